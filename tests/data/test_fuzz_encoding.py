"""Whatever stands in a row, what is trained is the answer and its stop token, and nothing of it is a marker of turns.

Held against an oracle that shares no code with the package: templates written a second time by hand, and the meaning of
a tokenizer's pieces. `tests/conftest.py` says how many cases are drawn, and how to draw more.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hbat_lightning.data.encoded import Encoded
from hbat_lightning.data.fields import FeedbackRow, InstructionRow, Message, PreferenceRow
from hbat_lightning.data.rollouts import encode_opening
from hbat_lightning.data.sets import PreferenceSet, pad_left
from hbat_lightning.data.templates import resolve_template
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.errors import DataError, LengthError
from tests.fuzzing import KINDS, LLAMA, MARKERS, TEXT_TEMPLATES, Chat, Kind, conversations, kind, texts

LONG = 10**6
FREE = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


@pytest.fixture(params=KINDS, scope="module")
def made(request: pytest.FixtureRequest) -> Kind:
    if request.param == "llama" and not LLAMA.exists():
        pytest.skip(f"the Llama-2 tokenizer is not at {LLAMA}")
    return kind(request.param)


class Oracle:
    """What a tokenizer and a template must make of a conversation, by hand."""

    def __init__(self, made: Kind, choice: Any, supervise: str) -> None:
        self.made, self.supervise, tokenizer = made, supervise, made.tokenizer
        self.chat = choice if isinstance(choice, Chat) else None
        self.name, self.write = ("chat", choice.write) if self.chat else TEXT_TEMPLATES[choice]
        tokenizer.chat_template = self.chat.source if self.chat else None
        self.stop = (self.chat.stop if self.chat else "") or tokenizer.eos_token
        # a chat template that closes no answer closes none in a prompt that is rendered as one text either
        self.inside = self.chat.stop if self.chat and supervise == "last" else self.stop
        self.bos = "" if self.chat else made.bos
        added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
        self.special = {text: number for text, number in added.items() if text not in made.markers or self.chat}
        self.watched = {number for text, number in self.special.items() if text != tokenizer.unk_token}

    def encoder(self, length: int = LONG, truncation: str = "error") -> Encoder:
        template = resolve_template(self.name, self.made.tokenizer)
        return Encoder(self.made.tokenizer, template, length, truncation, cast(Any, self.supervise))

    def content(self, message: Message) -> Message:
        """What the data mean: a written stop token at the end of an answer is not part of it."""
        if message.role != "assistant":
            return message
        text, stops = message.content, (self.stop, self.made.tokenizer.eos_token)
        while text.endswith(stops):
            text = next(text[: -len(stop)] for stop in stops if text.endswith(stop))
        return Message("assistant", text)

    def answer(self, message: Message) -> str:
        """What is learnt of an answer, without its stop token."""
        text = self.content(message).content
        if self.chat:
            return self.chat.head + (text.strip() if self.chat.trims else text) + self.chat.tail
        return text if self.name != "tldr" or text[:1].isspace() else " " + text

    def prompt(self, messages: Sequence[Message]) -> str:
        """The whole text that generation starts from."""
        between = self.write([self.content(message) for message in messages])
        answers = [self.answer(message) + self.inside for message in messages if message.role == "assistant"]
        return self.bos + "".join(a + b for a, b in zip(between, [*answers, ""], strict=True))

    def markers(self, messages: Sequence[Message]) -> Counter[int]:
        """The special ids that the template itself writes before generation, bos and stop tokens among them."""
        blank = [Message(one.role, "x", "x" if one.context else "") for one in messages]
        text = self.prompt(blank)
        pattern = "|".join(map(re.escape, sorted(self.special, key=len, reverse=True)))
        return self.watched_in([self.special[mark] for mark in re.findall(pattern, text)])

    def watched_in(self, ids: Sequence[int]) -> Counter[int]:
        return Counter(int(number) for number in ids if int(number) in self.watched)

    def unusable(self, messages: Sequence[Message]) -> bool:
        """Whether a row may be refused: an answer is empty, or the vocabulary may have nothing for a text."""
        said = [self.content(one).content.strip() for one in messages if one.role == "assistant"]
        return not all(said) or self.made.decode is None


@st.composite
def cases(draw: st.DrawFn, made: Kind) -> tuple[Oracle, list[Message]]:
    choice = draw(st.sampled_from([*made.chats, *made.chats, *TEXT_TEMPLATES]))
    return Oracle(made, choice, draw(st.sampled_from(["all", "last"]))), draw(conversations)


def check_prompt(oracle: Oracle, messages: Sequence[Message], ids: Sequence[int]) -> None:
    """The ids say what the template writes, and no special id is there that the template does not write."""
    assert oracle.watched_in(ids) == oracle.markers(messages)
    bos = oracle.made.tokenizer.bos_token_id
    assert bos is None or (list(ids).count(bos) <= 1 and bos not in ids[1:])
    if oracle.made.decode:
        same = oracle.made.same
        assert same(oracle.made.decode(ids)) == same(oracle.prompt(messages))


def check_answer(oracle: Oracle, message: Message, before: Sequence[int], ids: Sequence[int]) -> None:
    """An answer behind a prompt: its text, then exactly one stop token, and nothing else that is special."""
    stop = oracle.special[oracle.stop]
    assert ids[-1] == stop
    assert oracle.watched_in(ids) == Counter([stop])
    assert len(ids) > 1
    if oracle.made.decode:
        told, same = oracle.made.decode([*before, *ids[:-1]]), oracle.made.same
        assert same(told) == same(oracle.made.decode(before) + oracle.answer(message))


def check_refusal(error: DataError, expected: bool = True) -> None:
    """One line that names file and row, and that any terminal can show."""
    line = str(error)
    assert expected, f"a usable row was refused: {line}"
    assert line.startswith("f.jsonl, row 7: ")
    assert line.isprintable()
    assert len(line) < 1000


def runs(flags: Any) -> list[tuple[int, int]]:
    """Where stretches of true begin and end."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(int)))
    return [(int(begin), int(end)) for begin, end in edges.reshape(-1, 2)]


@given(data=st.data())
@FREE
def test_an_instruction_trains_its_answers_and_nothing_else(made: Kind, data: st.DataObject) -> None:
    oracle, prompt = data.draw(cases(made))
    last = Message("assistant", data.draw(texts()))
    coder = oracle.encoder()
    try:
        encoded = coder.encode_instruction(InstructionRow("f.jsonl", 7, (*prompt, last)))
    except DataError as error:
        check_refusal(error, expected=oracle.unusable([*prompt, last]))
        return
    assert encoded is not None
    ids, length = encoded.input_ids.tolist(), encoded.prompt_length
    check_prompt(oracle, prompt, ids[:length])
    check_answer(oracle, last, ids[:length], ids[length:])
    assert coder.encode_prompt(prompt) == ids[:length]

    # what is supervised: the last answer, and in the prompt each earlier one, ended by its stop token
    assert encoded.supervised[length:].all()
    early = [one for one in prompt if one.role == "assistant"] if oracle.supervise == "all" else []
    spans = runs(encoded.supervised[:length])
    assert len(spans) == len(early)
    for message, (begin, end) in zip(early, spans, strict=True):
        check_answer(oracle, message, ids[:begin], ids[begin:end])


@given(data=st.data())
@FREE
def test_pairs_feedback_and_rollouts_stand_behind_the_prompt_of_generation(made: Kind, data: st.DataObject) -> None:
    oracle, prompt = data.draw(cases(made))
    one, other = (Message("assistant", data.draw(texts())) for _ in range(2))
    coder = oracle.encoder()
    pair = PreferenceRow("f.jsonl", 7, tuple(prompt), one.content, other.content)
    try:
        sides = coder.encode_preference(pair)
        judged = coder.encode_feedback(FeedbackRow("f.jsonl", 7, tuple(prompt), one.content, True))
        opening = encode_opening(coder, pair, room=8)
    except DataError as error:
        same = made.same(oracle.answer(one)) == made.same(oracle.answer(other))
        check_refusal(error, expected=same or oracle.unusable([*prompt, one, other]))
        return
    assert sides is not None
    assert judged is not None
    check_prompt(oracle, prompt, opening or [])
    for side, message in ((sides.chosen, one), (sides.rejected, other), (judged[0], one)):
        ids, length = side.input_ids.tolist(), side.prompt_length
        assert ids[:length] == opening
        assert runs(side.supervised) == [(length, len(ids))]
        check_answer(oracle, message, ids[:length], ids[length:])
    check_collation(made, PreferenceSet([sides, sides], "f.jsonl", pad(made)).collate([1]), [*sides[:2]])
    check_left(made, [opening or [], judged[0].input_ids.tolist()])


def pad(made: Kind) -> int:
    numbers = made.tokenizer.pad_token_id, made.tokenizer.eos_token_id
    return int(numbers[0] if numbers[0] is not None else numbers[1])


def check_collation(made: Kind, batch: dict[str, torch.Tensor], rows: Sequence[Encoded]) -> None:
    """Every row stands on the left, labels are its supervised ids, and padding is neither seen nor learnt."""
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids, seen, labels = (batch[name][place] for name in ("input_ids", "attention_mask", "labels"))
        assert ids[:length].tolist() == row.input_ids.tolist()
        assert (ids[length:] == pad(made)).all()
        assert seen.tolist() == [1] * length + [0] * (len(ids) - length)
        wanted = [int(i) if s else -100 for i, s in zip(row.input_ids, row.supervised, strict=True)]
        assert labels.tolist() == wanted + [-100] * (len(ids) - length)
        assert labels[length - 1] == row.input_ids[-1], "the last stop token is learnt, whatever pads"


def check_left(made: Kind, rows: Sequence[Sequence[int]]) -> None:
    batch = pad_left(rows, pad(made))
    for place, row in enumerate(rows):
        room = batch["input_ids"].shape[1] - len(row)
        assert batch["input_ids"][place].tolist() == [pad(made)] * room + list(row)
        assert batch["attention_mask"][place].tolist() == [0] * room + [1] * len(row)


@given(data=st.data())
@FREE
def test_truncation_cuts_where_it_says_and_nowhere_else(made: Kind, data: st.DataObject) -> None:
    oracle, prompt = data.draw(cases(made))
    row = InstructionRow("f.jsonl", 7, (*prompt, Message("assistant", data.draw(texts()))))
    assume(not oracle.unusable(row.messages) or made.decode is None)
    try:
        whole = oracle.encoder().encode_instruction(row)
    except DataError:
        return
    assert whole is not None
    ids, mask, length = whole.input_ids.tolist(), whole.supervised.tolist(), whole.prompt_length
    policy = data.draw(st.sampled_from(["error", "drop", "prompt_left", "completion_right"]))
    room = data.draw(st.integers(2, len(ids) + 1))
    coder = oracle.encoder(room, policy)
    try:
        cut = coder.encode_instruction(row)
    except LengthError as error:
        opening = ids[:1] == [made.tokenizer.bos_token_id]
        none_left = {"prompt_left": len(ids) - length + opening >= room, "completion_right": length >= room}
        check_refusal(error, expected=len(ids) > room and none_left.get(policy, policy == "error"))
        return
    if len(ids) <= room:
        assert cut is not None
        expected = (ids, mask, length)
    elif policy == "drop":
        assert cut is None
        assert coder.counts == {"dropped": 1}
        return
    elif policy == "completion_right":
        expected = (ids[:room], mask[:room], length)
    else:
        kept = 1 if ids[0] == made.tokenizer.bos_token_id else 0
        gone = slice(kept, kept + len(ids) - room)
        del ids[gone], mask[gone]
        expected = (ids, mask, length - (gone.stop - gone.start))
    assert cut is not None
    assert (cut.input_ids.tolist(), cut.supervised.tolist(), cut.prompt_length) == expected
    assert coder.counts["kept"] == 1


def test_nothing_in_the_oracle_is_empty() -> None:
    """Its markers are those of real templates: a check that watches nothing would pass everything."""
    seen = {name: Oracle(kind(name), kind(name).chats[0], "all") for name in KINDS if name != "llama"}
    talk = [Message("user", "a"), Message("assistant", "b"), Message("user", "c")]
    assert all(oracle.markers(talk).total() >= 2 for oracle in seen.values())
    assert all(set(oracle.special) & set(MARKERS) for oracle in seen.values())
