"""The paper's data sets and hyper-parameters: prompts character for character, the partition, Table 5 cell by cell, and
every stage on every task, on rows in the schemas of the real sets."""
import json
import re

import datasets
import numpy as np
import pytest
import torch
import transformers

import ma_ppo
import ppo
import reward
import sft
from conftest import DATA, SMALL, read_metrics, run

TASKS = ("tldr", "hh", "webgpt", "apps")
TEXT, WHOLE, REAL = datasets.Value("string"), datasets.Value("int64"), datasets.Value("float64")
QUOTES = {"title": datasets.List(TEXT), "extract": datasets.List(TEXT)}
TOKENS = {"prefix": datasets.List(WHOLE), "completion": datasets.List(WHOLE)}
SCHEMAS = {  # of the real sets (JSON has but one kind of whole number)
    "tldr": {"info": {name: TEXT for name in ("id", "post", "title", "subreddit", "site", "article")},
             "summaries": datasets.List({"text": TEXT, "policy": TEXT, "note": TEXT}), "choice": WHOLE, "worker": TEXT,
             "batch": TEXT, "split": TEXT, "extra": {"confidence": WHOLE}},
    "hh": {"prompt": TEXT, "response": TEXT, "chosen": TEXT, "rejected": TEXT},
    "webgpt": {"question": {"dataset": TEXT, "id": TEXT, "full_text": TEXT}, "quotes_0": QUOTES, "answer_0": TEXT,
               "tokens_0": TOKENS, "score_0": REAL, "quotes_1": QUOTES, "answer_1": TEXT, "tokens_1": TOKENS, "score_1": REAL},
    "apps": {"problem_id": WHOLE, **{name: TEXT for name in ("question", "solutions", "input_output", "difficulty", "url",
                                                             "starter_code")}}}


def load(task, part, columns, *options, module=sft):
    args = module.parse_args(module.Args, argv=["--task", task, *options], presets=module.presets)
    return module.load_rows(args, part, columns, sft.toy_tokenizer())


@pytest.mark.parametrize("task", TASKS)
def test_rows_are_in_the_schema_of_the_real_set(task):
    rows = datasets.load_dataset("json", data_files=str(DATA / f"{task}.jsonl"), split="train")
    assert rows.features == datasets.Features(SCHEMAS[task]) and len(rows) >= 40
    assert list(rows.features) == list(SCHEMAS[task])


def tldr(subreddit="tifu", post="I ate\nthe cake.", article=None, choice=1):
    return {"info": {"id": "1", "post": post, "title": "t", "subreddit": subreddit, "site": None, "article": article},
            "summaries": [{"text": " zero", "policy": "ref", "note": None}, {"text": " one", "policy": "sup2", "note": None}],
            "choice": choice, "worker": "w", "batch": "b", "split": "train", "extra": {"confidence": 3}}


def webgpt(answers=("It is [1] so [2].", "No."), scores=(0.5, -0.5)):
    return {"question": {"dataset": "eli5", "id": "1", "full_text": "Why?"}, "answer_0": answers[0], "answer_1": answers[1],
            "score_0": scores[0], "score_1": scores[1]}


def apps(starter="", tests={"inputs": ["1\n"], "outputs": ["1\n"]}, solutions=["print(1)"]):
    return {"question": "Add.", "solutions": json.dumps(solutions) if solutions else "", "starter_code": starter,
            "input_output": json.dumps(tests) if tests else ""}


@pytest.mark.parametrize("task, row, prompt, chosen, rejected", [
    ("tldr", tldr(), "POST\nSubreddit: r/tifu\nI ate\nthe cake.\nTL;DR: ", " one", " zero"),
    ("tldr", tldr(subreddit=None, choice=0), "POST\nI ate\nthe cake.\nTL;DR: ", " zero", " one"),
    ("tldr", tldr(subreddit=None, post=None, article="News."), "ARTICLE\nNews.\nTL;DR: ", " one", " zero"),
    ("hh", {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response": " Yes", "chosen": " Yes", "rejected": " No"},
     "\n\nHuman: Hi\n\nAssistant:", " Yes", " No"),
    ("webgpt", webgpt(), " Human: Why? Assistant:", " It is so.", " No."),
    ("webgpt", webgpt(scores=(-0.5, 0.5)), " Human: Why? Assistant:", " No.", " It is so."),
    ("webgpt", webgpt(scores=(0.0, 0.0)), " Human: Why? Assistant:", " It is so.", " No."),
    # the released code's patterns end at the first closing bracket of any kind; an answer that begins with a citation
    # keeps the space behind it
    ("webgpt", webgpt(("[1] A (b [2]) c[3](d).", "x")), " Human: Why? Assistant:", "  A) c.", " x"),
    ("apps", apps(), "\nQUESTION:\nAdd.\nUse Standard Input format\nANSWER:\n", "print(1)", None),
    ("apps", apps("def f(a):\n\t", {"fn_name": "f", "inputs": [[1]], "outputs": [1]}),
     "\nQUESTION:\nAdd.\ndef f(a):\n\t\nUse Call-Based format\nANSWER:\n", "print(1)", None),
])
def test_prompts_and_answers(task, row, prompt, chosen, rejected):
    texts = sft.PAPER_DATA[task][3](row, 0)
    assert (texts["prompt"], texts["chosen"], texts.get("rejected")) == (prompt, chosen, rejected)


def test_one_solution_of_each_problem_is_drawn_by_the_seed():
    draws = [sft.apps_texts(apps(solutions=[str(i) for i in range(9)]), seed)["chosen"] for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1] and len(set(draws)) > 2


def shuffled(rows):
    rows = list(rows)
    np.random.RandomState(1234).shuffle(order := np.arange(len(rows)))
    return [rows[i] for i in order]


@pytest.mark.parametrize("task", TASKS)
def test_the_stages_share_no_row_of_the_papers_sets(task):
    """The released partition, row for row: 95% of the one file for training, then 20/40/40 of it, 20/80 for apps."""
    key = {"tldr": lambda row: row["info"]["id"], "hh": lambda row: row["prompt"] + row["rejected"],
           "webgpt": lambda row: row["question"]["id"], "apps": lambda row: row["problem_id"]}[task]
    usable = lambda row: task != "tldr" or row["info"]["post"] or row["info"]["article"]
    rows = [json.loads(line) for line in (DATA / f"{task}.jsonl").read_text().splitlines()]
    assert len({key(row) for row in rows}) == len(rows)
    rows = shuffled(shuffled(rows)[:int(round(0.95 * len(rows)))])
    shares = {0: 0.2, 2: 0.8} if task == "apps" else {0: 0.2, 1: 0.4, 2: 0.4}
    sizes = [int(round(share * len(rows))) for share in shares.values()]
    excess, begin = sum(sizes) - len(rows), 0
    for part, end in zip(shares, np.cumsum(sizes) - excess):
        train, held_out = load(task, part, ["prompt"], "--data_path", str(DATA / f"{task}.jsonl"))
        assert [key(row) for row in train] == [key(row) for row in rows[begin:end] if usable(row)]
        assert held_out and not {key(row) for row in held_out} & {key(row) for row in rows}
        begin = end
    assert begin == len(rows)


def test_rows_without_what_they_need_are_counted(capsys):
    rows = [json.loads(line) for line in (DATA / "apps.jsonl").read_text().splitlines()]
    data = ["--data_path", str(DATA / "apps.jsonl"), "--all_rows", "true"]
    without = {"chosen": sum(row["solutions"] in ("", "[]") for row in rows), "input_output": sum(not row["input_output"] for row in rows)}
    for column, count in without.items():
        sets = load("apps", 0, ["prompt", column], *data)
        assert count >= 2 and sum(map(len, sets)) == len(rows) - count
        assert sum(map(int, re.findall(r"(\d+) of \d+ rows have no text", capsys.readouterr().err))) == count
    sets = load("tldr", 0, ["prompt"], "--data_path", str(DATA / "tldr.jsonl"), "--all_rows", "true")
    assert "have no text as prompt" in capsys.readouterr().err
    assert {row["prompt"].split("\n")[0] for rows in sets for row in rows} == {"POST", "ARTICLE"}


# Table 5 of the paper: webgpt where it differs in brackets
TABLE_5 = {
    "gemma-2b": {"sft": dict(batch_size=(512, {"webgpt": 64}), epochs=3, lr=(5e-5, {"webgpt": 1e-4}), warmup_ratio=0.1),
                 "reward": dict(batch_size=(64, {"webgpt": 32}), epochs=1, lr=(1e-5, {"webgpt": 2e-5}), warmup_ratio=0.1),
                 "ppo": dict(batch_size=256, policy_lr=1.5e-5, critic_lr=1.5e-5, epochs=(1, {"webgpt": 4}), kl_coef=0.05, warmup_steps=6)},
    "gemma-7b": {"sft": dict(batch_size=128, epochs=(1, {"webgpt": 5}), lr=2e-5, warmup_ratio=0.1),
                 "reward": dict(batch_size=(64, {"tldr": 128, "webgpt": 32}), epochs=1, lr=1e-6, warmup_ratio=0.1),
                 "ppo": dict(batch_size=256, policy_lr=1e-6, critic_lr=1e-6, epochs=(1, {"webgpt": 4}),
                             kl_coef=(0.05, {"webgpt": 0.1, "tldr": 0.01}), warmup_steps=6)},
    "gemma-2-27b": {"sft": dict(batch_size=128, epochs=3, lr=5e-6, warmup_ratio=0.1),
                    "reward": dict(batch_size=128, epochs=1, lr=8e-6, warmup_ratio=0.1),
                    "ppo": dict(batch_size=256, policy_lr=7e-7, critic_lr=1e-6, epochs=1, kl_coef=0.1, warmup_steps=0)},
    "codegemma-2b": {"sft": dict(batch_size=16, epochs=1, lr=5e-6, warmup_ratio=0),
                     "ppo": dict(batch_size=16, policy_lr=5e-7, critic_lr=5e-5, epochs=1, kl_coef=0.05, warmup_steps=20)},
    "codegemma-7b": {"sft": dict(batch_size=32, epochs=1, lr=2e-6, warmup_ratio=0),
                     "ppo": dict(batch_size=16, policy_lr=5e-7, critic_lr=5e-5, epochs=1, kl_coef=0.05, warmup_steps=20)}}
EVERYWHERE = {"sft": dict(weight_decay=0.01, max_length=1024), "reward": dict(weight_decay=0.1, max_length=1024),
              "ppo": dict(ppo_epochs=1, clip_ratio=0.2, clip_value=0.2, lam=0.95, gamma=1, max_response_length=512, top_p=1, weight_decay=0.1,
                          score_clip=2.5)}
TEXTS = dict(max_prompt_length=512, temperature=0.8, top_k=50)
CODE = dict(max_prompt_length=600, temperature=1, top_k=5)
MODELS = {"gemma-2b": "google/gemma-2b", "gemma-7b": "google/gemma-7b", "gemma-2-27b": "google/gemma-2-27b",
          "codegemma-2b": "google/codegemma-2b", "codegemma-7b": "google/codegemma-7b-it"}


@pytest.mark.parametrize("name", TABLE_5)
def test_presets_are_table_5(name):
    for task in ("apps",) if "code" in name else ("tldr", "hh", "webgpt"):
        for stage, module, groups in (("sft", sft, ()), ("reward", reward, ()), ("ppo", ppo, ("AdvantageArgs",)),
                                      ("ppo", ma_ppo, ("AdvantageArgs",))):
            if stage not in TABLE_5[name]:
                continue
            groups = [module.Args, *(getattr(module, group) for group in groups)]
            argv = ["--task", task, "--preset", name]
            args = vars(module.parse_args(*groups, argv=argv, presets=module.presets))
            expected = TABLE_5[name][stage] | EVERYWHERE[stage] | ({} if stage != "ppo" else CODE if task == "apps" else TEXTS)
            for option, value in expected.items():
                value = value[1].get(task, value[0]) if isinstance(value, tuple) else value
                assert args[option] == value, f"{stage} {task} {option}"
            if module is sft:
                assert args["model"] == MODELS[name]
            if module is ma_ppo:
                assert args["ngram"] == (10 if task == "apps" else 5) and args["termination"] == "fixed_ngram"
            lr = "policy_lr" if stage == "ppo" else "lr"
            changed = vars(module.parse_args(*groups, argv=[*argv, f"--{lr}", "0.5", "--batch_size", "2"], presets=module.presets))
            assert changed == args | {lr: 0.5, "batch_size": 2}


def test_n_is_10_for_programs():
    parse = lambda *argv: ma_ppo.parse_args(ma_ppo.Args, ma_ppo.AdvantageArgs, argv=list(argv), presets=ma_ppo.presets)
    assert (parse("--task", "apps").ngram, parse("--task", "hh").ngram, parse("--task", "apps", "--ngram", "3").ngram) == (10, 5, 3)


@pytest.mark.parametrize("module, argv, message", [
    (ppo, ["--task", "tldr", "--preset", "codegemma-2b"], "did not run codegemma-2b on --task tldr"),
    (sft, ["--task", "apps", "--preset", "gemma-2b"], "did not run gemma-2b on --task apps"),
    (sft, ["--preset", "gemma-2b"], "did not run gemma-2b on --task toy"),
    (reward, ["--task", "apps", "--preset", "codegemma-7b"], "Table 5 has no codegemma-7b in this stage"),
    (reward, ["--task", "apps"], "APPS has no reward model"),
    (sft, ["--task", "news"], "choose from 'toy', 'pairs', 'tldr', 'hh', 'webgpt', 'apps'"),
    (sft, ["--preset", "gemma-9b"], "choose from 'gemma-2b', 'gemma-7b'"),
])
def test_what_the_paper_did_not_run_is_refused(module, argv, message, capsys):
    with pytest.raises(SystemExit) as end:
        module.main(argv)
    assert message in capsys.readouterr().err + str(end.value)


def test_print_args():
    done = run(["ma_ppo.py", "--task", "hh", "--preset", "gemma-2b", "--print_args", "--ngram", "inf"], DATA)
    assert done.returncode == 0 and not done.stderr
    shown = json.loads(done.stdout)
    assert (shown["ngram"], shown["batch_size"], shown["output_dir"]) == (float("inf"), 256, "runs/hh/ma_ppo")


@pytest.mark.parametrize("task, rows, message", [
    ("tldr", [{"prompt": "a"}], "lacks the column info, summaries, choice; it has prompt"),
    ("tldr", [tldr() | {"summaries": [{"text": "a"}], "choice": 1}] * 3, "not as --task tldr has them: IndexError"),
    ("tldr", [tldr() | {"info": {"id": "1"}}] * 3, "not as --task tldr has them: KeyError"),
    ("apps", [apps() | {"solutions": "print(1)"}] * 3, "not as --task apps has them: JSONDecodeError"),
    ("hh", [{"prompt": "a", "chosen": "b"}], "lacks the column rejected; it has prompt, chosen"),
])
def test_a_wrong_schema_is_named(task, rows, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(SystemExit, match=message):
        load(task, 0, ["prompt"], "--data_path", str(path), "--all_rows", "true")


def test_the_hub_is_asked_for_by_name_and_given_up_in_words(monkeypatch):
    """conftest.py sets HF_HUB_OFFLINE, so that the hub cannot be reached: one line, at once, with what to do."""
    for task, name in (("tldr", "openai/summarize_from_feedback"), ("hh", "Dahoas/full-hh-rlhf"),
                       ("webgpt", "openai/webgpt_comparisons"), ("apps", "codeparrot/apps")):
        with pytest.raises(SystemExit, match=f"{name}.* from the hub .*hf auth login.*--data_path"):
            load(task, 0, ["prompt"])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_folders(kind, tmp_path):
    """A folder of files, each split by its name; what datasets writes with save_to_disk is one too."""
    rows = datasets.load_dataset("json", data_files=str(DATA / "hh.jsonl"), split="train")
    splits = datasets.DatasetDict({"train": rows.select(range(30)), "test": rows.select(range(30, 44))})
    if kind == "arrow":
        splits.save_to_disk(tmp_path / "copy", num_shards={"train": 2, "test": 1})
    for name, part in splits.items() if kind != "arrow" else ():
        (tmp_path / "copy").mkdir(exist_ok=True)
        path = tmp_path / "copy" / f"{name}-00000-of-00001.{kind}"
        part.to_json(path) if kind == "jsonl" else part.to_parquet(path)
    train, held_out = load("hh", 0, ["prompt"], "--data_path", str(tmp_path / "copy"), "--all_rows", "true")
    assert [row["prompt"] for row in train] == splits["train"]["prompt"][:30]
    assert [row["prompt"] for row in held_out] == splits["test"]["prompt"][:14]
    with pytest.raises(SystemExit, match="no file .*/copy/none"):
        load("hh", 0, ["prompt"], "--data_path", str(tmp_path / "copy" / "none"))


@pytest.fixture(scope="module")
def tiny_gemma(tmp_path_factory):
    """A tiny random Gemma with a byte-level tokenizer trained on the rows of all four tasks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.train([str(DATA / f"{task}.jsonl") for task in TASKS], trainers.BpeTrainer(
        vocab_size=1000, special_tokens=["<pad>", "<eos>", "<bos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")
    torch.manual_seed(0)
    model = transformers.GemmaForCausalLM(transformers.GemmaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, pad_token_id=0, eos_token_id=1, bos_token_id=2))
    folder = tmp_path_factory.mktemp("gemma")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_every_stage_on_every_task(task, tiny_gemma, tmp_path, monkeypatch):
    """SFT -> reward model (not for apps) -> PPO and MA-PPO, each where the one before it left its model."""
    monkeypatch.chdir(tmp_path)
    data = ["--task", task, "--data_path", str(DATA / f"{task}.jsonl")]
    sft.main([*data, *SMALL["sft"], "--model", tiny_gemma])
    if task != "apps":
        reward.main([*data, *SMALL["reward"]])
    for stage, module in (("ppo", ppo), ("ma_ppo", ma_ppo)):
        module.main([*data, *SMALL[stage], "--max_prompt_length", "600"])
        rows = [row for row in read_metrics(f"runs/{task}/{stage}") if "lr" in row]
        assert len(rows) == 2 and all(row["val/ratio_dev"] < 1e-5 for row in rows)
    assert read_metrics(f"runs/{task}/sft")[-1]["eval/perplexity"] > 1
