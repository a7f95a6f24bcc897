"""Parsing: token positions against the bytes of a byte-level tokenizer, every rule on hand-made trees, the walk against
brute force, and the parsers."""
import json
import os
import random
import shutil
import time

import pytest
import torch
import transformers

import ma_ppo
import termination
from termination import Words


def starts_of(text, trees, cutoff=5):
    """Macro actions of a text of words, as lists of its words."""
    words = Words(text)
    responses = torch.arange(len(words.pieces))[None]
    starts = termination.parsing(responses, torch.ones_like(responses, dtype=torch.bool), words, lambda _: trees, cutoff)[0]
    actions = []
    for piece, start in zip(words.pieces, starts.tolist()):
        actions.append([piece.strip()]) if start else actions[-1].append(piece.strip())
    return [" ".join(action) for action in actions]


def tree(text, nested):
    """A nested list of words -> the same with their character spans in the text."""
    cursor = 0

    def spans(node):
        nonlocal cursor
        if isinstance(node, str):
            cursor = text.index(node, cursor) + len(node)
            return (cursor - len(node), cursor)
        return [spans(child) for child in node]
    return [spans(sentence) for sentence in nested]


@pytest.mark.parametrize("text, nested, cutoff, expected", [
    ("the cat sat on the mat", [[["the", "cat"], ["sat", ["on", ["the", "mat"]]]]], 5, ["the cat", "sat on the mat"]),
    ("the cat sat on the mat", [[["the", "cat"], ["sat", ["on", ["the", "mat"]]]]], 4, ["the cat sat", "on the mat"]),
    ("the cat sat on the mat", [[["the", "cat"], ["sat", ["on", ["the", "mat"]]]]], 7, ["the cat sat on the mat"]),
    ("well the cat sat now", [["well", ["the", "cat", "sat"], "now"]], 4, ["well", "the cat sat now"]),  # a word joins, or heads
    ("so well the cat sat", [["so", "well", ["the", "cat", "sat"]]], 4, ["so well", "the cat sat"]),
    ("go now . the cat sat", [["go", "now", "."], [["the", "cat", "sat"]]], 5, ["go now .", "the cat sat"]),  # sentences part
    ("yes . no", [["yes"], ["no"]], 5, ["yes", ". no"]),  # a token outside every word: to the next word, or to the last action
    ("yes ( no )", [["yes"], ["no"]], 5, ["yes", "( no )"]),
    ("a b c d e f", [[["a"], [["b"]], ["c", "d"], [], ["e", "f"]]], 3, ["a b", "c d", "e f"]),  # chains and empty nodes
    ("a b c d", [["a", "b", "c", "d"]], 1, ["a b c d"]),  # words join the one that heads the sentence
    ("x a b", [["a", "b"]], 5, ["x a b"]),  # the first token always begins one
])
def test_rules(text, nested, cutoff, expected):
    assert starts_of(text, tree(text, nested), cutoff) == expected


def test_the_cutoff_counts_tokens_not_words_and_actions_without_tokens_vanish():
    """Two words in one token: the constituent that begins inside it has no token of its own."""
    text = "the cat sat on it"

    class Tokens:  # tokens "the cat", " s", "at", " on it"
        pieces = ["the cat", " s", "at", " on it"]
        batch_decode = Words.batch_decode
    trees = tree(text, [[["the", "cat"], ["sat"], ["on", "it"]]])
    responses = torch.arange(4)[None]
    mask = torch.ones_like(responses, dtype=torch.bool)
    run = lambda trees, cutoff: termination.parsing(responses, mask, Tokens(), lambda _: trees, cutoff)[0].tolist()
    assert run(trees, 5) == [True, False, False, False]  # 4 tokens in all
    assert run(trees, 4) == [True, False, False, True]  # "sat" is one word, of two tokens: it joins
    assert run(tree(text, [[["the"], ["cat", "sat", "on"], ["it"]]]), 4) == [True, True, False, False]  # "cat" has no token
    assert run(tree(text, [[["the"], ["cat", "sat", "on"], ["it"]]]), 3) == [True, False, False, False]


def test_rejected_rows_are_all_false_and_eos_belongs_to_the_last_action(tokenizer):
    texts = ["the food was great .", "the pool was cold ."]
    rows = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
    responses = torch.tensor([row + [tokenizer.pad_token_id] * 2 for row in rows])
    mask = responses != tokenizer.pad_token_id
    parse = lambda text: None if "pool" in text else tree(text, [[["the", "food"], ["was", "great"], "."]])
    starts = termination.parsing(responses, mask, tokenizer, parse, 3)
    assert starts.tolist() == [[True, False, True, False, False, False, False, False], [False] * 8]


def test_a_rejected_row_falls_back_to_ngrams(tokenizer, monkeypatch):
    responses = torch.tensor([tokenizer("the food was great .")["input_ids"]] * 2)
    rollout = {"responses": responses, "mask": torch.ones_like(responses, dtype=torch.bool), "rewards": torch.zeros(2, 5),
               "values": torch.tensor([[1.0, 2, 3, 4, 5]] * 2)}
    args = ma_ppo.AdvantageArgs(termination="parsing", parser="python", ngram=2)  # no English sentence is Python
    advantages, returns, metrics = ma_ppo.compute_advantages(rollout, args, tokenizer)
    args.termination = "fixed_ngram"
    expected = ma_ppo.compute_advantages(rollout, args)
    assert torch.equal(advantages, expected[0]) and torch.equal(returns, expected[1]) and metrics["macro/parse_failures"] == 2


def brute_force_actions(trees, tokens):
    """The macro actions of words by the rules, as lists of word numbers, written a second time."""
    numbers, actions = {}, []

    def words(node):
        return [node] if isinstance(node, tuple) else [leaf for child in node for leaf in words(child)]
    for sentence in trees:
        for leaf in words(sentence):
            numbers[leaf] = len(numbers)
    for sentence in trees:
        mine, todo = [], [sentence]
        while todo:
            node = todo.pop(0)
            inside = [numbers[leaf] for leaf in words(node)]
            if len(inside) == 1 and mine:
                mine[-1] += inside
            elif len(inside) == 1 or sum(tokens.count(n) for n in inside) < 5:
                mine += [inside] if inside else []
            else:
                todo = list(node) + todo
        actions += mine
    return actions


def test_parsing_by_brute_force():
    rng = random.Random(0)

    def random_tree(count, depth=0):
        if count == 1 and rng.random() < 0.7:
            return "w"
        parts, left = [], count
        while left:
            size = rng.randint(1, left)
            if size == count and depth > 4:
                size = max(1, count // 2)
            parts.append(random_tree(size, depth + 1))
            left -= size
        return parts
    for _ in range(250):
        text, nested = "", [random_tree(rng.randint(1, 12)) for _ in range(rng.randint(1, 3))]

        def spans(node):
            nonlocal text
            if node == "w":
                text += rng.choice(["", "  ", "\n", " - ", " "])
                begin, text = len(text), text + "w" * rng.randint(1, 6)
                return (begin, len(text))
            return [spans(child) for child in node]
        trees = [spans(sentence) for sentence in nested]
        text += rng.choice(["", " ", "!\n"])
        leaves = termination.leaves(trees)
        cuts = sorted(rng.sample(range(1, len(text)), min(len(text) - 1, rng.randint(1, 25)))) if len(text) > 1 else []
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)])]

        class Tokens:
            batch_decode = Words.batch_decode
        Tokens.pieces = pieces
        word_of_token, at = [], 0
        for piece in pieces:
            first = next((i for i in range(at, len(text)) if not text[i].isspace()), len(text))
            word_of_token.append(next((n for n, (_, end) in enumerate(leaves) if first < end), len(leaves)))
            at += len(piece)
        actions = brute_force_actions(trees, word_of_token)
        action_of_word = {word: k for k, action in enumerate(actions) for word in action}
        expected = [action_of_word[min(word, len(leaves) - 1)] for word in word_of_token]
        expected = [k == 0 or expected[k] != expected[k - 1] for k in range(len(expected))]
        responses = torch.arange(len(pieces))[None]
        mask = torch.ones_like(responses, dtype=torch.bool)
        assert termination.parsing(responses, mask, Tokens(), lambda _: trees, 5)[0].tolist() == expected


@pytest.fixture(scope="module")
def byte_level():
    """A byte-level tokenizer with few merges, so that characters of several bytes are split over tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(["the food was great, the café naïve 世界", "the the food"], trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.fixture(scope="module")
def byte_fallback():
    """A tokenizer like Gemma's: spaces as a letter of their own, what the vocabulary lacks byte by byte."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(["the food was great,  the naïve a\n\n"], trainers.BpeTrainer(
        vocab_size=320, special_tokens=special[:2], initial_alphabet=["\t"]))
    spec = json.loads(tokenizer.to_str())
    words = [word for word in spec["model"]["vocab"] if word not in special]
    spec["model"]["vocab"] = {word: i for i, word in enumerate(special + words)}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_token_positions_are_those_of_their_bytes(kind, request):
    rng, tokenizer = random.Random(1), request.getfixturevalue(kind)
    alphabet = ["the ", "food", " ", "\n", "  ", "é", "世", "🙂", "a", ".", "<eos>", "ï", "\t"]
    for _ in range(200):
        text = "".join(rng.choice(alphabet) for _ in range(rng.randint(1, 40)))
        ids = tokenizer(text)["input_ids"]
        plain, starts = termination.token_starts(ids, tokenizer)
        assert plain == text.replace("<eos>", "")
        data, owner = plain.encode(), []
        for number, character in enumerate(plain):
            owner += [number] * len(character.encode())
        owner.append(len(plain))
        at, expected = 0, []
        for piece in tokenizer.convert_ids_to_tokens(ids):
            expected.append(owner[at])
            if kind == "byte_fallback" and not piece.startswith("<0x"):
                piece = piece if piece == "<eos>" else piece.replace("▁", " ").encode()
            at += 0 if piece == "<eos>" else 1 if str(piece).startswith("<0x") else len(piece)  # byte level: a letter a byte
        assert at == len(data) and starts == expected


def test_token_positions_of_broken_bytes(byte_level):
    ids = byte_level.convert_tokens_to_ids(["t", "Ã", "h", "ä", "¸", "ĸ"])  # a lone first byte, then 世 in three tokens
    text, starts = termination.token_starts(ids, byte_level)
    assert text == "t\ufffdh世" and starts == [0, 1, 2, 3, 3, 3]


def test_ptb_trees():
    text = 'He said (twice): "Go."'
    ptb = "(ROOT (S (NP (PRP he)) (VP (VBD said) (PRN (-LRB- -LRB-) (RB twice) (-RRB- -RRB-))) (: :) (`` ``) (VB Go) (. .) ('' '')))"
    spans = termination.leaves(termination.ptb_tree(ptb, text))
    assert [text[a:b] for a, b in spans] == ["He", "said", "(", "twice", ")", ":", '"', "Go", ".", '"']
    for wrong, message in (("(S (NP absent))", "'absent' of the tree"), ("(S (NP he)", "balanced"), ("(S twice)", "'twice'")):
        with pytest.raises(ValueError, match=message):
            termination.ptb_tree(wrong, text)


def test_the_python_parser():
    parse = termination.python_parser()
    source = '@dec\ndef f(a, b=1):\n    # é\n    return "é" + b * 2  # t\n\nfor i in x: print(i)\n'
    trees = parse(source)
    assert [source[a:b] for a, b in termination.leaves(trees)] == (
        '@ dec def f ( a , b = 1 ) :'.split() + ["# é"] + 'return "é" + b * 2'.split() + ["# t"] + "for i in x : print ( i )".split())
    assert len(trees) == 3  # the function, the comment behind its last line, the loop
    product = trees[0][-1][-1][-1]  # the return statement, its sum, the product in it
    assert [source[a:b] for a, b in termination.leaves(product)] == ["b", "*", "2"]
    for wrong in ("def f(:", "x = 'abc", "(" * 500, "a\x00b", "the food was great ."):
        assert parse(wrong) is None
    assert parse("") == [] and parse("# only\n") == [(0, 6)]
    assert len(termination.leaves(parse("x = " + "+".join("a" * 150)))) == 301
    for text in ("a = 1\rb = 2", "a = 1\fb = 2"):  # ends of lines to ast, and not to tokenize
        assert parse(text) is None
    odd = 'a = "\u2028"\r\nb = a\r\n'  # ends of lines to neither, and to both
    assert [odd[a:b] for a, b in termination.leaves(parse(odd))] == ["a", "=", '"\u2028"', "b", "=", "a"]


def test_deep_programs():
    """A sum of many terms is a tree as deep, deeper than Python may recurse."""
    text = "x = " + " + ".join("a" * 900)
    trees = termination.python_parser()(text)
    words = termination.leaves(trees)
    assert len(words) == 1801
    assert termination.parse_starts(trees, range(len(words)), 5)[:2] == [0, 2]


@pytest.mark.skipif(not shutil.which("link-parser"), reason="needs Debian's package link-grammar")
def test_the_link_grammar_parser():
    parse = termination.link_grammar_parser()
    for text, words in (
            ("the food was great . the pool was cold .", "the food was great . the pool was cold .".split()),
            ("To be honest, it wasn't\n\nso bad! We left.", None),
            ("!help me\n%quit now. He said (twice) that 50% of it xyzzy.", None),
            ("Hello", ["Hello"])):
        trees = parse(text)
        found = [text[a:b] for a, b in termination.leaves(trees)]
        assert found == words if words else "".join(c for c in text if c.isalnum()) == "".join(c for c in "".join(found) if c.isalnum())
    assert parse("") == [] and parse("...") == []
    assert parse("the food was great .")  # still alive


@pytest.mark.skipif(not shutil.which("link-parser"), reason="needs Debian's package link-grammar")
def test_a_parser_that_hangs_is_given_up():
    assert termination.link_grammar_parser(timeout=0.0)("the food was great .") is None


def test_a_parser_that_never_ends_its_answer_is_given_up(tmp_path, monkeypatch):
    """A program that goes on printing is stopped at the time limit, and the next text gets a new process."""
    program = tmp_path / "link-parser"
    program.write_text("#!/bin/sh\nwhile true; do echo still thinking; sleep 0.05; done\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    parse, began = termination.link_grammar_parser(timeout=0.4), time.monotonic()
    assert parse("the food was great .") is None and parse("the pool was cold .") is None
    assert time.monotonic() - began < 20


@pytest.mark.skipif(not shutil.which("link-parser"), reason="needs Debian's package link-grammar")
@pytest.mark.slow
def test_stage_3_with_parsing(tiny_models, tmp_path, monkeypatch):
    from conftest import SMALL, read_metrics
    monkeypatch.chdir(tmp_path)
    ma_ppo.main([*SMALL["ma_ppo"], "--policy", tiny_models["llama"][0], "--reward", tiny_models["llama"][1], "--output_dir", "out",
                 "--termination", "parsing"])
    assert all(row["macro/length"] >= 1 for row in read_metrics("out") if "lr" in row)


def test_the_viewer(capsys):
    termination.main(["the food was great and the pool was cold", "--ngram", "4", "--parser", "python"])
    shown = capsys.readouterr().out
    assert "n = 4: 3 macro actions, 3.0 tokens each\nthe food was great | and the pool was | cold\n" in shown
    assert "needs --model" in shown and "rejected by the parser" in shown
