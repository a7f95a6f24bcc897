"""Termination conditions of macro actions (section 3.2.1 and appendix B.4 of the paper), as pure functions on tensors.

Each takes the responses of a batch (B, T), any mix of lengths, on any device, and returns `starts` (B, T) bool: True on
the first token of every macro action, False on padding. Macro actions cut a response completely: each ends where the next
one starts. `mask` (B, T) is True on the real tokens, the first columns of every row.
"""
import math

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
