"""Unpaired feedback: its formats, and the mismatches of a micro-batch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hbat_lightning.data import embedded
from hbat_lightning.data.encoded import Encoded
from hbat_lightning.data.formats import FeedbackRow, Message, parse_feedback
from hbat_lightning.data.readers import RawRow
from hbat_lightning.data.sets import EvaluationLoader, FeedbackSet
from hbat_lightning.errors import DataError, UserError

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}
HI = (Message("user", "hi"),)


def raw(*values: dict[str, Any]) -> list[RawRow]:
    return [RawRow("f.jsonl", number, value) for number, value in enumerate(values, 1)]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"prompt": "hi", "completion": "yes", "label": True}, "feedback"),
        ({"prompt": [USER], "completion": [ANSWER], "label": True}, "feedback"),
        ({"prompt": "hi", "completion": "yes", "label": 1}, "feedback"),
        ({"prompt": "hi", "completion": "yes", "label": "True"}, "feedback"),
        ({"prompt": "hi", "completion": "yes", "kto_tag": "true"}, "feedback"),
        ({"messages": [USER, ANSWER], "label": True}, "messages_feedback"),
        (
            {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yes"}], "kto_tag": True},
            "messages_feedback",
        ),
    ],
)
@pytest.mark.parametrize("given", [False, True])
def test_formats(values: dict[str, Any], name: str, given: bool) -> None:
    rows, faults, found = parse_feedback(raw(values), name if given else None)
    assert (rows, faults, found) == ([FeedbackRow("f.jsonl", 1, HI, "yes", True)], [], name)


@pytest.mark.parametrize("label", [False, 0, 0.0, "false", "0"])
def test_undesirable(label: Any) -> None:
    assert not parse_feedback(raw({"prompt": "hi", "completion": "yes", "label": label}))[0][0].desirable


def test_a_system_message_stands_before_the_prompt() -> None:
    values = {"system": "be kind", "prompt": "hi", "completion": "yes", "label": True}
    assert parse_feedback(raw(values))[0][0].prompt == (Message("system", "be kind"), *HI)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "good"}, "'label' is 'good', true .desirable. or false"),
        ({"label": 2}, "'label' is 2, true"),
        ({"label": None}, "'label' is None, true"),
        ({"completion": " "}, "'completion' is empty"),
        ({"completion": [USER, ANSWER]}, "'completion' holds more than the one answer"),
        ({"prompt": [ANSWER]}, "begins with an assistant turn"),
    ],
)
def test_a_bad_row_is_reported_and_the_others_are_kept(change: dict[str, Any], message: str) -> None:
    good = {"prompt": "hi", "completion": "yes", "label": True}
    rows, faults, _ = parse_feedback(raw(good, good | change, good))
    assert [row.number for row in rows] == [1, 3]
    assert [fault.row for fault in faults] == [2]
    with pytest.raises(DataError, match=message):
        raise faults[0]


def test_other_kinds_are_named() -> None:
    with pytest.raises(DataError, match=r"this is preference data \(format preference.*DPOModule"):
        parse_feedback(raw({"prompt": "p", "chosen": "a", "rejected": "b"}))
    with pytest.raises(DataError, match=r"this is instruction data \(format prompt_completion.*Add a column label"):
        parse_feedback(raw({"prompt": "p", "completion": "a"}))
    with pytest.raises(DataError, match="no format of feedback data fits the columns text"):
        parse_feedback(raw({"text": "x"}))
    with pytest.raises(UserError, match="the names are feedback, messages_feedback"):
        parse_feedback(raw({"text": "x"}), "kto")


# ---- mismatches -----------------------------------------------------------------------------------------------------------


def encoded(prompt: list[int], answer: list[int]) -> Encoded:
    ids = np.array(prompt + answer, dtype=np.int32)
    return Encoded(ids, np.arange(len(ids)) >= len(prompt), len(prompt))


ROWS = [
    (encoded([1, 2], [10, 11]), True),
    (encoded([3], [12, 13, 14]), False),
    (encoded([4, 5, 6], [15]), True),
]


def rows_of(inputs: dict[str, torch.Tensor]) -> list[tuple[list[int], list[int]]]:
    """Ids and learnt ids of every row, without padding."""
    mask = inputs["attention_mask"].bool()
    pairs = zip(inputs["input_ids"], inputs["labels"], mask, strict=True)
    return [(ids[keep].tolist(), labels[labels >= 0].tolist()) for ids, labels, keep in pairs]


def test_every_prompt_gets_the_answer_of_the_row_before() -> None:
    inputs = FeedbackSet(ROWS, "f", 0).collate([0, 1, 2])
    assert inputs["desirable"].tolist() == [True, False, True]
    assert inputs["index"].tolist() == [0, 1, 2]
    assert rows_of(inputs) == [
        ([1, 2, 10, 11], [10, 11]),
        ([3, 12, 13, 14], [12, 13, 14]),
        ([4, 5, 6, 15], [15]),
        ([1, 2, 15], [15]),
        ([3, 10, 11], [10, 11]),
        ([4, 5, 6, 12], [12]),  # cut at the length of the longest row
    ]
    assert rows_of(FeedbackSet(ROWS, "f", 0).collate([2, 0]))[2:] == [([4, 5, 6, 10], [10]), ([1, 2, 15], [15])]


def test_a_lone_row_takes_the_next_ones_answer() -> None:
    rows = FeedbackSet(ROWS, "f", 0)
    assert rows_of(rows.collate([0]))[1] == ([1, 2, 12, 13], [12, 13])
    assert rows_of(rows.collate([2]))[1] == ([4, 5, 6, 10], [10])


def test_units_blank_and_digest() -> None:
    rows = FeedbackSet(ROWS, "f", 0)
    assert [rows.units(n) for n in range(len(rows))] == [1, 1, 1]
    blank = rows.blank()
    assert blank["input_ids"].shape == (2, 2)
    assert bool((blank["labels"] == -100).all())
    other = [(row, not good) for row, good in ROWS]
    assert rows.digest != FeedbackSet(other, "f", 0).digest
    assert rows.digest == FeedbackSet(list(ROWS), "g", 5).digest
    with pytest.raises(DataError, match="single row of feedback"):
        FeedbackSet(ROWS[:1], "f", 0)
    assert len(FeedbackSet([], "f", 0)) == 0


def test_scores_of_held_out_rows_belong_to_their_micro_batches() -> None:
    rows = FeedbackSet(ROWS, "f", 0)
    assert EvaluationLoader(rows, "preference", 2, True).digest != EvaluationLoader(rows, "preference", 3, True).digest
    assert EvaluationLoader(rows, "preference", 2).digest == EvaluationLoader(rows, "preference", 3).digest


def test_embedded_feedback_is_one_answer_of_each_pair() -> None:
    for name, pairs in (
        (embedded.FEEDBACK, embedded.PREFERENCE),
        (embedded.FEEDBACK_VALIDATION, embedded.PREFERENCE_VALIDATION),
    ):
        rows = embedded.rows(name)
        assert rows == embedded.rows(name)
        for row, pair in zip(rows, embedded.rows(pairs), strict=True):
            assert row["prompt"] == pair["prompt"]
            assert row["completion"] == pair["chosen" if row["label"] else "rejected"]
        assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6
