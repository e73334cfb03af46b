"""The kinds of rows there are: how each is read, encoded and collated. An objective names the one it wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hbat_lightning.data.fields import Row
from hbat_lightning.data.formats import parse_feedback, parse_instructions, parse_preferences, parse_texts
from hbat_lightning.data.sets import FeedbackSet, InstructionSet, PreferenceSet
from hbat_lightning.data.tokenization import Draft, Encoded, Encoder, Ids
from hbat_lightning.errors import DataError
from hbat_lightning.stream import TrainingSet


class Audited(NamedTuple):
    """A row as the audit looks at it.

    Attributes:
        draft: At its full length.
        encoded: What trains, one for each answer; ``None`` where the truncation policy drops the row.
    """

    draft: Draft
    encoded: list[Encoded] | None


def audit_answers(encoder: Encoder, row: Row) -> Audited:
    """A row whose own answers train."""
    draft = encoder.draft(row)
    return Audited(draft, encoder.fit(row, draft))


def audit_text(encoder: Encoder, row: Row) -> Audited:
    """A text in its pieces, of which the longest stands for its length."""
    pieces = encoder.encode_text(row)
    longest: list[int] = max((piece.input_ids.tolist() for piece in pieces), key=len, default=[])
    return Audited(Draft(Ids([], []), [Ids(longest, [True] * len(longest))]), pieces)


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
        answered: Whether the data's own answers train; else the audit has none to look at.
        prompted: Whether rows have prompts that ``test`` and ``predict`` complete.
        audit: A row as the audit looks at it.
    """

    name: str
    parse: Callable[[Sequence[Any], str | None], tuple[list[Any], list[DataError], str]]
    encode: Callable[[Encoder, Any], Any]
    collect: Callable[[Sequence[Any], str, int], TrainingSet]
    together: bool = False
    held_out: Callable[[Sequence[Any], str, int], TrainingSet] | None = None
    answered: bool = True
    prompted: bool = True
    audit: Callable[[Encoder, Any], Audited] = audit_answers


def _collect_pieces(texts: Sequence[Sequence[Encoded]], source: str, pad_id: int) -> InstructionSet:
    return InstructionSet([piece for pieces in texts for piece in pieces], source, pad_id)


INSTRUCTIONS = RowKind("instructions", parse_instructions, Encoder.encode_instruction, InstructionSet)
PAIRS = RowKind("pairs", parse_preferences, Encoder.encode_preference, PreferenceSet)
FEEDBACK = RowKind("feedback", parse_feedback, Encoder.encode_feedback, FeedbackSet, together=True)
TEXTS = RowKind(
    "texts", parse_texts, Encoder.encode_text, _collect_pieces, answered=False, prompted=False, audit=audit_text
)
