"""Where encoded rows come from: the file and the row behind each, and digests that tell one text or tokenizer from another."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from hbat_lightning.data.fields import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Change = Literal["base", "data", "template", "tokenizer", "schedule", "seed", "batch_size", "objectives", "reward"]
"""What may differ, where a user says so, between the run that a checkpoint is of and the one that goes on from it."""


class RowPlaces:
    """File and number of every row of a set, in 16 bytes each."""

    def __init__(self) -> None:
        self._sources: list[str] = []
        self._numbers = array("q")

    def append(self, row: Row) -> None:
        """Note the next row."""
        self._sources.append(row.source)
        self._numbers.append(row.number)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._sources)

    def __getitem__(self, row: int) -> tuple[str, int]:
        """File, and number in it."""
        return self._sources[row], self._numbers[row]


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def files_digest(paths: Iterable[Path]) -> str:
    """A digest of the bytes of some files, in order, wherever they lie."""
    whole = hashlib.blake2b(digest_size=8)
    for path in paths:
        with path.open("rb") as file:
            whole.update(hashlib.file_digest(file, hashlib.blake2b).digest())
    return whole.hexdigest()


def contents_digest(rows: Iterable[Row]) -> str:
    """A digest of what rows say, before any template or tokenizer, wherever their file lies."""
    whole = hashlib.blake2b(digest_size=8)
    for row in rows:
        whole.update(repr(replace(cast(Any, row), source="", number=0)).encode("utf-8", "surrogatepass"))
    return whole.hexdigest()


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """What decides which ids a text becomes, in plain types: a digest of the vocabulary, and the special tokens."""
    entries = sorted(tokenizer.get_vocab().items())
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    return {
        "vocabulary": f"{len(entries):,} entries ({digest(repr(entries))})",
        "special tokens": ", ".join(f"{name} {token}" for name, token in sorted(special.items())),
    }
