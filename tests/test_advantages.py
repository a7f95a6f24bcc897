"""GAE, macro values, macro rewards and compute_advantages against brute force, golden vectors and invariants."""
import json
import math
import random
from types import SimpleNamespace

import pytest
import torch

import ma_ppo
import ppo
import termination
from conftest import DATA

GOLDEN = {name: json.loads((DATA / f"{name}.json").read_text())["cases"] for name in ("gae", "end_to_end", "losses")}
TERMINATIONS = ("fixed_ngram", "randomized_ngram", "perplexity")


def settings(**changes):
    return SimpleNamespace(**({"gamma": 0.97, "lam": 0.9, "termination": "fixed_ngram", "ngram": 5, "value_weighting": "equal",
                               "macro_reward": "sum"} | changes))


def random_rollout(seed, rows=6, longest=37, dtype=torch.float64):
    """A rollout of random figures with rows of random lengths, one of them a single token."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (rows,), generator=g)
    lengths[0], lengths[-1] = longest, 1
    mask = torch.arange(longest) < lengths[:, None]
    rollout = {name: torch.randn(rows, longest, generator=g, dtype=dtype) for name in ("values", "logprobs")}
    rollout["ref_logprobs"] = -torch.rand(rows, longest, generator=g, dtype=dtype) * 3
    rollout["scores"] = torch.randn(rows, generator=g, dtype=dtype)
    rollout |= {"mask": mask, "rewards": ppo.token_rewards(rollout["logprobs"], rollout["ref_logprobs"], rollout["scores"], mask, 0.1)}
    return rollout


def with_nan(rollout):
    """The same rollout with NaN at every padded position."""
    return {name: x.masked_fill(~rollout["mask"], math.nan) if x.dim() == 2 and x.is_floating_point() else x
            for name, x in rollout.items()}


def brute_force(rollout, row, starts, args):
    """Advantages and returns of one row's tokens by the definitions of section 2 of the paper, in plain Python."""
    length = int(rollout["mask"][row].sum())
    values, rewards = rollout["values"][row].tolist(), rollout["rewards"][row].tolist()
    bounds = [t for t in range(length) if starts[row, t]] + [length]
    macro_values, macro_rewards = [], []
    for begin, end in zip(bounds, bounds[1:]):
        size = end - begin
        sigma = {"equal": [1 / size] * size, "unit": [0] * (size - 1) + [1],
                 "position_decayed": [1 / (size - i) for i in range(size)]}[args.value_weighting]
        macro_values.append(sum(s / sum(sigma) * v for s, v in zip(sigma, values[begin:end])))
        score = rollout["scores"][row].item() if end == length else 0.0
        macro_rewards.append(sum(rewards[begin:end]) if args.macro_reward == "sum" else
                             (sum(rewards[begin:end]) - score) / size + score)
    advantages, returns = [], []
    for k, (begin, end) in enumerate(zip(bounds, bounds[1:])):
        advantage = 0.0
        for j in range(k, len(macro_values)):
            following = macro_values[j + 1] if j + 1 < len(macro_values) else 0.0
            advantage += (args.gamma * args.lam)**(j - k) * (macro_rewards[j] + args.gamma * following - macro_values[j])
        advantages += [advantage] * (end - begin)
        returns += [advantage + macro_values[k]] * (end - begin)
    return advantages, returns


@pytest.mark.parametrize("case", range(len(GOLDEN["gae"])))
def test_gae_golden(case):
    case = GOLDEN["gae"][case]
    rewards, values = (torch.tensor([case[name]], dtype=torch.float64) for name in ("rewards", "values"))
    advantages, returns = ppo.gae(rewards, values, torch.ones_like(rewards, dtype=torch.bool), case["gamma"], case["lam"])
    assert advantages[0].tolist() == pytest.approx(case["advantages"], abs=1e-9)
    assert returns[0].tolist() == pytest.approx(case["returns"], abs=1e-9)


def test_gae_is_the_sum_over_tokens():
    rollout = random_rollout(1)
    advantages, returns = ppo.gae(rollout["rewards"], rollout["values"], rollout["mask"], 0.97, 0.9)
    for row in range(len(advantages)):
        expected = brute_force(rollout, row, rollout["mask"], settings())
        length = len(expected[0])
        assert advantages[row, :length].tolist() == pytest.approx(expected[0], abs=1e-12)
        assert returns[row, :length].tolist() == pytest.approx(expected[1], abs=1e-12)
        assert not advantages[row, length:].any() and not returns[row, length:].any()


def test_lambda_one_gives_the_discounted_return():
    rollout = random_rollout(2)
    _, returns = ppo.gae(rollout["rewards"], rollout["values"], rollout["mask"], 0.9, 1.0)
    rewards = rollout["rewards"][0]
    assert returns[0, 3].item() == pytest.approx(sum(0.9**i * r for i, r in enumerate(rewards[3:].tolist())), abs=1e-10)


def golden_slices(case):
    """Response slices (1, T) of a golden end-to-end case; ids and mask from its own boundaries."""
    first = case["prompt_len"] - 1
    rollout = {name: torch.tensor([case[name][first:]], dtype=torch.float64)
               for name in ("logprobs", "ref_logprobs", "values", "new_logprobs", "new_values", "token_rewards")}
    mask = torch.tensor([case["attention_mask"][first + 1:]], dtype=torch.bool)
    starts = torch.zeros_like(mask)
    starts[0, [boundary - first for boundary in case["boundaries"]]] = True
    return rollout, mask, termination.macro_ids(starts), starts


@pytest.mark.parametrize("case", range(len(GOLDEN["end_to_end"])))
def test_end_to_end_golden(case):
    """Given its own boundaries and the mean of the rewards, the released code's figures come out."""
    case = GOLDEN["end_to_end"][case]
    rollout, mask, ids, starts = golden_slices(case)
    score = torch.tensor([case["score"]], dtype=torch.float64).clamp(-case["clip_reward_value"], case["clip_reward_value"])
    rewards = ppo.token_rewards(rollout["logprobs"], rollout["ref_logprobs"], score, mask, case["kl_ctl"])
    assert rewards[0].tolist() == pytest.approx(rollout["token_rewards"][0].tolist(), abs=1e-9)
    values = ma_ppo.macro_values(rollout["values"], ids, mask, case["value_function"])
    macro_rewards = ma_ppo.macro_rewards(rewards, ids, mask, "mean")
    assert values[0].tolist() == pytest.approx(case["macro_values"], abs=1e-9)
    assert macro_rewards[0].tolist() == pytest.approx(case["macro_rewards"], abs=1e-9)
    actions = torch.ones_like(values, dtype=torch.bool)
    advantages, returns = (x.gather(1, ids) for x in ppo.gae(macro_rewards, values, actions, case["gamma"], case["lam"]))
    heads = starts[0].nonzero()[:, 0]
    assert not case["phantom"]  # the released code may take one step through a macro action of no tokens: in none of these
    assert advantages[0, heads].tolist() == pytest.approx(case["advantages"], abs=1e-9)
    assert returns[0, heads].tolist() == pytest.approx(case["returns"], abs=1e-9)
    loss, _ = ppo.policy_loss(rollout["new_logprobs"], rollout["logprobs"], advantages, mask, case["cliprange"])
    assert loss.item() / mask.sum().item() == pytest.approx(case["actor_loss"], abs=1e-9)
    loss, _ = ppo.value_loss(rollout["new_values"], rollout["values"], returns, mask, case["cliprange_value"])
    assert loss.item() / mask.sum().item() == pytest.approx(case["critic_loss"], abs=1e-9)


@pytest.mark.parametrize("weighting", ["equal", "unit", "position_decayed"])
@pytest.mark.parametrize("reward", ["sum", "mean"])
@pytest.mark.parametrize("condition", TERMINATIONS)
def test_compute_advantages_by_brute_force(weighting, reward, condition):
    rng = random.Random(f"{weighting} {reward} {condition}")
    for trial in range(34):  # 34 rollouts of 6 rows: 204 random cases
        args = settings(value_weighting=weighting, macro_reward=reward, termination=condition,
                        ngram=rng.choice([1, 2, 3, 5, 7, 40, math.inf]), gamma=rng.uniform(0.9, 1), lam=rng.uniform(0.8, 1))
        rollout = random_rollout(trial, longest=rng.randint(1, 40))
        starts = ma_ppo.macro_starts(rollout, args, generator=torch.Generator().manual_seed(trial))
        advantages, returns, metrics = ma_ppo.compute_advantages(rollout, args, generator=torch.Generator().manual_seed(trial))
        for row in range(len(starts)):
            expected = brute_force(rollout, row, starts, args)
            length = len(expected[0])
            assert advantages[row, :length].tolist() == pytest.approx(expected[0], abs=1e-10)
            assert returns[row, :length].tolist() == pytest.approx(expected[1], abs=1e-10)
            assert not advantages[row, length:].any() and not returns[row, length:].any()
        assert metrics["macro/count"] == pytest.approx(starts.sum().item() / len(starts))
        assert metrics["macro/length"] == pytest.approx(rollout["mask"].sum().item() / starts.sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weighting", ["equal", "unit", "position_decayed"])
@pytest.mark.parametrize("reward", ["sum", "mean"])
def test_n_1_is_ppo_to_the_last_bit(dtype, weighting, reward):
    for seed in range(20):
        rollout = with_nan(random_rollout(seed, dtype=dtype))
        args = settings(ngram=1, value_weighting=weighting, macro_reward=reward)
        expected = ppo.compute_advantages(rollout, args)
        result = ma_ppo.compute_advantages(rollout, args)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])
        assert result[2] == expected[2]


def test_n_infinite_is_one_action():
    rollout = random_rollout(3)
    advantages, returns, metrics = ma_ppo.compute_advantages(rollout, settings(ngram=math.inf))
    for row, length in enumerate(rollout["mask"].sum(1).tolist()):
        total = rollout["rewards"][row, :length].sum()
        torch.testing.assert_close(returns[row, :length], total.expand(length))
        torch.testing.assert_close(advantages[row, :length], (total - rollout["values"][row, :length].mean()).expand(length))
    assert metrics["macro/count"] == 1


@pytest.mark.parametrize("module", [ppo, ma_ppo])
@pytest.mark.parametrize("condition", TERMINATIONS)
@pytest.mark.parametrize("reward", ["sum", "mean"])
def test_padding_and_other_rows_change_nothing(module, condition, reward):
    for seed in range(10):
        rollout, args = random_rollout(seed), settings(termination=condition, macro_reward=reward)
        seeded = lambda: torch.Generator().manual_seed(7)
        clean = module.compute_advantages(rollout, args, generator=seeded())
        dirty = module.compute_advantages(with_nan(rollout), args, generator=seeded())
        assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1]) and clean[2] == dirty[2]
        if condition != "randomized_ngram":  # there each row draws its own order
            for row, length in enumerate(rollout["mask"].sum(1).tolist()):
                alone = {name: x[row:row + 1] if x.dim() == 1 else x[row:row + 1, :length] for name, x in rollout.items()}
                advantages, returns, _ = module.compute_advantages(alone, args)
                assert torch.equal(advantages[0], clean[0][row, :length]) and torch.equal(returns[0], clean[1][row, :length])


@pytest.mark.parametrize("case", range(len(GOLDEN["losses"])))
def test_losses_and_gradients_golden(case):
    case = GOLDEN["losses"][case]
    lengths = torch.tensor(case["lengths"])
    tensor = lambda name: torch.tensor([case[name]], dtype=torch.float64)
    mask = torch.tensor([case["mask"]], dtype=torch.bool)
    advantages, returns = (torch.repeat_interleave(tensor(name), lengths, 1) for name in ("advantages", "returns"))
    new_logprobs, new_values = tensor("new_logprobs").requires_grad_(), tensor("new_values").requires_grad_()
    actor, _ = ppo.policy_loss(new_logprobs, tensor("old_logprobs"), advantages, mask, case["cliprange"])
    critic, _ = ppo.value_loss(new_values, tensor("old_values"), returns, mask, case["cliprange_value"])
    (actor / mask.sum()).backward()
    (critic / mask.sum()).backward()
    assert actor.item() / mask.sum().item() == pytest.approx(case["actor_loss"], abs=1e-9)
    assert critic.item() / mask.sum().item() == pytest.approx(case["critic_loss"], abs=1e-9)
    assert new_logprobs.grad[0].tolist() == pytest.approx(case["actor_grad"], abs=1e-9)
    assert new_values.grad[0].tolist() == pytest.approx(case["critic_grad"], abs=1e-9)


def test_losses_ignore_padding():
    rollout = random_rollout(4)
    mask, g = rollout["mask"], torch.Generator().manual_seed(5)
    inputs = [torch.randn(mask.shape, generator=g, dtype=torch.float64) for _ in range(3)]
    for loss in (ppo.policy_loss, ppo.value_loss):
        results = []
        for fill in (0.0, math.nan):
            new, old, target = (x.masked_fill(~mask, fill).requires_grad_() for x in inputs)
            total, metrics = loss(new, old, target, mask, 0.2)
            total.backward()
            results.append((total, metrics, new.grad))
        assert torch.equal(results[0][0], results[1][0]) and results[0][1] == results[1][1]
        assert torch.equal(results[0][2], results[1][2]) and not results[0][2][~mask].any()


def test_loss_metrics_count_tokens():
    mask = torch.tensor([[True, True, True, False]])
    new = torch.tensor([[0.5, 0.0, -0.5, 9.0]])
    loss, metrics = ppo.policy_loss(new, torch.zeros(1, 4), torch.tensor([[1.0, 1.0, 1.0, 1.0]]), mask, 0.2)
    assert metrics["policy/clipfrac"] == 1  # only the ratio e^0.5 with a positive advantage is clipped
    assert loss.item() == pytest.approx(-1.2 - 1 - math.exp(-0.5))
    assert metrics["policy/approxkl"] == pytest.approx(math.exp(0.5) - 1.5 + math.exp(-0.5) - 0.5, abs=1e-6)


def test_token_rewards_put_the_score_on_the_last_real_token():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    zeros, scores = torch.full((2, 3), math.nan).masked_fill(mask, 0.0), torch.tensor([3.0, -1.0])
    assert ppo.token_rewards(zeros, zeros, scores, mask, 0.1).tolist() == [[0, 0, 3], [-1, 0, 0]]


def test_a_longer_horizon_and_macro_actions():
    """PPO with lambda' = lambda^(1/n) decays per token as MA-PPO with n does per macro action. With gamma = 1, values that are
    constant within macro actions and reward on their last tokens alone, both give those last tokens the same advantage:
    inside a macro action there is no TD error, so PPO's sum has the same terms. On the other tokens they part: PPO decays
    from the next TD error on, MA-PPO does not. And with any other values or rewards they part everywhere."""
    n, lam, T = 5, 0.9, 35
    g = torch.Generator().manual_seed(0)
    mask = torch.ones(3, T, dtype=torch.bool)
    last = torch.arange(T) % n == n - 1
    rollout = {"mask": mask, "scores": torch.zeros(3), "rewards": torch.randn(3, T, generator=g, dtype=torch.float64) * last,
               "values": torch.randn(3, T // n, generator=g, dtype=torch.float64).repeat_interleave(n, 1)}
    longer, _, _ = ppo.compute_advantages(rollout, settings(gamma=1.0, lam=lam**(1 / n)))
    macro, _, _ = ma_ppo.compute_advantages(rollout, settings(gamma=1.0, lam=lam, ngram=n))
    torch.testing.assert_close(longer[:, last], macro[:, last])
    for i in range(1, n):  # i tokens before the last one
        torch.testing.assert_close(longer[:, last.roll(-i)], macro[:, last] * lam**(i / n))
    rollout["values"] = torch.randn(3, T, generator=g, dtype=torch.float64)
    longer, _, _ = ppo.compute_advantages(rollout, settings(gamma=1.0, lam=lam**(1 / n)))
    macro, _, _ = ma_ppo.compute_advantages(rollout, settings(gamma=1.0, lam=lam, ngram=n))
    assert ((longer - macro)[:, last].abs() > 1e-3).float().mean() > 0.9
