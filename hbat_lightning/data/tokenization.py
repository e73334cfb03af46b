"""From written conversations to ids: special tokens, supervised positions and truncation, each decided in one place.

A row is tokenised segment by segment, and the prompt of generation by the very same calls, so that the ids a model is
trained on are the ids it is asked with. What stands in user text stays text, also where it reads like a special token.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from hbat_lightning.data.encoded import Draft, Encoded, EncodedPair, Ids
from hbat_lightning.data.fields import FeedbackRow, InstructionRow, Message, PreferenceRow, Row, TextRow
from hbat_lightning.data.templates import Segment, Template, special_token_ids
from hbat_lightning.data.text_coder import ANCHORS, TextCoder
from hbat_lightning.errors import DataError, LengthError, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRUNCATIONS = ("error", "drop", "prompt_left", "completion_right")


class Encoder:
    """Turns canonical rows into ids.

    Args:
        tokenizer: The tokenizer of the model; it must have an eos token.
        template: How conversations are written.
        max_length: The most tokens a row may have.
        truncation: What happens to longer rows. `error`: stop and name the row. `drop`: leave it out. `prompt_left`:
            cut the oldest tokens of the prompt, except bos. `completion_right`: cut the end of the last answer, which
            then has no stop token.
        supervise: `all` answers of a conversation, or only the `last`. With `last` everything before the last answer
            is rendered as one prompt. Of a preference pair only the last answers are ever supervised.
        count_merges: Count the rows in which prompt and answer, tokenised as one text, would give other ids at their
            boundary. It takes a second tokenisation.

    Attributes:
        counts: Rows `kept` and `dropped`; of those kept, `truncated_prompt` and `truncated_completion`; of all of them,
            `boundary_merges`.
        stop_token_id: The id that ends every complete answer.

    Raises:
        UserError: The tokenizer has no eos token, or an argument has no such value.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_length: int,
        truncation: str,
        supervise: Literal["all", "last"] = "all",
        count_merges: bool = False,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {tokenizer.name_or_path!r} has no eos token, so no answer could end;"
                " set eos_token in its tokenizer_config.json"
            )
        for name, value, known in (
            ("truncation", truncation, TRUNCATIONS),
            ("supervise", supervise, ("all", "last")),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; it can be {', '.join(known)}")
        if max_length < 2:
            raise UserError(f"max_length is {max_length}; a prompt and an answer need at least 2 tokens")
        self.tokenizer, self.template = tokenizer, template
        self.max_length, self.truncation, self.supervise = max_length, truncation, supervise
        self.count_merges = count_merges
        self.counts: Counter[str] = Counter()
        eos = int(tokenizer.eos_token_id)
        self.stop_token_id = eos if template.stop_token_id is None else template.stop_token_id
        specials = {**special_token_ids(tokenizer), **template.markers}
        self._text = TextCoder(tokenizer, specials, {eos, self.stop_token_id, tokenizer.bos_token_id})
        texts = [text for text, number in specials.items() if number in (eos, self.stop_token_id)]
        self._stop_texts = tuple(dict.fromkeys([template.stop_text or str(tokenizer.eos_token), *texts]))
        self._own_bos = _default_bos(tokenizer)
        self._bos = None if template.writes_bos else self._own_bos

    # --- rows -----------------------------------------------------------------------------------------------------

    def encode_instruction(self, row: InstructionRow) -> Encoded | None:
        """Encode a conversation.

        Returns:
            Its ids, or `None` where the truncation policy drops it.

        Raises:
            DataError: The row is too long under the policy `error`, or cannot be made to fit under the others, or the
                template cannot write it.
        """
        fitted = self.fit(row, self.draft(row))
        return None if fitted is None else fitted[0]

    def encode_preference(self, row: PreferenceRow) -> EncodedPair | None:
        """Encode a pair, both answers behind the same prompt ids.

        Returns:
            The pair, or `None` where the truncation policy drops it. A pair that becomes equal by truncation is dropped
            too.

        Raises:
            DataError: As for `encode_instruction`, or the two answers give the same ids.
        """
        fitted = self.fit(row, self.draft(row))
        return None if fitted is None else EncodedPair(fitted[0], fitted[1], row.margin)

    def encode_feedback(self, row: FeedbackRow) -> tuple[Encoded, bool] | None:
        """Encode an answer as (its ids behind the prompt, whether it is desirable).

        Returns:
            The row, or `None` where the truncation policy drops it.

        Raises:
            DataError: As for `encode_instruction`.
        """
        fitted = self.fit(row, self.draft(row))
        return None if fitted is None else (fitted[0], row.desirable)

    def encode_text(self, row: Row) -> list[Encoded]:
        """Encode a plain text with its eos, or a row's prompt as generation starts from it: all of it is learnt.

        Returns:
            Pieces of at most `max_length` tokens, each behind a bos where the tokenizer has one: a text is as long as it
            is, so the truncation policy does not apply. A last piece of a single token is left out, since nothing comes
            before it.

        Raises:
            DataError: The template cannot write the prompt, or the tokenizer the text.
        """
        bos = [] if self._own_bos is None else [self._own_bos]
        if isinstance(row, TextRow):
            try:
                ids = [*self._text.encode(self._text.protect(row.text), ()), int(self.tokenizer.eos_token_id)]
            except UserError as error:
                raise DataError(str(error), row.source, row.number) from error
        else:
            ids = self.encode_prompt_of(row)
        ids = ids[len(bos) :] if bos and ids[:1] == bos else ids
        room = self.max_length - len(bos)
        pieces = [bos + ids[begin : begin + room] for begin in range(0, len(ids), room)]
        self.counts["kept"] += 1
        return [
            Encoded(np.array(piece, dtype=np.int32), np.ones(len(piece), dtype=bool), 0)
            for piece in pieces
            if len(piece) > 1
        ]

    def draft(self, row: Row) -> Draft:
        """Encode a row at its full length.

        Raises:
            DataError: The template cannot write it, or the two answers give the same ids.
        """
        prompt, answers = self._encode_row(row)
        if len(answers) > 1 and answers[0].ids == answers[1].ids:
            raise DataError("both answers give the same tokens", row.source, row.number, "Remove the row")
        if isinstance(row, InstructionRow):
            return Draft(prompt, answers)
        return Draft(Ids(prompt.ids, [False] * len(prompt.ids)), answers)

    def encode_prompt_of(self, row: Row) -> list[int]:
        """The same for a row's prompt.

        Raises:
            DataError: The template cannot write it.
        """
        try:
            return self.encode_prompt(row.prompt)
        except UserError as error:  # a template knows no rows
            raise DataError(str(error), row.source, row.number) from error

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """The ids that generation starts from.

        Args:
            messages: A conversation that waits for an answer of the assistant.

        Raises:
            UserError: The template cannot write it.
            ValueError: It ends with an answer.
        """
        if not messages or messages[-1].role == "assistant":
            raise ValueError("a prompt is a conversation that ends before an answer")
        return self._encode_segments(self._write(messages)).ids

    # --- segments -------------------------------------------------------------------------------------------------

    def _write(self, messages: Sequence[Message]) -> list[Segment]:
        """The segments of a conversation, with special-token strings in its messages marked as text.

        Raises:
            UserError: The template cannot write it.
        """
        meant = [
            Message(one.role, self._without_stop(one.content), one.context) if one.role == "assistant" else one
            for one in messages
        ]
        safe = [Message(one.role, self._text.protect(one.content), self._text.protect(one.context)) for one in meant]
        segments = self.template.segments(safe, last_only=self.supervise == "last")
        texts = [one.content + one.context for one in meant]
        if safe != meant and self._text.cuts_a_mark([segment.text for segment in segments], texts):
            raise UserError(
                "the template cuts a message at a special token that is spelt out in it; remove that from the row, or "
                "choose the template alpaca, tldr or plain"
            )
        return segments

    def _without_stop(self, answer: str) -> str:
        """An answer whose stop token was written out in the data must not get a second one."""
        while answer.endswith(self._stop_texts):
            answer = next(answer.removesuffix(text) for text in self._stop_texts if answer.endswith(text))
        return answer

    def _encode_row(self, row: Row) -> Draft:
        """Encode the prompt once and every answer to it."""
        answers = [*row.answers, *(message.content for message in row.prompt if message.role == "assistant")]
        if not all(self._without_stop(answer).strip() for answer in answers):
            message = "the answer holds nothing but a stop token"
            raise DataError(message, row.source, row.number, "Fill it in or remove the row")
        try:
            written = [self._write([*row.prompt, Message("assistant", answer)]) for answer in row.answers]
        except UserError as error:  # a template knows no rows
            raise DataError(str(error), row.source, row.number) from error
        before = written[0][:-1]
        for segments in written:
            if segments[:-1] != before:
                message = "the template writes the prompt differently for the two answers"
                raise DataError(message, row.source, row.number, "Choose another template")
        try:
            encoded = [self._encode_answer(segments[-1].text) for segments in written]
            ids = self._encode_segments(before)
        except UserError as error:
            raise DataError(str(error), row.source, row.number) from error
        if self.count_merges:
            merges = any(self._merges(segments, answer.ids) for segments, answer in zip(written, encoded, strict=True))
            self.counts["boundary_merges"] += merges
        return Draft(ids, encoded)

    def _encode_segments(self, segments: Sequence[Segment]) -> Ids:
        """The one place where segments become ids: bos, texts, answers and their stop tokens."""
        ids: list[int] = []
        supervised: list[bool] = []
        for place, segment in enumerate(segments):
            if segment.supervised:
                piece = self._encode_answer(segment.text).ids
            elif place == 0:
                piece = self._encode_opening(segment.text)
            else:  # it stands behind a stop token, and is tokenised as it would be there
                piece = self._text.encode(segment.text, (self._stop_texts[0], *ANCHORS))
            ids += piece
            supervised += [segment.supervised and self.supervise == "all"] * len(piece)
        if not ids:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no token for the prompt: remove the row"
            )
        return Ids(ids, supervised)

    def _encode_opening(self, text: str) -> list[int]:
        ids = self._text.encode(text, ())
        return ids if self._bos is None or ids[:1] == [self._bos] else [self._bos, *ids]

    def _encode_answer(self, text: str) -> Ids:
        said = self._text.encode(text, ANCHORS)
        if not said:
            raise UserError(f"the tokenizer {self.tokenizer.name_or_path!r} has no token for an answer: remove the row")
        ids = [*said, self.stop_token_id]
        return Ids(ids, [True] * len(ids))

    def _merges(self, segments: Sequence[Segment], answer: list[int]) -> bool:
        """Whether the last prompt text and the answer would be cut elsewhere if they were tokenised as one text."""
        last = segments[-2].text
        encode = self._encode_opening if len(segments) == 2 else lambda text: self._text.encode(text, ANCHORS)
        return encode(last + segments[-1].text) != [*encode(last), *answer[:-1]]

    # --- length ---------------------------------------------------------------------------------------------------

    def fit(self, row: Row, draft: Draft) -> list[Encoded] | None:
        """Apply the truncation policy to a draft, and count what was done.

        Returns:
            Its answers, each behind the prompt, or `None` where the policy drops the row.

        Raises:
            LengthError: The row is too long under the policy `error`, or cannot be made to fit under the others.
        """
        prompt, answers = draft
        longest = max(draft.lengths[1])
        if len(prompt.ids) + longest > self.max_length:
            if self.truncation == "error":
                raise self._too_long(row, prompt, longest, "the row is longer than max_length")
            if self.truncation == "drop":
                self.counts["dropped"] += 1
                return None
            if self.truncation == "prompt_left":
                prompt = self._cut_prompt(row, prompt, longest)
            else:
                answers = self._cut_answers(row, prompt, answers)
            if len(answers) == 2 and answers[0].ids == answers[1].ids:
                self.counts["dropped"] += 1
                return None
            self.counts["truncated_prompt" if self.truncation == "prompt_left" else "truncated_completion"] += 1
        self.counts["kept"] += 1
        return [
            Encoded(
                np.array(prompt.ids + answer.ids, dtype=np.int32),
                np.array(prompt.supervised + answer.supervised, dtype=bool),
                len(prompt.ids),
            )
            for answer in answers
        ]

    def _cut_prompt(self, row: Row, prompt: Ids, longest: int) -> Ids:
        opening = 1 if prompt.ids[:1] == [self.tokenizer.bos_token_id] else 0
        room = self.max_length - longest - opening
        if room < 1:
            raise self._too_long(row, prompt, longest, "the answer alone leaves no room for the prompt in max_length")
        ids, supervised = prompt
        return Ids(ids[:opening] + ids[-room:], supervised[:opening] + supervised[-room:])

    def _cut_answers(self, row: Row, prompt: Ids, answers: list[Ids]) -> list[Ids]:
        room = self.max_length - len(prompt.ids)
        if room < 1:
            longest = max(len(answer.ids) for answer in answers)
            raise self._too_long(row, prompt, longest, "prompt longer than max_length, no token of the answer is left")
        return [Ids(answer.ids[:room], answer.supervised[:room]) for answer in answers]

    def _too_long(self, row: Any, prompt: Ids, longest: int, message: str) -> LengthError:
        return LengthError(
            f"{message}: {len(prompt.ids)} prompt tokens and {longest} of the answer, {self.max_length} allowed",
            row.source,
            row.number,
            "Raise max_length, shorten or remove the row, or set truncation to drop, prompt_left or completion_right",
        )


def _default_bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The bos id, if the tokenizer puts it before a text of its own accord."""
    bos = tokenizer.bos_token_id
    asked, plain = (tokenizer.encode("a", add_special_tokens=flag) for flag in (True, False))
    return int(bos) if bos is not None and asked[:1] == [bos] and plain[:1] != [bos] else None
