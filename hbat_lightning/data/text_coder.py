"""From text to ids: what stands in a message stays text, also where it reads like a special token."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hbat_lightning.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Private-use marks around special-token strings in user text, from before the template is rendered until the piece is
# tokenised. They are recognised only as a pair around such a string, so that text which holds them stays as it is.
_OPEN, _CLOSE = "\U0010fa01", "\U0010fa02"
# Texts to put before a continuation. The second is for texts that would merge with a line end.
ANCHORS = ("\n", "a")


class TextCoder:
    """Turns pieces of a written conversation into ids.

    Args:
        tokenizer: The tokenizer of the model.
        specials: Strings that the tokenizer or the template reads as special, with their ids.
        kept: Special ids that no text may become, also where one of them stands for letters that are not known.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, specials: Mapping[str, int], kept: set[int | None]) -> None:
        self._tokenizer, self._specials = tokenizer, specials
        # Unknown letters may become what stands for them.
        unknown = tokenizer.unk_token_id
        self._watched = frozenset(number for number in specials.values() if number != unknown or number in kept)
        alternatives = "|".join(map(re.escape, sorted(specials, key=len, reverse=True))) or r"(?!)"
        self._special = re.compile(f"({alternatives})")
        self._protected = re.compile(f"{_OPEN}({alternatives}){_CLOSE}")
        self._anchor_ids: dict[tuple[str, bool], list[int]] = {}

    def protect(self, text: str) -> str:
        """A message's text, with special-token strings in it marked as text."""
        return self._special.sub(f"{_OPEN}\\1{_CLOSE}", text)

    def cuts_a_mark(self, written: Sequence[str], meant: Sequence[str]) -> bool:
        """Whether a template, which may cut or change a message, has cut a marked string from one of its marks.

        Args:
            written: What the template made of the messages.
            meant: Their texts, before they were protected.
        """
        found = "".join(self._protected.sub("", text) for text in written)
        own = "".join(meant)
        return any(found.count(mark) > own.count(mark) for mark in (_OPEN, _CLOSE))

    def encode(self, text: str, anchors: tuple[str, ...]) -> list[int]:
        """Tokenise written text; what is marked in it stays text.

        Args:
            text: What the template has written, of protected messages.
            anchors: Texts that it may be tokenised behind; none where it is the beginning of a row.

        Raises:
            UserError: The tokenizer can write a text only as a special token.
        """
        ids: list[int] = []
        for place, piece in enumerate(self._protected.split(text)):  # every second piece is a marked string
            if piece:
                ids += self._continue(piece, anchors, split=place % 2 == 1)
                anchors = anchors or ANCHORS
        return ids

    def _continue(self, text: str, anchors: tuple[str, ...], split: bool) -> list[int]:
        """Tokenise `text` as it would be tokenised behind other text.

        Tokenised alone, SentencePiece would put a blank before it. So it is tokenised behind an anchor, whose ids are
        cut off where they come out as they do alone.
        """
        for anchor in anchors:
            key = (anchor, split)
            if key not in self._anchor_ids:
                self._anchor_ids[key] = self._tokenize(anchor, split)
            start = self._anchor_ids[key]
            ids = self._tokenize(anchor + text, split)
            if ids[: len(start)] == start:
                return self._checked(text, ids[len(start) :], split)
        return self._checked(text, self._tokenize(text, split), split)

    def _checked(self, text: str, ids: list[int], split: bool) -> list[int]:
        """Ids of a text, which hold a special token only where the template has written one.

        A vocabulary may hold special tokens as ordinary pieces too, a normaliser may make one of another spelling, and
        tokens that are not called special are found in any text.
        """
        found = [number for number in ids if number in self._watched]
        written = [] if split else [self._specials[mark] for mark in self._special.findall(text)]
        if not found or not Counter(found) - Counter(written):
            return ids
        if not split:
            parts = [(part, place % 2 == 0) for place, part in enumerate(self._special.split(text))]
        elif len(text) > 1:
            parts = [(text[:1], True), (text[1:], True)]
        else:
            raise UserError(
                f"the tokenizer {self._tokenizer.name_or_path!r} can write {text!r} only as a special token"
            )
        return [number for part, apart in parts if part for number in self._continue(part, ANCHORS, apart)]

    def _tokenize(self, text: str, split: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split, verbose=False))
