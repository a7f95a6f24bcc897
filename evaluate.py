"""Every figure that the paper reports (section 4, appendix B.5), one command for each; JSONL in and out, so that each step
can be repeated or replaced.

    python evaluate.py generate --policy runs/toy/ma_ppo/final --output ma_ppo.jsonl     answers to held-out prompts
    torchrun --nproc_per_node=8 -- evaluate.py generate ...                              the same on several processes
    python evaluate.py score ma_ppo.jsonl --reward runs/toy/reward/final                 reward-model scores, into the file
    python evaluate.py compare ma_ppo.jsonl ppo.jsonl                                    win rate, also at equal length
    python evaluate.py judge ma_ppo.jsonl ppo.jsonl --base_url URL --judge_model NAME    win rate by a language model
    python evaluate.py human ma_ppo.jsonl ppo.jsonl --annotator NAME                     win rate by a person, blind
    python evaluate.py agreement compare.jsonl judge.jsonl human.jsonl                   of the three
    python evaluate.py best-of-n ma_ppo.jsonl ppo.jsonl                                  best score of N samples
    python evaluate.py pass-at-k samples.jsonl                                           program synthesis
    python evaluate.py plot curves PPO=runs/toy/ppo MA-PPO=runs/toy/ma_ppo               PNG or SVG
    python evaluate.py summary PPO=ppo.jsonl MA-PPO=ma_ppo.jsonl                         the paper's Table 2

Stage 3 on --task apps takes its reward from here: --reward evaluate.py:compiler_reward.
"""
import argparse
import functools
import hashlib
import http.client
import importlib.util
import json
import marshal
import math
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedTokenizerFast

STAGE = Path(__file__).stem


# ---- programs ----
# What a program may use, each time that it is run. Seconds and bytes; all but the wall time by the kernel.
WALL_TIME = 8
LIMITS = {"RLIMIT_CPU": 4, "RLIMIT_AS": 512 << 20, "RLIMIT_NPROC": 8, "RLIMIT_FSIZE": 4 << 20, "RLIMIT_NOFILE": 64, "RLIMIT_CORE": 0}
PYTHON = os.path.realpath(sys.executable)  # not the virtual environment's: programs have the standard library alone

# What runs inside: reads the job, gives up its rights, and runs the program. It knows no expected output, so there is
# no verdict in it to forge: whatever the program does, it can but print, or return, something that is compared outside.
HARNESS = """
import marshal, posix, resource, sys  # what Python has built in: os and json would double the time to start
with open(int(sys.argv[1]), "rb") as file:
    job = marshal.load(file)
if posix.getuid() == 0:
    posix.setgroups([])
    posix.setresgid(job["user"], job["user"], job["user"])
    posix.setresuid(job["user"], job["user"], job["user"])
for name, limit in job["limits"].items():
    resource.setrlimit(getattr(resource, name), (limit, limit))
posix.environ.clear()
sys.argv = ["program.py"]
sys.set_int_max_str_digits(0)
__builtins__.exit = __builtins__.quit = sys.exit
try:
    code = compile(job["program"], "program.py", "exec")
except BaseException:
    posix._exit(99)
if job["function"] is None:
    exec(code, {"__name__": "__main__"})
else:
    import json
    result = open(posix.dup(1), "w")
    posix.dup2(posix.open("/dev/null", posix.O_WRONLY), 1)
    scope = {"__name__": "program"}
    exec("import collections, functools, heapq, itertools, math, random, sys; from typing import *; from collections import *; "
         "from functools import *; from heapq import *; from itertools import *; from math import *", scope)
    exec(code, scope)
    function = scope[job["function"]] if job["function"] in scope else getattr(scope["Solution"](), job["function"])
    value = function(*job["arguments"])
    json.dump(value, result, default=lambda x: list(x) if hasattr(x, "__iter__") else repr(x))
    result.close()
    posix._exit(0)
"""


@functools.cache
def sandbox():
    """The command in front of an untrusted program: bubblewrap, with no network, no files but Python's own (read-only), an
    empty /tmp in memory, no environment, and processes that die with it. [] where the environment variable
    MA_RLHF_SANDBOX is none. Exits with a sentence where it does not work."""
    if os.environ.get("MA_RLHF_SANDBOX") == "none":
        print("WARNING: --sandbox none: programs that a model wrote run on this machine with nothing but limits on time, memory, "
              "processes and file sizes; they can read files and use the network", file=sys.stderr)
        return []
    shown = [PYTHON, f"{sys.base_prefix}/lib", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"]
    command = [shutil.which("bwrap") or "bwrap", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts",
               "--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv", "--dev", "/dev", "--remount-ro", "/dev",
               "--size", str(16 << 20), "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
    for folder in reversed(Path(PYTHON).parents[:-1]):  # which would else be closed to all but root
        command += ["--perms", "0755", "--dir", str(folder)]
    command += [word for path in shown if os.path.exists(path) for word in ("--ro-bind", path, path)]
    packages = (f"{sys.base_prefix}/lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages", "/usr/lib/python3/dist-packages")
    command += [word for path in packages if os.path.exists(path) for word in ("--tmpfs", path, "--remount-ro", path)]
    # root changes to another user inside (a limit on processes does not bind root), all others are in a user namespace
    command += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"] if os.geteuid() == 0 else ["--unshare-user"]
    command += ["--remount-ro", "/"]
    try:
        trial = subprocess.run([*command, PYTHON, "-I", "-S", "-c", "print(6 * 7)"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        trial = subprocess.CompletedProcess([], 1, "", str(error))
    if trial.stdout != "42\n":
        sys.exit(f"programs that a model wrote run in a sandbox, and bubblewrap does not work here ({trial.stderr.strip()[-200:]}): "
                 "apt-get install bubblewrap, give the container the right to make namespaces, or take the risk with --sandbox none")
    return command


def run_program(program, stdin="", function=None, arguments=()):
    """Runs an untrusted Python program once -> (status, output). status: "ran", "runtime" (it raised, or exceeded a limit)
    or "compile". output: what it printed, or, with the name of a `function`, what that returned, as JSON."""
    job = {"program": program, "function": function, "arguments": arguments, "limits": LIMITS,
           "user": 10_000 + threading.get_native_id() % 50_000}  # one for each program that runs now: the kernel counts by user
    with tempfile.TemporaryFile() as job_file, tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as printed:
        marshal.dump(job, job_file)
        job_file.seek(0)
        given.write(stdin.encode(errors="replace"))
        given.flush()
        with open(f"/proc/self/fd/{given.fileno()}", "rb") as read_only:
            process = subprocess.Popen(
                [*sandbox(), PYTHON, "-I", "-S", "-c", HARNESS, str(job_file.fileno())], stdin=read_only, stdout=printed,
                stderr=subprocess.DEVNULL, pass_fds=[job_file.fileno()], env={}, start_new_session=True)
        ended = os.pidfd_open(process.pid)  # Popen.wait with a time-out would look only every 50 ms
        try:
            code = process.wait() if select.select([ended], [], [], WALL_TIME)[0] else -1
        finally:  # of an interrupt too
            os.close(ended)
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            process.wait()
        printed.seek(0)
        return {0: "ran", 99: "compile"}.get(code, "runtime"), printed.read().decode(errors="replace")


def number(text):
    return int(text) if len(text) < 4000 else text  # int() refuses more digits, and nothing computes with them here


def same_output(printed, expected):
    """Whether two outputs are the same words, numbers with a decimal point or exponent up to 1e-5 (APPS' tolerance).

    >>> same_output("1  2.500001 no\\n", "1 2.5\\nno"), same_output("1000001", "1000000"), same_output("1", "1 2")
    (True, False, False)
    """
    printed, expected = printed.split(), expected.split()
    return len(printed) == len(expected) and all(map(same_word, printed, expected))


def same_word(a, b):
    if a == b or a.lstrip("+-").isdigit() and b.lstrip("+-").isdigit():
        return a == b
    try:
        return math.isclose(float(a), float(b), rel_tol=1e-5, abs_tol=1e-8)
    except ValueError:
        return False


def same_value(a, b):
    """Whether two values read from JSON are equal, floats up to 1e-5."""
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_value, a, b))
    if isinstance(a, float) and isinstance(b, (int, float)) or isinstance(b, float) and isinstance(a, int):
        return math.isclose(a, b, rel_tol=1e-5, abs_tol=1e-8)
    return a == b


def run_test(program, function, given, expected):
    """One test of an APPS problem -> "compile", "runtime", "pass" or "fail"."""
    lines = lambda text: "\n".join(map(str, text)) if isinstance(text, list) else str(text)
    if function is None:
        status, output = run_program(program, lines(given))
        return status if status != "ran" else "pass" if same_output(output, lines(expected)) else "fail"
    status, output = run_program(program, "", function, given)
    if status != "ran":
        return status
    try:
        value = json.loads(output, parse_int=number)
        wrapped = isinstance(expected, list) and len(expected) == 1 and same_value(value, expected[0])
        return "pass" if wrapped or same_value(value, expected) else "fail"
    except (ValueError, OverflowError, RecursionError):
        return "fail"


@functools.cache
def pool():
    """One thread for each core of this process; they wait for the programs that they start."""
    return ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def run_tests(programs, tests):
    """Runs each program on the tests of its problem, all cores at once; the same program on the same tests only once.

    programs: sources; tests: APPS' input_output, JSON texts -> for each program the list of its tests' results, "compile",
    "runtime", "pass" or "fail"; it is cut short after the first "compile" or "runtime".
    """
    sandbox()  # probed here, where its error ends the run and not a thread

    def one(key, function, given, expected):
        if key in ended:
            return None
        result = run_test(key[0], function, given, expected)
        if result in ("compile", "runtime"):
            ended.add(key)
        return result

    futures, ended = {}, set()
    for key in dict.fromkeys(zip(programs, tests)):
        problem = json.loads(key[1], parse_int=number)
        futures[key] = [pool().submit(one, key, problem.get("fn_name"), given, expected)
                        for given, expected in zip(problem["inputs"], problem["outputs"])]
    results = {key: [result for future in group if (result := future.result())] for key, group in futures.items()}
    return [results[key] for key in zip(programs, tests)]


def compiler_reward(prompts, responses, rows):
    """The adaptive compiler signal of the paper (appendix B.5): -1 for a program that does not compile, -0.6 for one that
    raises or exceeds a limit, else -0.3 + 1.3 * the share of its tests that it passes. rows: APPS problems."""
    scores = []
    for results in run_tests(responses, [row["input_output"] for row in rows]):
        errors = [value for name, value in (("compile", -1.0), ("runtime", -0.6)) if name in results]
        scores.append(errors[0] if errors else -0.3 + 1.3 * results.count("pass") / len(results))
    return scores


def pass_at_k(n, c, k):
    """The unbiased estimate 1 - C(n - c, k) / C(n, k) of the chance that one of k samples passes, c of n having passed.

    >>> pass_at_k(5, 1, 1), pass_at_k(5, 1, 5), pass_at_k(4, 0, 2)
    (0.2, 1.0, 0.0)
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} needs at least {k} samples of a problem and 0 <= passed <= samples, not {c} of {n}")
    return 1 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))
# ---- end of programs ----


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


# Copied from ppo.py
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


# Copied from ppo.py
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


# ---- files ----
def read_rows(path, *needs, torn=False):
    """The rows of a JSONL file, each with the fields `needs`; exits with a sentence where that cannot be. With `torn`, a
    last line that an interrupted run left half-written is cut off the file."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        sys.exit(f"{STAGE}: cannot read {path}: {error.strerror}")
    if torn and data and not data.endswith(b"\n"):
        data = data[:data.rfind(b"\n") + 1]
        Path(path).write_bytes(data)
        say(f"the last line of {path} was half-written, and is done again")
    rows = []
    for i, line in enumerate(data.decode(errors="replace").removesuffix("\n").split("\n") if data else ()):
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append(None)
        if not isinstance(rows[-1], dict):
            sys.exit(f"{STAGE}: line {i + 1} of {path} is no JSON object (half-written?): {line[:60]}")
        if missing := [name for name in needs if name not in rows[-1]]:
            hint = "; run evaluate.py score on it first" if "score" in missing else ""
            sys.exit(f"{STAGE}: line {i + 1} of {path} has no {', '.join(missing)}{hint}")
    if not rows and not torn:
        sys.exit(f"{STAGE}: {path} has no rows")
    return rows


def write_rows(path, rows):
    """Writes a JSONL file that appears whole or not at all."""
    partial = f"{path}.partial"
    Path(partial).write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(partial, path)


def append(path, row):
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def pair_id(a, b):
    """What tells verdicts on two answers from verdicts on others to the same prompt."""
    return hashlib.blake2b(f"{a['response']}\0{b['response']}".encode(errors="replace"), digest_size=8).hexdigest()


def paired(path_a, path_b, *needs):
    """Rows of two files that answer the same prompts, one answer each, in the order of the first file."""
    files = [{}, {}]
    for path, rows in zip((path_a, path_b), files):
        for row in read_rows(path, "prompt", "response", *needs):
            key = (row["prompt"], row.get("temperature"))
            if key in rows:
                sys.exit(f"{STAGE}: {path} has several answers to {row['prompt'][:60]!r}; generate with --n 1")
            rows[key] = row
    # files of one temperature each may differ in it: the prompts are what must be the same
    if all(len({key[1] for key in rows}) == 1 for rows in files):
        files = [{key[0]: row for key, row in rows.items()} for rows in files]
    if files[0].keys() != files[1].keys() or not files[0]:
        sys.exit(f"{STAGE}: {path_a} and {path_b} do not answer the same prompts: {len(files[0].keys() - files[1].keys())} of "
                 f"{len(files[0])} are in the first alone, {len(files[1].keys() - files[0].keys())} of {len(files[1])} in the second")
    return [(row, files[1][key]) for key, row in files[0].items()]
# ---- end of files ----


# ---- statistics ----
def interval(values, statistic=lambda x: x.mean(1), resamples=2000, seed=0):
    """95% bootstrap interval (percentiles) of a statistic of independent values (n, ...): resamples (R, n, ...) -> (R,)."""
    values = np.asarray(values, dtype=float)
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    figures = np.concatenate([statistic(values[part]) for part in np.array_split(draws, max(1, draws.size // 2_000_000))])
    return tuple(np.percentile(figures, (2.5, 97.5)).tolist())


def sign_test(wins, losses):
    """Exact two-sided p-value of as uneven a split or more, were both as likely; ties are left out.

    >>> sign_test(8, 0), sign_test(3, 3), sign_test(0, 0)
    (0.0078125, 1.0, 1.0)
    """
    n = wins + losses
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n)


def length_controlled(wins, differences):
    """Win rate at equal length: a logistic regression of the outcome (1, 0, or 0.5 for a tie) on the difference of lengths,
    read at difference 0. wins, differences (..., n) -> (...). A weak ridge keeps it finite where length decides it all."""
    wins, x = np.asarray(wins, dtype=float), np.asarray(differences, dtype=float)
    x = x / np.maximum(x.std(-1, keepdims=True), 1e-9)
    beta = np.zeros((*wins.shape[:-1], 2))
    design = np.stack([np.ones_like(x), x], -1)  # (..., n, 2)
    for _ in range(12):  # Newton's method
        p = 1 / (1 + np.exp(-np.clip((design * beta[..., None, :]).sum(-1), -30, 30)))
        gradient = ((wins - p)[..., None] * design).sum(-2) - 0.01 * beta
        hessian = np.einsum("...n,...ni,...nj->...ij", p * (1 - p), design, design) + 0.01 * np.eye(2)
        beta = beta + np.clip(np.linalg.solve(hessian, gradient[..., None])[..., 0], -2, 2)
    return 1 / (1 + np.exp(-beta[..., 0]))


def best_of(scores, n):
    """Expected best score of n samples drawn without replacement from the samples of a prompt, scores (prompts, samples).

    >>> best_of(np.array([[1.0, 2.0, 4.0]]), 2).round(4).tolist()
    [3.3333]
    """
    size = scores.shape[1]
    weights = [math.comb(i, n - 1) / math.comb(size, n) for i in range(size)]  # that the i-th smallest is the best
    return np.sort(scores, 1) @ np.array(weights)


def kappa(a, b):
    """Cohen's kappa of two raters' choices (..., n), whole numbers: agreement beyond chance."""
    agreement = (a == b).mean(-1)
    chance = sum((a == k).mean(-1) * (b == k).mean(-1) for k in range(3))
    return np.where(chance < 1, (agreement - chance) / np.where(chance < 1, 1 - chance, 1), 1.0)
# ---- end of statistics ----


def generate_command(args):
    device, rank, world = start(args)
    tokenizer = load_tokenizer(args.policy)
    _, rows = load_rows(args, None, ["prompt", "input_output"] if args.task == "apps" else ["prompt"], tokenizer)
    rows = [row | {"ids": encode(tokenizer, row["prompt"])[0]} for row in {row["prompt"]: row for row in rows}.values()]
    fits = [row for row in rows if len(row["ids"]) <= args.max_prompt_length]
    chosen = np.random.RandomState(args.seed).permutation(len(fits))[:args.num].tolist()
    say(f"{len(chosen)} of {len(rows)} different held-out prompts, {len(rows) - len(fits)} being longer than "
        f"--max_prompt_length {args.max_prompt_length}")
    items = [(t, k, i) for t in args.temperature for i in chosen for k in range(args.n)]
    items.sort(key=lambda item: (item[0], len(fits[item[2]]["ids"])))
    batches = [items[i:i + args.batch_size] for i in range(0, len(items), args.batch_size)]
    name = lambda t, k, i: (t, k, fits[i]["prompt"])
    done = set()
    if rank == 0 and Path(args.output).exists():
        before = read_rows(args.output, "temperature", "sample", "prompt", "policy", torn=True)
        done = {(row["temperature"], row["sample"], row["prompt"]) for row in before}
        others = {row["policy"] for row in before} - {args.policy}
        if others or done - {name(*item) for item in items}:
            sys.exit(f"{STAGE}: {args.output} has answers of {others.pop() if others else 'other options'}; name another --output")
    done = shared(done)
    # an unfinished batch is sampled anew, whole: its random numbers depend on its place alone, not on who does it when
    left = [(place, batch) for place, batch in enumerate(batches) if any(name(*item) not in done for item in batch)]
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    model = load(AutoModelForCausalLM, args.policy, tokenizer, everywhere=True, dtype=dtype)[0].to(device).eval()
    for step in tqdm(range(0, len(left), world), desc="generate", unit="batch", disable=rank > 0):
        answers = []
        for place, batch in left[step:step + world][rank:rank + 1]:
            settings = argparse.Namespace(**vars(args) | {"temperature": batch[0][0] or 1.0, "top_k": args.top_k if batch[0][0] else 1})
            queries, mask = pad([fits[i]["ids"] for _, _, i in batch], tokenizer.pad_token_id, device, left=True)
            generator = torch.Generator(device).manual_seed(args.seed * 1_000_003 + place)
            responses, real = generate(model, queries, mask, settings, tokenizer, generator)
            texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
            for item, text, ids in zip(batch, texts, (response[keep].tolist() for response, keep in zip(responses, real))):
                row = fits[item[2]]
                kept = ("chosen", "rejected", "sentences", "problem_id", "difficulty", "input_output")
                kept = {name: row[name] for name in kept if isinstance(row.get(name), (str, int))}
                if isinstance(row.get("info"), dict):
                    kept["stratum"] = row["info"]["subreddit"]  # for judging some of every subreddit
                answers.append({"task": args.task, "policy": args.policy, "prompt": row["prompt"], "response": text, "tokens": len(ids),
                                "sample": item[1], "ended": ids[-1] == tokenizer.eos_token_id, "temperature": item[0], **kept})
        gathered = [None] * world
        dist.all_gather_object(gathered, answers)
        for row in sum(gathered, []) if rank == 0 else ():
            if (row["temperature"], row["sample"], row["prompt"]) not in done:
                append(args.output, row)
    say(f"{len(items)} answers are in {args.output}")
    finish()


def reward_of(args):
    """-> a function from prompts, answers, whether they ended, and rows to scores, by --reward."""
    if ".py:" in args.reward:
        function = load_function(args.reward)
        return lambda prompts, answers, ended, rows: function(prompts, answers, rows)
    tokenizer = load_tokenizer(args.reward)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, missing = load(AutoModelForSequenceClassification, args.reward, tokenizer, everywhere=True, dtype=torch.float32)
    if model.config.num_labels != 1 or missing:
        sys.exit(f"{STAGE}: {args.reward} is no reward model: it has no trained head of one label")
    model.to(device).eval()

    @torch.no_grad()
    def score(prompts, answers, ended, rows):
        sequences = []
        for prompt, answer, end in zip(prompts, answers, ended):
            question, reply = encode(tokenizer, prompt, answer)
            sequences.append(question + (reply if end else reply[:-1]))
        order, scores = sorted(range(len(sequences)), key=lambda i: len(sequences[i])), [0.0] * len(sequences)
        for i in tqdm(range(0, len(order), args.batch_size), desc="score", unit="batch"):
            part = order[i:i + args.batch_size]
            ids, mask = pad([sequences[k] for k in part], tokenizer.pad_token_id, device)
            for k, value in zip(part, model(input_ids=ids, attention_mask=mask.long()).logits[:, 0].tolist()):
                scores[k] = value
        return scores
    return score


def histogram(values, bins=12, width=50):
    """A text histogram, one line a bin."""
    counts, edges = np.histogram(values, bins)
    return "\n".join(f"  {edge:8.2f} {'#' * round(width * count / counts.max())} {count}" for edge, count in zip(edges, counts))


def score_command(args):
    os.environ["MA_RLHF_SANDBOX"] = args.sandbox
    rows = read_rows(args.samples, "task", "prompt", "response", "ended", "tokens", "temperature")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    score = reward_of(args)
    columns = {"score": ("response", [row["ended"] for row in rows])}
    if ".py:" not in args.reward and all("rejected" in row for row in rows):  # the data's own answers, which end
        columns |= {f"{name}_score": (name, [True] * len(rows)) for name in ("chosen", "rejected")}
    for column, (field, ended) in columns.items():
        try:
            values = [float(value) for value in score([row["prompt"] for row in rows], [row[field] for row in rows], ended, rows)]
            if len(values) != len(rows) or not np.isfinite(values).all():
                raise ValueError(f"{len(values)} scores for {len(rows)} answers, of which {np.isfinite(values).sum()} are finite")
        except Exception as error:  # whatever a function of the user's raises
            sys.exit(f"{STAGE}: {args.reward} failed: {error!r}; {args.samples} is as it was")
        for row, value in zip(rows, values):
            row[column] = value
            if row["task"] == "toy":
                row[column.replace("score", "gold")] = toy_gold(row["prompt"], row[field], row.get("sentences", 8))
    write_rows(args.output or args.samples, rows)
    for temperature in sorted({row["temperature"] for row in rows}):
        part = [row for row in rows if row["temperature"] == temperature]
        lengths = np.array([row["tokens"] for row in part])
        print(f"temperature {temperature:g}: {len(part)} answers, {np.mean([row['ended'] for row in part]):.1%} ended, "
              f"{lengths.mean():.1f} tokens (median {np.median(lengths):.0f}, longest {lengths.max()})")
        for name in ("score", "gold"):
            if name in part[0]:
                print(f"  {name}: %s" % spread(by_prompt(part, name).mean(1)))
        print(histogram([row["score"] for row in part]))
    data = list({row["prompt"]: row for row in rows}.values())
    for name in ("chosen", "rejected") if "chosen_score" in data[0] else ():
        gold = f", gold: {spread([row[f'{name}_gold'] for row in data])}" if "gold" in data[0] else ""
        print(f"the data's {name} answers: score: {spread([row[f'{name}_score'] for row in data])}{gold}")
    if "chosen_score" in data[0]:
        right = [row["chosen_score"] > row["rejected_score"] for row in data]
        print(f"accuracy of the reward model on the pairs of the data: {spread(right)}")


def spread(values):
    low, high = interval(values)
    return f"mean {np.mean(values):.3f}, 95% interval {low:.3f} to {high:.3f}"


def by_prompt(rows, name):
    """A field of the rows, samples of one temperature, as an array (prompts, samples)."""
    groups = {}
    if len({row.get("temperature") for row in rows}) > 1:
        sys.exit(f"{STAGE}: the samples are of several temperatures; keep one of them in a file of its own")
    for row in rows:
        groups.setdefault(row["prompt"], []).append(row[name])
    if len({len(group) for group in groups.values()}) > 1:
        sys.exit(f"{STAGE}: the prompts have different numbers of samples; let evaluate.py generate finish")
    return np.array(list(groups.values()), dtype=float)


def print_outcome(names, outcomes, differences=None):
    """Wins, ties, losses of the first, with tests. outcomes: 1, 0.5, 0 for each pair."""
    outcomes = np.array(outcomes)
    wins, ties, losses = ((outcomes == value).sum().item() for value in (1, 0.5, 0))
    low, high = interval(outcomes)
    print(f"{names[0]} against {names[1]}, {len(outcomes)} pairs: {wins} wins, {ties} ties, {losses} losses (sign test p = "
          f"{sign_test(wins, losses):.3g})\n  win rate {outcomes.mean():.3f}, 95% interval {low:.3f} to {high:.3f} (a tie is half a win)")
    if differences is not None:
        both = np.stack([outcomes, differences], 1)
        low, high = interval(both, lambda x: length_controlled(x[..., 0], x[..., 1]), resamples=500)
        rate = length_controlled(outcomes, differences).item()
        print(f"  at equal length {rate:.3f}, 95% interval {low:.3f} to {high:.3f} (mean difference {np.mean(differences):+.1f} tokens)")


def compare_command(args):
    pairs = paired(args.a, args.b, "score", "tokens")
    outcomes = [(a["score"] > b["score"]) + (a["score"] == b["score"]) / 2 for a, b in pairs]
    print_outcome((args.a, args.b), outcomes, [a["tokens"] - b["tokens"] for a, b in pairs])
    if args.output:
        choices = [{1: "A", 0: "B"}.get(outcome, "tie") for outcome in outcomes]
        write_rows(args.output, [{"prompt": a["prompt"], "pair": pair_id(a, b), "rater": "reward model", "choice": choice}
                                 for (a, b), choice in zip(pairs, choices)])


CRITERIA = {"tldr": ("a summary of a forum post", "relevance: it has what matters in the post; coherence: its sentences make one text; "
                     "consistency: it says nothing that the post does not; fluency: its grammar and wording"),
            "hh": ("an assistant's reply in a dialogue", "helpfulness: it does what the person needs, is right and to the point"),
            "webgpt": ("an answer to a question", "accuracy: what it says is true; coherence: it makes one text; usefulness: it answers "
                       "what was asked")}


def judge_prompt(task, prompt, first, second):
    kind, criteria = CRITERIA.get(task, ("a reply to a request", "quality: how well it does what was asked"))
    return (f"You are shown a text and two candidates for {kind}, A and B. Compare them by these criteria: {criteria}. The order of the "
            f"candidates is random, and length is no merit in itself.\n\n[text]\n{prompt}\n[end of text]\n\n[candidate A]\n{first}\n"
            f"[end of candidate A]\n\n[candidate B]\n{second}\n[end of candidate B]\n\nGive your reasons in two or three sentences. "
            "Then end with one line, either \"Choice: A\", \"Choice: B\" or, where they are equally good, \"Choice: equal\".")


class NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_):
        return None  # the key is for the server that was named, and for no other


def ask(prompt, args, key):
    """The answer of a chat-completions server to a prompt. What may pass (time-outs, 429, 5xx, broken connections) is tried
    again with growing, random waits; None after the last try. Any other answer of the server ends the program."""
    request = urllib.request.Request(
        args.base_url.rstrip("/") + "/chat/completions", headers={"Content-Type": "application/json", "Authorization": f"Bearer {key}"},
        data=json.dumps({"model": args.judge_model, "temperature": 0, "messages": [{"role": "user", "content": prompt}]}).encode())
    for attempt in range(args.tries):
        wait = 0.0
        try:
            with urllib.request.build_opener(NoRedirect).open(request, timeout=args.timeout) as answer:
                return json.load(answer)["choices"][0]["message"]["content"] or ""
        except urllib.error.HTTPError as error:
            if error.code != 429 and error.code < 500:
                said = error.read(100_000).decode(errors="replace")
                sys.exit(f"{STAGE}: the judge's server answered {error.code}: {(said.replace(key, '[key]') if key else said)[:300]}")
            after = error.headers.get("Retry-After", "")
            wait = float(after) if after.isdigit() else 0.0
        except (OSError, ValueError, KeyError, IndexError, TypeError, http.client.HTTPException):
            pass
        if attempt + 1 < args.tries:
            time.sleep(min(120.0, max(wait, args.backoff * 2**attempt * random.uniform(0.5, 1.5))))
    return None


def verdict(text):
    """The last "Choice: ..." of a judge's answer: "A", "B", "tie", or None.

    >>> verdict("Both are good. Choice: **B**"), verdict("choice: equal"), verdict("I like A"), verdict(None)
    ('B', 'tie', None, None)
    """
    found = re.findall(r"choice\W*:\W*(A|B|equal)\b", text or "", re.I)
    return {"a": "A", "b": "B", "equal": "tie"}[found[-1].lower()] if found else None


def stratified(pairs, num, seed):
    """`num` of the pairs, from every stratum (subreddit) in proportion: every so many of the shuffled pairs in its order."""
    pairs = sorted(random.Random(seed).sample(pairs, len(pairs)), key=lambda pair: str(pair[0].get("stratum")))
    return [pairs[int((i + 0.5) * len(pairs) / num)] for i in range(num)] if num < len(pairs) else pairs


def judge_command(args):
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not key.isascii() or not re.match(r"https?://\w", args.base_url):
        sys.exit(f"{STAGE}: --base_url must begin with http:// or https://, and OPENAI_API_KEY must be plain ASCII")
    pairs = stratified(paired(args.a, args.b), args.num, args.seed)
    output = Path(args.output)
    rows = read_rows(output, "prompt", "pair", "rater", "order", "choice", torn=True) if output.exists() else []
    known = {(row["prompt"], row["pair"], row["order"]): row["choice"] for row in rows if row["rater"] == args.judge_model}
    writing = threading.Lock()

    def one(a, b, order):
        """Judges a pair, the first answer shown first (order 0) or second (1); twice more where the answer is malformed."""
        shown = (a["response"], b["response"])[::-1 if order else 1]
        for _ in range(3):
            text = ask(judge_prompt(a.get("task"), a["prompt"], *shown), args, key)
            choice = verdict(text)
            if choice or text is None:
                break
        if order and choice in ("A", "B"):
            choice = "AB".replace(choice, "")
        row = {"prompt": a["prompt"], "pair": pair_id(a, b), "rater": args.judge_model, "order": order, "choice": choice, "answer": text}
        if text is not None:  # a request that failed is made again by the next run
            with writing:
                append(output, row)
        return row

    with ThreadPoolExecutor(args.concurrency) as threads:
        jobs = [threads.submit(one, a, b, order) for a, b in pairs for order in (0, 1) if (a["prompt"], pair_id(a, b), order) not in known]
        try:
            for job in tqdm(as_completed(jobs), total=len(jobs), desc="judge", unit="verdict"):
                row = job.result()
                known[row["prompt"], row["pair"], row["order"]] = row["choice"]
        except BaseException:
            for job in jobs:
                job.cancel()
            raise
    both = [(*(known[a["prompt"], pair_id(a, b), order] for order in (0, 1)), a, b) for a, b in pairs]
    judged = [(x if x == y else "tie", a, b) for x, y, a, b in both if x and y]
    turned = sum(x != y for x, y, *_ in both if x and y)
    print(f"{len(both) - len(judged)} of {len(both)} pairs have no verdict (failed or malformed), {turned} are ties because the verdict "
          "turned with the order")
    if judged:
        lengths = [a["tokens"] - b["tokens"] for _, a, b in judged] if "tokens" in judged[0][1] else None
        print_outcome((args.a, args.b), [{"A": 1, "B": 0, "tie": 0.5}[choice] for choice, _, _ in judged], lengths)


def read_key(prompt):
    """One key from the terminal, or one line where there is none."""
    print(prompt, end="", flush=True)
    if not sys.stdin.isatty():
        return (sys.stdin.readline() or "q").strip()
    import termios
    import tty
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        key = sys.stdin.read(1)
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
    print(key)
    return key


def human_command(args):
    pairs = stratified(paired(args.a, args.b), args.num, args.seed)
    output = Path(args.output)
    rows = read_rows(output, "prompt", "pair", "rater", "choice", torn=True) if output.exists() else []
    pair_ids = {pair_id(a, b) for a, b in pairs}
    known = {row["prompt"]: row["choice"] for row in rows if row["rater"] == args.annotator and row["pair"] in pair_ids}
    for i, (a, b) in enumerate(pairs):
        if a["prompt"] in known:
            continue
        swap = random.Random(f"{args.seed} {args.annotator} {a['prompt']}").random() < 0.5
        left, right = (b, a) if swap else (a, b)
        width = min(shutil.get_terminal_size((100, 24)).columns, 100)
        print("=" * width + f"\npair {i + 1} of {len(pairs)}\n")
        for title, text in (("prompt", a["prompt"]), ("answer 1", left["response"]), ("answer 2", right["response"])):
            print(f"[{title}]\n" + "\n".join(textwrap.fill(line, width) for line in text.splitlines()) + "\n")
        while (key := read_key("1: the first is better, 2: the second, 0: equal, q: stop > ")) not in ("1", "2", "0", "q"):
            print("press 1, 2, 0 or q")
        if key == "q":
            print(f"{len(known)} of {len(pairs)} are judged; the same command goes on from here")
            return
        known[a["prompt"]] = "tie" if key == "0" else "AB"[(key == "2") != swap]
        append(output, {"prompt": a["prompt"], "pair": pair_id(a, b), "rater": args.annotator, "choice": known[a["prompt"]]})
    print_outcome((args.a, args.b), [{"A": 1, "B": 0, "tie": 0.5}[known[a["prompt"]]] for a, _ in pairs])


def agreement_command(args):
    votes = {}  # rater -> pair -> choices; a judge has one in each order, and no choice without both
    for path in args.files:
        for row in read_rows(path, "prompt", "pair", "rater", "choice"):
            votes.setdefault(row["rater"], {}).setdefault((row["prompt"], row["pair"]), {})[row.get("order")] = row["choice"]
    for choices in votes.values():
        for pair, made in choices.items():
            whole = None in made or len(made) == 2
            choices[pair] = None if not whole or None in made.values() else made.popitem()[1] if len(set(made.values())) == 1 else "tie"
    raters = list(votes)
    if len(raters) < 2:
        sys.exit(f"{STAGE}: agreement needs two raters, and the files have {', '.join(raters) or 'none'}")
    print("| | pairs | agreement (95% interval) | Cohen's kappa (95% interval) |\n|---|---|---|---|")
    for i, first in enumerate(raters):
        for second in raters[i + 1:]:
            shared = [p for p in votes[first] if votes[first][p] and votes[second].get(p)]
            if not shared:
                sys.exit(f"{STAGE}: {first} and {second} judged no pair in common; give files of the same two answers")
            both = np.array([[("A", "B", "tie").index(votes[rater][p]) for rater in (first, second)] for p in shared])
            raw, k = (both[:, 0] == both[:, 1]).mean(), kappa(both[:, 0], both[:, 1])
            a, b = interval(both, lambda x: (x[..., 0] == x[..., 1]).mean(1)), interval(both, lambda x: kappa(x[..., 0], x[..., 1]))
            print(f"| {first} / {second} | {len(shared)} | {raw:.2f} ({a[0]:.2f} to {a[1]:.2f}) | {k:.2f} ({b[0]:.2f} to {b[1]:.2f}) |")


def best_of_n_command(args):
    curves = {}
    for path in args.samples:
        scores, curves[path] = by_prompt(read_rows(path, "prompt", "score"), "score"), []
        print(f"{path}: {len(scores)} prompts, {scores.shape[1]} samples of each")
        for n in [2**k for k in range(20) if 2**k < scores.shape[1]] + [scores.shape[1]]:
            values = best_of(scores, n)
            low, high = interval(values)
            curves[path].append({"n": n, "score": values.mean(), "low": low, "high": high})
            print(f"  best of {n:4d}: {values.mean():.3f}, 95% interval {low:.3f} to {high:.3f}")
    if args.output:
        Path(args.output).write_text(json.dumps(curves, indent=2) + "\n")


def pass_at_k_command(args):
    os.environ["MA_RLHF_SANDBOX"] = args.sandbox
    rows = read_rows(args.samples, "prompt", "response", "input_output", "difficulty")
    if any("passed" not in row for row in rows):
        for row, results in zip(rows, run_tests([row["response"] for row in rows], [row["input_output"] for row in rows])):
            row["passed"] = set(results) == {"pass"}
        write_rows(args.output or args.samples, rows)
    problems = {}
    for row in rows:
        problems.setdefault((row["difficulty"], row["prompt"]), []).append(row["passed"])
    for difficulty in [*sorted({name for name, _ in problems}), "all"]:
        counts = [(len(group), sum(group)) for (name, _), group in problems.items() if difficulty in (name, "all")]
        line = f"{difficulty:<14} {len(counts):5d} problems"
        for k in args.k:
            if min(n for n, _ in counts) < k:
                sys.exit(f"{STAGE}: pass@{k} needs {k} samples of each problem: generate with --n {k} or more, or give --k 1")
            values = [pass_at_k(n, c, k) for n, c in counts]
            line += f"   pass@{k} {np.mean(values):.3f} (%.3f to %.3f)" % interval(values)
        print(line)


def named(text):
    """NAME=PATH[,PATH...] -> the name and the paths."""
    name, _, paths = text.partition("=")
    if not paths:
        raise argparse.ArgumentTypeError(f"{text} must be NAME=PATH or, for several seeds, NAME=PATH,PATH")
    return name, paths.split(",")


def plot_command(args):
    try:
        import matplotlib
    except ImportError:
        sys.exit(f"{STAGE}: plots need matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, paths in args.inputs:
        if args.kind == "curves":  # mean over the runs (seeds), band: 95% interval over them
            runs = []
            for path in paths:
                rows = read_rows(Path(path, "metrics.jsonl") if os.path.isdir(path) else path, "update")
                runs.append({row["update"]: row[args.metric] for row in rows if args.metric in row})
            updates = sorted(set.intersection(*map(set, runs)))
            if not updates:
                sys.exit(f"{STAGE}: {', '.join(paths)} have no {args.metric}")
            values = np.array([[run[update] for update in updates] for run in runs])
            band = np.array([interval(column) for column in values.T])
            axes.plot(updates, values.mean(0), label=f"{name} ({len(runs)} run{'s' * (len(runs) > 1)})")
            axes.fill_between(updates, *band.T, alpha=0.2)
            axes.set(xlabel="update", ylabel=args.metric)
        elif args.kind == "scores":
            scores = [row["score"] for path in paths for row in read_rows(path, "score")]
            axes.hist(scores, 40, histtype="stepfilled", alpha=0.4, density=True, label=f"{name}, mean {np.mean(scores):.2f}")
            axes.set(xlabel="score", ylabel="density")
        else:
            points = []
            if args.kind == "temperature":
                rows = [row for path in paths for row in read_rows(path, "temperature", "score", "prompt")]
                for x in sorted({row["temperature"] for row in rows}):
                    values = by_prompt([row for row in rows if row["temperature"] == x], "score").mean(1)
                    points.append((x, values.mean(), *interval(values)))
            else:
                scores = np.concatenate([by_prompt(read_rows(path, "score", "prompt"), "score") for path in paths])
                for x in [2**k for k in range(20) if 2**k <= scores.shape[1]]:
                    points.append((x, best_of(scores, x).mean(), *interval(best_of(scores, x))))
                axes.set_xscale("log", base=2)
            x, mean, low, high = zip(*points)
            axes.errorbar(x, mean, [np.subtract(mean, low), np.subtract(high, mean)], marker="o", capsize=3, label=name)
            axes.set(xlabel={"temperature": "temperature", "best-of-n": "N"}[args.kind], ylabel="score")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(args.output, dpi=150)
    print(f"{args.output}")


def summary_command(args):
    print("| model | task | prompts | score (95% interval) | against the first | tokens | ended |\n|---|---|---|---|---|---|---|")
    base = None
    for name, paths in args.inputs:
        rows = [row for path in paths for row in read_rows(path, "score", "prompt", "tokens", "ended", "task")]
        values = by_prompt(rows, "score").mean(1)
        base = values.mean() if base is None else base
        gain = "" if base == values.mean() else f"{(values.mean() - base) / abs(base):+.0%}"
        low, high = interval(values)
        tasks = ", ".join(sorted({row["task"] for row in rows}))
        print(f"| {name} | {tasks} | {len(values)} | {values.mean():.2f} ({low:.2f} to {high:.2f}) | {gain} | "
              f"{np.mean([row['tokens'] for row in rows]):.0f} | {np.mean([row['ended'] for row in rows]):.0%} |")


def main(argv=None):
    class Layout(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=Layout)
    commands = parser.add_subparsers(required=True, metavar="command", help="each has --help of its own")

    def command(name, function, text):
        example = next(line.split("   ")[1] for line in __doc__.splitlines() if f"evaluate.py {name} " in line)
        sub = commands.add_parser(name, help=text, description=text, epilog=f"example: {example.strip()}", formatter_class=Layout)
        sub.set_defaults(function=function)
        return sub.add_argument

    add = command("generate", generate_command, "sample answers to held-out prompts; goes on with a file that an interrupted run left")
    add("--policy", required=True, help="model, folder or hub name")
    add("--task", default="toy", choices=("toy", *PAPER_DATA), help="data set")
    add("--toy_sentences", type=int, default=8, help="toy: the most sentences that a review has")
    add("--data_path", help="local copy of the data set, file or folder")
    add("--eval_path", help="file or folder of held-out rows")
    add("--output", required=True, help="JSONL file to write")
    add("--num", type=int, default=2000, help="prompts, drawn by the seed")
    add("--n", type=int, default=1, help="answers to each prompt")
    add("--temperature", type=float, nargs="+", default=[0.8], help="one or several; 0: the most probable token each time")
    add("--top_k", type=int, default=50, help="sample from the k most probable tokens; 0: from all")
    add("--top_p", type=float, default=1.0, help="sample from the fewest most probable tokens with this much probability")
    add("--max_prompt_length", type=int, default=512, help="tokens; longer prompts are left out")
    add("--max_response_length", type=int, default=512, help="tokens after which an answer is cut off")
    add("--batch_size", type=int, default=64, help="answers sampled at a time, by each process")
    add("--dtype", choices=("fp32", "bf16"), default="fp32", help="precision of the model")
    add("--seed", type=int, default=0, help="of the choice of prompts and of sampling")
    add = command("score", score_command, "score answers, and the data's own, by a reward model or a function")
    add("samples", help="JSONL file of generate")
    add("--reward", required=True, help="reward model (folder or hub name), or FILE.py:FUNCTION, f(prompts, responses, rows) -> floats")
    add("--output", help="JSONL file to write; the samples' own when not given")
    add("--batch_size", type=int, default=64, help="answers scored at a time")
    add("--sandbox", choices=("bwrap", "none"), default="bwrap", help="of evaluate.py:compiler_reward; none: at your own risk")
    for name, function, text in (("compare", compare_command, "win rate of A over B by their scores"),
                                 ("judge", judge_command, "win rate of A over B by a language model, each pair in both orders; the key "
                                  "of its server is read from the environment variable OPENAI_API_KEY"),
                                 ("human", human_command, "win rate of A over B by a person at this terminal, blind, in random order")):
        add = command(name, function, text)
        add("a", help="JSONL file of answers")
        add("b", help="JSONL file of answers to the same prompts")
        add("--output", default=None if name == "compare" else f"{name}.jsonl", help="JSONL file of the verdicts"
            + (", which a run that was stopped goes on with" if name != "compare" else ""))
        if name != "compare":
            add("--num", type=int, default=50, help="pairs, drawn by the seed from every subreddit in proportion")
            add("--seed", type=int, default=0, help="of the draw and of the order")
        if name == "judge":
            add("--base_url", required=True, help="of a server with /chat/completions, such as http://localhost:8000/v1")
            add("--judge_model", default="gpt-4o-2024-05-13", help="the server's name of the model")
            add("--concurrency", type=int, default=4, help="requests at a time")
            add("--timeout", type=float, default=60.0, help="seconds for a request")
            add("--tries", type=int, default=6, help="of a request that fails")
            add("--backoff", type=float, default=1.0, help="seconds before the second try, doubled for each one more")
        if name == "human":
            add("--annotator", required=True, help="name in the file of verdicts")
    add = command("agreement", agreement_command, "how far raters agree: reward model, judge, humans")
    add("files", nargs="+", help="JSONL files of compare --output, judge and human")
    add = command("best-of-n", best_of_n_command, "expected best score of N samples, for N up to the number of samples")
    add("samples", nargs="+", help="JSONL files of generate --n N, scored")
    add("--output", help="JSON file of the curves")
    add = command("pass-at-k", pass_at_k_command, "share of problems that k programs solve (apps)")
    add("samples", help="JSONL file of generate --task apps --n N")
    add("--k", type=int, nargs="+", default=[1, 5], help="how many programs count as one attempt")
    add("--output", help="JSONL file to write which programs passed; the samples' own when not given")
    add("--sandbox", choices=("bwrap", "none"), default="bwrap", help="run programs behind bubblewrap; none: at your own risk")
    add = command("plot", plot_command, "learning curves, score distributions, temperature and best-of-N curves as PNG or SVG")
    add("kind", choices=("curves", "scores", "temperature", "best-of-n"), help="what to draw")
    add("inputs", type=named, nargs="+", metavar="NAME=PATH[,PATH]", help="output folders of runs (curves) or scored samples, several "
        "for several seeds")
    add("--metric", default="objective/scores", help="curves: name in metrics.jsonl")
    add("--output", default="plot.png", help="PNG or SVG file to write")
    add = command("summary", summary_command, "the paper's Table 2 from scored samples, in Markdown")
    add("inputs", type=named, nargs="+", metavar="NAME=PATH[,PATH]", help="scored samples; gains are against the first")
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if name in ("num", "n", "batch_size", "concurrency", "tries", "max_prompt_length", "max_response_length") and value < 1:
            parser.error(f"--{name} is {value}; it must be at least 1")
    args.function(args)


if __name__ == "__main__":
    main()
