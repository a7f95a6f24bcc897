"""The embedded task, the split of the stages, tokens, and the user's own rows, wrong ones included."""
import json

import numpy as np
import pytest

import ppo
import sft


def test_toy_rows():
    rows = sft.toy_rows("train", 400)
    assert rows == sft.toy_rows("train", 400) and rows != sft.toy_rows("train", 400, seed=1)
    gold = [[sft.toy_gold(row["prompt"], row[name]) for name in ("chosen", "rejected")] for row in rows]
    wrong = sum(chosen < rejected for chosen, rejected in gold)
    assert 0 < wrong < 20  # some label noise
    assert all(abs(chosen - rejected) >= 0.4 for chosen, rejected in gold)
    lengths = [len(row["chosen"].split()) for row in rows]
    assert 4 < min(lengths) < 20 and max(lengths) < 105 and 45 < sum(lengths) / len(lengths) < 80  # some are short
    assert not {row["prompt"] + row["chosen"] for row in rows} & {
        row["prompt"] + row["chosen"] for row in sft.toy_rows("eval", 400)}


@pytest.mark.parametrize("sentences", (4, 32))
def test_toy_rows_of_other_lengths(sentences):
    """--toy_sentences: reviews of 32 and of 256 tokens at most; missing sentences count 0, those beyond not at all."""
    rows = sft.toy_rows("train", 200, sentences=sentences)
    parts = [row[name].count(" .") for row in rows for name in ("chosen", "rejected")]
    assert min(parts) < 5 / 8 * sentences and max(parts) == sentences
    tokens = sum(len(row["chosen"].split()) for row in rows) / len(rows)
    assert 5 * sentences < tokens < 9 * sentences
    assert all(abs(sft.toy_gold(row["prompt"], row["chosen"], sentences) - sft.toy_gold(row["prompt"], row["rejected"], sentences)) >= 0.4
               for row in rows)
    prompt, text = "review of the food and the pool at the hotel :", "the food was great . the pool was cold . the bed was dirty ."
    assert [sft.toy_gold(prompt, text, n) for n in (1, 2, 4)] == [1, 0, -0.25]


def test_toy_gold():
    prompt = "review of the food and the pool at the hotel by the sea :"
    gold = lambda text: round(sft.toy_gold(prompt, text) * 8)
    assert gold("the food was great .") == 1
    assert gold("the food was not great .") == -1 and gold("the food was never awful .") == 1
    assert gold("the food was simple .") == 0
    assert gold("the bed was great .") == 0 and gold("the bed was awful .") == -1  # praise only for what was asked
    assert gold("the food was great . the food was great . the food was lovely .") == 2  # no praise twice
    assert gold("we found the food great and awful .") == 0
    assert gold("the food was great . " * 3 + "the pool was cold .") == 0
    assert gold("the pool was cold . " * 9) == -8  # no more than eight sentences count
    assert gold("") == 0 and gold("great great") == 0


def test_every_toy_word_is_in_the_vocabulary(tokenizer):
    for row in sft.toy_rows("train", 200):
        for name in ("prompt", "chosen", "rejected"):
            ids = tokenizer(row[name])["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == row[name]


def test_split_indices():
    """The released code's partition, written here a second time and differently: bounds from the last one backwards."""
    for size in (1, 7, 10, 99, 1000, 92858):
        for shares in ((20, 40, 40), (20, 80), (95, 5), (1, 1, 1)):
            order = np.arange(size)
            np.random.RandomState(1234).shuffle(order)
            sizes = [int(round(share / sum(shares) * size)) for share in shares]
            surplus = sum(sizes) - size
            cuts = [0] + [sum(sizes[:k + 1]) - surplus for k in range(len(sizes))]
            parts = [sft.split_indices(size, shares, part).tolist() for part in range(len(shares))]
            assert parts == [order[cuts[k]:cuts[k + 1]].tolist() for k in range(len(shares))]
            flat = [i for part in parts for i in part]
            assert len(flat) == len(set(flat)) and (size < 7 or sorted(flat) == list(range(size)))


def test_the_stages_share_no_row(tokenizer):
    args = sft.parse_args(sft.Args, argv=[])
    parts = [sft.load_rows(args, part, ["prompt", "chosen"], tokenizer) for part in range(3)]
    train = [{row["prompt"] + row["chosen"] for row in rows} for rows, _ in parts]
    assert sum(map(len, train)) == len(set.union(*train)) and [len(rows) for rows in train] == [2240, 4480, 4480]


def test_batches_cover_every_epoch_once():
    seen = [sft.batch_indices(update, 10, 3, seed=5).tolist() for update in range(6)]
    for epoch in (seen[:3], seen[3:]):
        assert len({i for batch in epoch for i in batch}) == 9
    assert seen[:3] != seen[3:] and seen[1] == sft.batch_indices(1, 10, 3, seed=5).tolist()


def test_encode(tokenizer):
    prompt, answer = sft.encode(tokenizer, "review of the pool :", "the pool was cold .")
    assert tokenizer.convert_ids_to_tokens(prompt) == ["<bos>", "review", "of", "the", "pool", ":"]
    assert tokenizer.convert_ids_to_tokens(answer) == ["the", "pool", "was", "cold", ".", "<eos>"]
    assert sft.encode(tokenizer, "<bos> review")[0].count(tokenizer.bos_token_id) == 1  # a template may have added it
    assert sft.encode(tokenizer, "review") == (sft.encode(tokenizer, "review", "x")[0], None)


def test_pad():
    ids, mask = sft.pad([[1, 2], [3]], 0, "cpu")
    assert ids.tolist() == [[1, 2], [3, 0]] and mask.tolist() == [[True, True], [True, False]]
    ids, mask = sft.pad([[1, 2], [3]], 0, "cpu", left=True)
    assert ids.tolist() == [[1, 2], [0, 3]] and mask.tolist() == [[True, True], [False, True]]


def test_the_stages_share_no_row_of_a_file_either(tmp_path, tokenizer):
    """Rows that one stage skips and another does not leave the shares as they are; so do held-out rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({**GOOD, "prompt": f"row {i}", "rejected": None if i == 7 else "x"}) for i in range(400)))
    sets = []
    for part, columns in enumerate((["prompt", "chosen"], ["prompt", "chosen", "rejected"], ["prompt"])):
        args = sft.parse_args(sft.Args, argv=["--task", "pairs", "--data_path", str(path)])
        sets += [{row["prompt"] for row in rows} for rows in sft.load_rows(args, part, columns, tokenizer)]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 399 or sum(map(len, sets)) == len(set.union(*sets)) == 400
    assert [len(rows) for rows in sets[::2]] == [76, 152, 152] or sum(map(len, sets)) == 399


def rows_of(path, tokenizer, columns=("prompt", "chosen"), *options):
    args = sft.parse_args(sft.Args, argv=["--task", "pairs", "--data_path", str(path), "--all_rows", "true", *options])
    return sft.load_rows(args, 0, list(columns), tokenizer)


GOOD = {"prompt": "review of the pool :", "chosen": "the pool was great .", "rejected": "the pool was cold ."}


@pytest.mark.parametrize("lines, message", [
    ([], "has no rows"),
    (['{"prompt": "a"}'], "lacks the column chosen; it has prompt"),
    (["not json"], "row 0 .* is no JSON object"),
    ([json.dumps(GOOD), "[1]"], "row 1 .* is no JSON object|cannot be read"),
    (['{"prompt": [{"role": "user", "content": "hi"}], "chosen": "a"}'], "row 0 .* has no chat template|row 0 .* no chat template"),
])
def test_wrong_files_are_refused_in_words(lines, message, tmp_path, tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(SystemExit, match=message):
        rows_of(path, tokenizer)


def test_no_file(tmp_path, tokenizer):
    with pytest.raises(SystemExit, match="there is no file"):
        rows_of(tmp_path / "absent.jsonl", tokenizer)
    with pytest.raises(SystemExit, match="--task pairs needs --data_path"):
        sft.load_rows(sft.parse_args(sft.Args, argv=["--task", "pairs"]), 0, ["prompt"], tokenizer)


def test_rows_without_text_are_skipped_and_named(tmp_path, tokenizer, capsys):
    path = tmp_path / "rows.jsonl"
    # row 31 has a number, row 30 nothing
    path.write_text("\n".join(json.dumps(row) for row in [GOOD] * 30 + [{**GOOD, "chosen": None}, {**GOOD, "prompt": 3}] + [GOOD] * 8))
    train, held_out = rows_of(path, tokenizer)
    assert len(train) + len(held_out) == 38
    said = capsys.readouterr().err
    assert "2 of 38 rows have no text as prompt or chosen and are skipped" in said and "row 30, 31" in said


def test_parquet_and_a_file_of_held_out_rows(tmp_path, tokenizer):
    import datasets
    datasets.Dataset.from_list([GOOD] * 10).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list([GOOD] * 4).to_parquet(tmp_path / "held_out.parquet")
    train, held_out = rows_of(tmp_path / "rows.parquet", tokenizer, ("prompt", "chosen"), "--eval_path", str(tmp_path / "held_out.parquet"))
    assert (len(train), len(held_out)) == (10, 4) and train[0]["chosen"] == GOOD["chosen"]


def test_messages_go_through_the_chat_template(tmp_path):
    tokenizer = sft.toy_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}<bos> {{ m.role }} : {{ m.content }} <eos>\n{% endfor %}"
                               "{% if add_generation_prompt %}<bos> assistant : {% endif %}")
    messages = [{"role": "user", "content": "the pool"}]
    rows = [{"prompt": messages, "chosen": "was great .", "rejected": "was cold ."},
            {"prompt": messages, "chosen": [{"role": "assistant", "content": "was lovely ."}], "rejected": "was cold ."}]
    for row, expected in zip(rows, ("was great . ", "was lovely . ")):
        path = tmp_path / "rows.jsonl"
        path.write_text((json.dumps(row) + "\n") * 20)
        train, _ = rows_of(path, tokenizer, ("prompt", "chosen", "rejected"))
        assert train[0]["prompt"] == "<bos> user : the pool <eos>\n<bos> assistant : "
        assert train[0]["chosen"] == expected and train[0]["rejected"] == "was cold . "


def test_a_template_whose_prompt_is_no_prefix_is_refused(tmp_path):
    tokenizer = sft.toy_tokenizer()
    tokenizer.chat_template = ("{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}<think>{% endif %}")
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"prompt": [{"role": "user", "content": "the pool"}], "chosen": "was great ."}) + "\n") * 20)
    with pytest.raises(SystemExit, match="does not begin as the prompt alone does"):
        rows_of(path, tokenizer)


def test_prompts_that_are_too_long_are_left_out_and_counted(tmp_path, tokenizer, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "review " * (30 if i == 7 else 3)}) for i in range(40)))
    args = ppo.parse_args(ppo.Args, ppo.AdvantageArgs, argv=["--task", "pairs", "--data_path", str(path), "--all_rows", "true",
                                                             "--max_prompt_length", "20"])
    train, held_out = ppo.load_prompts(args, tokenizer)
    assert len(train) + len(held_out) == 39 and all(len(row["ids"]) <= 20 for row in train + held_out)
    assert "1 of 38 prompts are longer than --max_prompt_length 20" in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["--batch_size", "0"], "--batch_size is 0; it must be at least 1"),
    (["--lr", "-1"], "--lr is -1.0; it must be at least 0"),
    (["--warmup_ratio", "2"], "must be at least 0 and at most 1"),
    (["--lrr", "1"], "unknown option --lrr"),
    (["--updates", "0"], "--updates is 0; it must be at least 1"),
    (["--task", "nonsense"], "invalid choice: 'nonsense'"),
    (["--lr", "nan"], "--lr is nan"),
])
def test_wrong_options_are_refused_in_words(argv, message, capsys):
    with pytest.raises(SystemExit):
        sft.parse_args(sft.Args, argv=argv)
    assert message in capsys.readouterr().err
