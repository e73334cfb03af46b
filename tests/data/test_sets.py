"""Rows to tensors, and the data module's promises about prompts and stop tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hbat_lightning import DataSource, HybridDataModule, Policy
from hbat_lightning.data import embedded
from hbat_lightning.data.encoded import Encoded, EncodedPair
from hbat_lightning.data.sets import (
    EvaluationLoader,
    InstructionSet,
    PreferenceSet,
    Prompt,
    PromptLoader,
    deal,
    pad_right,
)
from hbat_lightning.ranks import ALONE, Ranks


def encoded(ids: list[int], prompt: int) -> Encoded:
    return Encoded(np.array(ids, dtype=np.int32), np.arange(len(ids)) >= prompt, prompt)


ROWS = [encoded([5, 6, 7, 2], 2), encoded([5, 8, 2], 1), encoded([5, 2, 6, 9, 9, 2], 3)]


@pytest.mark.parametrize("pad", [0, 2, 9], ids=["its own", "the stop token", "a word"])
def test_masks_go_by_length_and_never_by_the_pad_token(pad: int) -> None:
    batch = pad_right(ROWS, pad)
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0], [1] * 6]
    no = -100
    assert batch["labels"].tolist() == [[no, no, 7, 2, no, no], [no, 8, 2, no, no, no], [no, no, no, 9, 9, 2]]
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, pad, pad], [5, 8, 2, pad, pad, pad], [5, 2, 6, 9, 9, 2]]
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_units_are_the_labels_that_something_comes_before() -> None:
    rows = InstructionSet([*ROWS, encoded([7, 8, 2], 0)], "f", 0)
    assert [rows.units(row) for row in range(4)] == [2, 2, 3, 2]
    batch = rows.collate(range(4))
    assert (batch["labels"][:, 1:] != -100).sum(-1).tolist() == [2, 2, 3, 2]
    assert PreferenceSet([EncodedPair(ROWS[0], ROWS[1])], "f", 0).units(0) == 1


def test_pairs_are_chosen_first_and_blanks_have_no_labels() -> None:
    pairs = PreferenceSet([EncodedPair(ROWS[0], ROWS[1], 0.5), EncodedPair(ROWS[2], ROWS[0])], "f", 0)
    batch = pairs.collate([1, 0])
    assert batch["index"].tolist() == [1, 0]
    assert batch["margin"].tolist() == [0.0, 0.5]
    rows = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == [ROWS[n].input_ids.tolist() for n in (2, 0, 0, 1)]
    assert bool((pairs.blank()["labels"] == -100).all())
    assert len(pairs.blank()["labels"]) == 2
    assert pairs.blank()["margin"].tolist() == [0.0]
    blank = InstructionSet(ROWS, "f", 0).blank()
    assert bool((blank["labels"] == -100).all())
    assert len(blank["labels"]) == 1


def test_digest_changes_with_ids_and_with_masks() -> None:
    digests = {
        InstructionSet(rows, "f", 0).digest for rows in (ROWS, ROWS[::-1], [*ROWS[:2], encoded([5, 2, 6, 9, 9, 2], 2)])
    }
    assert len(digests) == 3
    assert InstructionSet(ROWS, "another file", 7).digest in digests


def test_digest_of_pairs_changes_with_margins() -> None:
    margins = ((0.0, 0.0), (0.5, 0.0), (0.0, 0.5))
    digests = {PreferenceSet([EncodedPair(*ROWS[:2], m) for m in two], "f", 0).digest for two in margins}
    assert len(digests) == 3


def test_evaluation_goes_through_all_rows_in_order() -> None:
    loader = EvaluationLoader(InstructionSet(ROWS, "f", 0), "instruction", 2)
    assert [batch.inputs["index"].tolist() for batch in loader] == [[0, 1], [2]]
    assert len(loader) == 2


def test_prompts_are_padded_on_the_left() -> None:
    loader = PromptLoader([Prompt([4, 5, 6], "a", "x"), Prompt([7], "b", "y"), Prompt([8, 9], "c", "z")], 2, pad_id=0)
    first, second = loader
    assert first.input_ids.tolist() == [[4, 5, 6], [0, 0, 7]]
    assert first.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert (second.input_ids.tolist(), second.prompts, second.completions) == ([[8, 9]], ["c"], ["z"])
    assert len(loader) == 2


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("rows", [1, 4, 5, 7])
def test_ranks_share_whole_micro_batches_and_have_as_many(rows: int, world: int) -> None:
    shares = [deal(rows, 2, Ranks(rank, world)) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1
    in_turn = [batch for turn in zip(*shares, strict=True) for batch in turn]
    assert [row for batch in in_turn for row in batch] == list(range(rows))  # every row once, in their order
    alone = deal(rows, 2, ALONE)
    assert in_turn[: len(alone)] == alone
    assert not any(in_turn[len(alone) :])


def test_a_rank_that_has_run_out_of_held_out_rows_gets_micro_batches_without_inputs() -> None:
    data = InstructionSet(ROWS, "f", 0)
    first, second, third = (EvaluationLoader(data, "instruction", 2, ranks=Ranks(rank, 3)) for rank in range(3))
    assert [batch.inputs["index"].tolist() for batch in first] == [[0, 1]]
    assert [batch.inputs["index"].tolist() for batch in second] == [[2]]
    assert [batch.inputs for batch in third] == [{}]
    assert len({first.digest, second.digest, third.digest, data.digest}) == 4  # what is prepared is only one's own rows


def test_a_rank_that_has_run_out_of_prompts_gets_a_batch_of_none() -> None:
    loader = PromptLoader([Prompt([4, 5, 6], "a", "x")], 2, pad_id=0, ranks=Ranks(1, 2))
    (batch,) = loader
    assert (batch.prompts, batch.completions, batch.input_ids.numel()) == ([], [], 0)


# ---- the data module ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["chat", "alpaca", "tldr", "plain"])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_prompt_ids_are_those_of_training_and_answers_end_in_one_stop_token(template: str, pad_is_eos: bool) -> None:
    """For every held-out row: what generation starts from is what stands before the answer, token for token."""
    tokenizer = Policy(embedded.TINY_LLAMA).tokenizer
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    source = DataSource(embedded.INSTRUCTION, limit=20, val_fraction=0.5)
    data = HybridDataModule(source, DataSource(embedded.PREFERENCE, limit=20, val_fraction=0.5), template=template)
    for name in ("instruction", "preference"):
        data.load(name, tokenizer, seed=3)
    prompts = data.load_prompts(tokenizer, seed=3, compared=True)
    rows = data.val_sets["instruction"].rows
    assert len(prompts) == len(rows) == 10
    for prompt, row in zip(prompts, rows, strict=True):
        assert prompt.input_ids == row.input_ids[: row.prompt_length].tolist()
        assert not row.supervised[: row.prompt_length].any()
    every = [*rows, *(side for pair in data.val_sets["preference"].rows for side in pair[:2])]
    for row in every:
        answer = row.input_ids[row.prompt_length :]
        assert row.supervised[row.prompt_length :].all()
        assert answer[-1] == tokenizer.eos_token_id
        assert (answer == tokenizer.eos_token_id).sum() == 1
        assert (row.input_ids == tokenizer.bos_token_id).sum() == 1
    batch = data.val_sets["instruction"].collate(range(10))
    last = batch["attention_mask"].sum(-1) - 1
    assert bool((batch["labels"][torch.arange(10), last] == tokenizer.eos_token_id).all())


def test_pad_equal_to_eos_leaves_the_loss_as_it_is(make_policy: Any) -> None:
    totals = []
    for pad_is_eos in (False, True):
        policy = make_policy()
        if pad_is_eos:
            policy.tokenizer.pad_token = policy.tokenizer.eos_token
        policy.build(torch.device("cpu"))
        data = HybridDataModule(DataSource(embedded.INSTRUCTION, limit=6, val_fraction=0.0))
        data.load("instruction", policy.tokenizer, seed=0)
        batch = data.train_sets["instruction"].collate(range(6))
        scores = policy.score(batch)
        totals.append((scores.log_probs.numel(), scores.row_sums().tolist()))
        assert (batch["input_ids"][batch["attention_mask"] == 0] == policy.tokenizer.eos_token_id).any() == pad_is_eos
    assert totals[0][0] == totals[1][0]
    assert totals[0][1] == pytest.approx(totals[1][1], rel=1e-6)


def test_held_out_rows_are_drawn_by_seed_and_disjoint() -> None:
    tokenizer = Policy(embedded.TINY_LLAMA).tokenizer

    def texts(seed: int) -> tuple[set[bytes], set[bytes]]:
        data = HybridDataModule(DataSource(embedded.INSTRUCTION, limit=40, val_fraction=0.25))
        data.load("instruction", tokenizer, seed)
        sets = (data.train_sets["instruction"], data.val_sets["instruction"])
        train, held_out = ({row.input_ids.tobytes() for row in rows.rows} for rows in sets)
        return train, held_out

    train, held_out = texts(1)
    assert (len(train), len(held_out)) == (30, 10)
    assert not train & held_out
    assert texts(1) == (train, held_out)
    assert texts(2)[1] != held_out
