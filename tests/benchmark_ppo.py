"""Seconds per update, tokens per second and peak memory of stage 3 with random models, run as a user runs it: main() of the
stage on folders made here, nothing is downloaded. The last line is JSON.

    python tests/benchmark_ppo.py --response_length 64 --batch 16 --vocab 32000
    python tests/benchmark_ppo.py --against TRL_ENV/bin/python --bench PATH/trl_ppo_bench.py     ratios to TRL's PPO trainer
    python tests/benchmark_ppo.py --preset gemma-2b --prompt_length 512 --response_length 512 --batch 32 --dtype bf16

Phases: rollout (sampling) · forward (log-probabilities, values and scores of what was sampled) · optimise (advantages, backward
of policy and critic, and forward where a micro-batch is smaller than the batch, optimizer steps) · other. Every response has the full length. What else is given goes to the stage:
--gradient_checkpointing true --micro_batch_size 4. With --against, ours and the other run by turns, --rounds times,
each in a process of its own, and the ratios are of medians over all measured updates, the other's without its gc calls.
"""
import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
GEMMA_2B = dict(hidden=2048, layers=18, heads=8, intermediate=16384, vocab=256_000)


def options():
    class Layout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Layout)
    for name, default, text in (("response_length", 64, "tokens of every response"), ("prompt_length", 32, "tokens of every prompt"),
                                ("batch", 16, "responses per update"), ("updates", 20, "updates"),
                                ("warmup", 2, "updates left out of the figures"), ("hidden", 128, "width"), ("layers", 4, "layers"),
                                ("heads", 4, "attention heads"), ("vocab", 512, "tokens in the vocabulary"),
                                ("threads", 2, "threads of torch on a CPU"), ("rounds", 3, "with --against: runs of each")):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument("--intermediate", type=int, help="width of the feed-forward layers; 4 times --hidden when not given")
    parser.add_argument("--preset", choices=["gemma-2b"], help="the real architecture's sizes, random weights")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run")
    parser.add_argument("--stage", choices=["ppo", "ma_ppo"], default="ma_ppo", help="script to measure")
    parser.add_argument("--against", help="Python of an environment with trl==1.12.0")
    parser.add_argument("--bench", default="../shared/peers/trl_ppo_bench.py", help="the other's benchmark, same options")
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # where the models are: set in the processes that measure
    sizes = dict(GEMMA_2B) if "gemma-2b" in sys.argv or "--preset=gemma-2b" in sys.argv else {}
    parser.set_defaults(**sizes)
    o, more = parser.parse_known_args()
    if o.against and (o.intermediate or o.device == "cuda"):
        parser.error("--against is for the CPU and for feed-forward layers of 4 times --hidden, the only ones that the other one takes")
    return o, more


def build(o, folder):
    """Writes tokenizer, policy, reward model and prompts. The policy never ends: channel 0 of every hidden state is large, and
    EOS alone has a negative weight for it."""
    import numpy as np
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    vocabulary = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"t{i}": i for i in range(3, o.vocab)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    shape = dict(vocab_size=o.vocab, hidden_size=o.hidden, num_hidden_layers=o.layers, num_attention_heads=o.heads,
                 intermediate_size=o.intermediate or 4 * o.hidden, pad_token_id=0, eos_token_id=1, bos_token_id=None,
                 max_position_embeddings=max(512, o.prompt_length + o.response_length))
    config = (transformers.GemmaConfig(num_key_value_heads=1, head_dim=256, **shape) if o.preset else
              transformers.LlamaConfig(num_key_value_heads=o.heads, **shape))
    torch.manual_seed(0)
    dtype = torch.bfloat16 if o.preset else torch.float32  # how the real ones are stored
    for name, auto_class in (("policy", transformers.AutoModelForCausalLM), ("reward", transformers.AutoModelForSequenceClassification)):
        config.num_labels = 1 if name == "reward" else 2
        model = auto_class.from_config(config, dtype=dtype)
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()) if name == "policy" else ():
            embedding.weight.data[:, 0] = 1
            embedding.weight.data[1, 0] = -1
        model.save_pretrained(f"{folder}/{name}")
        tokenizer.save_pretrained(f"{folder}/{name}")
        print(json.dumps({"params": sum(p.numel() for p in model.parameters())})) if name == "policy" else None
    draw = np.random.default_rng(0)
    with open(f"{folder}/prompts.jsonl", "w") as file:
        for _ in range(8 * o.batch):
            prompt = " ".join(f"t{i}" for i in draw.integers(3, o.vocab, o.prompt_length))
            file.write(json.dumps({"prompt": prompt}) + "\n")


def memory(field):
    """MiB of this process, VmRSS (now) or VmHWM (the most since it was last reset)."""
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) / 1024


def measure(o, more):
    """Runs the stage -> a row of seconds by phase for every update, memory in MiB."""
    import importlib
    import torch
    torch.set_num_threads(o.threads)
    stage = importlib.import_module(o.stage)
    rows, sizes = [], {}
    open_output, end_of_update, make_rollout = stage.open_output, stage.end_of_update, stage.make_rollout

    def built(args):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
        sizes["rss_after_build_mib"] = memory("VmRSS")
        if o.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            sizes["cuda_after_build_mib"] = torch.cuda.memory_allocated() / 2**20
        return open_output(args)

    def update_done(args, *rest, **named):
        end_of_update(args, *rest, **named)
        rows.append(time.perf_counter())

    stage.open_output, stage.end_of_update = built, update_done
    stage.main(["--task", "pairs", "--data_path", f"{o.folder}/prompts.jsonl", "--eval_path", f"{o.folder}/prompts.jsonl",
                "--all_rows", "true", "--policy", f"{o.folder}/policy", "--reward", f"{o.folder}/reward", "--output_dir",
                f"{o.folder}/run", "--batch_size", str(o.batch), "--micro_batch_size", str(o.batch), "--eval_size", "1",
                "--eval_every", "0", "--epochs", str(o.updates), "--updates", str(o.updates), "--max_prompt_length",
                str(o.prompt_length), "--max_response_length", str(o.response_length), "--temperature", "1", "--top_k", "0",
                "--policy_lr", "1e-5", "--critic_lr", "1e-5", *more])
    logged = [json.loads(line) for line in open(f"{o.folder}/run/metrics.jsonl")]
    logged = [row for row in logged if "lr" in row]
    assert all(row["response/length"] == o.response_length for row in logged), "a response ended early"
    phases = []
    for row, before, after in zip(logged[1:], rows, rows[1:]):  # the first update is never measured
        phase = {"total": after - before, "rollout": row["time/rollout"], "forward": row["time/score"], "optimise": row["time/update"]}
        phases.append(phase | {"other": phase["total"] - sum(phase[name] for name in ("rollout", "forward", "optimise"))})
    sizes["peak_rss_mib"] = memory("VmHWM")
    if o.device == "cuda":
        sizes["cuda_peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return phases[max(0, o.warmup - 1):], sizes


def rates(device, dtype):
    """Measured on this machine: bytes per second of reading memory, FLOP per second of a matrix product."""
    import torch

    def seconds(function, repeats=5):
        function()
        times = []
        for _ in range(repeats):
            torch.cuda.synchronize() if device == "cuda" else None
            began = time.perf_counter()
            function()
            torch.cuda.synchronize() if device == "cuda" else None
            times.append(time.perf_counter() - began)
        return min(times)
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    long = torch.ones(2**30 if device == "cuda" else 2**26, device=device, dtype=dtype)
    return long.numel() * long.element_size() / seconds(long.sum), 2 * size**3 / seconds(lambda: a @ b)


def floor(o, params, dtype, kept):
    """Seconds of an update at the machine's measured rates: the weights (and the cache) read once per decoded token; 2 N FLOP
    a token for each of four forwards, 4 N for each of two backwards, 2 N more for their forwards where these are not `kept` from
    the rollout. N leaves the input embedding out; heads are for responses alone."""
    import torch
    bandwidth, flops = rates(o.device, getattr(torch, dtype))
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    tokens = o.batch * (o.prompt_length + o.response_length)
    n = params - (0 if o.preset else o.vocab * o.hidden)  # Gemma's head is its embedding
    head = o.vocab * o.hidden  # critic and reward model have none
    body, answers = n - head, o.batch * o.response_length
    cache = o.batch * 2 * o.layers * (256 if o.preset else o.hidden) * (o.prompt_length + o.response_length / 2)
    decode = o.response_length * max((n + cache) * width / bandwidth, 2 * n * o.batch / flops)
    return {"bandwidth_gb_s": bandwidth / 1e9, "matmul_tflop_s": flops / 1e12, "rollout": decode,
            "forward": (4 * 2 * body * tokens + 2 * 2 * head * answers) / flops,
            "optimise": (4 if kept else 6) * (2 * body * tokens + head * answers) / flops}


def medians(phases):
    return {name: statistics.median(row[name] for row in phases) for name in phases[0]}


def best_quartile(phases):
    return medians(sorted(phases, key=lambda row: row["total"])[:max(1, len(phases) // 4)])


def rounded(value):
    return {k: rounded(v) for k, v in value.items()} if isinstance(value, dict) else float(f"{value:.4g}") if isinstance(value, float) else value


def main():
    o, more = options()
    os.environ |= {"OMP_NUM_THREADS": str(o.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if o.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if o.folder == "build":
        return build(o, more[-1])
    if o.folder:
        phases, sizes = measure(o, more)
        return print(json.dumps({"phases": phases, **sizes}))
    with tempfile.TemporaryDirectory() as folder:
        def run(command):
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                sys.exit(f"benchmark_ppo: {' '.join(command)} ended with status {done.returncode}")
            return json.loads(done.stdout.splitlines()[-1])
        own = [sys.executable, __file__, *sys.argv[1:]]
        params = run([*own, "--folder", "build", folder])["params"]
        names = ("response_length", "prompt_length", "batch", "updates", "hidden", "layers", "heads", "vocab", "threads", "warmup")
        theirs = [o.against, o.bench, *[word for name in names for word in (f"--{name}", str(getattr(o, name)))]]
        ours, others = [], []
        for _ in range(o.rounds if o.against else 1):
            ours.append(run([*own, "--folder", folder]))
            others += [run(theirs)] if o.against else []
    phases = [row for result in ours for row in result["phases"]]
    import torch
    import transformers
    dtype = "bfloat16" if any("bf16" in word for word in more) else "float32"
    median, tokens = medians(phases), o.batch * o.response_length
    result = {"bench": o.stage, "torch": torch.__version__, "transformers": transformers.__version__, "device": o.device,
              "threads": o.threads, "params_per_model": params, "stage_options": " ".join(more), "updates_measured": len(phases),
              "config": {name: getattr(o, name) for name in names}, "seconds_per_update_median": median,
              "seconds_per_update_best_quartile": best_quartile(phases), "response_tokens_per_s": tokens / median["total"],
              "rollout_tokens_per_s": tokens / median["rollout"], "floor_s": floor(o, params, dtype, not any("micro_batch_size" in word for word in more)),
              **{name: max(result[name] for result in ours) for name in ours[0] if name != "phases"}}
    result["above_build_mib"] = max(result["peak_rss_mib"] - result["rss_after_build_mib"] for result in ours)
    if o.device == "cuda":
        result["above_build_mib"] = max(result["cuda_peak_mib"] - result["cuda_after_build_mib"] for result in ours)
    if o.against:
        other = {name: statistics.median(result["seconds_per_update_median"][name] for result in others)
                 for name in others[0]["seconds_per_update_median"]}
        other["total"] -= other.pop("gc")
        above = max(result["peak_rss_mib"] - result["rss_after_build_mib"] for result in others)
        result |= {"other_seconds_per_update_median": other, "other_above_build_mib": above,
                   "ratio": {**{name: median[name] / other[name] for name in other}, "memory": result["above_build_mib"] / above}}
    print(json.dumps(rounded(result)))


if __name__ == "__main__":
    main()
