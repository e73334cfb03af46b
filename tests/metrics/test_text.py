"""Metrics of text against ROUGE, distinct-n and the like written out by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from hbat_lightning.completions import Completed
from hbat_lightning.metrics import CompletionMetric, Distinct, ExactMatch, Length, Repetition, Rouge, standard_metrics

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


def answer(completion: str, reference: str = "", tokens: int = 1, stopped: bool = True) -> Completed:
    return Completed("prompt", completion, reference, tokens, stopped)


def figures(metric: CompletionMetric) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items()}


def test_rouge_is_that_of_loops_by_hand() -> None:
    metric, sums = Rouge(), {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    answers = [answer(completion, reference) for completion, reference in PAIRS]
    metric.update(answers[:2])
    metric.update(answers[2:])
    for one, (completion, reference) in zip(answers, PAIRS, strict=True):
        words = completion.split(), reference.split()
        expected = {"rouge1": rouge_n(*words, 1), "rouge2": rouge_n(*words, 2), "rougeL": rouge_l(*words)}
        assert one.scores == pytest.approx(expected, rel=1e-12)
        for name, value in expected.items():
            sums[name] += value / len(PAIRS)
    assert figures(metric) == pytest.approx(sums, rel=1e-12)


def test_stems_count_as_equal() -> None:
    metric, exact, one = Rouge(), ExactMatch(), [answer("buying lamps", "buy lamp")]
    metric.update(one)
    exact.update(one)
    assert figures(metric)["rouge1"] == 1.0
    assert figures(exact) == {"exact_match": 0.0}


def test_shares_and_lengths_are_means() -> None:
    answers = [answer("yes ", " yes", 2), answer("Yes", "yes", 5, stopped=False), answer("no", "yes", 8)]
    exact, length = ExactMatch(), Length()
    exact.update(answers)
    length.update(answers)
    assert figures(exact)["exact_match"] == pytest.approx(1 / 3)
    assert figures(length) == pytest.approx({"stopped": 2 / 3, "length": 5.0})


def test_variety_is_that_of_sets_by_hand() -> None:
    texts = ["a b a b a b", "a b c", "d", ""]
    distinct, repeated = Distinct((1, 2)), Repetition(2)
    for text in texts:
        distinct.update([answer(text)])
    repeated.update([answer(text) for text in texts])
    # words: a b a b a b a b c d; pairs of them within a text: ab ba ab ba ab, ab bc
    assert figures(distinct) == pytest.approx({"distinct1": 4 / 10, "distinct2": 3 / 7})
    assert figures(repeated) == pytest.approx({"repetition": (1 - 2 / 5) / 4})
    with pytest.raises(ValueError, match="from 1 on"):
        Distinct(())


def test_what_has_no_answer_to_compare_with_is_not_compared() -> None:
    answers = [answer("yes indeed"), answer("yes indeed", "yes indeed")]
    for metric in (Rouge(), ExactMatch()):
        metric.update(answers)
        assert all(value == 1.0 for value in figures(metric).values())
    assert answers[0].scores == {}


def test_reset_and_nothing_seen() -> None:
    for metric in standard_metrics():
        metric.update([answer("a b", "a b")])
        assert metric.compute()
        metric.reset()
        assert metric.compute() == {}
