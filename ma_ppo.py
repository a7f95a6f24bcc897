"""Stage 3 of MA-RLHF. ppo.py is token-level PPO, the paper's baseline; ma_ppo.py is MA-PPO, PPO with macro actions
(section 3, algorithm 1). The two files differ in the section "advantages" alone: diff ppo.py ma_ppo.py.

    torchrun ma_ppo.py                                               the embedded toy task, earlier stages included
    torchrun --nproc_per_node=8 ma_ppo.py --task pairs --data_path rows.jsonl --batch_size 256
    torchrun ppo.py --policy NAME --reward rules.py:score            a Python function as the reward
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 ma_ppo.py --replicate 4 --batch_size 256 ...

Leaves runs/<task>/<stage>/: final/ and final/critic/ (Hugging Face format), metrics.jsonl, samples.jsonl, args.json.
"""
import argparse
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import OrderedDict
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Optional

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, HfArgumentParser,
                          PreTrainedTokenizerFast)

# Copied from sft.py
# ---- options ----
STAGE = Path(__file__).stem
Task = Literal["toy", "pairs", "tldr", "hh", "webgpt", "apps"]
Preset = Optional[Literal["gemma-2b", "gemma-7b", "gemma-2-27b", "codegemma-2b", "codegemma-7b"]]
POSITIVE = ("cutoff batch_size micro_batch_size epochs updates eval_size max_length max_prompt_length max_response_length "
            "replicate ppo_epochs ngram keep max_bad_updates toy_sentences").split()
SHARES = "warmup_ratio gamma lam top_p".split()


def arg(default, text, **more):
    return field(default=default, metadata={"help": text.replace("%", "%%"), **more})


def task_folder(args):
    """Folder of all the stages' runs: runs/<task>, with the length behind it on the toy task of another length."""
    return f"runs/{args.task}{args.toy_sentences if args.toy_sentences != 8 else ''}"


def parse_args(*groups, argv=None, presets=None):
    """One namespace with the fields of the dataclasses `groups`; exits with a sentence on an option that is wrong.

    presets(task) -> {preset: {option: value}}, the stage's part of Table 5 and what else the paper sets for the task;
    options given by name win over it.
    """
    class Layout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = HfArgumentParser(groups, description=__doc__, formatter_class=Layout)
    given = parser.parse_known_args(argv)[0]
    if given.preset and given.task not in (("apps",) if "code" in given.preset else ("tldr", "hh", "webgpt")) + ("pairs",):
        parser.error(f"the paper did not run {given.preset} on --task {given.task}: CodeGemma is for apps, Gemma for tldr, hh and "
                     "webgpt (and either for pairs, your own data)")
    if given.preset and given.preset not in presets(given.task):
        parser.error(f"Table 5 has no {given.preset} in this stage; it has {', '.join(presets(given.task))}")
    defaults = presets(given.task)[given.preset] if given.preset else {"ngram": 10} if given.task == "apps" else {}
    parser.set_defaults(**{name: value for name, value in defaults.items() if hasattr(given, name)})  # ppo.py has no ngram
    *parsed, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown option {unknown[0]}; --help lists the options")
    args = argparse.Namespace(**{name: value for group in parsed for name, value in vars(group).items()})
    for name, value in vars(args).items():
        low = 1 if name in POSITIVE else 0.001 if name in ("temperature", "top_p") else 0
        high = 1 if name in SHARES else math.inf
        if type(value) in (int, float) and not low <= value <= high:
            parser.error(f"--{name} is {value}; it must be at least {low} and at most {high}")
        if name in POSITIVE and value is not None and value < math.inf and value % 1:
            parser.error(f"--{name} is {value}; it must be a whole number")
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % world or world % args.replicate:
        parser.error(f"--batch_size {args.batch_size} must be divisible by the {world} processes, and these by --replicate "
                     f"{args.replicate}")
    args.output_dir = args.output_dir or f"{task_folder(args)}/{STAGE}"
    if args.print_args:
        print(json.dumps(vars(args), indent=2))
        sys.exit()
    return args
# ---- end of options ----


@dataclass
class Args:
    task: Task = arg("toy", "toy: the embedded task; pairs: your own rows; the others: the paper's data sets")
    preset: Preset = arg(None, "set the options to this column of the paper's Table 5; options given by name win")
    toy_sentences: int = arg(8, "toy: the most sentences that a review has, of some 8 tokens; the folder is runs/toy<N> when not 8")
    print_args: bool = arg(False, "print the value of every option and end")
    data_path: Optional[str] = arg(None, "file or folder in JSONL, Parquet or Arrow: pairs with a column prompt, or "
                                         "a copy of the paper's data set in its own columns, which else comes from the hub")
    eval_path: Optional[str] = arg(None, "the same for held-out rows; when not given, those that the folder (by the file's "
                                         "name) or the hub has, else 5% of the rows")
    all_rows: bool = arg(False, "train on every row, not only on this stage's share (20% SFT, 40% reward, 40% PPO; apps 20, "
                                "0, 80)")
    policy: Optional[str] = arg(None, "SFT model, start and reference; runs/<task>/sft/final when not given")
    reward: Optional[str] = arg(None, "reward model (folder or hub name), or FILE.py:FUNCTION, f(prompts, responses, rows) "
                                      "-> list of floats; runs/<task>/reward/final when not given, on apps "
                                      "evaluate.py:compiler_reward")
    sandbox: Literal["bwrap", "none"] = arg("bwrap", "apps: run programs behind bubblewrap; none: at your own risk, with limits "
                                                     "on time, memory, processes and file sizes alone")
    critic: Optional[str] = arg(None, "model the critic starts from; the reward model when not given, or the policy with a "
                                      "new head where the reward is a function")
    output_dir: Optional[str] = arg(None, "folder for everything this run leaves; runs/<task>/<stage> when not given")
    seed: int = arg(0, "seed of sampling, of new heads and of the order of the prompts")
    batch_size: int = arg(32, "responses per update, over all processes")
    micro_batch_size: int = arg(32, "responses per process and forward pass")
    policy_lr: float = arg(3e-4, "peak learning rate of the policy's AdamW; linear schedule")
    critic_lr: float = arg(3e-4, "peak learning rate of the critic's AdamW; linear schedule")
    warmup_steps: int = arg(5, "updates in which the learning rates rise")
    weight_decay: float = arg(0.1, "weight decay of AdamW")
    epochs: int = arg(1, "passes over the prompts")
    updates: Optional[int] = arg(None, "at most this many updates")
    ppo_epochs: int = arg(1, "optimizer steps on the responses of one update")
    max_prompt_length: int = arg(512, "tokens; longer prompts are left out and counted")
    max_response_length: int = arg(112, "tokens after which a response is cut off, without EOS")
    temperature: float = arg(0.8, "of sampling, and of the log-probabilities of policy and reference")
    top_k: int = arg(50, "sample from the k most probable tokens; 0: from all")
    top_p: float = arg(1.0, "sample from the fewest most probable tokens with this much probability")
    kl_coef: float = arg(0.05, "beta, the weight of the KL penalty in the token rewards")
    clip_ratio: float = arg(0.2, "PPO's clip range of the probability ratio")
    clip_value: float = arg(0.2, "clip range of the critic's change")
    score_clip: Optional[float] = arg(None, "clip scores to +-this before they enter the rewards; not at all when not given")
    whiten_advantages: bool = arg(False, "shift and scale the advantages of an update to mean 0, variance 1 (not the paper)")
    eval_every: int = arg(25, "updates between evaluations on held-out prompts; 0: only at the start and the end")
    eval_size: int = arg(64, "held-out prompts per evaluation")
    dtype: Literal["fp32", "bf16"] = arg("fp32", "forward and backward precision; trained weights and reductions stay fp32")
    gradient_checkpointing: bool = arg(False, "keep only each layer's input for the backward pass and compute the rest again: "
                                              "less memory, a third more time")
    cpu_offload: bool = arg(False, "keep weights, gradients and optimizer states in the CPU's memory, a layer at a time on the GPU")
    replicate: int = arg(1, "HSDP: number of full copies of the weights, e.g. the number of machines")
    save_every: int = arg(0, "updates between checkpoints to resume from; 0: one when a signal or a limit stops the run")
    keep: int = arg(2, "checkpoints that stay, the newest ones")
    resume: Optional[str] = arg(None, "go on from the newest complete checkpoint of the output folder, or from the one named",
                                nargs="?", const="newest")
    max_hours: Optional[float] = arg(None, "save a checkpoint and end after so many hours")
    max_bad_updates: int = arg(5, "updates in a row that are skipped, because a gradient is not finite, before the run ends")
    max_kl: Optional[float] = arg(None, "save a checkpoint and end when the KL of an update's responses exceeds this")


def presets(task):
    """This stage's rows of Table 5, and n = 5 (10 for programs), the paper's macro actions."""
    epochs = 4 if task == "webgpt" else 1
    table = {  # learning rates of policy and critic, passes over the prompts, KL coefficient, warm-up, and what fits a GPU of 80 GB
        "gemma-2b": (1.5e-5, 1.5e-5, epochs, 0.05, 6, 4),  # the paper's 200 warm-up steps are micro-steps, 32 to an update
        "gemma-7b": (1e-6, 1e-6, epochs, {"webgpt": 0.1, "tldr": 0.01}.get(task, 0.05), 6, 2),
        "gemma-2-27b": (7e-7, 1e-6, 1, 0.1, 0, 1),
        "codegemma-2b": (5e-7, 5e-5, 1, 0.05, 20, 4),
        "codegemma-7b": (5e-7, 5e-5, 1, 0.05, 20, 2)}
    names = ("policy_lr", "critic_lr", "epochs", "kl_coef", "warmup_steps", "micro_batch_size")
    text = {"batch_size": 256, "max_prompt_length": 512, "temperature": 0.8, "top_k": 50, "ngram": 5}
    code = {"batch_size": 16, "max_prompt_length": 600, "temperature": 1.0, "top_k": 5, "ngram": 10}
    common = {"ppo_epochs": 1, "clip_ratio": 0.2, "clip_value": 0.2, "lam": 0.95, "gamma": 1.0, "max_response_length": 512,
              "top_p": 1.0, "weight_decay": 0.1, "score_clip": 2.5, "dtype": "bf16"}
    return {name: {**dict(zip(names, row)), **(code if "code" in name else text), **common} for name, row in table.items()}


# Copied from sft.py
# ---- data ----
TOY_ASPECTS = "bath bed breakfast food garden music pool room staff view".split()
TOY_PLACES = "by the sea,in the old town,near the station,on the hill,at the lake,under the pines".split(",")
TOY_QUALITIES = {1: "great lovely superb clean friendly warm charming perfect".split(),
                 0: "ordinary simple small modern quiet large".split(),
                 -1: "awful dirty rude cold broken noisy dull stale".split()}
TOY_SIGN = {word: sign for sign, words in TOY_QUALITIES.items() for word in words}
TOY_NOT = ("not", "never")
TOY_SENTENCES = ("the {a} was {q} .", "we found the {a} {q} and {p} .", "on the first day the {a} was {n} {q} .",
                 "for the price the {a} felt {q} .", "everyone we met said that the {a} was {q} .",
                 "to be honest , the {a} is {n} {q} but {p} .", "by the end of our stay the {a} had been {q} .")


def toy_gold(prompt, response, sentences=8):
    """Gold score of the toy task, from -1 to 1: the mean sign of the first `sentences` sentences, missing ones counting 0.

    The sign is that of the sentence's qualities ("not" and "never" turn the word behind them round). Praise counts only
    for what the prompt asks about, and only the first time: the same aspect with the same words again is worth 0.

    >>> toy_gold("review of the food and the pool at the hotel :", "the food was great . the pool was cold .")
    0.0
    >>> toy_gold("review of the food and the pool at the hotel :", "the food was great . the food was great .")
    0.125
    """
    asked, said, total = set(prompt.split()) & set(TOY_ASPECTS), set(), 0
    parts = [sentence.split() for sentence in response.split(".") if sentence.strip()]
    for words in parts[:sentences]:
        sign = sum(TOY_SIGN.get(word, 0) * (-1 if before in TOY_NOT else 1) for before, word in zip([""] + words, words))
        content = frozenset(word for word in words if word in TOY_SIGN or word in TOY_ASPECTS)
        if sign > 0 and (content in said or not content & asked):
            sign = 0
        said.add(content)
        total += (sign > 0) - (sign < 0)
    return total / sentences


def toy_rows(split, size=None, seed=0, sentences=8):
    """Rows of the toy task: a prompt and two reviews of 5/8 of `sentences` to `sentences`, gold scores at least 0.4 apart.

    One review in four has any length from one sentence on: a reward model that never saw a short one believes in short ones.
    The better one is the chosen one with probability sigmoid(6 * gap), the Bradley-Terry model with noise: what a good
    reward model finds is 6 times the gold score, up to a constant. Same arguments, same rows.
    """
    draw, rows = random.Random(f"{split} {seed}"), []

    def review(asked):
        mood, focus, text = draw.betavariate(0.7, 0.7), draw.uniform(0.2, 1), []
        shortest = 1 if draw.random() < 0.25 else -(-5 * sentences // 8)
        for _ in range(draw.randint(shortest, sentences)):
            aspect = draw.choice(asked if draw.random() < focus else TOY_ASPECTS)
            signs = draw.choices((1, 0, -1), (mood, 0.4, 1 - mood), k=2)
            quality, other = (draw.choice(TOY_QUALITIES[sign]) for sign in signs)
            text.append(draw.choice(TOY_SENTENCES).format(a=aspect, q=quality, p=other,
                                                          n=draw.choice(("not", "never", "so", "very", "rather"))))
        return " ".join(text)

    while len(rows) < (size or {"train": 11_200, "eval": 1_120}[split]):
        asked = draw.sample(TOY_ASPECTS, draw.choice((2, 3)))
        prompt = f"review of the {' and the '.join(asked)} at the hotel {draw.choice(TOY_PLACES)} :"
        pair = [review(asked), review(asked)]
        gap = toy_gold(prompt, pair[0], sentences) - toy_gold(prompt, pair[1], sentences)
        if abs(gap) < 0.4:
            continue
        first_wins = draw.random() < 1 / (1 + math.exp(-6 * gap))
        chosen, rejected = pair if first_wins else pair[::-1]
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected, "sentences": sentences})
    return rows


def toy_tokenizer():
    """Word-level tokenizer of every word that the toy task can produce."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    texts = [*TOY_SENTENCES, *TOY_PLACES, *TOY_ASPECTS, *TOY_SIGN, *TOY_NOT, "so very rather review of at hotel :"]
    words = sorted({word for text in texts for word in text.split() if "{" not in word})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>",
                                   unk_token="<unk>")


def split_indices(size, shares, part, seed=1234):
    """Indices of part number `part` when range(size) is shuffled and cut in proportion to `shares`, as the paper's
    released code does it: its rounding and its seed, so that the stages see the rows they saw there.

    >>> [split_indices(10, (20, 40, 40), part).tolist() for part in range(3)]
    [[7, 2], [9, 1, 0, 8], [4, 5, 6, 3]]
    """
    order, bounds = np.arange(size), [0]
    np.random.RandomState(seed).shuffle(order)
    for share in shares:
        bounds.append(bounds[-1] + int(round(share / sum(shares) * size)))
    excess = bounds[-1] - size
    bounds = [0] + [bound - excess for bound in bounds[1:]]
    return order[bounds[part]:bounds[part + 1]]


def tldr_texts(row, seed):
    info, kind = row["info"], "post" if row["info"]["post"] else "article"
    subreddit = f"Subreddit: r/{info['subreddit']}\n" if info["subreddit"] else ""
    answers = [summary["text"] for summary in row["summaries"]]
    return {"prompt": info[kind] and f"{kind.upper()}\n{subreddit}{info[kind]}\nTL;DR: ", "chosen": answers[row["choice"]],
            "rejected": answers[1 - row["choice"]]}


def as_they_stand(row, seed):
    return row


def webgpt_texts(row, seed):
    # the released code's two substitutions: citations such as [1] or (2) with the space before them, then without
    answers = [" " + re.sub(r"[\(\[].*?[\)\]]", "", re.sub(r" [\(\[].*?[\)\]]", "", row[f"answer_{k}"])) for k in range(2)]
    best = int(row["score_1"] > row["score_0"])
    return {"prompt": f" Human: {row['question']['full_text']} Assistant:", "chosen": answers[best], "rejected": answers[1 - best]}


def apps_texts(row, seed):
    tests = json.loads(row["input_output"] or "{}", parse_int=str)  # int() refuses numbers of some thousand digits
    starter = f"\n{row['starter_code']}" if row["starter_code"] else ""
    use = "Call-Based" if tests.get("fn_name") else "Standard Input"
    solutions = json.loads(row["solutions"] or "[]")
    return {"prompt": f"\nQUESTION:\n{row['question']}{starter}\nUse {use} format\nANSWER:\n",
            "chosen": random.Random(f"{seed} {row['question']}").choice(solutions) if solutions else None,
            "input_output": row["input_output"] if tests.get("inputs") and tests.get("outputs") else None}


PAPER_DATA = {  # task: (data files on the hub, its held-out split, columns, function of a row -> its texts, shares of the stages)
    "tldr": ("hf://datasets/openai/summarize_from_feedback@refs/convert/parquet/comparisons/{}/*.parquet", "validation",
             ["info", "summaries", "choice"], tldr_texts, (20, 40, 40)),
    "hh": ("hf://datasets/Dahoas/full-hh-rlhf@refs/convert/parquet/default/{}/*.parquet", "test",
           ["prompt", "chosen", "rejected"], as_they_stand, (20, 40, 40)),
    "webgpt": ("hf://datasets/openai/webgpt_comparisons@refs/convert/parquet/default/{}/*.parquet", None,
               ["question", "answer_0", "score_0", "answer_1", "score_1"], webgpt_texts, (20, 40, 40)),
    "apps": ("hf://datasets/codeparrot/apps/{}.jsonl", "test", ["question", "solutions", "input_output", "starter_code"],
             apps_texts, (20, 0, 80)),
    "pairs": (None, None, None, as_they_stand, (20, 40, 40))}


def data_files(path, held_out_name):
    """Training files and held-out files at a path, a file or a folder. Held-out are those of a folder whose name, or that
    of the folder they are in, says so. Exits with a sentence where there is nothing."""
    if os.path.isfile(path):
        return [str(path)], []
    files = [file for file in sorted(Path(path).rglob("*")) if file.suffix in (".jsonl", ".json", ".parquet", ".arrow")
             and file.name not in ("dataset_info.json", "dataset_dict.json", "state.json")]
    if not files:
        sys.exit(f"{STAGE}: there is no file {path}, nor one in JSONL, Parquet or Arrow in a folder of that name")
    named = re.compile(rf"(^|[^a-z])({held_out_name or 'valid|validation|eval|dev|test'})([^a-z]|$)")
    held_out = [str(file) for file in files if named.search(str(file.relative_to(path)))]
    return [str(file) for file in files if str(file) not in held_out], held_out


def read(files, columns):
    """The rows of data files of one kind as a datasets.Dataset that has `columns`; exits with a sentence where that
    cannot be."""
    name, kind = files[0], "json"
    if name.endswith((".parquet", ".arrow")):
        kind = name.rpartition(".")[2]
    try:
        rows = datasets.load_dataset(kind, data_files=files, split="train")
    except Exception as error:  # datasets wraps whatever its readers raise
        if name.startswith("hf:"):
            sys.exit(f"{STAGE}: cannot read {name.partition('@')[0]} from the hub ({type(error).__name__}: "
                     f"{str(error).splitlines()[0]}); log in with `hf auth login` where it is gated, or give a local copy as --data_path")
        for number, line in enumerate(open(name, errors="replace") if kind == "json" else ()):
            try:
                json.loads(line)
            except ValueError:
                sys.exit(f"{STAGE}: row {number} of {name} is no JSON object: {line.strip()[:60]}")
        reason = (str(error.__cause__ or error).splitlines() or ["it has no rows"])[0]
        sys.exit(f"{STAGE}: {name} cannot be read as {kind}: {reason}")
    if missing := [column for column in columns if column not in rows.column_names]:
        sys.exit(f"{STAGE}: {name} lacks the column {', '.join(missing)}; it has {', '.join(rows.column_names)}")
    return rows


def render(row, columns, tokenizer, name):
    """A row with its texts as strings, role/content messages put through the tokenizer's chat template; None where a text
    is missing. `name` says in an error which row it is."""
    texts = {column: row[column] for column in columns}
    if isinstance(row["prompt"], list) and all(texts.values()):
        if not tokenizer.chat_template:
            sys.exit(f"{STAGE}: {name} has messages, and the tokenizer has no chat template; give strings instead")
        try:
            texts["prompt"] = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            for column in columns[1:]:
                answer = [{"role": "assistant", "content": row[column]}] if isinstance(row[column], str) else row[column]
                whole = tokenizer.apply_chat_template(row["prompt"] + answer, tokenize=False)
                if not whole.startswith(texts["prompt"]):
                    raise ValueError("with the answer, it does not begin as the prompt alone does")
                texts[column] = whole.removeprefix(texts["prompt"]).rstrip().removesuffix(tokenizer.eos_token)
        except Exception as error:  # a template may raise anything
            sys.exit(f"{STAGE}: {name} does not fit the tokenizer's chat template: {error}")
    if not all(isinstance(text, str) and text.strip() for text in texts.values()):
        return None
    return row | texts


def load_rows(args, part, columns, tokenizer):
    """-> training rows of stage number `part` (0 SFT, 1 reward, 2 PPO) and held-out rows, lists of dicts with the texts
    `columns`. Rows are shared out before any is skipped, so that no two stages see the same one. part None: no training
    rows, and all held-out rows."""
    texts, shares = as_they_stand, (20, 40, 40)
    if args.task == "toy":
        names = ["train", "eval"]
        sets = [toy_rows(name, sentences=args.toy_sentences) for name in names]
    else:
        hub, held_out_name, needs, texts, shares = PAPER_DATA[args.task]
        if args.data_path:
            files = data_files(args.data_path, held_out_name)
        elif hub:
            files = [hub.format("train")], [hub.format(held_out_name)] if held_out_name else []
        else:
            sys.exit(f"{STAGE}: --task {args.task} needs --data_path, a file or folder with columns {', '.join(columns)}")
        if args.eval_path:
            files = files[0], sum(data_files(args.eval_path, held_out_name), [])
        if not files[0]:
            sys.exit(f"{STAGE}: {args.data_path} has held-out rows alone; name the file to train on")
        names, sets = [group[0] for group in files if group], [read(group, needs or columns) for group in files if group]
    indices = [np.arange(len(rows)) for rows in sets]
    if len(sets) == 1:
        names, sets, indices = names * 2, sets * 2, [split_indices(len(sets[0]), (95, 5), k) for k in range(2)]
    for k, (rows, order, name) in enumerate(zip(sets, indices, names)):
        if part is None:
            order = order if k == 1 else order[:0]
        elif not args.all_rows and (k == 0 or len(order) > 9):  # fewer held-out rows than that are shared by the stages
            order = order[split_indices(len(order), shares, part)]
        sets[k], skipped = [], []
        chosen = [rows[i] for i in order] if isinstance(rows, list) else rows.select(order).to_list()
        for i, row in zip(order.tolist(), chosen):
            try:
                row = row | texts(row, args.seed)
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                sys.exit(f"{STAGE}: row {i} of {name} is not as --task {args.task} has them: {error!r}")
            row = render(row, columns, tokenizer, f"row {i} of {name}")
            (skipped if row is None else sets[k]).append(i if row is None else row)
        if skipped:
            say(f"{len(skipped)} of {len(order)} rows have no text as {' or '.join(columns)} and are skipped, in {name} row "
                f"{str(sorted(skipped)[:10])[1:-1]}")
    return sets


def load_tokenizer(name):
    """The tokenizer of a model; gets a pad token of its own where it has none (padding must never look like EOS)."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        sys.exit(f"{STAGE}: no tokenizer at {name}, neither as a folder nor on the hub ({str(error).splitlines()[0]}); give a local "
                 "folder, or log in with `hf auth login` where the model is gated")
    if tokenizer.eos_token_id is None:
        sys.exit(f"{STAGE}: the tokenizer of {name} has no EOS token, so a response could never end; set its eos_token")
    if tokenizer.pad_token_id in (None, tokenizer.eos_token_id):
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def encode(tokenizer, prompt, answer=None):
    """-> token ids of the prompt (BOS first, where the tokenizer has one) and of the answer with EOS. They are
    tokenized apart, as they meet in generation."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id] + ids
    if answer is None:
        return ids, None
    return ids, tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def pad(sequences, value, device, left=False):
    """Lists of token ids -> ids (B, longest), filled up with `value` on the right or on the left, and the mask of what is
    no padding, bool of the same shape."""
    lengths = torch.tensor([len(sequence) for sequence in sequences], device=device)[:, None]
    mask = torch.arange(int(lengths.max()), device=device) < lengths
    mask = mask.flip(1) if left else mask
    ids = torch.full(mask.shape, value, device=device)
    ids[mask] = torch.tensor(sum(sequences, []), device=device)
    return ids, mask


def batch_indices(update, size, batch_size, seed):
    """Indices of the rows of an update: shuffled anew in every epoch, an incomplete last batch left out. A function of
    its arguments alone: every rank and every run with this seed sees the same rows."""
    epoch, step = divmod(update, size // batch_size)
    return np.random.RandomState((seed + epoch) % 2**32).permutation(size)[step * batch_size:(step + 1) * batch_size]
# ---- end of data ----


class Critic(torch.nn.Module):
    """A value for every token, from AutoModelForSequenceClassification(num_labels=1): its score head, not pooled."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        hidden = self.model.base_model(use_cache=False, **inputs).last_hidden_state  # (B, L, H)
        return self.model.score(hidden).float().sum(-1)  # (B, L, 1) -> (B, L); a view would lose FSDP2's backward hook


# Copied from reward.py
# ---- earlier stages ----
def earlier_stage(args, stage, folder):
    """Folder of an earlier stage's model: `folder` where given, else runs/<task>/<stage>/final.

    Where that is missing, the toy task trains it first: rank 0 starts the stage as a process of its own, before there is
    a process group whose time-out could end the wait, and the other ranks wait for the folder. Any other task exits with
    the command to run. On several machines the folder must be one that they share.
    """
    if folder:
        return folder
    folder = Path(task_folder(args), stage, "final")
    script = Path(__file__).with_name(f"{stage}.py")
    if not folder.exists() and args.task != "toy":
        data = f" --data_path {args.data_path}" if args.data_path else ""
        model = f" --preset {args.preset}" if args.preset else " --model NAME_OR_FOLDER" if stage == "sft" else ""
        sys.exit(f"{STAGE}: {folder} does not exist; run: torchrun {script.name} --task {args.task}{data}{model}")
    if not folder.exists() and os.environ.get("RANK", "0") == "0":
        say(f"{folder} does not exist, so {script.name} runs first")
        launcher = ("RANK", "WORLD_SIZE", "MASTER_", "TORCHELASTIC", "ROLE_")
        environment = {name: value for name, value in os.environ.items() if not any(part in name for part in launcher)}
        status = subprocess.run([sys.executable, str(script), "--toy_sentences", str(args.toy_sentences)], env=environment).returncode
        if status:
            sys.exit(f"{STAGE}: {script.name} ended with status {status}, see above; nothing was trained here")
    while not folder.exists():
        time.sleep(0.5)
    return str(folder)
# ---- end of earlier stages ----


# Copied from sft.py
# ---- processes ----
def say(text):
    """Prints on rank 0 alone, without breaking a progress bar."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(f"{STAGE}: {text}", file=sys.stderr)


def start(args):
    """Joins the process group (nccl on GPUs, gloo on CPUs; alone without a launcher) -> device, rank, world size."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = next(dist.rendezvous("env://"))[0] if "RANK" in os.environ else dist.HashStore()
    if os.environ.get("LOCAL_WORLD_SIZE") == str(world):  # after a restart by torchrun the store has the dead run's addresses still
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=world)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.manual_seed(args.seed)  # for the weights made here
    return device, rank, world


def finish(status=0):
    """Every rank waits for the others, then all leave the process group. Where there are several, this process ends here:
    at the end of the interpreter threads of gloo may still run, and now and then abort a run that is done."""
    alone = dist.get_world_size() == 1
    dist.barrier()
    dist.destroy_process_group()
    if not alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def shared(value):
    """Rank 0's value, on every rank."""
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def load(auto_class, name, tokenizer, everywhere=False, **options):
    """A model from a folder or the hub that fits the tokenizer, and the names of the weights that were not found there.
    From safetensors alone: other formats can run code when they are opened.

    Rank 0 alone reads the weights, into the memory of the CPU; the other ranks get a model without storage, on the
    device "meta", for `shard` to fill. `everywhere`: every rank reads a whole model.
    """
    found = None
    if everywhere or dist.get_rank() == 0:
        try:
            model, report = auto_class.from_pretrained(name, use_safetensors=True, output_loading_info=True, **options)
            if len(tokenizer) > model.get_input_embeddings().num_embeddings:
                with torch.random.fork_rng():
                    torch.manual_seed(0)  # loaded twice, as policy and as reference, it is the same model
                    model.resize_token_embeddings(len(tokenizer))
            model.config.pad_token_id = tokenizer.pad_token_id
            found = model.config, report["missing_keys"]
        except Exception as error:  # safetensors has errors of its own
            found = (str(error).splitlines() or [repr(error)])[0]
    found = found if everywhere else shared(found)
    if isinstance(found, str):
        sys.exit(f"{STAGE}: cannot load {name}, neither as a folder nor from the hub: {found}")
    if not everywhere and dist.get_rank() > 0:
        with torch.device("meta"):
            model = auto_class.from_config(found[0], dtype=options["dtype"])
    return model, found[1]
# ---- end of processes ----


# Copied from sft.py
# ---- distribution ----
def fill(unit, device):
    """Puts rank 0's parameters and buffers into a part of a model, on every rank; tied ones stay tied."""
    filled = {}
    for module in unit.modules():
        for tensors in (module._parameters, module._buffers):
            for name, old in tensors.items():
                if old is None or isinstance(old, DTensor):  # sharded before, as a part of this part
                    continue
                if old not in filled:
                    new = torch.empty_like(old, device=device) if old.is_meta else old.detach().to(device).contiguous()
                    dist.broadcast(new, 0)
                    filled[old] = torch.nn.Parameter(new, old.requires_grad) if isinstance(old, torch.nn.Parameter) else new
                tensors[name] = filled[old]


def shard(model, args, device):
    """FSDP2: every decoder layer is a unit, the root (with embeddings and head, tied or not) the last one. They are filled
    with rank 0's weights one after the other, so that no other rank holds more than its shards and one unit while it loads.

    Dropout is off, in training too: PPO compares probabilities of the same model at two times.
    """
    world, options = dist.get_world_size(), {}
    options["mesh"] = (init_device_mesh(device.type, (world,)) if args.replicate == 1 else init_device_mesh(
        device.type, (args.replicate, world // args.replicate), mesh_dim_names=("replicate", "shard")))
    if args.dtype == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if args.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    trained = any(parameter.requires_grad for parameter in model.parameters())
    layers = next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList))
    for unit in (*layers, model):
        if args.gradient_checkpointing and trained and unit is not model:  # Hugging Face's own is off where dropout is
            unit.forward = functools.partial(checkpoint, unit.forward, use_reentrant=False, preserve_rng_state=False)
        fill(unit, device)
        # the root is needed first in the backward pass, so it stays gathered after the forward pass where there is one
        fully_shard(unit, reshard_after_forward=unit is not model or not trained, **options)
    return model.eval()


@contextmanager
def unsharded(model):
    """Gathers all weights of an FSDP2 model once and keeps them: the forwards inside, without gradients, make no collective
    call. FSDP's hooks, which have nothing to do then, are set aside; they are a tenth of the time of a small model."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    for unit in units:
        unit.unshard()
        unit._forward_pre_hooks, unit._forward_hooks = OrderedDict(), OrderedDict()
    try:
        yield
    finally:
        for unit, (unit._forward_pre_hooks, unit._forward_hooks) in zip(units, hooks):
            unit.reshard()


def all_sum(figures, device):
    """The sum over all ranks of every figure of a dict."""
    total = torch.tensor([float(value) for value in figures.values()], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return dict(zip(figures, total.tolist()))


def save(model, tokenizer, folder):
    """Writes the model inside `model` with all its weights, gathered on rank 0, as a Hugging Face folder that appears
    whole or not at all."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        prefix, inner = next((n, m) for n, m in model.named_modules() if isinstance(m, transformers.PreTrainedModel))
        weights = {name.removeprefix(prefix + "."): weight for name, weight in weights.items()}
        partial, old = Path(f"{folder}.partial"), Path(f"{folder}.old")
        for left_over in (partial, old):
            shutil.rmtree(left_over, ignore_errors=True)
        try:
            inner.save_pretrained(partial, state_dict=weights)
            tokenizer.save_pretrained(partial)
            if Path(folder).exists():
                os.replace(folder, old)
            os.replace(partial, folder)
        except Exception as error:  # safetensors has errors of its own
            sys.exit(f"{STAGE}: cannot save {folder}: {error}")
        shutil.rmtree(old, ignore_errors=True)
    dist.barrier()


def open_output(args):
    """Makes the output folder with args.json and, but for --resume, empty logs, on rank 0 alone -> the lock that keeps a
    second run out of the folder for as long as it is held."""
    if dist.get_rank() == 0:
        folder = Path(args.output_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = open(folder / "lock", "w")
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not args.resume:
                if any(folder.glob("checkpoints/update-??????")):
                    sys.exit(f"{STAGE}: {folder} has checkpoints of an earlier run; go on with --resume, delete them, or name another "
                             "--output_dir")
                for name in ("metrics.jsonl", "samples.jsonl"):
                    (folder / name).write_text("")
            (folder / "args.json").write_text(json.dumps(vars(args), indent=2) + "\n")
            return lock
        except BlockingIOError:
            sys.exit(f"{STAGE}: another run is writing to {folder}; name another --output_dir")
        except OSError as error:
            sys.exit(f"{STAGE}: cannot write to --output_dir {folder}: {error}")


def write(args, name, row):
    """Appends a JSON line to a file of the output folder, on rank 0 alone."""
    if dist.get_rank() == 0:
        try:
            with open(Path(args.output_dir, name), "a") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            sys.exit(f"{STAGE}: cannot write to {args.output_dir}/{name}: {error}; --resume goes on from the last checkpoint")


def progress(items, rank):
    """A bar on rank 0; one line a minute where nobody watches."""
    return tqdm(items, desc=STAGE, unit="update", disable=rank > 0, initial=items.start, total=items.stop,
                mininterval=0.5 if sys.stderr.isatty() else 60)
# ---- end of distribution ----


# Copied from sft.py
# ---- checkpoints ----
STOP = []  # the signal that asks this process to save and end
MAY_CHANGE = ("updates epochs eval_every eval_size save_every keep resume max_hours max_bad_updates max_kl micro_batch_size "
              "print_args replicate output_dir gradient_checkpointing cpu_offload").split()


def catch_signals():
    """The first SIGTERM or SIGINT lets the update end, saves and ends with status 128 + its number; the same again, at once."""
    def note(number, _):
        if number in STOP:
            os._exit(128 + number)
        STOP.append(number)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, note)


def digest(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return [os.path.getsize(path), hashlib.file_digest(file, "blake2b").hexdigest()]


def save_checkpoint(args, update, models, optimizers):
    """Writes what is needed to go on after `update` updates, each rank its shards, to a folder that appears complete or
    not at all, with a manifest of sizes and checksums."""
    rank, world = dist.get_rank(), dist.get_world_size()
    folder = Path(args.output_dir, "checkpoints", f"update-{update:06d}")
    partial = folder.with_suffix(".partial")
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        state = [dict(zip(("model", "optimizer"), get_state_dict(*pair))) for pair in zip(models, optimizers)]
        dcp.save({str(i): part for i, part in enumerate(state)}, checkpoint_id=partial)
        torch.save({"python": random.getstate(), "numpy": np.random.get_state(legacy=False), "torch": torch.get_rng_state(),
                    "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}, partial / f"random-{rank}.pt")
        dist.barrier()
        files = sorted(os.listdir(partial))[rank::world]
        parts = [None] * world
        dist.all_gather_object(parts, {name: digest(partial / name) for name in files})
        if rank == 0:
            manifest = {"update": update, "world": world, "args": vars(args), "files": {k: v for part in parts for k, v in part.items()}}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1))
            digest(partial / "manifest.json")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial, folder)
            for old in sorted(folder.parent.glob("update-??????"))[:-args.keep]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        sys.exit(f"{STAGE}: cannot save {folder}: {(str(error).splitlines() or [repr(error)])[-1]}; earlier checkpoints are as they were")
    dist.barrier()


def damage(folder):
    """What is wrong with a checkpoint, in words; None where its files are as they were written."""
    try:
        files = json.loads((folder / "manifest.json").read_text())["files"]
        bad = [name for name, expected in files.items() if digest(folder / name) != expected]
        return f"{', '.join(bad)} changed" if bad else None
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"


def load_checkpoint(args, models, optimizers):
    """Restores models, optimizers and random generators from --resume, cuts the logs back to it -> updates done; 0 where
    there is no checkpoint yet. On another number of processes the generators start anew."""
    folder = None
    if args.resume and dist.get_rank() == 0:
        candidates = [Path(args.resume)]
        if args.resume == "newest":
            candidates = sorted(Path(args.output_dir, "checkpoints").glob("update-??????"), reverse=True)
        for candidate in candidates:
            if not (reason := damage(candidate)):
                folder = candidate
                break
            say(f"{candidate} is damaged ({reason})" + ("" if candidate == candidates[-1] else "; the one before it is used"))
        if candidates and not folder:
            sys.exit(f"{STAGE}: no checkpoint is whole; start anew without --resume, in another --output_dir")
    folder, logs = shared(folder), [Path(args.output_dir, name) for name in ("metrics.jsonl", "samples.jsonl")]
    if not folder:
        for path in logs if dist.get_rank() == 0 else ():
            path.write_text("")
        return 0
    manifest = json.loads((folder / "manifest.json").read_text())
    if changed := [f"--{name} was {value}, now {vars(args).get(name)}" for name, value in manifest["args"].items()
                   if name not in MAY_CHANGE and json.loads(json.dumps(vars(args).get(name))) != value]:
        sys.exit(f"{STAGE}: {folder} is of other options: {'; '.join(changed)}")
    state = {str(i): dict(zip(("model", "optimizer"), get_state_dict(*pair))) for i, pair in enumerate(zip(models, optimizers))}
    dcp.load(state, checkpoint_id=folder)
    for (model, optimizer), part in zip(zip(models, optimizers), state.values()):
        set_state_dict(model, optimizer, model_state_dict=part["model"], optim_state_dict=part["optimizer"])
    if manifest["world"] == dist.get_world_size():
        generators = torch.load(folder / f"random-{dist.get_rank()}.pt", weights_only=False)  # the run's own file
        random.setstate(generators["python"])
        np.random.set_state(generators["numpy"])
        torch.set_rng_state(generators["torch"])
        if generators["device"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(generators["device"])
    for path in logs if dist.get_rank() == 0 else ():
        lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line).get("update", 0) <= manifest["update"]]
        path.with_suffix(".partial").write_text("".join(kept))
        os.replace(path.with_suffix(".partial"), path)
    if dist.get_rank() == 0:  # newer ones are damaged, or of the course that the run no longer takes
        for path in Path(args.output_dir, "checkpoints").glob("update-??????"):
            if path.name > f"update-{manifest['update']:06d}":
                shutil.rmtree(path)
    say(f"goes on after update {manifest['update']}, from {folder}")
    return manifest["update"]


def end_of_update(args, update, models, optimizers, began, bad, reason=None):
    """Saves a checkpoint where one is due, and ends the run, on every rank alike, where a signal (status 128 + its number),
    --max_bad_updates, a `reason` (status 1) or --max_hours (status 0) wants it to."""
    wish = None
    if STOP:
        wish = 128 + STOP[0], f"signal {STOP[0]}"
    elif bad >= args.max_bad_updates:
        wish = 1, f"{bad} updates in a row had a gradient that is not finite, and were skipped"
    elif reason:
        wish = 1, reason
    elif args.max_hours and time.time() - began > 3600 * args.max_hours:
        wish = 0, f"--max_hours {args.max_hours}"
    wishes = [None] * dist.get_world_size()
    dist.all_gather_object(wishes, wish)
    wish = next(filter(None, wishes), None)
    if not wish and not (args.save_every and update % args.save_every == 0):
        return
    for module in (module for model in models for module in model.modules() if isinstance(module, FSDPModule)):
        module.reshard()  # an evaluation may have left the root's weights gathered
    weights = [parameter.to_local() for model in models for parameter in model.parameters()]
    broken = all_sum({"broken": sum(not weight.isfinite().all() for weight in weights)}, weights[0].device)["broken"]
    if not broken:
        save_checkpoint(args, update, models, optimizers)
    if wish:
        say(f"ends after update {update}: {wish[1]}. " + ("Weights are not finite, so no checkpoint was made; --resume goes on from the "
                                                         "one before" if broken else "--resume goes on from here"))
        finish(wish[0])
        sys.exit(wish[0])
# ---- end of checkpoints ----


# ---- generation ----
def sample(logits, temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """One token for each row of logits (B, V) -> (B,), by the inverse of the cumulative distribution: for a large
    vocabulary much faster than torch.multinomial."""
    logits, tokens = logits.float() / temperature, None
    if top_k or top_p < 1:
        logits, tokens = logits.topk(min(top_k or logits.shape[1], logits.shape[1]))  # (B, k), in falling order
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    if top_p < 1:
        cumulative = probabilities.masked_fill(cumulative - probabilities >= top_p, 0).cumsum(-1)
    total = cumulative[:, -1:]
    draw = torch.rand(total.shape, generator=generator, device=total.device) * total
    draw = torch.minimum(draw, total.nextafter(torch.zeros_like(total)))  # a draw of `total` would fall behind the last
    choice = torch.searchsorted(cumulative, draw, right=True).clamp(max=cumulative.shape[1] - 1)  # NaN goes beyond the end
    return (choice if tokens is None else tokens.gather(1, choice)).squeeze(1)


def generate(model, queries, query_mask, args, tokenizer, generator):
    """Samples a response to each query -> responses (B, T) right-padded, mask (B, T) True up to EOS, EOS included.

    queries (B, Q) left-padded, query_mask (B, Q). Ends when every row has ended. The pad token is never sampled.
    """
    inputs, attention, cache = queries, query_mask, None
    positions = (query_mask.long().cumsum(1) - 1).clamp(min=0)
    running = torch.ones(len(queries), dtype=torch.bool, device=queries.device)
    responses, mask = [], []
    with torch.inference_mode():
        while len(responses) < args.max_response_length and running.any():
            output = model(input_ids=inputs, attention_mask=attention.long(), position_ids=positions, past_key_values=cache,
                           use_cache=True, logits_to_keep=1)
            logits, cache = output.logits[:, -1], output.past_key_values
            logits[:, tokenizer.pad_token_id] = -math.inf
            token = sample(logits, args.temperature, args.top_k, args.top_p, generator)
            responses.append(token.where(running, tokenizer.pad_token_id))
            mask.append(running)
            running = running & (token != tokenizer.eos_token_id)
            inputs, positions = responses[-1][:, None], positions[:, -1:] + 1
            attention = torch.cat([attention, mask[-1][:, None]], 1)
    return torch.stack(responses, 1), torch.stack(mask, 1)  # outside inference mode: they enter backward passes
# ---- end of generation ----


class TokenLogprobs(torch.autograd.Function):
    """log softmax(logits / temperature) of the chosen tokens, and the entropy (no gradient): inputs (N, H), the weight of the
    model's head (V, H), tokens (N,) -> (N,), (N,). With weight None the inputs are the logits (N, V) themselves.

    `chunk` rows at a time in one buffer, computed anew in the backward pass, in fp32 but for the matrix products, which
    are in the dtype of the inputs, as is the weight's gradient, the sum over the chunks: neither all logits nor their
    gradients ever exist together.
    """
    chunk = 128

    @staticmethod
    def chunks(inputs, weight, temperature):
        """-> slices of the rows with their logits / temperature in fp32, which the caller may overwrite, and their softmax."""
        buffers = [inputs.new_empty(min(TokenLogprobs.chunk, len(inputs)), len(inputs.T if weight is None else weight), dtype=dtype)
                   for dtype in (inputs.dtype, torch.float32)]
        for i in range(0, len(inputs), TokenLogprobs.chunk):
            rows = inputs[i:i + TokenLogprobs.chunk]
            out, p = (buffer[:len(rows)] for buffer in buffers)
            logits = (out.copy_(rows) if weight is None else torch.mm(rows, weight.T, out=out)).float()
            logits = logits if temperature == 1 else logits.div_(temperature)
            yield slice(i, i + len(rows)), logits, torch.softmax(logits, 1, out=p)

    @staticmethod
    def forward(ctx, inputs, weight, tokens, temperature, with_entropy=True):
        logprobs, entropy = torch.zeros(2, len(tokens), device=tokens.device)
        for part, logits, p in TokenLogprobs.chunks(inputs, weight, temperature):
            log_total = logits.amax(1) - p.amax(1).log()  # log sum exp, from two numbers that are never tiny
            logprobs[part] = logits.gather(1, tokens[part, None]).squeeze(1) - log_total
            if with_entropy:
                entropy[part] = log_total - torch.linalg.vecdot(p, logits.clamp_(min=torch.finfo(torch.float32).min))  # no 0 * -inf
        ctx.save_for_backward(inputs, weight, tokens)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, gradient, _):
        inputs, weight, tokens = ctx.saved_tensors
        to_inputs = torch.empty_like(inputs)
        to_weight = None if weight is None else torch.zeros_like(weight)
        gradient = (gradient[:, None] / -ctx.temperature).to(inputs.dtype)
        for part, _, p in TokenLogprobs.chunks(inputs, weight, ctx.temperature):
            change = p.scatter_add_(1, tokens[part, None], p.new_full((len(p), 1), -1)).to(inputs.dtype)  # softmax - one-hot
            if weight is None:
                torch.mul(change, gradient[part], out=to_inputs[part])
            else:
                torch.mm(change, weight, out=to_inputs[part]).mul_(gradient[part])
                to_weight.addmm_(change.T, inputs[part] * gradient[part])
        return to_inputs, to_weight, None, None, None


def model_inputs(queries, query_mask, responses, mask):
    """Inputs of a forward pass over query and response but for the last token, which predicts nothing: left-padded
    rows with the position ids that they would have alone. All (B, Q + T - 1)."""
    attention = torch.cat([query_mask, mask], 1)[:, :-1].long()
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.cat([queries, responses], 1)[:, :-1], "attention_mask": attention, "position_ids": positions}


def response_logprobs(model, queries, query_mask, responses, mask, temperature, with_entropy=True):
    """-> log-probabilities of the responses' tokens and entropies of the distributions they come from, both (B, T).
    Entropies are a tenth of the time; without them they are 0.

    The model's head gives these two in place of logits, which at 256,000 tokens are most of the memory of an update. A
    model that does something to its logits behind the head (Gemma 2 caps them) gets it done on all of them.
    """
    inputs = model_inputs(queries, query_mask, responses, mask) | {"use_cache": False, "logits_to_keep": responses.shape[1]}
    head, made = model.get_output_embeddings(), []

    def instead(hidden):  # (B, T, H) -> (B, T, 2)
        pair = TokenLogprobs.apply(hidden.flatten(0, 1), head.weight, responses.flatten(), temperature, with_entropy)
        made.append(torch.stack([x.view_as(responses) for x in pair], -1))
        return made[0]

    if head.bias is None and not getattr(model, "shapes_logits", False):
        head.forward = instead
        try:
            logits = model(**inputs).logits
        finally:
            del head.forward
        if logits is made[0]:
            return logits.unbind(-1)
        model.shapes_logits = True
    logits = model(**inputs).logits  # (B, T, V)
    logprobs, entropy = TokenLogprobs.apply(logits.flatten(0, 1), None, responses.flatten(), temperature, with_entropy)
    return logprobs.view_as(responses), entropy.view_as(responses)


def response_values(critic, queries, query_mask, responses, mask):
    """-> V(s_t) (B, T): the critic's output at the token before each response token, the position that predicts it."""
    return critic(**model_inputs(queries, query_mask, responses, mask))[:, -responses.shape[1]:]


# ---- functions by name ----
def load_function(spec):
    """The function that FILE.py:FUNCTION names; exits with a sentence where there is none."""
    path, _, name = spec.rpartition(":")
    if not os.path.isfile(path):
        sys.exit(f"{STAGE}: --reward {spec} must be FILE.py:FUNCTION, and there is no file {path}")
    module_spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        sys.exit(f"{STAGE}: --reward {spec} must be FILE.py:FUNCTION, and {path} has no function {name}")
    return getattr(module, name)
# ---- end of functions by name ----


def rule_reward(function, tokenizer, device):
    """A function f(prompts, responses, rows) -> list of floats as one of rows and token ids -> scores (B,)."""
    def score(rows, responses):
        texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
        try:
            scores = list(function([row["prompt"] for row in rows], texts, rows))
        except Exception as error:  # whatever a function of the user's raises; one row at a time shows for which
            for row, text in zip(rows, texts):
                try:
                    function([row["prompt"]], [text], [row])
                except Exception as own:
                    sys.exit(f"{STAGE}: the reward function raised {own!r} for the response {text!r} to {row['prompt']!r}")
            sys.exit(f"{STAGE}: the reward function raised {error!r}")
        if len(scores) != len(texts):
            sys.exit(f"{STAGE}: the reward function gave {len(scores)} scores for {len(texts)} responses")
        for i, value in enumerate(scores):
            try:
                scores[i] = float(value)
            except (TypeError, ValueError):
                scores[i] = math.nan
            if not math.isfinite(scores[i]):
                sys.exit(f"{STAGE}: the reward function must give a finite number for each response, and gave {value!r} for "
                         f"the response {texts[i]!r} to {rows[i]['prompt']!r}")
        return torch.tensor(scores, device=device)
    return score


def model_reward(name, tokenizer, args, device):
    """A reward model as a function of rows and responses (lists of token ids) -> scores (B,). Where its tokenizer is not
    the policy's, it reads the same text in its own tokens."""
    own = load_tokenizer(name)
    same = own.get_vocab() == tokenizer.get_vocab()
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model, missing = load(AutoModelForSequenceClassification, name, own, dtype=dtype)
    if model.config.num_labels != 1 or missing:
        sys.exit(f"{STAGE}: {name} is no reward model: it has {model.config.num_labels} label(s) instead of one, or no trained "
                 f"head (weights not found: {', '.join(sorted(missing)) or 'none'})")
    shard(model.requires_grad_(False), args, device)

    def tokens(row, response):
        if same:
            return row["ids"] + response
        prompt, answer = encode(own, row["prompt"], tokenizer.decode(response, skip_special_tokens=True))
        return prompt + (answer if response[-1] == tokenizer.eos_token_id else answer[:-1])

    @torch.no_grad()
    def score(rows, responses):
        sequences, scores = [tokens(row, response) for row, response in zip(rows, responses)], torch.zeros(len(rows), device=device)
        longest_first = sorted(range(len(rows)), key=lambda i: -len(sequences[i]))
        for i in range(0, len(rows), args.micro_batch_size):
            part = longest_first[i:i + args.micro_batch_size]
            ids, mask = pad([sequences[k] for k in part], own.pad_token_id, device)
            scores[part] = model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].float()
        return scores
    return score


def token_rewards(logprobs, ref_logprobs, scores, mask, kl_coef):
    """r_t = -kl_coef * (log pi_old - log pi_sft), plus the score (B,) on the last real token (section 2) -> (B, T).

    >>> mask = torch.tensor([[True, True, False]])
    >>> token_rewards(torch.tensor([[-1.0, -2.0, 0.0]]), torch.tensor([[-2.0, -2.0, 9.0]]), torch.tensor([3.0]), mask, 0.1)
    tensor([[-0.1000,  3.0000,  0.0000]])
    """
    penalty = (-kl_coef * (logprobs - ref_logprobs)).masked_fill(~mask, 0)
    return penalty.scatter_add(1, mask.sum(1, keepdim=True) - 1, scores[:, None].to(penalty))


def micro_batches(rollout, size):
    """The rows of a rollout, `size` at a time, the longest first -> pairs of their indices and of a dict of their part of
    each tensor, without the columns that are padding for all of them."""
    query_mask, mask = rollout["query_mask"], rollout["mask"]
    for rows in (query_mask.sum(1) + mask.sum(1)).argsort(descending=True, stable=True).split(size):
        Q, T = query_mask[rows].sum(1).max(), mask[rows].sum(1).max()
        columns = {"queries": slice(-Q, None), "query_mask": slice(-Q, None)}
        yield rows, {name: x[rows, columns.get(name, slice(T))] if x.dim() > 1 else x[rows] for name, x in rollout.items()}


@torch.no_grad()
def make_rollout(rows, generator, policy, ref, critic, score, args, tokenizer, device, training=False):
    """Samples a response to each row's prompt and judges it -> the rollout, a dict of tensors, and seconds by phase.

    queries, query_mask (B, Q) · responses, mask, logprobs, ref_logprobs, entropy, values, rewards (B, T) · scores (B,) as
    they enter the rewards, raw_scores (B,) before --score_clip. `training`, with all rows in one micro-batch: the update's
    first forward pass would be the same as that of the rollout, so this one is kept for it, as new_logprobs and new_values.
    """
    began = time.perf_counter()
    queries, query_mask = pad([row["ids"] for row in rows], tokenizer.pad_token_id, device, left=True)  # (B, Q)
    with unsharded(policy):
        if device.type == "cuda":
            torch.cuda.synchronize()
        gathered = time.perf_counter()
        responses, mask = generate(policy, queries, query_mask, args, tokenizer, generator)
    sampled = time.perf_counter()
    rollout = {"queries": queries, "query_mask": query_mask, "responses": responses, "mask": mask}
    logprobs, entropy, ref_logprobs, values = torch.zeros(4, *mask.shape, device=device)
    for i, part in micro_batches(rollout, args.micro_batch_size):
        batch, columns = part.values(), slice(part["mask"].shape[1])
        with torch.set_grad_enabled(training and len(i) == len(rows)):
            new_logprobs, new_entropy = response_logprobs(policy, *batch, args.temperature)
            new_values = response_values(critic, *batch)
        logprobs[i, columns], entropy[i, columns], values[i, columns] = new_logprobs.detach(), new_entropy.detach(), new_values.detach()
        ref_logprobs[i, columns] = response_logprobs(ref, *batch, args.temperature, False)[0]
    logprobs, entropy, ref_logprobs, values = (x.masked_fill(~mask, 0) for x in (logprobs, entropy, ref_logprobs, values))
    raw_scores = score(rows, [response[real].tolist() for response, real in zip(responses, mask)])
    scores = raw_scores if args.score_clip is None else raw_scores.clamp(-args.score_clip, args.score_clip)
    rollout |= {"logprobs": logprobs, "ref_logprobs": ref_logprobs, "entropy": entropy, "values": values, "scores": scores,
                "raw_scores": raw_scores, "rewards": token_rewards(logprobs, ref_logprobs, scores, mask, args.kl_coef)}
    if new_logprobs.requires_grad:
        with torch.enable_grad():  # back into the order of `rows`
            rollout |= {"new_logprobs": new_logprobs[i.argsort()], "new_values": new_values[i.argsort()]}
    return rollout, {"time/gather": gathered - began, "time/rollout": sampled - began, "time/score": time.perf_counter() - sampled}


def gae(rewards, values, mask, gamma, lam):
    """Generalized advantage estimation over any sequence of actions, one step per action (equation 2):
    delta_k = r_k + gamma V_{k+1} - V_k, A_k = sum_i (gamma lam)^i delta_{k+i}, return_k = A_k + V_k, V after the last is 0.

    rewards, values (B, K), mask (B, K) True on the K_b actions of row b, its first columns -> advantages, returns (B, K).

    >>> gae(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.25]]), torch.tensor([[True, True]]), 1.0, 0.5)
    (tensor([[0.1250, 0.7500]]), tensor([[0.6250, 1.0000]]))
    """
    rewards, values = rewards.masked_fill(~mask, 0), values.masked_fill(~mask, 0)
    advantages = torch.zeros_like(values)
    advantage = next_value = torch.zeros_like(values[:, 0])
    for k in reversed(range(values.shape[1])):
        delta = rewards[:, k] + gamma * next_value - values[:, k]
        advantage = delta + gamma * lam * advantage
        advantages[:, k], next_value = advantage, values[:, k]
    return advantages, advantages + values


# ---- advantages ----
import termination


@dataclass
class AdvantageArgs:
    gamma: float = arg(1.0, "discount per macro action")
    lam: float = arg(0.95, "lambda of GAE, per macro action")
    termination: Literal["fixed_ngram", "randomized_ngram", "perplexity", "parsing"] = arg(
        "fixed_ngram", "what ends a macro action (section 3.2.1)")
    ngram: float = arg(5, "tokens per macro action of fixed_ngram, and of what no parser accepts; inf: the whole response")
    parser: Literal["stanza", "link-grammar", "python"] = arg("link-grammar", "of parsing: two for English, one for code")
    cutoff: int = arg(5, "parsing: a constituent of fewer tokens is one macro action")
    value_weighting: Literal["equal", "unit", "position_decayed"] = arg("equal", "sigma of the macro value (appendix D.1)")
    macro_reward: Literal["sum", "mean"] = arg("sum", "of the KL penalties in a macro action; the score is added whole")

    def __post_init__(self):
        if self.termination == "parsing":
            termination.parser(self.parser)  # a parser that is not installed is missed now, not in the first update


def macro_starts(rollout, args, tokenizer=None, generator=None):
    """-> starts (B, T), True on the first token of every macro action, by the termination condition of `args`. Rows that a
    parser rejects are all False."""
    if args.termination == "fixed_ngram":
        return termination.fixed_ngram(rollout["mask"], args.ngram)
    if args.termination == "randomized_ngram":
        return termination.randomized_ngram(rollout["mask"], generator=generator)
    if args.termination == "perplexity":
        return termination.perplexity(rollout["ref_logprobs"], rollout["mask"])
    return termination.parsing(rollout["responses"], rollout["mask"], tokenizer, termination.parser(args.parser), args.cutoff)


def per_action(x, ids, mask):
    """Sums of x (B, T) over the tokens of each macro action -> (B, K), K the largest number of them in a row."""
    sums = torch.zeros(len(x), int(ids.max()) + 1, dtype=x.dtype, device=x.device)
    return sums.scatter_add_(1, ids, x.masked_fill(~mask, 0))


def macro_values(values, ids, mask, weighting):
    """V(s_tau, omega_tau) = sum_i sigma_i V(s_{t_tau + i}) (B, K): "equal" sigma_i = 1 / |omega|, "unit" the last token's
    value, "position_decayed" sigma_i in proportion to 1 / (|omega| - i). values, ids, mask (B, T)."""
    sigma = torch.ones_like(values)
    if weighting != "equal":
        end = per_action(sigma, ids, mask).cumsum(1).gather(1, ids)  # (B, T): the position behind each token's macro action
        distance = end - torch.arange(values.shape[1], device=values.device)  # |omega| - i, from |omega| down to 1
        sigma = (distance == 1).to(values) if weighting == "unit" else 1 / distance
    total, weight = per_action(values * sigma, ids, mask), per_action(sigma, ids, mask)
    return total / weight.where(weight > 0, 1)


def macro_rewards(rewards, ids, mask, mode="sum"):
    """R_tau (B, K): the sum (rho = 1, as in the paper) or mean of the rewards (B, T) of each macro action's tokens."""
    total = per_action(rewards, ids, mask)
    return total if mode == "sum" else total / per_action(torch.ones_like(rewards), ids, mask).clamp(min=1)


def compute_advantages(rollout, args, tokenizer=None, generator=None):
    """GAE with one step per macro action; every token of a macro action has its advantage and return -> (B, T), (B, T),
    metrics."""
    mask, starts = rollout["mask"], macro_starts(rollout, args, tokenizer, generator)
    rejected = ~starts.any(1)
    if rejected.any():
        starts |= termination.fixed_ngram(mask, args.ngram) & rejected[:, None]
    ids, count = termination.macro_ids(starts), starts.sum(1)
    rewards = macro_rewards(rollout["rewards"], ids, mask, args.macro_reward)
    if args.macro_reward == "mean":  # the mean has 1 / |omega| of the score on the last token: add the rest of it
        last, length = count[:, None] - 1, per_action(torch.ones_like(rollout["rewards"]), ids, mask)
        rest = rollout["scores"].to(rewards)[:, None] * (1 - 1 / length.gather(1, last))
        rewards = rewards.scatter_add(1, last, rest)
    values = macro_values(rollout["values"], ids, mask, args.value_weighting)
    actions = torch.arange(values.shape[1], device=values.device) < count[:, None]  # (B, K)
    advantages, returns = (x.gather(1, ids).masked_fill(~mask, 0) for x in gae(rewards, values, actions, args.gamma, args.lam))
    return advantages, returns, {"macro/length": (mask.sum() / count.sum()).item(), "macro/count": count.float().mean().item(),
                                 "macro/parse_failures": rejected.sum().item()}
# ---- end of advantages ----


def whiten(advantages, mask, device):
    """Shifts and scales to mean 0, variance 1 over the real tokens of all ranks; 0 elsewhere."""
    sums = all_sum({"n": mask.sum(), "x": advantages.sum(), "xx": advantages.double().square().sum()}, device)
    mean = sums["x"] / sums["n"]
    return ((advantages - mean) / math.sqrt(sums["xx"] / sums["n"] - mean**2 + 1e-8)).masked_fill(~mask, 0)


def policy_loss(new_logprobs, logprobs, advantages, mask, clip_ratio):
    """PPO's clipped loss max(-A ratio, -A clip(ratio, 1 - c, 1 + c)), summed over the real tokens, and sums over them of
    approxkl, E[ratio - 1 - log ratio], and of clipfrac, the tokens on which the clipped term decides. All (B, T)."""
    log_ratio = (new_logprobs - logprobs).masked_fill(~mask, 0)
    advantages = advantages.masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
    metrics = {"policy/approxkl": (ratio - 1 - log_ratio).sum().item(), "policy/clipfrac": (clipped > plain).sum().item()}
    return torch.maximum(plain, clipped).sum(), metrics


def value_loss(new_values, values, returns, mask, clip_value):
    """PPO's clipped value loss 0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2), summed over the real tokens,
    and the sum over them of clipfrac, the tokens on which the clipped term decides. All (B, T)."""
    new_values, values, returns = (x.masked_fill(~mask, 0) for x in (new_values, values, returns))
    plain = (new_values - returns).square()
    clipped = (values + (new_values - values).clamp(-clip_value, clip_value) - returns).square()
    return 0.5 * torch.maximum(plain, clipped).sum(), {"value/clipfrac": (clipped > plain).sum().item()}


def update_models(policy, critic, optimizers, rollout, args, device):
    """One optimizer step of policy and critic (--ppo_epochs of them) on a rollout with advantages and returns.

    The loss is the sum over the update's tokens / their number, over every micro-batch and rank -> metrics.
    """
    world, mask = dist.get_world_size(), rollout["mask"]
    tokens = all_sum({"tokens": mask.sum()}, device)["tokens"]
    sums = dict.fromkeys(("policy/loss", "policy/approxkl", "policy/clipfrac", "value/loss", "value/clipfrac"), 0.0)
    metrics, deviation = {}, torch.zeros((), device=device)
    for epoch in range(args.ppo_epochs):
        for _, part in micro_batches(rollout, args.micro_batch_size):
            batch = [part[name] for name in ("queries", "query_mask", "responses", "mask")]
            kept = epoch == 0 and "new_logprobs" in part
            new_logprobs = part["new_logprobs"] if kept else response_logprobs(policy, *batch, args.temperature, False)[0]
            loss, figures = policy_loss(new_logprobs, part["logprobs"], part["advantages"], part["mask"], args.clip_ratio)
            (loss * world / tokens).backward()  # FSDP averages over the ranks; the loss is a sum
            new_values = part["new_values"] if kept else response_values(critic, *batch)
            critic_loss, more = value_loss(new_values, part["values"], part["returns"], part["mask"], args.clip_value)
            (critic_loss * world / tokens).backward()
            for name, value in {"policy/loss": loss.item(), "value/loss": critic_loss.item(), **figures, **more}.items():
                sums[name] += value
            if epoch == 0:  # the weights are still those of the rollout, so the ratio should be 1
                log_ratio = (new_logprobs.detach() - part["logprobs"]).masked_fill(~part["mask"], 0)
                deviation = torch.maximum(deviation, log_ratio.expm1().abs().max())
        for name, model in (("policy", policy), ("value", critic)):
            metrics[f"norm/{name}_grad"] = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor().item()
        finite = math.isfinite(metrics["norm/policy_grad"] + metrics["norm/value_grad"])
        metrics["skipped"] = metrics.get("skipped", 0) + (not finite)
        for optimizer in optimizers:
            if finite:
                optimizer.step()
            optimizer.zero_grad()
    dist.all_reduce(deviation, dist.ReduceOp.MAX)
    means = {name: value / tokens / args.ppo_epochs for name, value in all_sum(sums, device).items()}
    return means | metrics | {"val/ratio_dev": deviation.item()}


def sample_metrics(rollout, texts, rows, args, tokenizer, device):
    """What a rollout is like, over all ranks: means over its responses, the entropy over its tokens."""
    mask = rollout["mask"]
    kl = (rollout["logprobs"] - rollout["ref_logprobs"]).sum(1)  # (B,)
    ended = ((rollout["responses"] == tokenizer.eos_token_id) & mask).any(1)
    sums = {"responses": len(mask), "objective/kl": kl.sum(), "objective/entropy": rollout["entropy"].sum(),
            "objective/scores": rollout["raw_scores"].sum(),
            "objective/rlhf_reward": (rollout["scores"] - args.kl_coef * kl).sum(),
            "response/length": mask.sum(), "response/eos_rate": ended.sum()}
    if args.task == "toy":
        sums["objective/gold"] = sum(toy_gold(row["prompt"], text, row["sentences"]) for row, text in zip(rows, texts))
    sums = all_sum(sums, device)
    responses, tokens = sums.pop("responses"), sums["response/length"]
    return {name: value / (tokens if name == "objective/entropy" else responses) for name, value in sums.items()}


def advantage_metrics(rollout, device):
    """L2 norms of advantages and values over the update's tokens, and the share of the returns' variance that the
    critic explains, over all ranks."""
    mask = rollout["mask"]
    advantages, values, returns = (rollout[name][mask].double() for name in ("advantages", "values", "returns"))
    error = returns - values
    sums = all_sum({"n": mask.sum(), "a": advantages.square().sum(), "v": values.square().sum(), "e": error.sum(),
                    "ee": error.square().sum(), "r": returns.sum(), "rr": returns.square().sum()}, device)
    unexplained, variance = (sums[2 * x] / sums["n"] - (sums[x] / sums["n"])**2 for x in "er")
    return {"norm/advantages": math.sqrt(sums["a"]), "norm/values": math.sqrt(sums["v"]),
            "value/explained_var": 1 - unexplained / max(variance, 1e-12)}


def linear_schedule(update, updates, warmup_steps):
    """Linear warm-up, then linearly down to 0 after the last of `updates`."""
    if update < warmup_steps:
        return (update + 1) / warmup_steps
    return (updates - update) / max(1, updates - warmup_steps)


def load_prompts(args, tokenizer):
    """-> training rows and held-out rows of this stage, each with its prompt's token `ids`; long prompts are left out."""
    parts = []
    for rows in load_rows(args, 2, ["prompt", "input_output"] if args.task == "apps" else ["prompt"], tokenizer):
        rows = [row | {"ids": encode(tokenizer, row["prompt"])[0]} for row in rows]
        parts.append([row for row in rows if len(row["ids"]) <= args.max_prompt_length])
        if len(parts[-1]) < len(rows):
            longest = max(range(len(rows)), key=lambda i: len(rows[i]["ids"]))
            say(f"{len(rows) - len(parts[-1])} of {len(rows)} prompts are longer than --max_prompt_length "
                f"{args.max_prompt_length} tokens and are left out, the longest: {rows[longest]['prompt'][:60]!r}")
    return parts


def seeded(device, *numbers):
    """A random generator of its own for every combination of numbers (seed, update, rank ...)."""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


def held_out_samples(update, roll, rows, args, tokenizer, device):
    """Samples answers to held-out prompts, with the same random numbers at every evaluation -> mean figures over all
    ranks, under eval/, and this rank's answers. Both go to the output folder."""
    rollout, _ = roll(rows, seeded(device, args.seed, 2**32, dist.get_rank()))
    texts = tokenizer.batch_decode(rollout["responses"], skip_special_tokens=True)
    metrics = sample_metrics(rollout, texts, rows, args, tokenizer, device)
    metrics = {f"eval/{name.split('/')[1]}": value for name, value in metrics.items()}
    write(args, "metrics.jsonl", {"update": update, **metrics})
    answers = []
    for row, text, answer_score in zip(rows, texts, rollout["raw_scores"].tolist()):
        answers.append({"update": update, "prompt": row["prompt"], "response": text, "score": answer_score})
        if args.task == "toy":
            answers[-1]["gold"] = toy_gold(row["prompt"], text, row["sentences"])
        write(args, "samples.jsonl", answers[-1])
    return metrics, answers


def logged_samples(update, args):
    """What held_out_samples gave after an update of the run that is resumed, read from the output folder, on rank 0."""
    if dist.get_rank() > 0:
        return None
    files = [map(json.loads, Path(args.output_dir, name).read_text().splitlines()) for name in ("metrics.jsonl", "samples.jsonl")]
    figures, answers = ([row for row in file if row["update"] == update and "lr" not in row] for file in files)
    return {name: value for name, value in (figures or [{}])[0].items() if name != "update"}, answers


def show(rows, before, after, args):
    """Prints three prompts with the SFT model's and the trained policy's answers and scores."""
    width = min(shutil.get_terminal_size((120, 24)).columns, 120)
    before, after = ({answer["prompt"]: answer for answer in answers} for answers in (before, after))
    for prompt in [row["prompt"] for row in rows if row["prompt"] in before.keys() & after.keys()][:3]:
        lines, old, new = [("prompt", prompt)], before[prompt], after[prompt]
        for name, answer in (("SFT", old), (STAGE, new)):
            gold = f", gold {answer['gold']:.2f}" if "gold" in answer else ""
            lines.append((name, f"[score {answer['score']:.2f}{gold}] {answer['response']}"))
        print("-" * width)
        for name, text in lines:
            print(textwrap.fill(text, width, initial_indent=f"{name:<8}", subsequent_indent=" " * 8))
    print("-" * width)


def main(argv=None):
    args = parse_args(Args, AdvantageArgs, argv=argv, presets=presets)
    os.environ["MA_RLHF_SANDBOX"] = args.sandbox  # evaluate.py reads it
    if args.task == "apps" and not args.reward:
        args.reward = str(Path(__file__).with_name("evaluate.py")) + ":compiler_reward"
        load_function(args.reward)([], [], [])  # so that a sandbox that does not work is found now, before models are loaded
    function = load_function(args.reward) if ".py:" in (args.reward or "") else None
    policy_name = earlier_stage(args, "sft", args.policy)
    reward_name = None if function else earlier_stage(args, "reward", args.reward)
    device, rank, world = start(args)
    tokenizer = load_tokenizer(policy_name)
    train, held_out = load_prompts(args, tokenizer)
    held_out = held_out[:args.eval_size]
    held_out = held_out[:len(held_out) // world * world][rank::world]
    per_epoch = len(train) // args.batch_size
    if not per_epoch or not held_out:
        sys.exit(f"{STAGE}: {len(train)} prompts to train on and {len(held_out) * world} held out, too few for --batch_size "
                 f"{args.batch_size} and {world} processes; give more data, or --all_rows true")
    updates = min(args.epochs * per_epoch, args.updates or math.inf)

    policy, _ = load(AutoModelForCausalLM, policy_name, tokenizer, dtype=torch.float32)
    limit = getattr(policy.config, "max_position_embeddings", math.inf)
    if args.max_prompt_length + args.max_response_length > limit:
        sys.exit(f"{STAGE}: {policy_name} has {limit} positions, too few for --max_prompt_length {args.max_prompt_length} and "
                 f"--max_response_length {args.max_response_length}")
    policy = shard(policy, args, device)
    ref = load(AutoModelForCausalLM, policy_name, tokenizer, dtype=torch.float32)[0].requires_grad_(False)
    if args.dtype == "bf16":
        for parameter in ref.parameters():  # not the buffers: rotary frequencies stay fp32, as they do in the policy
            parameter.data = parameter.data.bfloat16()
    ref = shard(ref, args, device)
    critic_name = args.critic or reward_name
    if not critic_name or load_tokenizer(critic_name).get_vocab() != tokenizer.get_vocab():
        say("the critic starts from the policy, with a new head: the reward has no model that reads the policy's tokens")
        critic_name = policy_name
    critic, _ = load(AutoModelForSequenceClassification, critic_name, tokenizer, num_labels=1, dtype=torch.float32)
    critic = shard(Critic(critic), args, device)
    score = rule_reward(function, tokenizer, device) if function else model_reward(reward_name, tokenizer, args, device)
    lock = open_output(args)  # held until main returns
    optimizers = [torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
                  for model, lr in ((policy, args.policy_lr), (critic, args.critic_lr))]
    say(f"{len(train)} prompts, {updates} updates of {args.batch_size} responses on {world} process(es), {device.type}")
    roll = functools.partial(make_rollout, policy=policy, ref=ref, critic=critic, score=score, args=args, tokenizer=tokenizer,
                             device=device)
    models, launched, bad = (policy, critic), time.time(), 0
    done = load_checkpoint(args, models, optimizers)
    first = logged_samples(0, args) if done else held_out_samples(0, roll, held_out, args, tokenizer, device)
    last = logged_samples(done, args) if done else first
    catch_signals()

    bar = progress(range(done, updates), rank)
    for update in bar:
        began = time.perf_counter()
        rows = [train[i] for i in batch_indices(update, len(train), args.batch_size, args.seed)[rank::world]]
        rollout, metrics = roll(rows, seeded(device, args.seed, update, rank), training=True)
        texts = tokenizer.batch_decode(rollout["responses"], skip_special_tokens=True)

        scored = time.perf_counter()
        advantages, returns, macro = compute_advantages(rollout, args, tokenizer, seeded(device, args.seed, update, rank, 1))
        metrics["time/termination"] = time.perf_counter() - scored
        if args.whiten_advantages:
            advantages = whiten(advantages, rollout["mask"], device)
        rollout |= {"advantages": advantages, "returns": returns}
        for optimizer, lr in zip(optimizers, (args.policy_lr, args.critic_lr)):
            optimizer.param_groups[0]["lr"] = lr * linear_schedule(update, updates, args.warmup_steps)
        metrics |= update_models(policy, critic, optimizers, rollout, args, device)
        metrics["time/update"] = time.perf_counter() - scored

        metrics |= sample_metrics(rollout, texts, rows, args, tokenizer, device) | advantage_metrics(rollout, device)
        metrics |= {name: value / world for name, value in all_sum(macro, device).items()}
        metrics["tokens_per_s"] = metrics["response/length"] * args.batch_size / (time.perf_counter() - began)
        metrics |= {"lr": optimizers[0].param_groups[0]["lr"], "update": update + 1, "episodes": (update + 1) * args.batch_size}
        write(args, "metrics.jsonl", metrics)
        bar.set_postfix({name.split("/")[1]: f"{metrics[name]:.2f}" for name in
                         ("objective/scores", "objective/gold", "objective/kl", "response/length") if name in metrics}, refresh=False)
        if update + 1 == updates or args.eval_every and (update + 1) % args.eval_every == 0:
            last = held_out_samples(update + 1, roll, held_out, args, tokenizer, device)
        bad = bad + 1 if metrics["skipped"] else 0
        far = metrics["objective/kl"] > (args.max_kl or math.inf)
        reason = f"the KL is {metrics['objective/kl']:.1f}, more than --max_kl {args.max_kl}" if far else None
        end_of_update(args, update + 1, models, optimizers, launched, bad, reason)

    save(policy, tokenizer, Path(args.output_dir, "final"))
    save(critic, tokenizer, Path(args.output_dir, "final", "critic"))
    if rank == 0:
        show(held_out, first[1], last[1], args)
        print(f"{f'{len(held_out) * world} held-out prompts':<24}{'SFT':>10}{STAGE:>10}   after {updates} updates")
        for name in [name for name in last[0] if name in first[0]]:  # none where the run was resumed without its logs
            print(f"{name.removeprefix('eval/'):<24}{first[0][name]:>10.2f}{last[0][name]:>10.2f}")
        print(f"{args.output_dir}/: final has the policy (and critic), metrics.jsonl the figures of every update, samples.jsonl "
              "answers to held-out prompts")
    finish()


if __name__ == "__main__":
    main()
