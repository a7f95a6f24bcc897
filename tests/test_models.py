"""Log-probabilities, values, scores, sampling and generation, on tiny random models of five architectures."""
import math
from types import SimpleNamespace

import pytest
import torch
import transformers

import ppo
from conftest import ARCHITECTURES, read_metrics

PROMPTS = ["review of the food and the pool at the hotel by the sea :", "the food was great .", "review :"]
ANSWERS = ["the food was great . the pool was cold .", "the pool was never dull .", "we found the bed warm and quiet ."]


def tensors(tokenizer, extra_padding=0, rows=range(3)):
    """queries, query_mask, responses, mask of the examples, with `extra_padding` columns on both sides."""
    pairs = [ppo.encode(tokenizer, PROMPTS[i], ANSWERS[i]) for i in rows]
    pad = tokenizer.pad_token_id
    side = torch.full((len(pairs), extra_padding), pad)
    queries = torch.cat([side, ppo.pad([prompt for prompt, _ in pairs], pad, "cpu", left=True)[0]], 1)
    responses = torch.cat([ppo.pad([answer for _, answer in pairs], pad, "cpu")[0], side], 1)
    return queries, queries != pad, responses, responses != pad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_padding_changes_no_logprob_value_or_score(architecture, tiny_models, tokenizer):
    policy_folder, reward_folder = tiny_models[architecture]
    policy = transformers.AutoModelForCausalLM.from_pretrained(policy_folder)
    critic = ppo.Critic(transformers.AutoModelForSequenceClassification.from_pretrained(reward_folder))
    with torch.no_grad():
        wide = tensors(tokenizer, extra_padding=9)
        logprobs, entropy = ppo.response_logprobs(policy, *wide, 0.8)
        values = ppo.response_values(critic, *wide)
        assert logprobs.std() > 0.1 and values.std() > 0.01
        for i in range(3):
            queries, query_mask, responses, mask = tensors(tokenizer, rows=[i])
            length = mask.shape[1]
            alone, alone_entropy = ppo.response_logprobs(policy, queries, query_mask, responses, mask, 0.8)
            torch.testing.assert_close(logprobs[i, :length], alone[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(entropy[i, :length], alone_entropy[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(values[i, :length], ppo.response_values(critic, queries, query_mask, responses, mask)[0],
                                       atol=1e-5, rtol=0)
            # the plain way, without padding, position ids or chunks: token t is predicted at the position before it
            whole = torch.cat([queries, responses], 1)
            logp = (policy(whole).logits / 0.8).log_softmax(-1)[0]
            start = queries.shape[1]
            expected = torch.stack([logp[start + t - 1, responses[0, t]] for t in range(length)])
            torch.testing.assert_close(alone[0], expected, atol=1e-5, rtol=0)
            torch.testing.assert_close(alone_entropy[0], -(logp.exp() * logp).sum(-1)[start - 1:-1], atol=1e-5, rtol=0)
            hidden = critic.model.base_model(whole).last_hidden_state
            expected = critic.model.score(hidden)[0, start - 1:-1, 0]
            torch.testing.assert_close(ppo.response_values(critic, queries, query_mask, responses, mask)[0], expected, atol=1e-5, rtol=0)


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A process group of one, as a stage makes it; -> the stage's settings and device."""
    monkeypatch.chdir(tmp_path)
    args = ppo.parse_args(ppo.Args, ppo.AdvantageArgs, argv=["--micro_batch_size", "2", "--max_response_length", "20"])
    device, _, _ = ppo.start(args)
    yield args, device
    ppo.finish()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_reward_models_score_as_their_own_class_does(architecture, tiny_models, tokenizer, alone):
    args, device = alone
    folder = tiny_models[architecture][1]
    score = ppo.model_reward(folder, tokenizer, args, device)
    pairs = [ppo.encode(tokenizer, prompt, answer) for prompt, answer in zip(PROMPTS, ANSWERS)]
    scores = score([{"prompt": text, "ids": ids} for text, (ids, _) in zip(PROMPTS, pairs)], [answer for _, answer in pairs])
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    expected = [model(torch.tensor([prompt + answer])).logits[0, 0].item() for prompt, answer in pairs]
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    # the critic's value at the last real token is that score
    values = ppo.Critic(model)(input_ids=torch.tensor([sum(pairs[0], [])]))
    assert values[0, -1].item() == pytest.approx(expected[0], abs=1e-5)


def test_a_reward_model_with_another_tokenizer_reads_the_text(tiny_models, tokenizer, alone, tmp_path):
    """The same model behind a tokenizer with shuffled ids and its embedding rows shuffled alike gives the same scores."""
    args, device = alone
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"][1])
    order = torch.randperm(len(tokenizer), generator=torch.Generator().manual_seed(0))  # new id -> old id
    import json
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    new_id = {old: new for new, old in enumerate(order.tolist())}
    spec["model"]["vocab"] = {word: new_id[i] for word, i in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [token | {"id": new_id[token["id"]]} for token in spec["added_tokens"]]
    from tokenizers import Tokenizer
    other = transformers.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(spec)), pad_token="<pad>",
                                                 bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    assert other.get_vocab() != tokenizer.get_vocab()
    embedding = model.get_input_embeddings().weight
    embedding.data = embedding.data[order]
    model.config.update({name: getattr(other, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")})
    model.save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    rows = [{"prompt": text, "ids": ppo.encode(tokenizer, text)[0]} for text in PROMPTS]
    responses = [ppo.encode(tokenizer, "", text)[1] for text in ANSWERS]
    responses[1] = responses[1][:-1]  # cut off, without EOS
    expected = ppo.model_reward(tiny_models["llama"][1], tokenizer, args, device)(rows, responses)
    scores = ppo.model_reward(str(tmp_path / "other"), tokenizer, args, device)(rows, responses)
    assert scores.tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_a_policy_is_no_reward_model(tiny_models, tokenizer, alone):
    args, device = alone
    with pytest.raises(SystemExit, match="no reward model"):
        ppo.model_reward(tiny_models["llama"][0], tokenizer, args, device)


def test_rule_rewards(tmp_path, tokenizer):
    (tmp_path / "rules.py").write_text(
        "def words(prompts, responses, rows):\n    return [len(r.split()) + row['bonus'] for r, row in zip(responses, rows)]\n"
        "def short(prompts, responses, rows):\n    return [1.0]\n"
        "def numpy(prompts, responses, rows):\n    import numpy\n    return numpy.array([1.5, 2], dtype='float32')\n"
        "def nothing(prompts, responses, rows):\n    return [1, None]\n"
        "def nan(prompts, responses, rows):\n    return [0.5, float('nan')]\n")
    rows = [{"prompt": text, "bonus": i} for i, text in enumerate(PROMPTS[:2])]
    responses = [ppo.encode(tokenizer, "", text)[1] for text in ANSWERS[:2]]
    score = lambda name: ppo.rule_reward(ppo.load_function(f"{tmp_path}/rules.py:{name}"), tokenizer, "cpu")(rows, responses)
    assert score("words").tolist() == [10, 7] and score("numpy").tolist() == [1.5, 2.0]
    with pytest.raises(SystemExit, match="gave 1 scores for 2 responses"):
        score("short")
    for name, shown in (("nan", "nan"), ("nothing", "None")):
        with pytest.raises(SystemExit, match=f"gave {shown} for the response 'the pool was never dull .'"):
            score(name)
    for wrong in ("absent.py:f", f"{tmp_path}/rules.py:absent"):
        with pytest.raises(SystemExit, match="must be FILE.py:FUNCTION"):
            ppo.load_function(wrong)


def test_an_update_makes_good_tokens_likelier_and_values_better(tiny_models, tokenizer, alone):
    """The signs of it all: after an update, tokens with a positive advantage are likelier, those with a negative one are
    not, and values are nearer to the returns."""
    args, device = alone
    policy = ppo.shard(transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"][0]), args, device)
    critic = ppo.shard(ppo.Critic(transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["llama"][1])), args, device)
    batch = tensors(tokenizer)
    with torch.no_grad():
        logprobs, values = ppo.response_logprobs(policy, *batch, 0.8)[0], ppo.response_values(critic, *batch)
    advantages = torch.ones_like(values)
    advantages[1] = -1
    rollout = dict(zip(("queries", "query_mask", "responses", "mask"), batch)) | {
        "logprobs": logprobs, "values": values, "advantages": advantages, "returns": values + 1}
    optimizers = [torch.optim.AdamW(model.parameters(), 1e-3) for model in (policy, critic)]
    metrics = ppo.update_models(policy, critic, optimizers, rollout, args, device)
    with torch.no_grad():
        change = (ppo.response_logprobs(policy, *batch, 0.8)[0] - logprobs) * batch[3]
        closer = ((ppo.response_values(critic, *batch) - values) * batch[3]).sum()
    assert change[0].sum() > 0 and change[2].sum() > 0 and change[1].sum() < 0 and closer > 0
    assert metrics["val/ratio_dev"] < 1e-5 and metrics["value/loss"] == pytest.approx(0.5, rel=1e-4)
    assert ppo.advantage_metrics(rollout, device)["value/explained_var"] == pytest.approx(1, abs=1e-4)


def test_the_reference_is_the_policy_in_bf16_too(tiny_models, tokenizer, tmp_path, monkeypatch):
    """At update 0 policy and reference are the same model, whatever the precision and the length: the KL is 0."""
    monkeypatch.chdir(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["llama"][0])
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 8  # sharp attention, so that positions matter
    model.save_pretrained("policy")
    tokenizer.save_pretrained("policy")
    ppo.main(["--policy", "policy", "--reward", tiny_models["llama"][1], "--dtype", "bf16", "--updates", "1", "--batch_size", "2",
              "--eval_size", "2", "--max_response_length", "300", "--output_dir", "out"])
    first = read_metrics("out")[0]
    assert first["eval/length"] > 100 and abs(first["eval/kl"]) < 1e-3


def test_the_pad_token_is_never_sampled(tokenizer):
    class Constant(torch.nn.Module):
        def forward(self, input_ids, **_):
            logits = torch.zeros(len(input_ids), 1, len(tokenizer))
            logits[..., tokenizer.pad_token_id] = 99
            return SimpleNamespace(logits=logits, past_key_values=None)
    settings = SimpleNamespace(max_response_length=50, temperature=1.0, top_k=0, top_p=1.0)
    queries = torch.full((8, 2), 5)
    responses, mask = ppo.generate(Constant(), queries, queries > 0, settings, tokenizer, torch.Generator().manual_seed(0))
    assert not (responses[mask] == tokenizer.pad_token_id).any()


def test_schedules():
    import sft
    linear = [ppo.linear_schedule(update, 10, 4) for update in range(10)]
    assert linear == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [sft.cosine_schedule(update, 20, 0.1) for update in range(20)]
    assert cosine[:3] == [0.5, 1, 1] and cosine[11] == pytest.approx(0.5) and 0 < cosine[19] < 0.01
    assert cosine[2:] == sorted(cosine[2:], reverse=True) and sft.cosine_schedule(0, 1, 0.0) == 1


@pytest.mark.parametrize("chunk", [3, 256])
def test_token_logprobs_and_their_gradient(chunk, monkeypatch):
    monkeypatch.setattr(ppo.TokenLogprobs, "chunk", chunk)
    g = torch.Generator().manual_seed(0)
    logits = (torch.randn(10, 17, generator=g) * 3).requires_grad_()
    tokens, weights = torch.randint(17, (10,), generator=g), torch.randn(10, generator=g)
    logprobs, entropy = ppo.TokenLogprobs.apply(logits, None, tokens, 0.7)
    (logprobs * weights).sum().backward()
    gradient, logits.grad = logits.grad, None
    logp = (logits / 0.7).log_softmax(-1)
    expected = logp.gather(1, tokens[:, None]).squeeze(1)
    (expected * weights).sum().backward()
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, -(logp.exp() * logp).sum(-1))
    torch.testing.assert_close(gradient, logits.grad)


@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.7), (4, 0.8)])
def test_sample_follows_the_distribution(top_k, top_p):
    logits = torch.tensor([2.0, 1.5, 1.0, 0.0, -0.5, -math.inf])
    p = (logits / 0.8).softmax(-1).tolist()
    kept = sorted(range(6), key=lambda i: -p[i])[:top_k or 6]
    mass, nucleus = 0.0, []
    for i in kept:
        if mass < top_p * sum(p[j] for j in kept) and p[i] > 0:
            nucleus.append(i)
        mass += p[i]
    draws = ppo.sample(logits.expand(200_000, 6), 0.8, top_k, top_p, torch.Generator().manual_seed(0))
    frequency = torch.bincount(draws, minlength=6) / len(draws)
    expected = [p[i] / sum(p[j] for j in nucleus) if i in nucleus else 0.0 for i in range(6)]
    assert frequency.tolist() == pytest.approx(expected, abs=0.005)
    assert all(frequency[i] == 0 for i in range(6) if i not in nucleus)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_generate_with_cache_and_padding_is_plain_sampling(architecture, tiny_models, tokenizer):
    """Greedy (top_k 1) responses are those of one full forward pass per token on the unpadded prompt; rows end at EOS."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[architecture][0])
    queries, query_mask, _, _ = tensors(tokenizer)
    settings = SimpleNamespace(max_response_length=20, temperature=1.0, top_k=1, top_p=1.0)
    expected = []
    with torch.no_grad():
        for row, real in zip(queries, query_mask):
            ids = row[real].tolist()
            for _ in range(20):
                logits = model(torch.tensor([ids])).logits[0, -1]
                logits[tokenizer.pad_token_id] = -math.inf
                ids.append(int(logits.argmax()))
            expected.append(ids[int(real.sum()):])
    eos = expected[0][4]  # a token that the first row does produce plays EOS
    fake = SimpleNamespace(pad_token_id=tokenizer.pad_token_id, eos_token_id=eos)
    responses, mask = ppo.generate(model, queries, query_mask, settings, fake, torch.Generator())
    for response, real, whole in zip(responses, mask, expected):
        until_eos = whole[:whole.index(eos) + 1] if eos in whole else whole
        assert response[real].tolist() == until_eos
        assert real.tolist() == [True] * len(until_eos) + [False] * (len(real) - len(until_eos))
        assert (response[~real] == tokenizer.pad_token_id).all()
    assert mask.any(0).all()  # it stops when every row has ended


def test_whiten(alone):
    _, device = alone
    mask = torch.tensor([[True, True, False], [True, True, True]])
    advantages = torch.tensor([[1.0, 2.0, 0.0], [4.0, -3.0, 7.0]])
    white = ppo.whiten(advantages, mask, device)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-6)
    assert white[mask].std(unbiased=False).item() == pytest.approx(1, abs=1e-6)
    assert white[0, 2] == 0
