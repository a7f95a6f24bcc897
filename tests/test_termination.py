"""Termination conditions against brute-force definitions, one token at a time in plain Python."""
import math
import random

import pytest
import torch

import termination


def random_mask(rng, rows=4):
    lengths = [rng.randint(1, 40) for _ in range(rows)]
    return torch.arange(max(lengths) + rng.randint(0, 3)) < torch.tensor(lengths)[:, None], lengths


@pytest.mark.parametrize("n", [1, 2, 3, 5, 10, 64, math.inf])
def test_fixed_ngram(n):
    rng = random.Random(0)
    for _ in range(50):
        mask, lengths = random_mask(rng)
        for row, length in zip(termination.fixed_ngram(mask, n).tolist(), lengths):
            assert row == [t < length and (t == 0 if n == math.inf else t % n == 0) for t in range(mask.shape[1])]


def test_randomized_ngram():
    rng, orders, deck = random.Random(1), set(), sorted([2, 3, 5, 10] * 3)
    for seed in range(200):
        lengths = [rng.randint(1, 90) for _ in range(4)]
        mask = torch.arange(90) < torch.tensor(lengths)[:, None]
        starts = termination.randomized_ngram(mask, generator=torch.Generator().manual_seed(seed))
        again = termination.randomized_ngram(mask, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(starts, again)
        for row, length in zip(starts.tolist(), lengths):
            bounds = [t for t, start in enumerate(row) if start] + [length]
            assert bounds[0] == 0 and bounds[-2] < length
            sizes = [end - begin for begin, end in zip(bounds, bounds[1:])]
            left = list(deck)
            for size in sizes[:-1]:
                left.remove(size)  # raises where a length is used more often than it is in the list
            if sum(sizes[:-1]) == sum(deck):
                assert not left and len(sizes) == len(deck) + 1  # the rest is one macro action
            else:
                assert any(sizes[-1] <= size for size in left)  # a length of the list, cut off by the end
            orders.add(tuple(sizes[:-1]))
    assert len(orders) > 400  # rows and seeds draw orders of their own


def test_randomized_ngram_draws_every_length_first_equally_often():
    starts = termination.randomized_ngram(torch.ones(4000, 12, dtype=torch.bool), generator=torch.Generator().manual_seed(0))
    first = starts[:, 1:].int().argmax(1) + 1
    for size in (2, 3, 5, 10):
        assert abs((first == size).float().mean().item() - 0.25) < 0.03


def test_perplexity():
    rng = random.Random(2)
    for trial in range(200):
        mask, lengths = random_mask(rng)
        logprobs = torch.tensor([[-rng.choice([0.5, 1.0, 2.0, rng.random() * 5]) for _ in range(mask.shape[1])] for _ in lengths])
        starts = termination.perplexity(logprobs, mask)
        for row, length in enumerate(lengths):
            total, count, expected = 0.0, 0, []
            for v in (-logprobs[row, :length]).double().tolist():
                expected.append(count == 0 or v * count > total)
                total, count = (v, 1) if expected[-1] else (total + v, count + 1)
            assert starts[row].tolist() == expected + [False] * (mask.shape[1] - length)


def test_perplexity_never_rises_inside_a_macro_action_and_ties_do_not_end_it():
    logprobs = -torch.rand(8, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.ones(8, 50, dtype=torch.bool)
    starts = termination.perplexity(logprobs, mask)
    for row in range(8):
        tokens = []
        for t in range(50):
            before = sum(tokens) / len(tokens) if tokens else None
            tokens = [-logprobs[row, t].item()] if starts[row, t] else tokens + [-logprobs[row, t].item()]
            if not starts[row, t]:
                assert sum(tokens) / len(tokens) <= before + 1e-12
    assert termination.perplexity(torch.full((1, 5), -0.7), mask[:1, :5]).tolist() == [[True] + [False] * 4]


def test_padding_does_not_matter():
    mask = torch.tensor([[True, True, True, False, False]])
    logprobs = torch.tensor([[-1.0, -2.0, -0.5, math.nan, math.inf]])
    assert termination.perplexity(logprobs, mask).tolist() == [[True, True, False, False, False]]


def test_macro_ids():
    rng = random.Random(3)
    for _ in range(50):
        mask, lengths = random_mask(rng)
        starts = mask & (torch.rand(mask.shape) < 0.3)
        starts[:, 0] = True
        for row, ids in zip(starts.tolist(), termination.macro_ids(starts).tolist()):
            assert ids == [sum(row[:t + 1]) - 1 for t in range(len(row))]


@pytest.mark.parametrize("call, message", [
    (lambda: termination.fixed_ngram(torch.ones(1, 3, dtype=torch.bool), 0), "whole number"),
    (lambda: termination.fixed_ngram(torch.ones(1, 3, dtype=torch.bool), 2.5), "whole number"),
    (lambda: termination.fixed_ngram(torch.ones(1, 3, dtype=torch.bool), math.nan), "whole number"),
    (lambda: termination.fixed_ngram(torch.tensor([[True, False, True]]), 2), "row 0 .* padding"),
    (lambda: termination.perplexity(torch.zeros(2, 2), torch.tensor([[True, True], [False, False]])), "row 1 .* no real token"),
    (lambda: termination.randomized_ngram(torch.ones(1, 3, dtype=torch.bool), lengths=(0, 2)), "lengths"),
    (lambda: termination.randomized_ngram(torch.ones(1, 3, dtype=torch.bool), lengths=()), "lengths"),
    (lambda: termination.fixed_ngram(torch.ones(3), 2), "bool tensor"),
])
def test_wrong_input_is_refused_in_words(call, message):
    with pytest.raises(ValueError, match=message):
        call()
