"""What stage 3 holds in memory and sends between processes, and the options that change it: their effect is real, their result
the same."""
import json

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import ppo
from conftest import ARCHITECTURES, SMALL, read_metrics, run, tiny_config


class Largest(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation makes."""
    elements = 0

    def __torch_dispatch__(self, function, types, arguments=(), named=None):
        result = function(*arguments, **(named or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return result


def batch_of(rows, Q, T, vocabulary, seed=0):
    """Queries, query_mask, responses, mask with rows of different lengths."""
    g = torch.Generator().manual_seed(seed)
    query_mask = torch.arange(Q) >= Q - torch.randint(2, Q + 1, (rows, 1), generator=g)
    mask = torch.arange(T) < torch.randint(1, T + 1, (rows, 1), generator=g)
    return (torch.randint(4, vocabulary, (rows, Q), generator=g) * query_mask, query_mask,
            torch.randint(4, vocabulary, (rows, T), generator=g) * mask, mask)


@pytest.mark.parametrize("tied", [False, True])
def test_no_tensor_of_all_logits_exists(tied):
    """Neither forward nor backward, where a model's logits are its head's output: B T V is three times the largest tensor."""
    config = transformers.LlamaConfig(vocab_size=5000, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      tie_word_embeddings=tied)
    model = transformers.AutoModelForCausalLM.from_config(config)
    batch = batch_of(4, 8, 96, 5000)
    with Largest() as largest:
        logprobs, _ = ppo.response_logprobs(model, *batch, 1.0)
        logprobs.sum().backward()
    assert largest.elements <= ppo.TokenLogprobs.chunk * 5000 == 4 * 96 * 5000 / 3
    with Largest() as largest:  # and this does see them
        model(**ppo.model_inputs(*batch))
    assert largest.elements > 4 * 96 * 5000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_are_those_of_plain_logits(architecture, tokenizer):
    """Of every parameter, tied or not, logits capped or not."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(architecture, tokenizer)).eval()
    queries, query_mask, responses, mask = batch = batch_of(5, 6, 40, 60)
    weights = torch.randn(mask.shape) * mask
    logprobs, entropy = ppo.response_logprobs(model, *batch, 0.7)
    (logprobs * weights).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    expected = (model(**ppo.model_inputs(*batch)).logits[:, -responses.shape[1]:] / 0.7).log_softmax(-1)
    torch.testing.assert_close(entropy, -(expected.exp() * expected).sum(-1), atol=1e-5, rtol=1e-5)
    (expected.gather(2, responses[..., None])[..., 0] * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, atol=2e-5, rtol=1e-4)
    assert getattr(model, "shapes_logits", False) == (architecture == "gemma2")


@pytest.mark.parametrize("size", [1, 3, 8, 20])
def test_micro_batches_hold_every_row_once_without_padding(size):
    queries, query_mask, responses, mask = batch_of(8, 9, 30, 60)
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses, "mask": mask, "scores": torch.arange(8.0)}
    seen, last = [], float("inf")
    for rows, part in ppo.micro_batches(rollout, size):
        Q, T = part["query_mask"].shape[1], part["mask"].shape[1]
        assert part["query_mask"].any(0)[0] and part["mask"].any(0)[-1] and len(rows) <= size
        for name, left in (("queries", True), ("query_mask", True), ("responses", False), ("mask", False)):
            assert torch.equal(part[name], rollout[name][rows][:, -Q:] if left else rollout[name][rows][:, :T])
            assert part[name].sum() == rollout[name][rows].sum()  # only padding was cut off
        assert torch.equal(part["scores"], rollout["scores"][rows])
        lengths = (query_mask.sum(1) + mask.sum(1))[rows]
        assert lengths.max() <= last
        seen, last = seen + rows.tolist(), lengths.min()
    assert sorted(seen) == list(range(8))


def stage(models, folder, *more):
    """Metrics of two updates of MA-PPO run by its main, but for times."""
    import ma_ppo
    torch.distributed.is_initialized() and torch.distributed.destroy_process_group()
    ma_ppo.main(["--policy", models[0], "--reward", models[1], *SMALL["ma_ppo"], "--max_response_length", "40", "--batch_size", "8",
                 "--whiten_advantages", "true", "--output_dir", str(folder), *more])
    return [{k: v for k, v in row.items() if not k.startswith("time/") and k not in ("tokens_per_s", "val/ratio_dev")}
            for row in read_metrics(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--micro_batch_size", "3"], ["--gradient_checkpointing", "true"], ["--cpu_offload", "true"]],
                         ids=lambda more: more[0])
def test_the_memory_options_change_nothing(more, tiny_models, tmp_path):
    """Two updates, from sampling to optimizer steps, next to those with one micro-batch, whose forward pass is kept."""
    plain = stage(tiny_models["gemma"], tmp_path / "plain", "--micro_batch_size", "8")
    result = stage(tiny_models["gemma"], tmp_path / "result", "--micro_batch_size", "8", *more)
    assert len(plain) == len(result) and all(a == pytest.approx(b, rel=2e-3, abs=2e-4) for a, b in zip(plain, result))


@pytest.fixture
def build(tiny_models):
    """-> a function from options to the sharded tiny Gemma (policy, critic), args and device, in a process group of one."""
    def made(*more):
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        args = ppo.parse_args(ppo.Args, ppo.AdvantageArgs, argv=[*more])
        device, _, _ = ppo.start(args)
        policy = transformers.AutoModelForCausalLM.from_pretrained(tiny_models["gemma"][0])
        critic = ppo.Critic(transformers.AutoModelForSequenceClassification.from_pretrained(tiny_models["gemma"][1]))
        return ppo.shard(policy, args, device), ppo.shard(critic, args, device), args, device
    return made


def saved_bytes(model, batch):
    """Bytes that a forward pass keeps for the backward pass, parameters left out."""
    kept, own = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def note(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logprobs, _ = ppo.response_logprobs(model, *batch, 1.0)
    assert logprobs.requires_grad
    return sum(kept.values())


def test_gradient_checkpointing_keeps_less(build):
    batch = batch_of(8, 9, 100, 60)
    plain = saved_bytes(build()[0], batch)
    assert saved_bytes(build("--gradient_checkpointing", "true")[0], batch) < 0.4 * plain


def test_bf16_computes_in_bf16_and_keeps_fp32(build):
    policy, critic, args, device = build("--dtype", "bf16")
    seen = []
    policy.model.layers[0].self_attn.q_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    logprobs, _ = ppo.response_logprobs(policy, *batch_of(4, 9, 20, 60), 1.0)
    logprobs.sum().backward()
    assert set(seen) == {torch.bfloat16} and logprobs.dtype == torch.float32
    assert all(parameter.dtype == parameter.grad.dtype == torch.float32 for parameter in policy.parameters())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a machine without a GPU has one memory only")
def test_cpu_offload_keeps_weights_off_the_gpu(build):
    assert {parameter.device.type for parameter in build("--cpu_offload", "true")[0].parameters()} == {"cpu"}


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_gradients_are_clipped_to_norm_1(scale, build):
    """With plain gradient descent at rate 1 the weights move by the gradient: by norm 1 where it is larger, else as it is."""
    policy, critic, args, device = build("--micro_batch_size", "3")
    queries, query_mask, responses, mask = batch = batch_of(8, 9, 30, 60)
    with torch.no_grad():
        logprobs, values = ppo.response_logprobs(policy, *batch, args.temperature)[0], ppo.response_values(critic, *batch)
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses, "mask": mask, "logprobs": logprobs,
               "values": values, "advantages": scale * torch.ones_like(values), "returns": values + scale}
    policy.reshard(), critic.reshard()
    before = [[parameter.full_tensor().clone() for parameter in model.parameters()] for model in (policy, critic)]
    metrics = ppo.update_models(policy, critic, [torch.optim.SGD(model.parameters(), 1.0) for model in (policy, critic)], rollout, args, device)
    for name, model, old in (("policy", policy, before[0]), ("value", critic, before[1])):
        moved = torch.stack([(new.full_tensor().detach() - x).norm() for new, x in zip(model.parameters(), old)]).norm().item()
        assert (metrics[f"norm/{name}_grad"] > 1) == (scale > 1)
        assert moved == pytest.approx(min(1, metrics[f"norm/{name}_grad"]), rel=0.02)


def scale_run(monkeypatch, folder, *arguments, processes=4):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # freed memory leaves the process at once, so that peaks are what is held
    done = run(["tests/scale_worker.py", *arguments[:2], folder / "result.json", *arguments[2:]], folder, processes)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text())


@pytest.mark.slow
def test_no_rank_but_0_ever_holds_a_whole_model(monkeypatch, tmp_path, tokenizer):
    """Four ranks, 24 layers, 230 MB: a quarter of the weights, one layer and buffers; rank 0 one whole model at a time."""
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=24,
                                      num_attention_heads=4, bos_token_id=0, eos_token_id=1, pad_token_id=2)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    ranks = scale_run(monkeypatch, tmp_path, tmp_path / "policy", "none")
    whole = ranks[0]["weights"]
    print([{name: round(rank[name] / whole, 2) for name in ("loading", "loading both")} for rank in ranks])
    assert whole > 200e6
    assert all(rank["loading"] < 0.5 * whole and rank["loading both"] < 0.75 * whole for rank in ranks[1:])
    assert 0.9 * whole < ranks[0]["loading"] and ranks[0]["loading both"] < 1.75 * whole


@pytest.mark.slow
@pytest.mark.parametrize("replicate", [1, 2])
def test_collective_calls(replicate, monkeypatch, tiny_models, tmp_path):
    """Four ranks, responses of 5 to 32 tokens, rows in two micro-batches: weights are gathered once for sampling, none per
    token, then once for each forward and once for each backward pass; gradients are reduced once a backward pass."""
    ranks = scale_run(monkeypatch, tmp_path, *tiny_models["llama"], "--replicate", str(replicate))
    layers, parts = ranks[0]["layers"], 2
    units = layers + 1  # the root, which stays gathered between forward and backward pass and is not gathered again then
    assert len({rank["tokens"] for rank in ranks}) > 1
    for rank in ranks:
        assert rank["sampling"] == {} and rank["ratio_dev"] < 1e-5
        # the policy before sampling; then policy, reference, critic and reward model for each micro-batch, but that the
        # roots of policy and critic, which are trained, are there still for the second one
        assert rank["rollout"] == {"allgather_base": units + parts * 4 * units - 2 * (parts - 1)}
        assert rank["update"].pop("allgather_base") == 2 * parts * (units + layers) - 2  # and for the update's first one
        assert rank["update"].pop("reduce_scatter_base") == 2 * parts * units
        # number of tokens, metrics and val/ratio_dev; HSDP's reduction over the copies (the gradient norms' are not counted)
        assert rank["update"] == {"allreduce": 3 + 2 * parts * units * (replicate > 1)}
