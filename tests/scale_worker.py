"""Run by test_scale.py under torchrun: on every rank, the memory that loading and sharding take at their peak, and the
collective calls of each part of an update; rank 0 writes them to a file."""
import json
import resource
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import ma_ppo


def main():
    policy_folder, reward_folder, target, *more = sys.argv[1:]
    args = ma_ppo.parse_args(ma_ppo.Args, ma_ppo.AdvantageArgs, argv=["--batch_size", "16", "--micro_batch_size", "2", *more])
    device, rank, world = ma_ppo.start(args)
    tokenizer = ma_ppo.load_tokenizer(policy_folder)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    result, before = {}, peak()
    policy = ma_ppo.shard(ma_ppo.load(transformers.AutoModelForCausalLM, policy_folder, tokenizer, dtype=torch.float32)[0], args, device)
    result["loading"] = peak() - before
    ref = ma_ppo.shard(ma_ppo.load(transformers.AutoModelForCausalLM, policy_folder, tokenizer, dtype=torch.float32)[0].requires_grad_(False),
                       args, device)
    result["loading both"] = peak() - before
    result["weights"] = sum(parameter.numel() * 4 for parameter in policy.parameters())

    if reward_folder != "none":
        critic, _ = ma_ppo.load(transformers.AutoModelForSequenceClassification, reward_folder, tokenizer, num_labels=1, dtype=torch.float32)
        critic = ma_ppo.shard(ma_ppo.Critic(critic), args, device)
        score = ma_ppo.model_reward(reward_folder, tokenizer, args, device)
        rows = [{"prompt": text, "ids": ma_ppo.encode(tokenizer, text)[0]} for text in ma_ppo.TOY_PLACES[:4]]

        class Calls(TorchDispatchMode):
            """Counts collective calls, and those while it samples apart."""
            def __init__(self):
                super().__init__()
                self.all, self.sampling, self.now = Counter(), Counter(), False

            def __torch_dispatch__(self, function, types, arguments=(), named=None):
                if function.namespace == "c10d":
                    name = function.name().partition("::")[2].partition(".")[0].strip("_")
                    self.all[name] += 1
                    self.sampling[name] += self.now
                return function(*arguments, **(named or {}))

        generate = ma_ppo.generate

        def watched(*arguments):
            args.max_response_length = 5 + 9 * rank  # the ranks' responses are of different lengths
            calls.now = True
            value = generate(*arguments)
            calls.now = False
            return value
        ma_ppo.generate = watched
        with Calls() as calls:
            rollout, _ = ma_ppo.make_rollout(rows, ma_ppo.seeded(device, rank), policy, ref, critic, score, args, tokenizer, device, training=True)
        result |= {"rollout": calls.all, "sampling": +calls.sampling, "tokens": rollout["mask"].shape[1], "layers": len(policy.model.layers)}
        advantages, returns, _ = ma_ppo.compute_advantages(rollout, args)
        rollout |= {"advantages": advantages, "returns": returns}
        optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, fused=True) for model in (policy, critic)]
        with Calls() as calls:
            metrics = ma_ppo.update_models(policy, critic, optimizers, rollout, args, device)
        result |= {"update": calls.all, "ratio_dev": metrics["val/ratio_dev"]}
    results = [None] * world
    torch.distributed.all_gather_object(results, result)
    if rank == 0:
        Path(target).write_text(json.dumps(results))
    ma_ppo.finish()


if __name__ == "__main__":
    main()
