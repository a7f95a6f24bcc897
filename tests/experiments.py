"""What macro actions buy, measured: PPO against MA-PPO on the toy task, over many seeds. The protocol is in the README.

    python tests/experiments.py            everything, and from it the README's table, docs/experiments.svg and docs/experiments.jsonl.gz
    python tests/experiments.py --quick    two seeds and few updates, in some ten minutes; table and figure in runs/experiments_quick
    python tests/experiments.py --report   table and figure anew from docs/experiments.jsonl.gz, nothing is trained

Runs are independent and share the machine's cores, one thread each. What is done stays in the output folder's results.jsonl:
the same command goes on where it was cut off. Needs matplotlib for the figure and the program link-parser for one setting.
"""
import argparse
import contextlib
import functools
import gzip
import json
import os
import random
import re
import shutil
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np

LONG_LAMBDA = 0.95**(1 / 5)
SETTINGS = {  # name: (stage, its options); the first of each length is what the others are compared with
    "PPO": ("ppo", ""),
    "PPO, λ' = λ^(1/5)": ("ppo", f"--lam {LONG_LAMBDA}"),
    "n = 3": ("ma_ppo", "--ngram 3"),
    "n = 5": ("ma_ppo", "--ngram 5"),
    "n = 10": ("ma_ppo", "--ngram 10"),
    "n = ∞": ("ma_ppo", "--ngram inf"),
    "randomized": ("ma_ppo", "--termination randomized_ngram"),
    "perplexity": ("ma_ppo", "--termination perplexity"),
    "parsing": ("ma_ppo", "--termination parsing"),
    "n = 5, unit value": ("ma_ppo", "--ngram 5 --value_weighting unit"),
    "n = 5, decayed value": ("ma_ppo", "--ngram 5 --value_weighting position_decayed"),
    "n = 5, mean reward": ("ma_ppo", "--ngram 5 --macro_reward mean")}
FEW = ["PPO", "PPO, λ' = λ^(1/5)", "n = 5", "n = ∞"]
GROUPS = {  # name: (sentences, updates, learning rate and KL coefficient, None for the tuned ones, settings)
    "8 sentences": (8, 100, None, list(SETTINGS)),
    "8 sentences, lr 3e-4": (8, 60, {"lr": 3e-4, "kl": 0.05}, FEW),
    "8 sentences, lr 1e-4": (8, 60, {"lr": 1e-4, "kl": 0.05}, FEW),
    "24 sentences": (24, 80, None, FEW)}
LENGTHS = {8: 100, 24: 80}  # sentences: updates of tuning
COST = ["PPO", "n = 5", "n = ∞", "randomized", "perplexity", "parsing"]
FULL = dict(seeds=10, most_updates=100, tuning_seeds={8: 2, 24: 1}, lr=(1e-4, 3e-4, 1e-3), kl=(0.02, 0.05), gradients={8: 64, 24: 24}, rounds={8: 40, 24: 12})
QUICK = dict(seeds=2, most_updates=15, tuning_seeds={8: 1, 24: 1}, lr=(3e-4, 1e-3), kl=(0.05,), gradients={8: 8, 24: 4}, rounds={8: 8, 24: 4})
COLUMNS = ("objective/scores objective/gold objective/kl objective/entropy response/length response/eos_rate norm/advantages "
           "norm/values norm/policy_grad value/explained_var value/loss macro/length macro/parse_failures").split()
WINDOW = 10  # updates over which a curve is averaged


def interval(values):
    """[estimate, lower, upper] from an estimate and its bootstrap repetitions behind it."""
    values = np.nan_to_num(values, nan=-np.inf)  # a level that is never reached: as slow as can be
    return [float(values[0]), *(float(x) for x in np.percentile(values[1:], (2.5, 97.5), method="inverted_cdf"))]


# ---- runs ----
def options(job, setting, folder):
    """Command line of a run of stage 3, without its output folder."""
    length, models = job["sentences"], folder.parent / f"toy{job['sentences']}"
    return [*SETTINGS[setting][1].split(), *f"--toy_sentences {length} --max_response_length {14 * length} --policy_lr {job['lr']} "
            f"--critic_lr {job['lr']} --kl_coef {job['kl']} --seed {job['seed']} --eval_every 0 --policy {models}/sft/final "
            f"--reward {models}/reward/final".split()]


@functools.cache
def stages():
    """The stage scripts as modules; rows of the toy task are made once per process, not at every run."""
    import ma_ppo
    import ppo
    import reward
    import sft
    rows = functools.cache(sft.toy_rows)
    for module in (sft, reward, ppo, ma_ppo):
        module.toy_rows = rows
    return {"sft": sft, "reward": reward, "ppo": ppo, "ma_ppo": ma_ppo}


def call(stage, argv, folder):
    """main() of a stage, in this process, with all that it prints in folder.log."""
    shutil.rmtree(folder, ignore_errors=True)
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        stages()[stage].main([*argv, "--output_dir", str(folder)])


def train_models(job, folder):
    """SFT model and reward model of a length; all runs of this length start from them."""
    folder = folder.parent / f"toy{job['sentences']}"
    length = ["--toy_sentences", str(job["sentences"])]
    call("sft", length, folder / "sft")
    call("reward", [*length, "--policy", str(folder / "sft/final")], folder / "reward")
    return {"accuracy": json.loads((folder / "reward/metrics.jsonl").read_text().splitlines()[-1])["eval/accuracy"]}


def train(job, folder):
    """A run of stage 3 -> its figures by update."""
    call(SETTINGS[job["setting"]][0], [*options(job, job["setting"], folder), "--updates", str(job["updates"])], folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [row for row in rows if "lr" in row]
    seconds = [sum(row[f"time/{phase}"] for phase in ("rollout", "score", "update")) for row in updates]
    if not job.get("keep"):
        shutil.rmtree(folder)
    return {"by_update": {name: [float(f"{row[name]:.5g}") for row in updates] for name in COLUMNS}
            | {"seconds": [round(x, 3) for x in seconds]}, "held_out": {"before": rows[0], "after": rows[-1]}}


def models_of(job, folder, policy, critic, settings):
    """The four models as main() of ppo.py sets them up, and the options of each setting."""
    ppo, ma_ppo = stages()["ppo"], stages()["ma_ppo"]
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    modules = {name: stages()[SETTINGS[name][0]] for name in settings}
    all_args = {name: module.parse_args(module.Args, module.AdvantageArgs, presets=module.presets,
                                        argv=options(job, name, folder))
                for name, module in modules.items()}
    args = all_args["PPO"]
    device, _, _ = ppo.start(args)
    tokenizer = ppo.load_tokenizer(args.policy)
    rows, _ = ppo.load_prompts(args, tokenizer)
    policy, ref = (ppo.shard(ppo.load(AutoModelForCausalLM, name, tokenizer, dtype=ppo.torch.float32)[0], args, device)
                   for name in (policy or args.policy, args.policy))
    critic = ppo.load(AutoModelForSequenceClassification, critic or args.reward, tokenizer, num_labels=1, dtype=ppo.torch.float32)[0]
    critic = ppo.shard(ppo.Critic(critic), args, device)
    score = ppo.model_reward(args.reward, tokenizer, args, device)
    roll = functools.partial(ppo.make_rollout, policy=policy, ref=ref.requires_grad_(False), critic=critic, score=score, args=args,
                             tokenizer=tokenizer, device=device)

    def sample(k):
        some = [rows[i] for i in ppo.batch_indices(k, len(rows), args.batch_size, job["seed"])]
        return roll(some, ppo.seeded(device, job["seed"], k), training=True)[0]

    def advantages(name, rollout, k):
        values, returns, _ = modules[name].compute_advantages(rollout, all_args[name], tokenizer, ppo.seeded(device, k))
        return {"advantages": values, "returns": returns}
    return ppo, args, device, policy, critic, sample, advantages


def gradients(job, folder):
    """Gradients of the policy loss at fixed weights, on the same rollouts for every setting -> signal_and_alignment of each;
    unbiased are the gradients at lambda = 1, to which errors of the critic add noise but no bias."""
    start = Path(job["start"])
    ppo, args, device, policy, critic, sample, advantages = models_of(job, folder, str(start), str(start / "critic"), list(SETTINGS))
    names, vectors = ["λ = 1", *SETTINGS], {}
    for k in range(job["gradients"]):
        rollout = sample(k)
        for name in names:
            if name == "λ = 1":
                ones = argparse.Namespace(**vars(args) | {"lam": 1.0})
                chosen = ppo.compute_advantages(rollout, ones)[0]
            else:
                chosen = advantages(name, rollout, k)["advantages"]
            loss, _ = ppo.policy_loss(rollout["new_logprobs"], rollout["logprobs"], chosen, rollout["mask"], args.clip_ratio)
            (loss / rollout["mask"].sum()).backward(retain_graph=True)
            vectors.setdefault(name, []).append(np.concatenate([p.grad.full_tensor().flatten().numpy() for p in policy.parameters()]))
            policy.zero_grad()
    ppo.finish()
    truth = np.stack(vectors["λ = 1"])
    return {name: signal_and_alignment(np.stack(vectors.pop(name)), truth) for name in names}


def signal_and_alignment(g, unbiased):
    """Of gradients g (N, P) of N rollouts: signal, the squared norm of their mean / the trace of their covariance (the variance
    of an update's gradient), and alignment, the mean cosine of g_i with the mean of `unbiased` (N, P) over the other rollouts,
    each with its bootstrap interval."""
    others = (unbiased.sum(0) - unbiased) / (len(unbiased) - 1)
    cosine = (g * others).sum(1) / np.linalg.norm(g, axis=1) / np.linalg.norm(others, axis=1)
    gram, size, draw = g.astype(np.float64) @ g.T.astype(np.float64), len(g), np.random.default_rng(0)

    def signal(i):
        distinct = i[:, None] != i  # a rollout drawn twice tells nothing of the mean
        mean = gram[np.ix_(i, i)][distinct].mean()
        return mean / (gram.diagonal()[i].mean() - mean)
    again = [np.arange(size), *draw.integers(size, size=(1000, size))]
    return {"signal": interval([signal(i) for i in again]), "alignment": interval([cosine[i].mean() for i in again])}


def cost(job, folder):
    """Seconds of whole updates, all conditions by turns at the same weights and on the same responses -> seconds by condition."""
    ppo, args, device, policy, critic, sample, advantages = models_of(job, folder, None, None, COST)
    optimizers = [ppo.torch.optim.AdamW(model.parameters(), 0.0, weight_decay=0.0, fused=True) for model in (policy, critic)]
    seconds, draw = {name: [] for name in COST}, random.Random(0)
    for k in range(-2, job["rounds"]):  # two to warm up
        for name in draw.sample(COST, len(COST)):
            began = time.perf_counter()
            rollout = sample(abs(k))
            rollout |= advantages(name, rollout, abs(k))
            ppo.update_models(policy, critic, optimizers, rollout, args, device)
            if k >= 0:
                seconds[name].append(round(time.perf_counter() - began, 5))
    ppo.finish()
    return seconds


def work(job, folder):
    began = time.time()
    kinds = {"models": train_models, "tuning": train, "start": train, "run": train, "gradients": gradients, "cost": cost}
    try:
        return job | {"result": kinds[job["kind"]](job, Path(folder)), "wall": round(time.time() - began, 1)}
    except BaseException as error:  # also the exits of the stages
        return job | {"failed": repr(error)}


# ---- the plan ----
class Results:
    """What is done, in a file that grows by a line per job."""
    def __init__(self, folder, workers):
        self.folder, self.workers, self.file = folder, workers, folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.done = {self.key(row): row for row in map(json.loads, lines)}

    def key(self, job):
        return json.dumps({name: value for name, value in job.items() if name not in ("result", "wall")}, sort_keys=True)

    def run(self, jobs, alone=False):
        """Does the jobs that are not done -> the results of all, in order."""
        from tqdm import tqdm
        left = [job for job in jobs if self.key(job) not in self.done]
        folder = lambda job: self.folder / "-".join(re.sub(r"\W+", "_", str(value)) for name, value in job.items() if name != "start")
        if left:
            with ProcessPoolExecutor(1 if alone else self.workers, get_context("spawn")) as pool:
                todo = [pool.submit(work, job, str(folder(job))) for job in left]
                for future in tqdm(as_completed(todo), total=len(todo), desc=left[0]["kind"], unit="job"):
                    row = future.result()
                    if "failed" in row:
                        pool.shutdown(cancel_futures=True)
                        sys.exit(f"experiments: {row} failed, see {folder(row)}.log; the same command goes on")
                    with open(self.file, "a") as file:
                        file.write(json.dumps(row, ensure_ascii=False) + "\n")
                    self.done[self.key(row)] = row
        return [self.done[self.key(job)] for job in jobs]


def tune(plan, results, sentences, kl_coefs):
    """Tries the grid with PPO and with MA-PPO -> {stage: {"lr", "kl"}} with the highest reward-model score, the mean over all
    updates and tuning seeds, and the rows. `kl_coefs`: {setting: KL coefficients to try}."""
    jobs = [{"kind": "tuning", "setting": setting, "sentences": sentences, "lr": lr, "kl": kl, "seed": 100 + seed,
             "updates": min(LENGTHS[sentences], plan["most_updates"])}
            for seed in range(plan["tuning_seeds"][sentences]) for lr in plan["lr"] for setting in kl_coefs for kl in kl_coefs[setting]]
    rows, chosen = results.run(jobs), {}
    for setting in kl_coefs:
        scores = {}
        for row in rows:
            if row["setting"] == setting:
                scores.setdefault((row["lr"], row["kl"]), []).append(np.mean(row["result"]["by_update"]["objective/scores"]))
        chosen[SETTINGS[setting][0]] = dict(zip(("lr", "kl"), max(scores, key=lambda cell: statistics.mean(scores[cell]))))
    print(f"chosen for {sentences} sentences: {chosen}")
    return chosen, rows


def everything(plan, results):
    """Does the whole plan -> all result rows."""
    rows = results.run([{"kind": "models", "sentences": sentences} for sentences in LENGTHS])
    chosen, kl_coefs = {}, {"PPO": plan["kl"], "n = 5": plan["kl"]}
    for sentences in LENGTHS:  # the longer one tries learning rates alone, at the KL coefficients of the shorter one
        chosen[sentences], tried = tune(plan, results, sentences, kl_coefs)
        kl_coefs = {setting: [chosen[sentences][SETTINGS[setting][0]]["kl"]] for setting in kl_coefs}
        rows += tried
    runs = [{"kind": "run", "group": group, "setting": setting, "sentences": sentences, **(given or chosen[sentences][SETTINGS[setting][0]]),
             "seed": seed, "updates": min(updates, plan["most_updates"])}
            for seed in range(plan["seeds"]) for group, (sentences, updates, given, settings) in GROUPS.items() for setting in settings]
    rows += results.run(runs)
    starts = [{"kind": "start", "setting": "PPO", "sentences": sentences, **chosen[sentences]["ppo"], "seed": 200, "updates": plan["most_updates"] // 5,
               "keep": True} for sentences in LENGTHS]
    rows += results.run(starts)
    final = lambda sentences: next(str(path / "final") for path in results.folder.glob(f"start-PPO-{sentences}-*") if path.is_dir())
    rows += results.run([{"kind": "gradients", "sentences": sentences, **chosen[sentences]["ppo"], "seed": 300, "gradients": plan["gradients"][sentences],
                          "start": final(sentences)} for sentences in LENGTHS])
    rows += results.run([{"kind": "cost", "sentences": sentences, **chosen[sentences]["ppo"], "seed": 400, "rounds": plan["rounds"][sentences]}
                         for sentences in LENGTHS], alone=True)
    return rows


# ---- the report ----
def curves(rows):
    """-> {(group, setting): {figure: (seeds, updates)}}, each update the mean of the last ten (of fewer at the start)."""
    found = {}
    for row in sorted((row for row in rows if row["kind"] == "run"), key=lambda row: row["seed"]):
        found.setdefault((row["group"], row["setting"]), []).append(row["result"]["by_update"])
    for key, runs in found.items():
        found[key] = {}
        for name in runs[0]:
            x = np.array([run[name] for run in runs])
            total = np.cumsum(x, 1)
            before = np.pad(total, ((0, 0), (WINDOW, 0)))[:, :total.shape[1]]
            found[key][name] = (total - before) / np.minimum(np.arange(total.shape[1]) + 1, WINDOW)
        found[key]["seconds"] = np.cumsum([run["seconds"] for run in runs], 1)
    return found


def reaches(scores, level):
    """The first update after which a curve (updates,) is at `level`, NaN where it never is; not before the first window."""
    there = np.flatnonzero(scores[WINDOW - 1:] >= level)
    return there[0] + WINDOW if len(there) else np.nan


def comparison(setting, ppo):
    """Figures of a setting against PPO from their curves {figure: (updates,)}, means over seeds: score and gold as
    differences, speed as a ratio; score, gold, KL and the rest of the setting alone."""
    score, base, gold, base_gold = (x[f"objective/{kind}"] for kind in ("scores", "gold") for x in (setting, ppo))
    middle, level = round(0.4 * len(base)) - 1, base[WINDOW - 1] + 0.9 * (base[-1] - base[WINDOW - 1])
    updates, base_updates = reaches(score, level), reaches(base, level)
    at = lambda x, update: x[int(update) - 1] if update == update else np.nan
    return {"middle": score[middle] - base[middle], "end": score[-1] - base[-1], "gold_middle": gold[middle] - base_gold[middle],
            "gold_end": gold[-1] - base_gold[-1], "kl": setting["objective/kl"][-1], "speed": base_updates / updates,
            "speed_seconds": at(ppo["seconds"], base_updates) / at(setting["seconds"], updates),
            "to_the_end": len(base) / reaches(score, base[-1]), "gold_at_score": at(gold, updates) - at(base_gold, base_updates),
            "gold_fall": gold[WINDOW - 1:].max() - gold[-1], "score_middle": score[middle], "score": score[-1],
            "gold_score_middle": gold[middle], "gold": gold[-1], "advantages": setting["norm/advantages"].mean(),
            "values": setting["norm/values"].mean(), "explained": setting["value/explained_var"][-1]}


def compared(rows):
    """-> {(group, setting): {figure: [estimate, lower, upper]}}, the interval a bootstrap over seeds."""
    found, result = curves(rows), {}
    for group, name in found:
        size = len(found[group, name]["objective/kl"])
        draws = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=2000)
        weights = np.concatenate([np.ones((1, size)), draws]) / size  # the first is the estimate
        means = [{figure: weights @ x[:size] for figure, x in found[group, setting].items()} for setting in (name, "PPO")]
        again = [comparison(*({figure: x[b] for figure, x in mean.items()} for mean in means)) for b in range(len(weights))]
        result[group, name] = {figure: interval([x[figure] for x in again]) for figure in again[0]}
    return result


def show(figure, digits=2, sign=True):
    """[estimate, lower, upper] as text."""
    text = [f"{x:{'+' if sign else ''}.{digits}f}" if np.isfinite(x) else "never" for x in figure]
    return f"{text[0]} ({text[1]} to {text[2]})"


def table(rows):
    """The README's tables in Markdown: differences from PPO; then, folded away, what explains them, and the cost of each condition."""
    result, gradient = compared(rows), {row["sentences"]: row["result"] for row in rows if row["kind"] == "gradients"}
    effects = ["| | score, mid-course | score, end | gold, mid-course | gold, end | KL, end | speed | gold at equal score |", "|---|" + "---|" * 7]
    causes = ["| | L2 of advantages | L2 of values | explained variance | gradient: signal | alignment |", "|---|" + "---|" * 5]
    for group, (sentences, updates, given, settings) in GROUPS.items():
        effects.append(f"| **{group}** |" + " |" * 7)
        for name in settings:
            x = result[group, name]
            if name == "PPO":
                numbers = [show(x[figure], digits, False) for figure, digits in (("score_middle", 2), ("score", 2), ("gold_score_middle", 3),
                                                                                 ("gold", 3), ("kl", 1))]
                effects.append("| " + " | ".join([name, *numbers, "1", "0"]) + " |")
            else:
                numbers = [show(x["middle"]), show(x["end"]), show(x["gold_middle"], 3), show(x["gold_end"], 3), show(x["kl"], 1, False),
                           show(x["speed"], 2, False), show(x["gold_at_score"], 3)]
                effects.append("| " + " | ".join([name, *numbers]) + " |")
        if given:
            continue  # the gradients are those of the tuned groups
        causes.append(f"| **{group}** |" + " |" * 5)
        for name in ["λ = 1", *SETTINGS]:
            cells = [""] * 3
            if name in settings:
                cells = [f"{result[group, name][figure][0]:.{digits}f}" for figure, digits in (("advantages", 1), ("values", 0), ("explained", 2))]
            causes.append("| " + " | ".join([name, *cells, *(show(gradient[sentences][name][x], 3, False) for x in ("signal", "alignment"))]) + " |")
    costs = []
    for row in (row for row in rows if row["kind"] == "cost"):
        seconds, draw = {name: np.array(x) for name, x in row["result"].items()}, np.random.default_rng(0)
        again = [np.arange(len(seconds["PPO"])), *draw.integers(len(seconds["PPO"]), size=(2000, len(seconds["PPO"])))]
        ratio = {name: interval([np.median(x[i] / seconds["PPO"][i]) for i in again]) for name, x in seconds.items() if name != "PPO"}
        costs += ["", f"Seconds of an update over PPO's {np.median(seconds['PPO']):.3f} s, {row['sentences']} sentences, median of {len(again[0])} "
                  "rounds: " + ", ".join(f"{name} {show(x, 3, False)}" for name, x in ratio.items()) + "."]
    return "\n".join([*effects, "", "<details><summary>Norms, explained variance, gradients, cost</summary>", "", *causes, *costs, "", "</details>"])


def plot(rows, path):
    """Learning curves with 95% bootstrap bands over seeds, and gold score against reward-model score (a dot: the end)."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    plt.rcParams.update({"svg.hashsalt": "0", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    found, draw = curves(rows), np.random.default_rng(0)
    colors = {"PPO": "#555555", "PPO, λ' = λ^(1/5)": "#E69F00", "n = 5": "#0072B2", "n = ∞": "#CC3311"}
    figure, axes = plt.subplots(3, len(GROUPS), figsize=(12, 7.2), layout="constrained")
    for column, group in zip(axes.T, GROUPS):
        for name, color in colors.items():
            scores, gold = (found[group, name][kind][:, WINDOW - 1:] for kind in ("objective/scores", "objective/gold"))
            size, u = len(scores), np.arange(WINDOW, WINDOW + scores.shape[1])
            for axis, x in zip(column, (scores, gold)):
                band = np.percentile([x[draw.integers(size, size=size)].mean(0) for _ in range(1000)], (2.5, 97.5), axis=0)
                axis.plot(u, x.mean(0), color=color, label=name, linewidth=1.4)
                axis.fill_between(u, *band, color=color, alpha=0.18, linewidth=0)
                axis.set_xlabel("update")
            column[2].plot(scores.mean(0), gold.mean(0), color=color, linewidth=1.4)
            column[2].plot(scores.mean(0)[-1], gold.mean(0)[-1], "o", color=color, markersize=4)
        column[2].set_xlabel("reward-model score")
        column[0].set_title(f"{group}, {size} seeds", loc="left", fontsize=9)
    for axis, label in zip(axes[:, 0], ("reward-model score", "gold score", "gold score")):
        axis.set_ylabel(label)
    axes[0, 0].legend(frameon=False)
    path.parent.mkdir(exist_ok=True, parents=True)
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two seeds and few updates; leaves README and docs alone")
    parser.add_argument("--report", action="store_true", help="only table and figure, from docs/experiments.jsonl.gz")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time; all cores when not given")
    o = parser.parse_args()
    os.chdir(ROOT)
    plan, folder = (QUICK, Path("runs/experiments_quick")) if o.quick else (FULL, Path("runs/experiments"))
    raw = Path("docs/experiments.jsonl.gz")
    if o.report:
        rows = [json.loads(line) for line in gzip.decompress(raw.read_bytes()).decode().splitlines()]
    else:
        rows = everything(plan, Results(folder, o.workers))
    text, place = table(rows), folder if o.quick else Path("docs")
    plot(rows, place / "experiments.svg")
    if o.quick:
        print(text)
    else:
        if not o.report:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            raw.write_bytes(gzip.compress(lines.encode(), mtime=0))
        readme = Path("README.md").read_text()
        marks = "<!-- by tests/experiments.py -->\n", "<!-- end -->"
        readme = re.sub(f"{marks[0]}.*?{marks[1]}", lambda _: marks[0] + text + "\n" + marks[1], readme, flags=re.S)
        Path("README.md").write_text(readme)
    print(f"figure in {place}/experiments.svg, table {'above' if o.quick else 'in README.md'}")


if __name__ == "__main__":
    main()
