"""Run by test_distribution.py under torchrun: one update of policy and critic on a fixed rollout, shared among the
processes; rank 0 leaves losses, gradient norms and weights in a file."""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import ma_ppo

policy_folder, reward_folder, micro_batch_size, replicate, target = sys.argv[1:]
args = ma_ppo.parse_args(ma_ppo.Args, ma_ppo.AdvantageArgs, argv=[
    "--micro_batch_size", micro_batch_size, "--batch_size", "8", "--replicate", replicate])
device, rank, world = ma_ppo.start(args)
tokenizer = ma_ppo.load_tokenizer(policy_folder)
policy = ma_ppo.shard(transformers.AutoModelForCausalLM.from_pretrained(policy_folder), args, device)
critic = ma_ppo.shard(ma_ppo.Critic(transformers.AutoModelForSequenceClassification.from_pretrained(reward_folder)), args, device)

g = torch.Generator().manual_seed(0)  # the same 8 rows everywhere, of very different lengths
query_lengths, lengths = torch.randint(2, 9, (8, 1), generator=g), torch.tensor([[30], [3], [17], [1], [24], [9], [12], [28]])
query_mask, mask = torch.arange(9) >= 9 - query_lengths, torch.arange(30) < lengths
rollout = {"queries": torch.randint(4, 60, (8, 9), generator=g) * query_mask, "query_mask": query_mask,
           "responses": torch.randint(4, 60, (8, 30), generator=g) * mask, "mask": mask, "scores": torch.randn(8, generator=g)}
rollout |= {name: torch.randn(8, 30, generator=g) * 0.1 for name in ("ref_logprobs", "values")}
rollout = {name: x[rank::world] for name, x in rollout.items()}
with torch.no_grad():
    batch = [rollout[name] for name in ("queries", "query_mask", "responses", "mask")]
    logprobs, _ = ma_ppo.response_logprobs(policy, *batch, args.temperature)
    # not quite the policy's own, so that the ratio is not 1 everywhere and some tokens are clipped
    rollout["logprobs"] = logprobs + 0.3 * torch.sin(rollout["responses"].float())
rollout["rewards"] = ma_ppo.token_rewards(rollout["logprobs"], logprobs + rollout["ref_logprobs"], rollout["scores"],
                                          rollout["mask"], args.kl_coef)
advantages, returns, _ = ma_ppo.compute_advantages(rollout, args)
rollout |= {"advantages": ma_ppo.whiten(advantages, rollout["mask"], device), "returns": returns}
optimizers = [torch.optim.AdamW(model.parameters(), 1e-3, eps=1e-4) for model in (policy, critic)]
metrics = ma_ppo.update_models(policy, critic, optimizers, rollout, args, device)
options = StateDictOptions(full_state_dict=True, cpu_offload=True)
weights = {f"{name} {key}": value for name, model in (("policy", policy), ("critic", critic))
           for key, value in get_model_state_dict(model, options=options).items()}
if rank == 0:
    torch.save({"metrics": metrics, "weights": weights}, target)
ma_ppo.finish()
