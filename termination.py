"""Termination conditions of macro actions (section 3.2.1 and appendix B.4 of the paper), as pure functions on tensors.

Each takes the responses of a batch (B, T), any mix of lengths, on any device, and returns `starts` (B, T) bool: True on
the first token of every macro action, False on padding. Macro actions cut a response completely: each ends where the next
one starts. `mask` (B, T) is True on the real tokens, the first columns of every row.

Run as a program, it shows a text cut into macro actions under each condition:

    python termination.py "The food was great. The pool was never cold."
    python termination.py --samples runs/toy/ma_ppo/samples.jsonl --model runs/toy/sft/final
"""
import argparse
import ast
import bisect
import collections
import functools
import io
import itertools
import json
import math
import os
import re
import select
import shutil
import subprocess
import sys
import time
import tokenize
import warnings

import torch


def check_mask(mask):
    """ValueError unless every row of mask (B, T) is a run of at least one True followed by nothing but False."""
    if mask.dim() != 2 or mask.dtype != torch.bool:
        raise ValueError(f"mask must be a bool tensor (B, T), not {mask.dtype} of shape {tuple(mask.shape)}")
    if not mask.any(1).all():
        raise ValueError(f"row {int((~mask.any(1)).nonzero()[0, 0])} of the mask has no real token; drop empty responses")
    holes = (mask[:, 1:] & ~mask[:, :-1]).any(1)
    if holes.any():
        raise ValueError(f"row {int(holes.nonzero()[0, 0])} of the mask has a real token after padding; pad on the right")


def fixed_ngram(mask, n):
    """A macro action is n tokens long, the last one may be shorter. n: a whole number >= 1, or math.inf (one macro action).

    >>> fixed_ngram(torch.tensor([[True] * 5, [True] * 2 + [False] * 3]), 2).int()
    tensor([[1, 0, 1, 0, 1],
            [1, 0, 0, 0, 0]], dtype=torch.int32)
    """
    check_mask(mask)
    if not (n == math.inf or n >= 1 and n == int(n)):
        raise ValueError(f"n must be a whole number of tokens >= 1, or math.inf, not {n}")
    position = torch.arange(mask.shape[1], device=mask.device)
    return mask & (position % min(n, mask.shape[1]) == 0)


def randomized_ngram(mask, lengths=(2, 3, 5, 10), repeats=3, generator=None):
    """Lengths come from a list, `lengths` repeated `repeats` times and shuffled, for each row anew; what is left of a
    response after the list is used up is one macro action. `generator` (on the mask's device) makes it reproducible.

    >>> randomized_ngram(torch.ones(1, 6, dtype=torch.bool), lengths=(2,), repeats=2).int()
    tensor([[1, 0, 1, 0, 1, 0]], dtype=torch.int32)
    """
    check_mask(mask)
    if repeats < 1 or not lengths or any(length < 1 or length != int(length) for length in lengths):
        raise ValueError(f"lengths must be whole numbers >= 1, repeated at least once, not {lengths} x {repeats}")
    deck = torch.tensor(list(lengths) * repeats, device=mask.device)
    order = torch.rand(len(mask), len(deck), generator=generator, device=mask.device).argsort(1)
    ends = deck[order].cumsum(1)  # (B, D): where a macro action ends and the next one starts
    starts = torch.zeros(len(mask), mask.shape[1] + 1, dtype=torch.bool, device=mask.device)
    starts.scatter_(1, ends.clamp(max=mask.shape[1]), True)  # starts beyond the response gather in the extra column
    starts[:, 0] = True
    return starts[:, :-1] & mask


def perplexity(ref_logprobs, mask):
    """A macro action ends before a token that would raise its perplexity exp(mean of -ref_logprobs): a token of negative
    log-probability v is the first of a new one iff v * count > the sum over the macro action so far, in float64.

    ref_logprobs (B, T): log pi_sft(a_t | s_t), which PPO has anyway. One pass over the columns, for all rows at once:
    where a macro action starts depends on where the one before it started.

    >>> perplexity(torch.tensor([[-2.0, -1.0, -1.5, -1.6]]), torch.ones(1, 4, dtype=torch.bool)).int()
    tensor([[1, 0, 0, 1]], dtype=torch.int32)
    """
    check_mask(mask)
    surprise = (-ref_logprobs).double().masked_fill(~mask, 0).unbind(1)
    total, count = torch.zeros_like(surprise[0]), torch.zeros_like(surprise[0])
    starts = []
    for v in surprise:
        start = (v * count > total) | (count == 0)
        starts.append(start)
        total, count = v + total.masked_fill(start, 0), count.masked_fill(start, 0) + 1
    return torch.stack(starts, 1) & mask


def macro_ids(starts):
    """The index of each token's macro action, (B, T) long; padding has the index of the last one.

    >>> macro_ids(torch.tensor([[True, False, True, True, False]]))
    tensor([[0, 0, 1, 2, 2]])
    """
    return (starts.long().cumsum(1) - 1).clamp(min=0)


def token_starts(ids, tokenizer):
    """-> the text of the token ids (special tokens left out), and for each token the character at which its text begins.

    A token begins where the decoded tokens before it cease to agree with the text. Bytes of one character that are split
    over tokens so all begin at that character; a special token begins where the next token does. Tokens are decoded from
    some eight behind the last place of agreement, since the first of a decoded list may lose its space.
    """
    decode = lambda part: tokenizer.batch_decode([part], skip_special_tokens=True, clean_up_tokenization_spaces=False)[0]
    text, starts = decode(ids), []
    behind = anchor = base = 0  # the tokens before `anchor` are the text before character `base`
    head = ""  # the text of ids[behind:anchor]
    for k in range(len(ids)):
        piece = decode(ids[behind:k])[len(head):]
        agreed = len(os.path.commonprefix([piece, text[base:base + len(piece)]]))
        starts.append(max(base + agreed, starts[-1] if starts else 0))
        if agreed == len(piece) and k >= anchor + 8:
            behind, anchor, base, head = anchor, k, base + agreed, decode(ids[anchor:k])
    return text, starts


def parse_starts(trees, words_of_tokens, cutoff):
    """Indices of the words at which macro actions start, in order, by a depth-first walk over the trees of a response.

    trees: nested lists whose leaves are (start, end) spans of words; words_of_tokens: the index of each token's word. A node
    of one word joins the macro action before it, but at the head of its sentence; a node with fewer than `cutoff` tokens
    is one macro action; any other node is descended into.
    """
    tokens = collections.Counter(words_of_tokens)
    starts, word = [], 0
    for tree in trees:
        head, stack = word, [tree]  # a stack, since programs nest deeper than Python may recurse
        while stack:
            node = stack.pop()
            size = len(leaves(node))
            if size == 1 or sum(tokens[i] for i in range(word, word + size)) < cutoff:
                if size > 1 or size == 1 and word == head:
                    starts.append(word)
                word += size
            else:
                stack.extend(reversed(node))
    return starts


def leaves(tree):
    """The (start, end) spans of a tree from left to right.

    >>> leaves([[(0, 3), (4, 8)], (9, 12)])
    [(0, 3), (4, 8), (9, 12)]
    """
    spans, stack = [], [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, tuple):
            spans.append(node)
        else:
            stack.extend(reversed(node))
    return spans


def parsing(responses, mask, tokenizer, parse, cutoff=5):
    """Macro actions are constituents of a parse: nodes with fewer than `cutoff` tokens, see parse_starts.

    responses (B, T) token ids. parse: text -> trees of its sentences in order, nested lists whose leaves are (start, end)
    character spans of words; None (or no word) where it rejects the text: that row of the result is all False. A token
    belongs to the word that holds its first non-space character, or to the next word where none does; what follows the
    last word (EOS) to the last macro action.
    """
    check_mask(mask)
    starts = torch.zeros_like(mask)
    for row, (response, real) in enumerate(zip(responses, mask)):
        text, begins = token_starts(response[real].tolist(), tokenizer)
        trees = parse(text) or []
        words = leaves(trees)
        if not words:
            continue
        firsts = [begin + len(text[begin:]) - len(text[begin:].lstrip()) for begin in begins]
        words_of_tokens = [bisect.bisect_right([end for _, end in words], first) for first in firsts]
        actions = parse_starts(trees, words_of_tokens, cutoff)
        action_of_token = [bisect.bisect_right(actions, min(word, len(words) - 1)) for word in words_of_tokens]
        for k, action in enumerate(action_of_token):
            starts[row, k] = k == 0 or action != action_of_token[k - 1]
    return starts


def ptb_tree(ptb, text, start=0):
    """A tree of (start, end) spans from a Penn Treebank string, whose words stand in `text` in the same order, from
    character `start` on. Bracket and quote codes, upper and lower case are as in the text. ValueError where a word is not.

    >>> ptb_tree("(S (NP (DT The) (NN cat)) (VP (VBD sat)) (. .))", "The cat sat.")
    [[[(0, 3)], [(4, 7)]], [[(8, 11)]], [(11, 12)]]
    """
    codes = {"-LRB-": "(", "-RRB-": ")", "-LSB-": "[", "-RSB-": "]", "-LCB-": "{", "-RCB-": "}", "``": '"', "''": '"'}
    stack, cursor, lower = [[]], start, text.lower()
    for opening, word in re.findall(r"(\([^\s()]*)|([^\s()]+|\))", ptb):
        if opening:
            stack.append([])
        elif word == ")" and len(stack) > 1:
            node = stack.pop()
            stack[-1].append(node)
        else:
            found = [at for form in (word, codes.get(word, word)) if (at := lower.find(form.lower(), cursor)) >= 0]
            if not found or any(character.isalnum() for character in text[cursor:min(found)]) or len(lower) != len(text):
                raise ValueError(f"the word {word!r} of the tree does not follow at character {cursor} of the text")
            cursor = min(found) + len(word if lower.startswith(word.lower(), min(found)) else codes[word])
            stack[-1].append((min(found), cursor))
    if len(stack) != 1 or len(stack[0]) != 1:
        raise ValueError(f"not one balanced tree: {ptb[:60]}")
    return stack[0][0]


def python_parser():
    """-> parse(text) for Python source: trees of its top-level statements by `ast`, the inner nodes statements and
    expressions, the leaves the tokens of the source with comments; None for text that is no Python."""
    layout = (tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)

    def parse(text):
        if re.search("[\r\f](?!\n)", text):
            return None  # ast counts lines at these, tokenize does not
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of what a model's code looks like
                module = ast.parse(text)
            tokens = [t for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type not in layout]
        except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
            return None
        lines = io.StringIO(text).readlines()
        offsets = [0, *itertools.accumulate(map(len, lines))]
        spans = [(offsets[t.start[0] - 1] + t.start[1], offsets[t.end[0] - 1] + t.end[1]) for t in tokens]
        character = lambda line, byte: offsets[line - 1] + len(lines[line - 1].encode()[:byte].decode(errors="ignore"))
        ranges = set()  # of tokens, of every statement and expression
        for node in ast.walk(module):
            if isinstance(node, (ast.stmt, ast.expr)):
                first = bisect.bisect_left(spans, (character(node.lineno, node.col_offset),))
                if getattr(node, "decorator_list", None):
                    head = node.decorator_list[0]
                    first = bisect.bisect_left(spans, (character(head.lineno, head.col_offset),)) - 1  # with its @
                end = character(node.end_lineno, node.end_col_offset)
                last = bisect.bisect_right([end for _, end in spans], end)
                if first < last:
                    ranges.add((first, -last))
        root, open_nodes = [], []  # open_nodes: (list, its last token + 1) of the nodes that are not complete
        todo = sorted(ranges, reverse=True)
        for i, span in enumerate(spans):
            while open_nodes and open_nodes[-1][1] <= i:
                open_nodes.pop()
            while todo and todo[-1][0] == i:
                last, node = -todo.pop()[1], []
                if not open_nodes or last <= open_nodes[-1][1]:
                    (open_nodes[-1][0] if open_nodes else root).append(node)
                    open_nodes.append((node, last))
            (open_nodes[-1][0] if open_nodes else root).append(span)
        return root
    return parse


def link_grammar_parser(timeout=5.0):
    """-> parse(text) for English by the program link-parser (Debian's package link-grammar), one process that lives on.
    None where a sentence has no parse whose words stand in the text in order, or takes more than `timeout` seconds."""
    if not shutil.which("link-parser"):
        raise SystemExit("--parser link-grammar needs the program link-parser: apt-get install link-grammar")
    command = ["stdbuf", "-oL", "link-parser", "en", "-limit=1", "-spell=0", "-graphics=0", "-constituents=3"]
    process, command_done = None, b"width set to 16000\n"

    def ask(sentence):
        """The program's answer to a line; a command behind the line shows where the answer ends."""
        nonlocal process
        if process is None or process.poll() is not None:
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        answer, deadline = b"", time.monotonic() + timeout
        try:
            process.stdin.write(sentence.encode() + b"\n!width=16000\n")
            process.stdin.flush()
            while not answer.endswith(command_done):
                if not select.select([process.stdout], [], [], max(0, deadline - time.monotonic()))[0]:
                    raise TimeoutError
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    raise BrokenPipeError
                answer += chunk
        except (OSError, TimeoutError):
            process.kill()
            process.wait()
            process = None
            return ""
        return answer.decode(errors="replace")

    def parse(text):
        trees = []
        for match in re.finditer(r"[^.!?\n]*[.!?]*", text):
            sentence = " ".join(match[0].split()).lstrip("!% ")  # these would make it a command
            if not any(character.isalnum() for character in sentence):
                continue
            found = re.search(r"^\(S .*$", ask(sentence), re.M)
            if not found:
                return None
            # words come lower-cased, with subscripts (food.s), and marked where they were guessed (xyzzy{?}.n)
            words = re.sub(r"(?<=[^\s(])(\[[^\]\s]*\]|\{[^}\s]*\})?(\.[a-z][\w-]*)?(?=[\s)])", "", found[0])
            try:
                trees.append(ptb_tree(re.sub(r"[{}]", "", words), text[:match.end()], match.start()))
            except ValueError:
                return None
        return trees
    return parse


def stanza_parser():
    """-> parse(text) by stanza's English constituency pipeline (pip install stanza; it downloads its own model)."""
    try:
        import stanza
    except ImportError:
        raise SystemExit("--parser stanza needs the package: pip install stanza") from None
    pipeline = stanza.Pipeline("en", processors="tokenize,pos,constituency", verbose=False)

    def parse(text):
        try:
            return [ptb_tree(str(sentence.constituency), text, sentence.tokens[0].start_char)
                    for sentence in pipeline(text).sentences]
        except ValueError:
            return None
    return parse


@functools.cache
def parser(name):
    """The parser of that name, made once for a process: "stanza", "link-grammar" or "python"."""
    return {"stanza": stanza_parser, "link-grammar": link_grammar_parser, "python": python_parser}[name]()


class Words:
    """The words of a text as a tokenizer: token i is the i-th word with the space before it."""

    def __init__(self, text):
        self.pieces = re.findall(r"\s*\S+", text)

    def batch_decode(self, lists, **_):
        return ["".join(self.pieces[i] for i in ids) for ids in lists]


def colored(pieces, starts, color):
    """The pieces of a text as one string, its macro actions in alternating colors, or with bars between them."""
    text, number = "", -1
    for piece, start in zip(pieces, starts):
        number += start
        if start and number and not color:
            text += " |"
        text += f"\x1b[3{'64'[number % 2]}m{piece}\x1b[0m" if color else piece
    return text.strip()


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("text", nargs="?", help="the text to cut")
    options.add_argument("--file", help="read the text from this file")
    options.add_argument("--samples", help="a samples.jsonl of stage 3: its last response, and its prompt for perplexity")
    options.add_argument("--tokenizer", help="folder or hub name; without it (and --model) a token is a word")
    options.add_argument("--model", help="policy whose log-probabilities perplexity uses; also the tokenizer")
    options.add_argument("--ngram", type=float, default=5, help="tokens per fixed n-gram, or inf (default: 5)")
    options.add_argument("--parser", choices=("stanza", "link-grammar", "python"), default="link-grammar", help="of parsing "
                         "(default: link-grammar)")
    options.add_argument("--cutoff", type=int, default=5, help="constituents of fewer tokens are one action (default: 5)")
    options.add_argument("--seed", type=int, default=0, help="of randomized n-grams (default: 0)")
    args = options.parse_args(argv)
    prompt = ""
    try:
        if args.samples:
            row = json.loads(open(args.samples).read().splitlines()[-1])
            prompt, args.text = row["prompt"], row["response"]
        elif args.file:
            args.text = open(args.file).read()
    except (OSError, ValueError, IndexError, KeyError) as error:
        options.error(f"cannot read a text from {args.samples or args.file}: {error}")
    if not (args.text or "").strip():
        options.error("give a text, --file or --samples")
    tokenizer = Words(args.text)
    ids = list(range(len(tokenizer.pieces)))
    if args.tokenizer or args.model:
        from transformers import AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.model)
        ids = tokenizer(args.text, add_special_tokens=False)["input_ids"]
    text, begins = token_starts(ids, tokenizer)
    pieces = [text[begin:end] for begin, end in zip(begins, [*begins[1:], len(text)])]
    responses = torch.tensor([ids])
    mask = torch.ones_like(responses, dtype=torch.bool)
    cuts = {f"fixed n-gram, n = {args.ngram:g}": lambda: fixed_ngram(mask, args.ngram),
            "randomized n-gram": lambda: randomized_ngram(mask, generator=torch.Generator().manual_seed(args.seed)),
            f"parsing, {args.parser}, cutoff {args.cutoff}": lambda: parsing(responses, mask, tokenizer, parser(args.parser), args.cutoff)}
    if args.model:
        from transformers import AutoModelForCausalLM
        head = [tokenizer.bos_token_id or tokenizer.eos_token_id] + tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = AutoModelForCausalLM.from_pretrained(args.model)(torch.tensor([head + ids])).logits[:, len(head) - 1:-1]
        logprobs = logits.log_softmax(-1).gather(2, responses[..., None]).squeeze(2)
        cuts["perplexity"] = lambda: perplexity(logprobs, mask)
    else:
        print("perplexity: needs --model, whose log-probabilities it uses\n")
    for name, cut in cuts.items():
        try:
            starts = cut()[0].tolist()
        except (SystemExit, ValueError) as error:
            print(f"{name}: {error}\n")
            continue
        count = sum(starts)
        print(f"{name}: {count} macro actions, {len(ids) / count:.1f} tokens each" if count else f"{name}: rejected by the parser")
        print((colored(pieces, starts, sys.stdout.isatty()) if count else text) + "\n")


if __name__ == "__main__":
    main()
