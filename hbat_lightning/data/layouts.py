"""The layouts that instruction data, preferences and feedback come in, each a small class.

A format says which columns it needs, whether a file looks like it, and how one of its rows becomes canonical. A new
one is a new class in one of the tuples at the end of this file.
"""

# ruff: noqa: D102  (the methods of a format are documented once, on Format)

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import ClassVar, Generic, TypeVar

from hbat_lightning.data.fields import (
    FeedbackRow,
    InstructionRow,
    Message,
    PreferenceRow,
    PromptRow,
    TextRow,
    checked_text,
    column_text,
    fault,
    feedback_row,
    instruction_row,
    optional_text,
    post_prompt,
    preference_row,
    prompt_row,
    read_answer,
    read_choice,
    read_prompt,
    read_turns,
    read_verdict,
    system_messages,
    value_of,
)
from hbat_lightning.data.readers import RawRow

Row = TypeVar("Row", InstructionRow, PreferenceRow, FeedbackRow, PromptRow, TextRow)

_VERDICT_COLUMNS = ("label", "kto_tag")
_PROMPT_COLUMNS = ("prompt", "instruction", "question")
_ANSWER_COLUMNS = (
    *("output", "completion", "summary", "answer", "response", "label", "kto_tag"),
    *("chosen", "rejected", "output_1", "output_2"),
)
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}


class Format(ABC, Generic[Row]):
    """One way of laying out a row.

    Attributes:
        name: What a configuration calls it.
        columns: The columns it needs, for messages to the user.
    """

    name: ClassVar[str]
    columns: ClassVar[str]

    @abstractmethod
    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        """Whether a file with these columns and this first row is in the format."""

    @abstractmethod
    def parse(self, row: RawRow) -> Row:
        """Bring one row into the canonical form.

        Raises:
            DataError: The row cannot be used; says why and what to do.
        """


class Alpaca(Format[InstructionRow]):
    """Stanford Alpaca: an instruction, perhaps an input it works on, and the output."""

    name, columns = "alpaca", "instruction, output (and input, system)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"instruction", "output"} <= columns

    def parse(self, row: RawRow) -> InstructionRow:
        user = Message("user", column_text(row, "instruction"), optional_text(row, "input"))
        return instruction_row(row, (*system_messages(row), user, Message("assistant", column_text(row, "output"))))


class PromptCompletion(Format[InstructionRow]):
    """A prompt, as text or as messages, and its completion."""

    name, columns = "prompt_completion", "prompt, completion"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"prompt", "completion"} <= columns

    def parse(self, row: RawRow) -> InstructionRow:
        prompt = read_prompt(row, "prompt")
        inside, answer = read_answer(row, "completion")
        if inside:
            raise fault(row, "'completion' holds more than the one answer", "Move the turns before it to 'prompt'")
        return instruction_row(row, (*system_messages(row), *prompt, Message("assistant", answer)))


class Messages(Format[InstructionRow]):
    """A list of `{role, content}`."""

    name, columns = "messages", "messages"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return "messages" in columns and not {"chosen", "rejected"} & columns

    def parse(self, row: RawRow) -> InstructionRow:
        return instruction_row(row, read_turns(row, value_of(row, "messages"), "messages"))


class ShareGPT(Format[InstructionRow]):
    """A list of `{from, value}` under `conversations`."""

    name, columns = "sharegpt", "conversations (and system)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return "conversations" in columns and not {"chosen", "rejected"} & columns

    def parse(self, row: RawRow) -> InstructionRow:
        turns = read_turns(row, value_of(row, "conversations"), "conversations")
        return instruction_row(row, (*system_messages(row), *turns))


class TLDR(Format[InstructionRow]):
    """Reddit posts with their summaries, as fields or as a finished query that ends in "TL;DR:"."""

    name, columns = "tldr", "subreddit, title, post, summary; or prompt, label"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        if {"subreddit", "title", "post", "summary"} <= columns:
            return True
        # the label of unpaired feedback is a judgement, not a summary
        return {"prompt", "label"} <= columns and "completion" not in columns and isinstance(first.values["label"], str)

    def parse(self, row: RawRow) -> InstructionRow:
        if "post" in row.values:
            prompt, answer = post_prompt(row, row.values), column_text(row, "summary")
        else:
            query, answer = column_text(row, "prompt"), column_text(row, "label")
            if not query.rstrip().endswith("TL;DR:"):
                raise fault(row, "'prompt' does not end in 'TL;DR:'", "For other data rename label completion")
            prompt = (Message("user", query.rstrip()),)
        return instruction_row(row, (*prompt, Message("assistant", answer.strip())))


class Preference(Format[PreferenceRow]):
    """An explicit prompt with two answers, each as text, message or messages."""

    name, columns = "preference", "prompt (or instruction, question), chosen, rejected (and input, system, margin)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"chosen", "rejected"} <= columns and not columns.isdisjoint(_PROMPT_COLUMNS)

    def parse(self, row: RawRow) -> PreferenceRow:
        prompt = read_prompt(row, next((column for column in _PROMPT_COLUMNS if column in row.values), "prompt"))
        (before_chosen, chosen), (before_rejected, rejected) = read_answer(row, "chosen"), read_answer(row, "rejected")
        if before_chosen != before_rejected:
            raise fault(row, "the conversations of 'chosen' and 'rejected' differ before the last answer")
        if before_chosen:  # the prompt stands in the answers as well; theirs is the fuller one
            if before_chosen[-1].content != prompt[-1].content:
                raise fault(row, "'prompt' is not the last turn before the answers in 'chosen' and 'rejected'")
            prompt = before_chosen
        return preference_row(row, (*system_messages(row), *prompt), chosen, rejected)


class ShareGPTPreference(Format[PreferenceRow]):
    """A conversation that ends with the user, and two answers to it."""

    name, columns = "sharegpt_preference", "conversations, chosen, rejected (and system, margin)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"conversations", "chosen", "rejected"} <= columns

    def parse(self, row: RawRow) -> PreferenceRow:
        prompt = read_turns(row, value_of(row, "conversations"), "conversations")
        (before_chosen, chosen), (before_rejected, rejected) = read_answer(row, "chosen"), read_answer(row, "rejected")
        if before_chosen or before_rejected:
            raise fault(row, "'chosen' or 'rejected' holds more than one turn", "Leave only the answer in them")
        return preference_row(row, (*system_messages(row), *prompt), chosen, rejected)


class Transcripts(Format[PreferenceRow]):
    """HH-RLHF: two whole conversations that share everything but the last answer."""

    name, columns = "transcripts", "chosen, rejected (and margin)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"chosen", "rejected"} <= columns and columns.isdisjoint((*_PROMPT_COLUMNS, "conversations"))

    def parse(self, row: RawRow) -> PreferenceRow:
        chosen, rejected = (self._transcript(row, column) for column in ("chosen", "rejected"))
        if chosen[:-1] != rejected[:-1]:
            raise fault(
                row, "the two conversations differ before the last answer, so they share no prompt", "Remove the row"
            )
        return preference_row(row, chosen[:-1], chosen[-1].content, rejected[-1].content)

    def _transcript(self, row: RawRow, column: str) -> tuple[Message, ...]:
        value = value_of(row, column)
        if isinstance(value, str):
            head, *parts = re.split(r"(?:^|\n\n)(Human|Assistant):", checked_text(row, value, f"{column!r}"))
            if head.strip() or not parts:
                raise fault(
                    row,
                    f"{column!r} does not begin with a turn 'Human:'",
                    "Write transcripts as '\\n\\nHuman: …\\n\\nAssistant: …', or give the prompt its own column",
                )
            # the blanks around a turn are the transcript's layout
            pairs = zip(parts[::2], parts[1::2], strict=True)
            value = [{"role": _SPEAKERS[who], "content": said.strip()} for who, said in pairs]
        turns = read_turns(row, value, f"{column!r}")
        if not turns or turns[-1].role != "assistant":
            raise fault(row, f"{column!r} does not end with an answer")
        return turns


class AlpacaFarm(Format[PreferenceRow]):
    """AlpacaFarm: two outputs, and the number of the better one."""

    name, columns = "alpaca_farm", "instruction, output_1, output_2, preference (and input)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"instruction", "output_1", "output_2", "preference"} <= columns

    def parse(self, row: RawRow) -> PreferenceRow:
        user = Message("user", column_text(row, "instruction"), optional_text(row, "input"))
        better = read_choice(row, value_of(row, "preference"), "preference", first=1)
        answers = column_text(row, "output_1"), column_text(row, "output_2")
        return preference_row(row, (user,), answers[better], answers[1 - better])


class Comparisons(Format[PreferenceRow]):
    """openai/summarize_from_feedback: a post, two summaries, and the place of the better one."""

    name, columns = "comparisons", "info, summaries, choice"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"info", "summaries", "choice"} <= columns

    def parse(self, row: RawRow) -> PreferenceRow:
        info, summaries = value_of(row, "info"), value_of(row, "summaries")
        if not isinstance(info, dict):
            raise fault(row, f"'info' is a {type(info).__name__}, an object with post and title was expected")
        if not isinstance(summaries, (list, tuple)) or len(summaries) != 2:
            raise fault(row, "'summaries' is not a list of two")
        texts = [
            checked_text(row, item.get("text") if isinstance(item, dict) else item, f"summaries[{place}].text").strip()
            for place, item in enumerate(summaries)
        ]
        better = read_choice(row, value_of(row, "choice"), "choice", first=0)
        return preference_row(row, post_prompt(row, info, "info."), texts[better], texts[1 - better])


class Feedback(Format[FeedbackRow]):
    """A prompt, as text or as messages, one completion, and whether it is desirable (TRL's unpaired preferences)."""

    name, columns = "feedback", "prompt, completion, label (or kto_tag)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return {"prompt", "completion"} <= columns and not columns.isdisjoint(_VERDICT_COLUMNS)

    def parse(self, row: RawRow) -> FeedbackRow:
        prompt = read_prompt(row, "prompt")
        inside, answer = read_answer(row, "completion")
        if inside:
            raise fault(row, "'completion' holds more than the one answer", "Move the turns before it to 'prompt'")
        return feedback_row(row, (*system_messages(row), *prompt), answer, read_verdict(row, _VERDICT_COLUMNS))


class MessagesFeedback(Format[FeedbackRow]):
    """A conversation whose last answer is judged, as LLaMA-Factory lays it out."""

    name, columns = "messages_feedback", "messages (or conversations), label (or kto_tag)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return not columns.isdisjoint(("messages", "conversations")) and not columns.isdisjoint(_VERDICT_COLUMNS)

    def parse(self, row: RawRow) -> FeedbackRow:
        column = "messages" if "messages" in row.values else "conversations"
        before, answer = read_answer(row, column)
        return feedback_row(row, (*system_messages(row), *before), answer, read_verdict(row, _VERDICT_COLUMNS))


class PromptAlone(Format[PromptRow]):
    """A prompt without an answer, as text, as messages or as the fields of a Reddit post."""

    name, columns = "prompt", "prompt (or instruction, question; or subreddit, title, post), and no answer"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        asks = not columns.isdisjoint(_PROMPT_COLUMNS) or {"subreddit", "title", "post"} <= columns
        return asks and columns.isdisjoint((*_ANSWER_COLUMNS, "messages", "conversations"))

    def parse(self, row: RawRow) -> PromptRow:
        column = next((column for column in _PROMPT_COLUMNS if column in row.values), None)
        if column is None and "post" in row.values:
            return prompt_row(row, post_prompt(row, row.values))
        return prompt_row(row, (*system_messages(row), *read_prompt(row, column or _PROMPT_COLUMNS[0])))


class OpenMessages(Format[PromptRow]):
    """A conversation that ends with the user."""

    name, columns = "open_messages", "messages (or conversations), the last one a user's (and system)"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        if columns.isdisjoint(("messages", "conversations")) or not columns.isdisjoint(_ANSWER_COLUMNS):
            return False
        turns = first.values.get("messages", first.values.get("conversations"))
        last = turns[-1] if isinstance(turns, list) and turns else None
        return isinstance(last, dict) and str(last.get("role", last.get("from"))).lower() in ("user", "human")

    def parse(self, row: RawRow) -> PromptRow:
        column = "messages" if "messages" in row.values else "conversations"
        return prompt_row(row, (*system_messages(row), *read_turns(row, value_of(row, column), column)))


class PlainText(Format[TextRow]):
    """A text, of which every token is learnt; a file of lines has no other column."""

    name, columns = "text", "text"

    def matches(self, columns: frozenset[str], first: RawRow) -> bool:
        return "text" in columns

    def parse(self, row: RawRow) -> TextRow:
        return TextRow(row.source, row.number, column_text(row, "text"))


INSTRUCTION_FORMATS: tuple[Format[InstructionRow], ...] = (
    Alpaca(),
    PromptCompletion(),
    Messages(),
    ShareGPT(),
    TLDR(),
)
PREFERENCE_FORMATS: tuple[Format[PreferenceRow], ...] = (
    ShareGPTPreference(),
    Preference(),
    Transcripts(),
    AlpacaFarm(),
    Comparisons(),
)
FEEDBACK_FORMATS: tuple[Format[FeedbackRow], ...] = (
    Feedback(),
    MessagesFeedback(),
)
PROMPT_FORMATS: tuple[Format[PromptRow], ...] = (
    PromptAlone(),
    OpenMessages(),
)
TEXT_FORMATS: tuple[Format[TextRow], ...] = (PlainText(),)
