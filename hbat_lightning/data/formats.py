"""From raw rows to canonical ones: which format is it, which rows are usable, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic

from hbat_lightning.data.fields import FeedbackRow, InstructionRow, Message, PreferenceRow
from hbat_lightning.data.layouts import (
    FEEDBACK_FORMATS,
    INSTRUCTION_FORMATS,
    PREFERENCE_FORMATS,
    PROMPT_FORMATS,
    TEXT_FORMATS,
    Format,
    Row,
)
from hbat_lightning.data.readers import RawRow
from hbat_lightning.errors import DataError, UserError

__all__ = [
    "FEEDBACK_FORMATS",
    "INSTRUCTION_FORMATS",
    "PREFERENCE_FORMATS",
    "PROMPT_FORMATS",
    "TEXT_FORMATS",
    "FeedbackRow",
    "Format",
    "InstructionRow",
    "Message",
    "PreferenceRow",
    "parse_feedback",
    "parse_instructions",
    "parse_preferences",
    "parse_prompts",
    "parse_texts",
    "recognise_feedback",
    "recognise_instructions",
    "recognise_preferences",
    "recognise_prompts",
    "recognise_texts",
]


@dataclass(frozen=True)
class _Kind(Generic[Row]):
    """A kind of data.

    Attributes:
        name: As messages call it.
        formats: Its formats, in the order in which they are tried.
        judged: Whether each answer has a verdict of its own.
        elsewhere: Other kinds that a file may hold by mistake, each as its name, its formats and what to do with it.
    """

    name: str
    formats: tuple[Format[Row], ...]
    judged: bool
    elsewhere: tuple[tuple[str, tuple[Format[Any], ...], str], ...]


_INSTRUCTION = _Kind(
    "instruction",
    INSTRUCTION_FORMATS,
    False,
    (
        (
            "preference",
            PREFERENCE_FORMATS,
            "Name the file under `data.preference.path`, and a file of instruction data here",
        ),
        (
            "text",
            TEXT_FORMATS,
            "Train LanguageModelModule with it; or write every row as prompt and completion",
        ),
        (
            "prompt",
            PROMPT_FORMATS,
            "Add the answers; prompts alone are for objectives that learn from a reward, such as PPOModule",
        ),
    ),
)
_PREFERENCE = _Kind(
    "preference",
    PREFERENCE_FORMATS,
    False,
    (
        (
            "instruction",
            INSTRUCTION_FORMATS,
            "Name the file under `data.instruction.path`, and a file of preference data here",
        ),
        (
            "prompt",
            PROMPT_FORMATS,
            "Add two answers to each; prompts alone are for objectives that learn from a reward, such as PPOModule",
        ),
    ),
)
_FEEDBACK = _Kind(
    "feedback",
    FEEDBACK_FORMATS,
    True,
    (
        (
            "preference",
            PREFERENCE_FORMATS,
            "Train a loss on pairs with it, such as DPOModule; or write every pair as two rows of prompt, completion, label",
        ),
        (
            "instruction",
            INSTRUCTION_FORMATS,
            "Add a column label, true for a desirable and false for an undesirable answer",
        ),
    ),
)


_WITH_PROMPTS: tuple[Format[Any], ...] = (*PROMPT_FORMATS, *INSTRUCTION_FORMATS, *PREFERENCE_FORMATS, *FEEDBACK_FORMATS)
_PROMPT: _Kind[Any] = _Kind("prompt", _WITH_PROMPTS, True, ())
_TEXT: _Kind[Any] = _Kind("text", (*TEXT_FORMATS, *_WITH_PROMPTS), True, ())


def parse_instructions(
    rows: Sequence[RawRow], format: str | None = None
) -> tuple[list[InstructionRow], list[DataError], str]:
    """Bring instruction data into its canonical form.

    Args:
        rows: What `read_rows` returned.
        format: The name of a format, or `None` to recognise it from the first row.

    Returns:
        The usable rows, one error for every row that is not usable, and the name of the format.

    Raises:
        DataError: The whole file is of another kind: unknown columns, preference data, unpaired feedback.
        UserError: No format has that name, or there are no rows.
    """
    return _parse(rows, format, _INSTRUCTION)


def parse_preferences(
    rows: Sequence[RawRow], format: str | None = None
) -> tuple[list[PreferenceRow], list[DataError], str]:
    """Bring preference data into its canonical form; arguments, result and errors as in `parse_instructions`."""
    return _parse(rows, format, _PREFERENCE)


def parse_feedback(rows: Sequence[RawRow], format: str | None = None) -> tuple[list[FeedbackRow], list[DataError], str]:
    """Bring unpaired feedback into its canonical form; arguments, result and errors as in `parse_instructions`."""
    return _parse(rows, format, _FEEDBACK)


def parse_prompts(rows: Sequence[RawRow], format: str | None = None) -> tuple[list[Any], list[DataError], str]:
    """Bring data of any kind into its canonical form, for the prompts in it; otherwise as `parse_instructions`."""
    return _parse(rows, format, _PROMPT)


def parse_texts(rows: Sequence[RawRow], format: str | None = None) -> tuple[list[Any], list[DataError], str]:
    """Bring texts, or data of any kind for the prompts in it, into canonical form; otherwise as `parse_instructions`."""
    return _parse(rows, format, _TEXT)


def recognise_instructions(first: RawRow, format: str | None = None) -> Format[InstructionRow]:
    """The format that instruction data are in.

    Args:
        first: Their first row.
        format: The name of a format, or `None` to go by the columns.

    Raises:
        DataError: The data are of another kind: unknown columns, preference data, unpaired feedback.
        UserError: No format has that name.
    """
    return _choose(first, format, _INSTRUCTION)


def recognise_preferences(first: RawRow, format: str | None = None) -> Format[PreferenceRow]:
    """The format that preference data are in; arguments and errors as of `recognise_instructions`."""
    return _choose(first, format, _PREFERENCE)


def recognise_feedback(first: RawRow, format: str | None = None) -> Format[FeedbackRow]:
    """The format that unpaired feedback is in; arguments and errors as of `recognise_instructions`."""
    return _choose(first, format, _FEEDBACK)


def recognise_prompts(first: RawRow, format: str | None = None) -> Format[Any]:
    """The format that data of any kind are in, for the prompts in them; otherwise as `recognise_instructions`."""
    return _choose(first, format, _PROMPT)


def recognise_texts(first: RawRow, format: str | None = None) -> Format[Any]:
    """The format that texts are in, or data of any kind for the prompts in it; otherwise as `recognise_instructions`."""
    return _choose(first, format, _TEXT)


def _parse(rows: Sequence[RawRow], name: str | None, kind: _Kind[Row]) -> tuple[list[Row], list[DataError], str]:
    if not rows:
        raise UserError(f"there are no rows of {kind.name} data to read")
    chosen = _choose(rows[0], name, kind)
    good: list[Row] = []
    faults: list[DataError] = []
    for row in rows:
        try:
            good.append(chosen.parse(row))
        except DataError as error:
            faults.append(error.with_traceback(None))  # a traceback would keep the row, and whatever read it
    return good, faults, chosen.name


def _choose(first: RawRow, name: str | None, kind: _Kind[Row]) -> Format[Row]:
    columns = frozenset(first.values)
    found = ", ".join(sorted(columns))
    if name is not None:
        named = next((candidate for candidate in kind.formats if candidate.name == name), None)
        if named is None:
            known = ", ".join(candidate.name for candidate in kind.formats)
            raise UserError(f"there is no format {name!r} of {kind.name} data; the names are {known}")
        if not named.matches(columns, first):
            message = f"the format {name} needs the columns {named.columns}; found: {found}"
            raise DataError(message, first.source, remedy="Rename the columns, or leave the format to be recognised")
        return named
    if not kind.judged and any(isinstance(first.values.get(column), bool) for column in ("label", "kto_tag")):
        raise DataError(
            f"unpaired feedback (a true or false for every single answer; columns {found}) is neither instruction nor"
            " preference data",
            first.source,
            remedy="Train KTOModule with it; or pair good and bad answers to the same prompt as prompt, chosen, rejected;"
            " or keep the good rows alone, without that column, as instruction data",
        )
    for candidate in kind.formats:
        if candidate.matches(columns, first):
            return candidate
    for other, formats, remedy in kind.elsewhere:
        for one in formats:
            if one.matches(columns, first):
                raise DataError(
                    f"this is {other} data (format {one.name}, columns {found}), but it was given as {kind.name} data",
                    first.source,
                    remedy=remedy,
                )
    known = "; ".join(f"{candidate.name}: {candidate.columns}" for candidate in kind.formats)
    raise DataError(
        f"no format of {kind.name} data fits the columns {found}",
        first.source,
        remedy=f"Rename them to fit one of: {known}",
    )
