"""Micro-batches of the greatest length that a run could have, without reading its data."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.data.encoded import Encoded, EncodedPair
from hbat_lightning.data.kinds import FEEDBACK, INSTRUCTIONS, PAIRS, TEXTS, RowKind
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.errors import UserError
from hbat_lightning.objectives.rollout import RolloutModule


def is_validated(data: HybridDataModule, name: str) -> bool:
    """Whether an objective has held-out rows."""
    source = data.source(name)
    return source.held_out is not None or source.val_fraction > 0


def batches(module: AlignmentModule, data: HybridDataModule, size: int) -> dict[str, dict[str, Tensor]]:
    """A micro-batch of every objective with rows of data, of the greatest length; padded where it has more than one row."""
    longest = data.max_length
    full, short = _row(longest), _row(longest - 1)
    rows = [short if number % 2 else full for number in range(max(2, size))]
    made: dict[RowKind, list[Any]] = {
        INSTRUCTIONS: rows,
        TEXTS: [[row] for row in rows],
        PAIRS: [EncodedPair(full, short)] * size,
        FEEDBACK: [(row, True) for row in rows],
    }
    objectives = {n: one for n, one in module.objectives.items() if not isinstance(one, RolloutModule)}
    unknown = [name for name, objective in objectives.items() if objective.rows not in made]
    if unknown:
        raise UserError(
            f"the {unknown[0]} objective has rows of a kind of its own, which cannot be planned: use hbat fit"
        )
    return {name: one.rows.collect(made[one.rows], "", 0).collate(range(size)) for name, one in objectives.items()}


def held_out_prompts(module: AlignmentModule, data: HybridDataModule) -> dict[str, dict[str, Tensor]]:
    """The longest prompts that there can be, as many as are completed at once."""
    sizes = {
        name: (data.val_batch_size, len(longest_prompt(data, objective)))
        for name, objective in module.objectives.items()
        if isinstance(objective, RolloutModule)
    }
    with unset_fake_temporarily():
        ids = {name: torch.ones(size, dtype=torch.long) for name, size in sizes.items()}
        return {name: {"input_ids": one, "attention_mask": torch.ones_like(one)} for name, one in ids.items()}


def longest_prompt(data: HybridDataModule, objective: RolloutModule, number: int = 0) -> list[int]:
    """Prompt and completion together have the greatest length. Every number has its own: equal ones would share a pass."""
    room = data.max_length - objective.sampling.max_new_tokens
    if room < 1:
        raise UserError(
            f"sampling.max_new_tokens is {objective.sampling.max_new_tokens} and data.max_length {data.max_length}: there is "
            "no room for a prompt; give a greater data.max_length"
        )
    return [number + 2] + [1] * (room - 1)


def _row(length: int) -> Encoded:
    """A row that is learnt whole, but for its first token."""
    return Encoded(np.zeros(length, dtype=np.int64), np.arange(length) > 0, 1)
