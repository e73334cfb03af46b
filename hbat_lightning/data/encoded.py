"""Rows as ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Encoded:
    """One row as a model takes it.

    Attributes:
        input_ids: int32, shape `(T,)`.
        supervised: bool, shape `(T,)`: the tokens to be learnt, each at its own position (nothing is shifted).
        prompt_length: The number of tokens before the last answer.
    """

    input_ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    prompt_length: int


class EncodedPair(NamedTuple):
    """Two answers behind the same prompt.

    Attributes:
        chosen: The preferred one.
        rejected: The other one.
        margin: By how much, as in the data.
    """

    chosen: Encoded
    rejected: Encoded
    margin: float = 0.0


class Ids(NamedTuple):
    """Ids with, for each, whether it is supervised."""

    ids: list[int]
    supervised: list[bool]


class Draft(NamedTuple):
    """A row as ids before the truncation policy: its prompt, and each answer to it."""

    prompt: Ids
    answers: list[Ids]

    @property
    def lengths(self) -> tuple[int, list[int]]:
        """Tokens of the prompt, and of each answer with its stop token."""
        return len(self.prompt.ids), [len(answer.ids) for answer in self.answers]
