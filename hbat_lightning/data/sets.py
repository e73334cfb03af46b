"""Encoded rows of one objective, and how they become tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hbat_lightning.data.encoded import Encoded, EncodedPair
from hbat_lightning.data.packed import PackedRows, pack_texts
from hbat_lightning.errors import DataError
from hbat_lightning.ranks import ALONE, Ranks
from hbat_lightning.scoring import IGNORE
from hbat_lightning.training_data import MicroBatch, TrainingSet


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up rows; any would do, since masks go by length, so the vocabulary never grows for it."""
    return int(tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


def pad_right(rows: Sequence[Encoded], pad_id: int) -> dict[str, Tensor]:
    """Collate encoded texts.

    Masks come from lengths, never from comparing ids with the pad id: where pad and eos are one token, the last eos of
    an answer must still be learned.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)`` int64; labels are -100 where nothing is
        supervised.
    """
    longest = max(len(row.input_ids) for row in rows)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORE, dtype=np.int64)
    for place, row in enumerate(rows):
        length = len(row.input_ids)
        ids[place, :length] = row.input_ids
        mask[place, :length] = 1
        labels[place, :length] = np.where(row.supervised, row.input_ids, IGNORE)
    return {name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """Collate prompts where generation wants them.

    Returns:
        ``input_ids`` and ``attention_mask``, each ``(B, T)``.
    """
    longest = max((len(row) for row in rows), default=0)
    ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, longest - len(row) :] = torch.tensor(row)
        mask[place, longest - len(row) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _digest(rows: Iterable[Encoded]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(row.input_ids.tobytes())
        digest.update(np.packbits(row.supervised).tobytes())
    return digest.hexdigest()


def _without_labels(row: Encoded) -> Encoded:
    """Its first two tokens, supervised nowhere: the cheapest forward pass there is."""
    ids = row.input_ids[:2]
    return Encoded(ids, np.zeros(len(ids), dtype=bool), len(ids))


class InstructionSet:
    """Conversations to imitate.

    Args:
        rows: Encoded conversations.
        source: Where they come from, for messages.
        pad_id: Fills up short rows.
    """

    def __init__(self, rows: Iterable[Encoded], source: str, pad_id: int) -> None:
        self.rows, self.source, self.pad_id = pack_texts(rows), source, pad_id
        self.digest = _digest(self.rows)

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.rows)

    def units(self, row: int) -> int:
        """Supervised tokens that something comes before, since the first token is never predicted."""
        return int(self.rows[row].supervised[1:].sum())

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` ``(B, T)`` and ``index`` ``(B,)``."""
        return pad_right([self.rows[row] for row in rows], self.pad_id) | {"index": torch.tensor(rows)}

    def blank(self) -> dict[str, Tensor]:
        """One row without labels."""
        return pad_right([_without_labels(self.rows[0])], self.pad_id) | {"index": torch.tensor([-1])}


class PreferenceSet:
    """Pairs of a chosen and a rejected completion of one prompt.

    Args:
        rows: Encoded pairs.
        source: Where they come from, for messages.
        pad_id: Fills up short rows.
    """

    def __init__(self, rows: Iterable[EncodedPair], source: str, pad_id: int) -> None:
        self.source, self.pad_id = source, pad_id
        self.rows = PackedRows(
            rows,
            lambda pair: ((pair.chosen, pair.rejected), pair.margin),
            lambda two, margin: EncodedPair(two[0], two[1], margin),
        )
        self.digest = _digest(side for pair in self.rows for side in (pair.chosen, pair.rejected))
        if any(self.rows.numbers()):
            margins = " ".join(map(repr, self.rows.numbers()))
            self.digest = hashlib.blake2b((self.digest + margins).encode(), digest_size=8).hexdigest()

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.rows)

    def units(self, row: int) -> int:
        """A pair counts once."""
        return 1

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` ``(2B, T)``, chosen first, then rejected.

        And ``margin`` ``(B,)`` fp32, ``index`` ``(B,)``.
        """
        pairs = [self.rows[row] for row in rows]
        sides = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
        margins = torch.tensor([pair.margin for pair in pairs])
        return pad_right(sides, self.pad_id) | {"margin": margins, "index": torch.tensor(rows)}

    def blank(self) -> dict[str, Tensor]:
        """One pair without labels."""
        sides = [_without_labels(side) for side in (self.rows[0].chosen, self.rows[0].rejected)]
        return pad_right(sides, self.pad_id) | {"margin": torch.zeros(1), "index": torch.tensor([-1])}


class FeedbackSet:
    """Answers with a verdict on each, and beside each a mismatch: its prompt with the answer to another prompt.

    The mismatches are KTO's sample for the distance between policy and reference. In a micro-batch every row takes the
    answer of the row before it, the first one that of the last, as TRL and the authors' code do: so the same answers are
    judged and sampled. A row that is alone in its micro-batch, as at the end of a pass, takes the next one's of the set.

    Args:
        rows: Encoded answers, each with whether it is desirable.
        source: Where they come from, for messages.
        pad_id: Fills up short rows.

    Raises:
        DataError: There is a single row: no other answer to take.
    """

    def __init__(self, rows: Iterable[tuple[Encoded, bool]], source: str, pad_id: int) -> None:
        self.source, self.pad_id = source, pad_id
        self.rows: PackedRows[tuple[Encoded, bool]] = PackedRows(
            rows, lambda row: ((row[0],), float(row[1])), lambda texts, desirable: (texts[0], bool(desirable))
        )
        if len(self.rows) == 1:
            message = "a single row of feedback, training or held out, has no other answer to be compared with"
            raise DataError(message, source, remedy="Add rows, or hold out more of them, or none (val_fraction 0)")
        verdicts = "".join(str(int(desirable)) for desirable in self.rows.numbers())
        self.digest = hashlib.blake2b(
            (_digest(row for row, _ in self.rows) + verdicts).encode(), digest_size=8
        ).hexdigest()
        self._longest = max(self.rows.lengths(), default=0)

    def __len__(self) -> int:
        """Number of answers."""
        return len(self.rows)

    def units(self, row: int) -> int:
        """An answer counts once."""
        return 1

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask``, ``labels`` ``(2B, T)``, answers first, then mismatches.

        And ``desirable`` ``(B,)`` bool, ``index`` ``(B,)``.
        """
        others = [rows[-1], *rows[:-1]] if len(rows) > 1 else [(rows[0] + 1) % len(self.rows)]
        matched = [self.rows[row][0] for row in rows]
        mismatched = [self._mismatch(*pair) for pair in zip(rows, others, strict=True)]
        desirable = torch.tensor([self.rows[row][1] for row in rows])
        return pad_right(matched + mismatched, self.pad_id) | {"desirable": desirable, "index": torch.tensor(rows)}

    def blank(self) -> dict[str, Tensor]:
        """One row without labels."""
        nothing = [_without_labels(self.rows[0][0])] * 2
        return pad_right(nothing, self.pad_id) | {"desirable": torch.tensor([False]), "index": torch.tensor([-1])}

    def _mismatch(self, row: int, other: int) -> Encoded:
        """A row's prompt with another row's answer, cut where it would be longer than every row of the set."""
        mine, theirs = self.rows[row][0], self.rows[other][0]
        ids = np.concatenate([mine.input_ids[: mine.prompt_length], theirs.input_ids[theirs.prompt_length :]])
        supervised = np.arange(len(ids)) >= mine.prompt_length
        return Encoded(ids[: self._longest], supervised[: self._longest], mine.prompt_length)


def deal(rows: int, batch_size: int, ranks: Ranks) -> list[range]:
    """Rows in order, cut into batches that ranks take turns in, as many on each: the last of a rank's may be empty."""
    batches = [range(begin, min(begin + batch_size, rows)) for begin in range(0, rows, batch_size)]
    batches += [range(0)] * (-len(batches) % ranks.world)
    return batches[ranks.rank :: ranks.world]


class EvaluationLoader:
    """All rows of a set, in order, as micro-batches of one objective; of several ranks each has a share of them.

    Shares are of whole micro-batches, so that these hold what they would hold in a single process, and as many for every
    rank: one that has run out gets micro-batches without inputs.

    Args:
        data: The rows.
        objective: Name of the objective that evaluates them.
        batch_size: Rows in a micro-batch.
        together: Whether what a row is scored on depends on the others of its micro-batch.
        ranks: Who shares them.
    """

    def __init__(
        self, data: TrainingSet, objective: str, batch_size: int, together: bool = False, ranks: Ranks = ALONE
    ) -> None:
        self.data, self.objective = data, objective
        self.batches = deal(len(data), batch_size, ranks)
        self.digest = f"{data.digest}, {batch_size} at a time" if together or ranks.world > 1 else data.digest
        if ranks.world > 1:
            self.digest += f", share {ranks.rank} of {ranks.world}"

    def __len__(self) -> int:
        """Number of micro-batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Yield them."""
        for rows in self.batches:
            yield MicroBatch(self.data.collate(list(rows)) if rows else {}, self.objective)


@dataclass(frozen=True)
class Prompt:
    """A prompt to complete, with the completion that the data holds.

    Attributes:
        input_ids: The ids that generation starts from.
        text: The prompt as text.
        completion: The data's own answer.
    """

    input_ids: list[int]
    text: str
    completion: str


@dataclass
class PromptBatch:
    """Left-padded prompts.

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: ``(B, T)``.
        prompts: B texts.
        completions: B answers from the data.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompts: list[str]
    completions: list[str]


class PromptLoader:
    """Prompts in order, padded on the left, where generation wants it; shared like :class:`EvaluationLoader`'s rows.

    Args:
        prompts: The prompts.
        batch_size: Prompts in a batch.
        pad_id: Fills up short rows.
        ranks: Who shares them.
    """

    def __init__(self, prompts: Sequence[Prompt], batch_size: int, pad_id: int, ranks: Ranks = ALONE) -> None:
        self.prompts, self.pad_id = list(prompts), pad_id
        self.batches = deal(len(self.prompts), batch_size, ranks)

    def __len__(self) -> int:
        """Number of batches."""
        return len(self.batches)

    def __iter__(self) -> Iterator[PromptBatch]:
        """Yield them."""
        for rows in self.batches:
            part = [self.prompts[row] for row in rows]
            inputs = pad_left([prompt.input_ids for prompt in part], self.pad_id)
            yield PromptBatch(**inputs, prompts=[p.text for p in part], completions=[p.completion for p in part])
