"""The kinds of rows there are: how each is read, encoded and collated. An objective names the one it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hbat_lightning.data.formats import parse_feedback, parse_instructions, parse_preferences
from hbat_lightning.data.sets import FeedbackSet, InstructionSet, PreferenceSet
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.errors import DataError
from hbat_lightning.stream import TrainingSet


@dataclass(frozen=True)
class RowKind:
    """What the data module must know of one kind of rows.

    Attributes:
        name: As messages call them.
        parse: Raw rows and perhaps the name of a format -> usable rows, faults of the others, the format's name.
        encode: A row -> its encoded form; ``None`` where it was dropped for its length.
        collect: Encoded rows, their source and the pad id -> a set to train on.
        held_out: The same for held-out rows, where they are used in another way.
        together: Whether what a row is scored on depends on the others of its micro-batch, which then must be two or more.
    """

    name: str
    parse: Callable[[Sequence[Any], str | None], tuple[list[Any], list[DataError], str]]
    encode: Callable[[Encoder, Any], Any]
    collect: Callable[[Sequence[Any], str, int], TrainingSet]
    together: bool = False
    held_out: Callable[[Sequence[Any], str, int], TrainingSet] | None = None


INSTRUCTIONS = RowKind("instructions", parse_instructions, Encoder.encode_instruction, InstructionSet)
PAIRS = RowKind("pairs", parse_preferences, Encoder.encode_preference, PreferenceSet)
FEEDBACK = RowKind("feedback", parse_feedback, Encoder.encode_feedback, FeedbackSet, together=True)
