"""Templates: how a conversation is written as one text, and which stretches of that text are answers.

A template only writes. Which ids come of it, which special tokens close an answer and what is trained is decided by
`hbat_lightning.data.tokenization.Encoder`.
"""

from __future__ import annotations

import re
from abc import ABCMeta, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from hbat_lightning.data.formats import Message
from hbat_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A stretch of a written conversation.

    Attributes:
        text: The text, without the token that stops an answer.
        supervised: Whether it is an answer of the assistant.
    """

    text: str
    supervised: bool


# The metaclass instead of the base ABC: a class whose bases are all dataclasses can be written in a configuration as
# a plain mapping of its fields.
@dataclass(frozen=True)
class Template(metaclass=ABCMeta):
    """Writes conversations.

    Attributes:
        name: What logs call it.
        stop_text: What closes an answer in the template's own rendering; empty where it writes nothing there.
        stop_token_id: The id of that; `None` means the tokenizer's eos.
        writes_bos: Whether the template alone decides about the bos token.
        markers: Tokens of the vocabulary, with their ids, that it opens turns with although they are not called special.
    """

    # Not fields: a subclass sets them, and they are not part of what a configuration can give.
    name = ""
    stop_text = ""
    stop_token_id = cast("int | None", None)
    writes_bos = False
    markers = cast("Mapping[str, int]", {})

    @property
    def wording(self) -> str:
        """What it writes by, in full: tells it from another of the same name."""
        return repr(self)

    @abstractmethod
    def segments(self, messages: Sequence[Message], last_only: bool = False) -> list[Segment]:
        """Write a conversation.

        Args:
            messages: At least one message.
            last_only: Take everything before the last answer as one prompt, earlier answers included.

        Returns:
            Unsupervised text and answers in turn, an unsupervised text first. The list ends with the last answer, or,
            when the last message is not the assistant's, with the text behind which generation starts. What a template
            writes between an answer's stop token and the next turn opens the next unsupervised text.

        Raises:
            UserError: The template cannot write these messages.
        """


@dataclass(frozen=True)
class TextTemplate(Template):
    """A template of plain strings, with `{content}` and `{context}` for what is filled in.

    The assistant's text is not written again where the prompt already ends with it, as TL;DR posts do.

    Attributes:
        user: A user's turn.
        assistant: What stands before an answer; a prompt ends with it.
        name: What logs call it.
        user_with_context: A user's turn that has a context; by default the content followed by the context.
        system: A system message.
        preamble: What opens a conversation that has no system message.
        preamble_with_context: The same where the first user turn has a context; by default like `preamble`.
        separator: What stands between an answer's stop token and the next turn.
        answer_prefix: What opens an answer that does not itself begin with blank space; it is learnt.
        alone: How a conversation is written up to its first answer if it is a single user message and nothing else;
            by default like every other.
    """

    user: str
    assistant: str = ""
    name: str = "custom"
    user_with_context: str = ""
    system: str = "{content}\n\n"
    preamble: str = ""
    preamble_with_context: str = ""
    separator: str = "\n\n"
    answer_prefix: str = ""
    alone: str = ""

    def segments(self, messages: Sequence[Message], last_only: bool = False) -> list[Segment]:
        """Write a conversation; see `Template.segments`. `last_only` changes nothing: each answer has its own place."""
        # Only a conversation that never comes back to the user can do without names for the speakers.
        if self.alone and [message.role for message in messages] in (["user"], ["user", "assistant"]):
            first = Segment(_fill(self.alone, _merged(messages[0])), False)
            return [first, *(Segment(self._answer(message), True) for message in messages[1:])]
        written, text = [], self._preamble(messages)
        for message in messages:
            if message.role == "assistant":
                written += [Segment(self._closed(text), False), Segment(self._answer(message), True)]
                text = self.separator
            else:
                text += self._turn(message)
        return written if messages[-1].role == "assistant" else [*written, Segment(self._closed(text), False)]

    def _preamble(self, messages: Sequence[Message]) -> str:
        if messages[0].role == "system":
            return ""
        return (messages[0].context and self.preamble_with_context) or self.preamble

    def _turn(self, message: Message) -> str:
        if message.role == "system":
            return _fill(self.system, message)
        if message.context and self.user_with_context:
            return _fill(self.user_with_context, message)
        return _fill(self.user, _merged(message))

    def _closed(self, text: str) -> str:
        mark = self.assistant.strip()
        return text if mark and text.endswith(mark) else text + self.assistant

    def _answer(self, message: Message) -> str:
        return message.content if message.content[:1].isspace() else self.answer_prefix + message.content


def _merged(message: Message) -> Message:
    """The message with its context, if any, as part of the content."""
    return Message(message.role, f"{message.content}\n\n{message.context}") if message.context else message


def _fill(pattern: str, message: Message) -> str:
    # in one pass and without str.format: user text is full of braces
    values = {"{content}": message.content, "{context}": message.context}
    return re.sub(r"\{content\}|\{context\}", lambda found: values[found[0]], pattern)


ALPACA = TextTemplate(
    name="alpaca",  # the wording of tatsu-lab/stanford_alpaca, train.py
    preamble="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n",
    preamble_with_context="Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n",
    user="### Instruction:\n{content}\n\n",
    user_with_context="### Instruction:\n{content}\n\n### Input:\n{context}\n\n",
    assistant="### Response:",
)
TLDR = TextTemplate(name="tldr", user="{content}", assistant="\n\nTL;DR:", answer_prefix=" ")
PLAIN = TextTemplate(
    name="plain",
    user="Human:\n{content}\n\n",
    assistant="Assistant:\n",
    system="System:\n{content}\n\n",
    alone="{content}",
)
_TEXT_TEMPLATES = {template.name: template for template in (ALPACA, TLDR, PLAIN)}


class ChatTemplate(Template):
    """The chat template that a tokenizer brings along.

    Where an answer begins and ends is found by rendering, never by searching for its text: the prompt of a turn is the
    rendering of the messages before it with the generation prompt, and what ends a turn is learnt once, from a
    conversation whose answer is a mark.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        UserError: The tokenizer has no chat template, or it cannot render a question and an answer.
    """

    name = "chat"
    writes_bos = True
    _MARK = "\ufdd0answer\ufdd1"  # noncharacters: they occur in no text and no vocabulary

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no chat template;"
                " choose the template alpaca, tldr or plain, or a tokenizer that has one"
            )
        self._tokenizer = tokenizer
        probe = self._render([Message("user", "question"), Message("assistant", self._MARK)])
        if self._MARK not in probe:
            raise UserError(f"the chat template of {tokenizer.name_or_path!r} does not write the assistant's answers")
        self._ending = probe.rpartition(self._MARK)[2]
        specials = special_token_ids(tokenizer)
        stop = re.search("|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)", self._ending)
        self.stop_text = stop[0] if stop else ""
        self.stop_token_id = specials[stop[0]] if stop else None
        # what the template writes between the answer's content and its stop token is learnt with the answer
        self._answer_tail = self._ending[: stop.start()] if stop else ""
        asked = self._render([Message("user", "question")], prompt=True)
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self.markers = {text: number for text, number in added.items() if text in asked and text not in specials}

    @property
    def wording(self) -> str:
        """See `Template.wording`."""
        return str(self._tokenizer.chat_template)

    def segments(self, messages: Sequence[Message], last_only: bool = False) -> list[Segment]:
        """Write a conversation; see `Template.segments`.

        Raises:
            UserError: The template refuses the messages, or writes earlier turns differently once others follow.
        """
        answers = [place for place, message in enumerate(messages) if message.role == "assistant"]
        if last_only:
            answers = answers[-1:] if messages[-1].role == "assistant" else []
        written: list[Segment] = []
        done = ""  # how the conversation reads so far, stop tokens included
        for place in answers:
            prompt, answer = self._answer(messages[: place + 1])
            written += [Segment(self._rest(prompt, done), False), Segment(answer, True)]
            done = prompt + answer + self.stop_text
        if messages[-1].role != "assistant":
            written.append(Segment(self._rest(self._render(messages, prompt=True), done), False))
        return written

    def _answer(self, messages: Sequence[Message]) -> tuple[str, str]:
        """The text before the last message, which is an answer, and that answer up to its stop token."""
        prompt, whole = self._render(messages[:-1], prompt=True), self._render(messages)
        if not (whole.startswith(prompt) and whole.endswith(self._ending) and len(whole) > len(prompt)):
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path!r} does not write answers behind its generation"
                f" prompt, ended by {self._ending!r}: a model would be trained on other texts than it is asked with;"
                " give the tokenizer a template that does, or choose the template alpaca, tldr or plain"
            )
        return prompt, whole[len(prompt) : len(whole) - len(self._ending)] + self._answer_tail

    def _rest(self, whole: str, beginning: str) -> str:
        if not whole.startswith(beginning):
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path!r} writes earlier turns differently once others"
                " follow, so they cannot be trained as they would be generated;"
                " train only on the last answer (supervise: last)"
            )
        return whole[len(beginning) :]

    def _render(self, messages: Sequence[Message], prompt: bool = False) -> str:
        import jinja2

        turns = [{"role": message.role, "content": _merged(message).content} for message in messages]
        try:
            return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(
                f"the chat template of {self._tokenizer.name_or_path!r} refuses a conversation of the turns {roles}"
                f" ({error}); change the turns, or choose the template alpaca, tldr or plain"
            ) from error


def special_token_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Every string that a tokenizer turns into a special token, with the id."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
    return {text: int(number) for text, number in {**added, **named}.items() if text}


def resolve_template(template: str | TextTemplate | None, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template that a configuration asks for.

    Args:
        template: `chat`, `alpaca`, `tldr`, `plain`, a template of one's own, or `None`: the tokenizer's chat template
            if it has one, else `alpaca`.
        tokenizer: The tokenizer of the model.

    Raises:
        UserError: No template has that name, or `chat` was asked for and the tokenizer has no chat template.
    """
    if isinstance(template, TextTemplate):
        return template
    if template is None:
        template = "chat" if tokenizer.chat_template else "alpaca"
    if template == "chat":
        return ChatTemplate(tokenizer)
    if template not in _TEXT_TEMPLATES:
        names = ", ".join(["chat", *_TEXT_TEMPLATES])
        raise UserError(f"there is no template {template!r}; the names are {names}, or give one of your own")
    return _TEXT_TEMPLATES[template]
