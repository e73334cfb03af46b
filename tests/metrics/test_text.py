"""Completion metrics against a ROUGE written out by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from hbat_lightning.metrics import CompletionMetrics

PAIRS = [
    ("the cat sat on the mat", "the cat lay on a mat"),
    ("mat the on sat cat", "the cat sat on the mat"),
    ("", "something"),
    ("anna bought a lamp", "anna bought a lamp"),
    ("nothing shared", "other words entirely"),
]


def f1(hits: int, one: int, other: int) -> float:
    return 0.0 if hits == 0 else 2 * (hits / one) * (hits / other) / (hits / one + hits / other)


def rouge_n(one: list[str], other: list[str], n: int) -> float:
    grams = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in (one, other)]
    return f1(sum((grams[0] & grams[1]).values()), sum(grams[0].values()), sum(grams[1].values()))


def rouge_l(one: list[str], other: list[str]) -> float:
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return f1(table[-1][-1], len(one), len(other))


def test_rouge_is_that_of_loops_by_hand() -> None:
    metrics = CompletionMetrics()
    sums = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for completion, reference in PAIRS:
        metrics.update(completion, reference, tokens=3, stopped=True)
        one, other = completion.split(), reference.split()
        sums["rouge1"] += rouge_n(one, other, 1)
        sums["rouge2"] += rouge_n(one, other, 2)
        sums["rougeL"] += rouge_l(one, other)
    got = metrics.compute()
    for name, value in sums.items():
        assert got[name].item() == pytest.approx(value / len(PAIRS), rel=1e-12), name


def test_stems_count_as_equal() -> None:
    metrics = CompletionMetrics()
    metrics.update("buying lamps", "buy lamp", 2, True)
    assert metrics.compute()["rouge1"].item() == 1.0
    assert metrics.compute()["exact_match"].item() == 0.0


def test_shares_and_lengths_are_means() -> None:
    metrics = CompletionMetrics()
    metrics.update("yes ", " yes", 2, True)
    metrics.update("Yes", "yes", 5, False)
    metrics.update("no", "yes", 8, True)
    got = {name: value.item() for name, value in metrics.compute().items()}
    assert got["exact_match"] == pytest.approx(1 / 3)
    assert got["stopped"] == pytest.approx(2 / 3)
    assert got["length"] == pytest.approx(5.0)


def test_reset_and_nothing_seen() -> None:
    metrics = CompletionMetrics()
    metrics.update("a", "a", 1, True)
    metrics.reset()
    assert all(value.item() == 0.0 for value in metrics.compute().values())
    assert all(isinstance(value, torch.Tensor) for value in metrics.compute().values())
