"""From raw rows to canonical ones: which format is it, which rows are usable, and what is wrong with the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbat_lightning.data.fields import InstructionRow, Message, PreferenceRow
from hbat_lightning.data.layouts import INSTRUCTION_FORMATS, PREFERENCE_FORMATS, Format, Row
from hbat_lightning.data.readers import RawRow
from hbat_lightning.errors import DataError, UserError

__all__ = [
    "INSTRUCTION_FORMATS",
    "PREFERENCE_FORMATS",
    "Format",
    "InstructionRow",
    "Message",
    "PreferenceRow",
    "parse_instructions",
    "parse_preferences",
]


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
    return _parse(rows, format, INSTRUCTION_FORMATS, PREFERENCE_FORMATS, ("instruction", "preference"))


def parse_preferences(
    rows: Sequence[RawRow], format: str | None = None
) -> tuple[list[PreferenceRow], list[DataError], str]:
    """Bring preference data into its canonical form; arguments, result and errors as in `parse_instructions`."""
    return _parse(rows, format, PREFERENCE_FORMATS, INSTRUCTION_FORMATS, ("preference", "instruction"))


def _parse(
    rows: Sequence[RawRow],
    name: str | None,
    formats: tuple[Format[Row], ...],
    other_formats: tuple[Format[Any], ...],
    kinds: tuple[str, str],
) -> tuple[list[Row], list[DataError], str]:
    if not rows:
        raise UserError(f"there are no rows of {kinds[0]} data to read")
    chosen = _choose(rows[0], name, formats, other_formats, kinds)
    good: list[Row] = []
    faults: list[DataError] = []
    for row in rows:
        try:
            good.append(chosen.parse(row))
        except DataError as error:
            faults.append(error)
    return good, faults, chosen.name


def _choose(
    first: RawRow,
    name: str | None,
    formats: tuple[Format[Row], ...],
    other_formats: tuple[Format[Any], ...],
    kinds: tuple[str, str],
) -> Format[Row]:
    kind, other_kind = kinds
    columns = frozenset(first.values)
    found = ", ".join(sorted(columns))
    if name is not None:
        named = next((candidate for candidate in formats if candidate.name == name), None)
        if named is None:
            known = ", ".join(candidate.name for candidate in formats)
            raise UserError(f"there is no format {name!r} of {kind} data; the names are {known}")
        if not named.matches(columns, first):
            message = f"the format {name} needs the columns {named.columns}; found: {found}"
            raise DataError(message, first.source, remedy="Rename the columns, or leave the format to be recognised")
        return named
    if any(isinstance(first.values.get(column), bool) for column in ("label", "kto_tag")):
        raise DataError(
            f"unpaired feedback (a true or false for every single answer; columns {found}) is neither instruction nor"
            " preference data",
            first.source,
            remedy="Pair good and bad answers to the same prompt as prompt, chosen, rejected;"
            " or keep the good rows alone, without that column, as instruction data",
        )
    for candidate in formats:
        if candidate.matches(columns, first):
            return candidate
    for other in other_formats:
        if other.matches(columns, first):
            raise DataError(
                f"this is {other_kind} data (format {other.name}, columns {found}), but it was given as {kind} data",
                first.source,
                remedy=f"Name the file under `data.{other_kind}.path`, and a file of {kind} data here",
            )
    known = "; ".join(f"{candidate.name}: {candidate.columns}" for candidate in formats)
    raise DataError(
        f"no format of {kind} data fits the columns {found}",
        first.source,
        remedy=f"Rename them to fit one of: {known}",
    )
