"""The kinds of rows there are: how each is read, encoded and collated. An objective names the one it wants."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hbat_lightning.data.encoded import Draft, Encoded, Ids
from hbat_lightning.data.fields import Row
from hbat_lightning.data.formats import (
    Format,
    recognise_feedback,
    recognise_instructions,
    recognise_preferences,
    recognise_texts,
)
from hbat_lightning.data.readers import RawRow
from hbat_lightning.data.sets import FeedbackSet, InstructionSet, PreferenceSet
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.training_data import TrainingSet


@dataclass(frozen=True)
class RowKind:
    """What the data module must know of one kind of rows.

    Attributes:
        name: As messages call them.
        recognise: The first row and perhaps the name of a format -> the format that the rows are in.
        encode: A row -> its encoded form; ``None`` where it was dropped for its length.
        size: An encoded row -> how many rows it is in the set.
        collect: Encoded rows one by one, their source and the pad id -> a set to train on.
        held_out: The same for held-out rows, where they are used in another way.
        together: Whether what a row is scored on depends on the others of its micro-batch, which then must be two or more.
        answered: Whether the data's own answers train; else the audit has none to look at.
        prompted: Whether rows have prompts that ``test`` and ``predict`` complete.
        draft: A row at its full length, for the audit.
        fit: A draft under the truncation policy, for the audit: what trains, or ``None`` where the row is dropped.
    """

    name: str
    recognise: Callable[[RawRow, str | None], Format[Any]]
    encode: Callable[[Encoder, Any], Any]
    collect: Callable[[Iterable[Any], str, int], TrainingSet]
    together: bool = False
    held_out: Callable[[Iterable[Any], str, int], TrainingSet] | None = None
    answered: bool = True
    prompted: bool = True
    draft: Callable[[Encoder, Any], Draft] = Encoder.draft
    fit: Callable[[Encoder, Any, Draft], list[Encoded] | None] = Encoder.fit
    size: Callable[[Any], int] = lambda encoded: 1


def _collect_pieces(texts: Iterable[Sequence[Encoded]], source: str, pad_id: int) -> InstructionSet:
    return InstructionSet((piece for pieces in texts for piece in pieces), source, pad_id)


INSTRUCTIONS = RowKind("instructions", recognise_instructions, Encoder.encode_instruction, InstructionSet)
PAIRS = RowKind("pairs", recognise_preferences, Encoder.encode_preference, PreferenceSet)
FEEDBACK = RowKind("feedback", recognise_feedback, Encoder.encode_feedback, FeedbackSet, together=True)


def _draft_text(encoder: Encoder, row: Row) -> Draft:
    """The longest piece of a text, which stands for its length: no piece is too long."""
    longest: list[int] = max((piece.input_ids.tolist() for piece in encoder.encode_text(row)), key=len, default=[])
    return Draft(Ids([], []), [Ids(longest, [True] * len(longest))])


TEXTS = RowKind(
    "texts",
    recognise_texts,
    Encoder.encode_text,
    _collect_pieces,
    answered=False,
    prompted=False,
    draft=_draft_text,
    fit=lambda encoder, row, _: encoder.encode_text(row),
    size=len,
)
