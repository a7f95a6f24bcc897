"""Stage 1 of MA-RLHF, supervised fine-tuning (section 4.1 of the paper): maximise log pi(answer | prompt).

    python sft.py                                                    the embedded toy task, one process
    torchrun --nproc_per_node=8 sft.py --task pairs --data_path rows.jsonl --model google/gemma-2b --lr 5e-5 --batch_size 512
    torchrun --nnodes=4 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 sft.py --replicate 4 --batch_size 512 ...

Leaves runs/<task>/sft/: final/ (Hugging Face format), metrics.jsonl, samples.jsonl, args.json.
"""
import argparse
import fcntl
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import sys
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
import torch.nn.functional as F
import transformers
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, LlamaConfig, PreTrainedTokenizerFast

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
    data_path: Optional[str] = arg(None, "file or folder in JSONL, Parquet or Arrow: pairs with columns prompt and chosen, or "
                                         "a copy of the paper's data set in its own columns, which else comes from the hub")
    eval_path: Optional[str] = arg(None, "the same for held-out rows; when not given, those that the folder (by the file's "
                                         "name) or the hub has, else 5% of the rows")
    all_rows: bool = arg(False, "train on every row, not only on this stage's share (20% SFT, 40% reward, 40% PPO; apps 20, "
                                "0, 80)")
    model: Optional[str] = arg(None, "folder or hub name of the model to start from; a small new Llama on the toy task")
    output_dir: Optional[str] = arg(None, "folder for everything this run leaves; runs/<task>/sft when not given")
    seed: int = arg(0, "seed of the weights made here and of the order of the rows")
    batch_size: int = arg(16, "sequences per optimizer step, over all processes")
    micro_batch_size: int = arg(16, "sequences per process and forward pass")
    lr: float = arg(3e-3, "peak learning rate of AdamW; cosine schedule")
    warmup_ratio: float = arg(0.1, "share of the updates in which the learning rate rises")
    weight_decay: float = arg(0.01, "weight decay of AdamW")
    epochs: int = arg(3, "passes over the rows")
    updates: Optional[int] = arg(None, "at most this many optimizer steps")
    max_length: int = arg(1024, "tokens of prompt and answer after which a row is cut off")
    eval_every: int = arg(50, "updates between evaluations on held-out rows; 0: only at the end")
    eval_size: int = arg(256, "held-out rows per evaluation")
    dtype: Literal["fp32", "bf16"] = arg("fp32", "forward and backward precision; weights and reductions stay fp32")
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


def presets(task):
    """This stage's rows of Table 5, and the hub's name of each model."""
    webgpt = task == "webgpt"
    table = {  # model, batch size, epochs, learning rate, warm-up ratio, and what fits a GPU of 80 GB
        "gemma-2b": ("google/gemma-2b", 64 if webgpt else 512, 3, 1e-4 if webgpt else 5e-5, 0.1, 4),
        "gemma-7b": ("google/gemma-7b", 128, 5 if webgpt else 1, 2e-5, 0.1, 2),
        "gemma-2-27b": ("google/gemma-2-27b", 128, 3, 5e-6, 0.1, 1),
        "codegemma-2b": ("google/codegemma-2b", 16, 1, 5e-6, 0.0, 4),
        "codegemma-7b": ("google/codegemma-7b-it", 32, 1, 2e-6, 0.0, 2)}
    names = ("model", "batch_size", "epochs", "lr", "warmup_ratio", "micro_batch_size")
    common = {"weight_decay": 0.01, "max_length": 1024, "dtype": "bf16"}
    return {name: {**dict(zip(names, row)), **common} for name, row in table.items()}


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


def sft_loss(model, sequences, starts, pad_id, device):
    """-> sum over the answers' tokens of -log pi(token | everything before it).

    sequences: lists of token ids, prompt and answer; starts: the position at which each answer begins. Only the rows of
    the logits that predict an answer's token are taken to fp32.
    """
    ids, mask = pad(sequences, pad_id, device)  # (B, L)
    answer = mask & (torch.arange(ids.shape[1], device=device) >= torch.tensor(starts, device=device)[:, None])
    logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits  # (B, L, V)
    return F.cross_entropy(logits[:, :-1][answer[:, 1:]].float(), ids[:, 1:][answer[:, 1:]], reduction="sum")


# ---- cosine schedule ----
def cosine_schedule(update, updates, warmup_ratio):
    """Linear warm-up, then a cosine down to 0 after the last of `updates`."""
    warmup = math.ceil(warmup_ratio * updates)
    if update < warmup:
        return (update + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (update - warmup) / max(1, updates - warmup)))
# ---- end of cosine schedule ----


@torch.no_grad()
def held_out_loss(model, examples, args, pad_id, device):
    """Mean loss per answer token on held-out rows, over all ranks."""
    figures = {"loss": 0.0, "tokens": 0}
    for i in range(0, len(examples), args.micro_batch_size):
        sequences, starts = zip(*examples[i:i + args.micro_batch_size])
        figures["loss"] += sft_loss(model, sequences, starts, pad_id, device).item()
        figures["tokens"] += sum(map(len, sequences)) - sum(starts)
    figures = all_sum(figures, device)
    loss = figures["loss"] / figures["tokens"]
    return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 700))}


def show_samples(model, tokenizer, rows, args, device):
    """One sampled answer for each row, written to samples.jsonl beside the data's own. Every rank must call this."""
    for row in rows:
        ids = torch.tensor([encode(tokenizer, row["prompt"])[0]], device=device)
        if (room := getattr(model.config, "max_position_embeddings", 10**9) - ids.shape[1]) < 1:
            continue
        with unsharded(model):
            output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, synced_gpus=False,
                                    max_new_tokens=min(2 * len(encode(tokenizer, row["prompt"], row["chosen"])[1]), room),
                                    pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id)
        answer = tokenizer.decode(output[0, ids.shape[1]:], skip_special_tokens=True)
        write(args, "samples.jsonl", {"prompt": row["prompt"], "response": answer, "chosen": row["chosen"]})
        say(f"\n  prompt  {row['prompt']}\n  data    {row['chosen']}\n  model   {answer}")


def main(argv=None):
    args = parse_args(Args, argv=argv, presets=presets)
    if args.task != "toy" and not args.model:
        sys.exit(f"{STAGE}: --task {args.task} needs --model, the folder or hub name of the model to start from")
    device, rank, world = start(args)
    if args.model:
        tokenizer = load_tokenizer(args.model)
        model, _ = load(AutoModelForCausalLM, args.model, tokenizer, dtype=torch.float32)
    else:
        tokenizer = toy_tokenizer()
        model = AutoModelForCausalLM.from_config(LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))
    args.max_length = min(args.max_length, getattr(model.config, "max_position_embeddings", args.max_length))
    train_rows, eval_rows = load_rows(args, 0, ["prompt", "chosen"], tokenizer)
    train, held_out = [], []
    for rows, examples in ((train_rows, train), (eval_rows[:args.eval_size], held_out)):
        for row in rows:
            prompt, answer = encode(tokenizer, row["prompt"], row["chosen"])
            if len(prompt) < args.max_length:  # else nothing of the answer would be left
                examples.append(((prompt + answer)[:args.max_length], len(prompt)))
    held_out = held_out[:len(held_out) // world * world][rank::world]
    per_epoch = len(train) // args.batch_size
    if not per_epoch or not held_out:
        sys.exit(f"{STAGE}: {len(train)} rows to train on and {len(held_out) * world} held out, too few for --batch_size "
                 f"{args.batch_size} and {world} processes; give more data, or --all_rows true")
    updates = min(args.epochs * per_epoch, args.updates or math.inf)
    say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(train)} rows of {len(train_rows)} within "
        f"--max_length, {updates} updates of {args.batch_size} on {world} process(es), {device.type}")

    lock = open_output(args)  # held until main returns
    model = shard(model, args, device)
    optimizer = torch.optim.AdamW(model.parameters(), args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)
    done, launched, bad, metrics = load_checkpoint(args, [model], [optimizer]), time.time(), 0, {}
    catch_signals()
    bar = progress(range(done, updates), rank)
    for update in bar:
        began = time.perf_counter()
        batch = [train[i] for i in batch_indices(update, len(train), args.batch_size, args.seed)[rank::world]]
        tokens = sum(len(sequence) - start for sequence, start in batch)
        tokens = all_sum({"tokens": tokens}, device)["tokens"]
        loss = torch.zeros((), device=device)
        for i in range(0, len(batch), args.micro_batch_size):
            sequences, starts = zip(*batch[i:i + args.micro_batch_size])
            part = sft_loss(model, sequences, starts, tokenizer.pad_token_id, device) / tokens
            (part * world).backward()  # FSDP averages gradients over the ranks; the loss is a sum over them
            loss += part.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).full_tensor()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * cosine_schedule(update, updates, args.warmup_ratio)
        bad = 0 if norm.isfinite() else bad + 1
        if not bad:
            optimizer.step()
        optimizer.zero_grad()

        metrics = {"update": update + 1, "skipped": int(bad > 0), "episodes": (update + 1) * args.batch_size,
                   **all_sum({"loss": loss}, device), "norm/grad": norm.item(), "lr": optimizer.param_groups[0]["lr"],
                   "tokens_per_s": tokens / (time.perf_counter() - began)}
        if update + 1 == updates or args.eval_every and (update + 1) % args.eval_every == 0:
            metrics |= held_out_loss(model, held_out, args, tokenizer.pad_token_id, device)
            bar.set_postfix({"loss": f"{metrics['loss']:.3f}", "held out": f"{metrics['eval/loss']:.3f}"}, refresh=False)
        write(args, "metrics.jsonl", metrics)
        end_of_update(args, update + 1, [model], [optimizer], launched, bad)

    metrics = metrics or held_out_loss(model, held_out, args, tokenizer.pad_token_id, device)  # all updates were done before
    save(model, tokenizer, Path(args.output_dir, "final"))
    show_samples(model, tokenizer, eval_rows[:3], args, device)
    say(f"held-out perplexity {metrics['eval/perplexity']:.2f}; the model is in {args.output_dir}/final, "
        f"the figures in {args.output_dir}/metrics.jsonl")
    finish()


if __name__ == "__main__":
    main()
