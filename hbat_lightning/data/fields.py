"""Canonical rows, and checked access to the fields of raw ones.

What the formats have in common: each function here takes a raw row and returns something usable, or raises the one
line that tells the user which field of which row is wrong.
"""

from __future__ import annotations

import math
import re
import reprlib
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

from hbat_lightning.data.readers import RawRow
from hbat_lightning.errors import DataError

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: Who speaks.
        content: What is said.
        context: Alpaca's `input`, kept apart from the instruction because templates place it differently.
    """

    role: Role
    content: str
    context: str = ""


class Row(Protocol):
    """A row in canonical form: a prompt and its answers.

    Attributes:
        source: Where it comes from.
        number: Which row of it.
        prompt: A conversation that waits for an answer.
        answers: The answers that the data hold, if any; the first is the one to give.
    """

    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def number(self) -> int: ...  # noqa: D102
    @property
    def prompt(self) -> tuple[Message, ...]: ...  # noqa: D102
    @property
    def answers(self) -> tuple[str, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class InstructionRow:
    """A conversation to imitate; its last message is the assistant's."""

    source: str
    number: int
    messages: tuple[Message, ...]

    @property
    def prompt(self) -> tuple[Message, ...]:
        """All but the last message; answers in it may be supervised too."""
        return self.messages[:-1]

    @property
    def answers(self) -> tuple[str]:
        """The last message."""
        return (self.messages[-1].content,)


@dataclass(frozen=True)
class PreferenceRow:
    """Two answers to the same prompt, of which the first is preferred.

    Attributes:
        margin: By how much, where the data say so: reward models then keep this distance between the two.
    """

    source: str
    number: int
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float = 0.0

    @property
    def answers(self) -> tuple[str, str]:
        """Chosen, rejected."""
        return self.chosen, self.rejected


@dataclass(frozen=True)
class FeedbackRow:
    """One answer to a prompt, and whether it is a desirable one."""

    source: str
    number: int
    prompt: tuple[Message, ...]
    completion: str
    desirable: bool

    @property
    def answers(self) -> tuple[str]:
        """The one answer."""
        return (self.completion,)


@dataclass(frozen=True)
class PromptRow:
    """A prompt without an answer, for policies that sample their own."""

    source: str
    number: int
    prompt: tuple[Message, ...]

    @property
    def answers(self) -> tuple[()]:
        """None."""
        return ()


@dataclass(frozen=True)
class TextRow:
    """A plain text, which no template writes."""

    source: str
    number: int
    text: str

    @property
    def prompt(self) -> tuple[Message]:
        """The text as something that is said, by which the audit compares rows."""
        return (Message("user", self.text),)

    @property
    def answers(self) -> tuple[()]:
        """None."""
        return ()


# Every name that data sets in the wild give to the three roles.
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
}
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
_TABLES = (".csv", ".csv.gz", ".tsv", ".tsv.gz")  # their cells have no types
_SHOWN = reprlib.Repr()
_SHOWN.maxlevel, _SHOWN.maxstring, _SHOWN.maxother = 2, 80, 80


# --- checked access to the fields of a row ----------------------------------------------------------------------


def fault(row: RawRow, message: str, remedy: str = "Repair or remove the row") -> DataError:
    """The error for one row."""
    return DataError(message, row.source, row.number, remedy)


def checked_text(row: RawRow, value: Any, name: str, may_be_empty: bool = False) -> str:
    """Return `value` if it is usable text, else say what is wrong with the field `name`."""
    if value is None:
        raise fault(row, f"{name} is null")
    if not isinstance(value, str):
        raise fault(row, f"{name} is a {type(value).__name__}, text was expected")
    if not may_be_empty and not value.strip():
        raise fault(row, f"{name} is empty")
    if value.strip().lower() == "nan" and row.source.lower().endswith(_TABLES):
        remedy = "Repair or remove the row; where the word is meant, write the data as JSON"
        raise fault(row, f"{name} is {value.strip()}, which tables write for a value that is missing", remedy)
    if _LONE_SURROGATE.search(value):  # JSON can spell it, but no tokenizer takes it
        raise fault(row, f"{name} holds half of a surrogate pair, which is no character", "Write it as valid Unicode")
    return value


def shown(value: Any) -> str:
    """A value as messages show it: its beginning, and not what is nested deep in it."""
    return _SHOWN.repr(value)


def value_of(row: RawRow, column: str) -> Any:
    """The value of a column that must be there, whatever it is."""
    if column not in row.values:
        raise fault(row, f"the column {column!r} is missing", "Give every row the columns of the first one")
    return row.values[column]


def column_text(row: RawRow, column: str, may_be_empty: bool = False) -> str:
    """The text of a column that must be there."""
    return checked_text(row, value_of(row, column), f"{column!r}", may_be_empty)


def optional_text(row: RawRow, column: str) -> str:
    """The text of a column that may be absent, null or empty."""
    value = row.values.get(column)
    return "" if value is None else checked_text(row, value, f"{column!r}", may_be_empty=True)


def system_messages(row: RawRow) -> tuple[Message, ...]:
    """The column `system` as a message, or nothing."""
    text = optional_text(row, "system")
    return (Message("system", text),) if text.strip() else ()


def read_turn(row: RawRow, value: Any, name: str) -> Message:
    """Read `{role, content}` or `{from, value}`."""
    if not isinstance(value, dict):
        raise fault(row, f"{name} is a {type(value).__name__}, an object with a role and a content was expected")
    role_key, content_key = ("from", "value") if "from" in value else ("role", "content")
    for key in (role_key, content_key):
        if key not in value:
            raise fault(row, f"{name} has no {key!r}")
    said = value[role_key]
    role = _ROLES.get(said.lower()) if isinstance(said, str) else None
    if role is None:
        known = ", ".join(_ROLES)
        raise fault(row, f"{name} has the role {shown(said)}", f"Known roles are {known}; rename or remove it")
    return Message(role, checked_text(row, value[content_key], f"{name}.{content_key}"))


def read_turns(row: RawRow, value: Any, name: str) -> tuple[Message, ...]:
    """Read a list of turns."""
    if not isinstance(value, (list, tuple)):
        raise fault(row, f"{name} is {'null' if value is None else f'a {type(value).__name__}'}, a list was expected")
    return tuple(read_turn(row, item, f"{name}[{place}]") for place, item in enumerate(value))


def checked_prompt(row: RawRow, prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """A prompt opens with the user (behind system messages) and ends with the user."""
    spoken = [message for message in prompt if message.role != "system"]
    if not spoken:
        raise fault(row, "the prompt is empty: no user turn comes before the answer")
    if spoken[0].role != "user":
        raise fault(row, "the conversation begins with an assistant turn", "Remove that turn, or the row")
    if prompt[-1].role != "user":
        raise fault(row, f"the turn before the answer is the {prompt[-1].role}'s, not the user's")
    return prompt


def instruction_row(row: RawRow, messages: tuple[Message, ...]) -> InstructionRow:
    """A conversation with a prompt and, at its end, an answer."""
    if not messages:
        raise fault(row, "the conversation is empty")
    if messages[-1].role != "assistant":
        raise fault(
            row,
            f"the conversation ends with a {messages[-1].role} turn, so there is no answer to learn",
            "Remove the turns behind the last answer, or the row",
        )
    checked_prompt(row, messages[:-1])
    return InstructionRow(row.source, row.number, messages)


def preference_row(row: RawRow, prompt: tuple[Message, ...], chosen: str, rejected: str) -> PreferenceRow:
    """A prompt with two answers that differ."""
    if chosen == rejected:
        raise fault(row, "the chosen and the rejected answer are equal", "Remove the row: it prefers nothing")
    return PreferenceRow(row.source, row.number, checked_prompt(row, prompt), chosen, rejected, read_margin(row))


def feedback_row(row: RawRow, prompt: tuple[Message, ...], completion: str, desirable: bool) -> FeedbackRow:
    """A prompt with one answer and the verdict on it."""
    return FeedbackRow(row.source, row.number, checked_prompt(row, prompt), completion, desirable)


def prompt_row(row: RawRow, prompt: tuple[Message, ...]) -> PromptRow:
    """A prompt alone."""
    return PromptRow(row.source, row.number, checked_prompt(row, prompt))


def post_prompt(row: RawRow, values: dict[str, Any], prefix: str = "") -> tuple[Message, ...]:
    """The summarisation query of Stiennon et al. (arXiv 2009.01325), their appendix B, as one user message."""
    parts = {}
    for key in ("subreddit", "title", "post"):
        if key not in values:
            raise fault(row, f"{prefix}{key} is missing")
        parts[key] = checked_text(row, values[key], f"{prefix}{key}", may_be_empty=key != "post")
    subreddit = parts["subreddit"].removeprefix("r/")
    return (Message("user", f"SUBREDDIT: r/{subreddit}\n\nTITLE: {parts['title']}\n\nPOST: {parts['post']}\n\nTL;DR:"),)


def read_prompt(row: RawRow, column: str) -> tuple[Message, ...]:
    """A prompt given as text, as one message or as messages."""
    value = value_of(row, column)
    if isinstance(value, (list, tuple)):
        return read_turns(row, value, f"{column!r}")
    if isinstance(value, dict):
        return (read_turn(row, value, f"{column!r}"),)
    return (Message("user", checked_text(row, value, f"{column!r}"), optional_text(row, "input")),)


def read_answer(row: RawRow, column: str) -> tuple[tuple[Message, ...], str]:
    """An answer given as text, as one message or as a conversation: the turns before it, and its text."""
    value = value_of(row, column)
    if isinstance(value, dict):
        turns: tuple[Message, ...] = (read_turn(row, value, f"{column!r}"),)
    elif isinstance(value, (list, tuple)):
        turns = read_turns(row, value, f"{column!r}")
    else:
        return (), checked_text(row, value, f"{column!r}")
    if not turns:
        raise fault(row, f"{column!r} is empty")
    if turns[-1].role != "assistant":
        raise fault(row, f"{column!r} ends with a {turns[-1].role} turn, not with an answer")
    return turns[:-1], turns[-1].content


def read_choice(row: RawRow, value: Any, column: str, first: int) -> int:
    """0 or 1 from a column that counts from `first`; tables give it as text or as a float."""
    known = {first: 0, first + 1: 1, str(first): 0, str(first + 1): 1}
    if isinstance(value, bool) or not isinstance(value, (int, float, str)) or value not in known:
        raise fault(row, f"{column!r} is {shown(value)}, {first} or {first + 1} was expected")
    return known[cast("int | str", value)]


def read_margin(row: RawRow) -> float:
    """The number in the column `margin`, which may be absent, null or empty; tables give it as text."""
    value = row.values.get("margin")
    if value is None or value == "":
        return 0.0
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise fault(row, f"'margin' is {shown(value)}, a number was expected", "Repair it, or rename the column")
    return margin


def read_verdict(row: RawRow, columns: tuple[str, ...]) -> bool:
    """True or false from the first of some columns that is there; tables give it as text or as a number."""
    column = next((name for name in columns if name in row.values), columns[0])
    value = value_of(row, column)
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if not isinstance(value, (bool, int, float, str)) or str(value).strip().lower() not in known:
        raise fault(row, f"{column!r} is {shown(value)}, true (desirable) or false (undesirable) was expected")
    return known[str(value).strip().lower()]
