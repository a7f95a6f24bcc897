"""Boundaries, aggregation, GAE and broadcast of a batch, against the same done row by row with a slice of the tensor per
macro action, as the authors' released code does. Prints one JSON line: milliseconds (medians, both in one run) and ratios.

    python tests/benchmark_macro.py [--rows 256] [--length 512] [--repeats 5]
"""
import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import ma_ppo


def row_by_row(rollout, args, generator):
    """The loop: for each row its boundaries, one slice per macro action, GAE in plain Python, then the broadcast."""
    advantages, returns = torch.zeros_like(rollout["values"]), torch.zeros_like(rollout["values"])
    for row, length in enumerate(rollout["mask"].sum(1).tolist()):
        if args.termination == "fixed_ngram":
            bounds = list(range(0, length, args.ngram)) + [length]
        elif args.termination == "randomized_ngram":
            deck = torch.tensor([2, 3, 5, 10] * 3)[torch.randperm(12, generator=generator)]
            bounds = [0] + [end for end in deck.cumsum(0).tolist() if end < length] + [length]
        else:
            bounds, total, count = [0], 0.0, 0
            for t in range(length):
                v = -rollout["ref_logprobs"][row, t].item()
                if count and v * count > total:
                    bounds.append(t)
                    total, count = 0.0, 0
                total, count = total + v, count + 1
            bounds.append(length)
        spans = list(zip(bounds, bounds[1:]))
        values = [rollout["values"][row, a:b].mean() for a, b in spans]
        rewards = [rollout["rewards"][row, a:b].sum() for a, b in spans]
        advantage, following = 0.0, 0.0
        for k in reversed(range(len(spans))):
            advantage = rewards[k] + args.gamma * following - values[k] + args.gamma * args.lam * advantage
            following = values[k]
            advantages[row, slice(*spans[k])], returns[row, slice(*spans[k])] = advantage, advantage + values[k]
    return advantages, returns


def main():
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 256), ("length", 512), ("repeats", 5)):
        options.add_argument(f"--{name}", type=int, default=default)
    options = options.parse_args()
    g = torch.Generator().manual_seed(0)
    shape = (options.rows, options.length)
    mask = torch.arange(options.length) < torch.randint(options.length // 2, options.length + 1, (options.rows, 1), generator=g)
    rollout = {"mask": mask, "values": torch.randn(shape, generator=g), "rewards": torch.randn(shape, generator=g),
               "ref_logprobs": -torch.rand(shape, generator=g) * 3, "scores": torch.zeros(options.rows)}
    result = {"bench": "macro", "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": options.rows,
              "length": options.length}
    for termination in ("fixed_ngram", "randomized_ngram", "perplexity"):
        args = ma_ppo.AdvantageArgs(termination=termination)
        args.ngram = int(args.ngram)
        times = {"batched": [], "row_by_row": []}
        for _ in range(options.repeats):
            for name, call in (("batched", ma_ppo.compute_advantages), ("row_by_row", row_by_row)):
                began = time.perf_counter()
                output = call(rollout, args, generator=torch.Generator().manual_seed(0))
                times[name].append(time.perf_counter() - began)
                if name == "batched":
                    batched = output
        if termination != "randomized_ngram":  # the two draw different orders
            torch.testing.assert_close(batched[0], output[0], atol=1e-3, rtol=1e-3)
        median = {name: statistics.median(seconds) for name, seconds in times.items()}
        result[termination] = {**{f"{name}_ms": round(1e3 * value, 2) for name, value in median.items()},
                               "ratio": round(median["row_by_row"] / median["batched"], 1)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
