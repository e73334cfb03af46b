"""Prompts that a policy answers as it trains, and the answers with all that is learnt from them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hbat_lightning.data.encoded import Draft, Encoded, Ids
from hbat_lightning.data.fields import Row
from hbat_lightning.data.packed import pack_prompts
from hbat_lightning.data.sets import pad_left, pad_right
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.ranks import Ranks
from hbat_lightning.stream import stable_seed
from hbat_lightning.switches import PhaseKey
from hbat_lightning.training_data import Cycle, SampledSet


def encode_opening(encoder: Encoder, row: Row, room: int) -> list[int] | None:
    """Encode a row's prompt, and leave room for an answer.

    Args:
        encoder: Its ``max_length`` is that of prompt and answer together.
        row: The row; its own answers are not looked at.
        room: Tokens of the longest answer.

    Returns:
        The ids that generation starts from; ``None`` where the truncation policy drops the row.

    Raises:
        DataError: The template cannot write it, or it is too long under the policy.
    """
    opening = fit_opening(encoder, row, draft_opening(encoder, row, room))
    return None if opening is None else opening[0].input_ids.tolist()


def draft_opening(encoder: Encoder, row: Row, room: int) -> Draft:
    """A row's prompt, and behind it as many tokens as the longest answer may have."""
    ids = encoder.encode_prompt_of(row)
    return Draft(Ids(ids, [False] * len(ids)), [Ids([0] * room, [True] * room)])


def fit_opening(encoder: Encoder, row: Row, draft: Draft) -> list[Encoded] | None:
    """The prompt of such a draft under the truncation policy; see :meth:`Encoder.fit`."""
    fitted = encoder.fit(row, draft)
    if fitted is None:
        return None
    length = fitted[0].prompt_length
    return [Encoded(fitted[0].input_ids[:length], fitted[0].supervised[:length], length)]


@dataclass
class Rollout:
    """One sampled completion.

    Attributes:
        prompt: Ids of the prompt.
        completion: Ids of the completion, n of them, with its stop token if it stopped.
        tokens: Per-token tensors by name, each ``(n,)``, such as the log-probabilities when it was sampled.
        figures: Per-completion values by name, such as its reward.
    """

    prompt: list[int]
    completion: list[int]
    tokens: dict[str, Tensor] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)

    def encoded(self) -> Encoded:
        """Prompt and completion, the completion supervised."""
        ids = np.array(self.prompt + self.completion, dtype=np.int32)
        return Encoded(ids, np.arange(len(ids)) >= len(self.prompt), len(self.prompt))

    def state(self) -> dict[str, Any]:
        """In plain types and tensors."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "tokens": dict(self.tokens),
            "figures": dict(self.figures),
        }


Prompts = Sequence[Sequence[list[int]]]
"""Ids of prompts, grouped as micro-batches will be."""

Each = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]
"""Like ``map``: a job and its items -> the results, in order. Somebody else may do some of them."""

RollOut = Callable[[Any, Prompts, torch.device, Each], list[list[list[Rollout]]]]
"""The policy, prompts, where the policy is, who does the sampling -> for every prompt its rollouts, in the same grouping."""

Sampler = Callable[[PhaseKey, Prompts, int], list[list[list[Rollout]]]]
"""Phase, prompts, seed -> the same, from the policy as it is in that phase."""


class SharedWork:
    """Shares items among ranks. Each has a seed of its own, so that it does not matter whose it is.

    Args:
        ranks: The processes.
        seed: For the work of one cycle; a second call draws other numbers than the first.
    """

    def __init__(self, ranks: Ranks, seed: int) -> None:
        self.ranks, self.seed, self._calls = ranks, seed, 0

    def __call__(self, job: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
        """See :data:`Each`; results are what jobs return, not what they change."""
        self._calls += 1

        def seeded(numbered: tuple[int, Any]) -> Any:
            torch.manual_seed(stable_seed(self.seed, self._calls, numbered[0]))
            return job(numbered[1])

        return self.ranks.map(seeded, list(enumerate(items)))


def one_by_one(job: Callable[[Any], Any], items: Sequence[Any]) -> list[Any]:
    """The plain :data:`Each`: all of them, here."""
    return [job(item) for item in items]


def collate_rollouts(rollouts: Sequence[Rollout], pad_id: int) -> dict[str, Tensor]:
    """Tensors of some completions.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels`` ``(S, T)``; every per-token quantity ``(N,)``, in the order in
        which a scorer gives the N supervised tokens; every per-completion one ``(S,)``.
    """
    inputs = pad_right([rollout.encoded() for rollout in rollouts], pad_id)
    for name in rollouts[0].tokens:
        inputs[name] = torch.cat([rollout.tokens[name] for rollout in rollouts])
    for name in rollouts[0].figures:
        inputs[name] = torch.tensor([rollout.figures[name] for rollout in rollouts])
    return inputs


class RolloutSet(SampledSet):
    """Prompts to train on by what the policy answers.

    Args:
        rows: Ids of the prompts.
        source: Where they come from, for messages.
        pad_id: Fills up short rows.
        cycle: How many windows' worth are sampled at once, and how often they are trained on.
        count: What a rollout counts in the mean of the loss: its tokens, or 1.
        roll_out: How the objective that these rows are for answers them.
    """

    def __init__(
        self,
        rows: Iterable[list[int]],
        source: str,
        pad_id: int,
        cycle: Cycle,
        count: Callable[[Rollout], int],
        roll_out: RollOut,
    ) -> None:
        self.rows, self.source, self.pad_id, self.cycle = pack_prompts(rows), source, pad_id, cycle
        self.count, self.roll_out = count, roll_out
        self.digest = _digest(self.rows)
        self._sampler: Sampler | None = None
        self._key = ""
        self._rollouts: dict[int, list[Rollout]] = {}

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    @property
    def at_hand(self) -> frozenset[int]:
        """Numbers of the rows that have rollouts now."""
        return frozenset(self._rollouts)

    def answer_with(self, sampler: Sampler) -> None:
        """Say who has the policy answer the prompts."""
        self._sampler = sampler

    def sample(self, phase: PhaseKey, key: str, micro_batches: Sequence[Sequence[int]], seed: int) -> None:
        """See :meth:`SampledSet.sample`."""
        if key == self._key:
            return
        if self._sampler is None:
            raise RuntimeError("nobody answers the prompts: call answer_with() first")
        groups = self._sampler(phase, [[self.rows[row] for row in part] for part in micro_batches], seed)
        self._rollouts = {
            row: rollouts
            for part, group in zip(micro_batches, groups, strict=True)
            for row, rollouts in zip(part, group, strict=True)
        }
        self._key = key

    def forget(self) -> None:
        """See :meth:`SampledSet.forget`."""
        self._rollouts, self._key = {}, ""

    def units(self, row: int) -> int:
        """What its rollouts count."""
        return sum(self.count(rollout) for rollout in self._rollouts[row])

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """See :func:`collate_rollouts`; a prompt's rollouts stand side by side. And ``index`` ``(S,)``."""
        numbered = [(row, rollout) for row in rows for rollout in self._rollouts[row]]
        inputs = collate_rollouts([rollout for _, rollout in numbered], self.pad_id)
        return inputs | {"index": torch.tensor([row for row, _ in numbered])}

    def blank(self) -> dict[str, Tensor]:
        """One row without labels."""
        known = next(iter(self._rollouts.values()))[0]
        empty = Rollout(self.rows[0][:2], [], {name: value[:0] for name, value in known.tokens.items()})
        blank = collate_rollouts([empty], self.pad_id) | {name: torch.zeros(0) for name in known.figures}
        return blank | {"index": torch.tensor([-1])}

    def state_dict(self) -> dict[str, Any]:
        """The rollouts at hand."""
        rollouts = {row: [rollout.state() for rollout in group] for row, group in self._rollouts.items()}
        return {"key": self._key, "rollouts": rollouts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved rollouts."""
        self._key = state["key"]
        self._rollouts = {row: [Rollout(**one) for one in group] for row, group in state["rollouts"].items()}


class PromptSet:
    """Held-out prompts.

    Args:
        rows: Ids of the prompts.
        source: Where they come from, for messages.
        pad_id: Fills up short rows.
    """

    def __init__(self, rows: Iterable[list[int]], source: str, pad_id: int) -> None:
        self.rows, self.source, self.pad_id = pack_prompts(rows), source, pad_id
        self.digest = _digest(self.rows)

    def __len__(self) -> int:
        """Number of prompts."""
        return len(self.rows)

    def units(self, row: int) -> int:
        """A prompt counts once."""
        return 1

    def collate(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """``input_ids`` and ``attention_mask`` ``(B, T)``, padded on the left, and ``index`` ``(B,)``."""
        return pad_left([self.rows[row] for row in rows], self.pad_id) | {"index": torch.tensor(rows)}

    def blank(self) -> dict[str, Tensor]:
        """A prompt; held-out rows need no blank ones."""
        return self.collate([0])


def _digest(rows: Iterable[list[int]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for row in rows:
        digest.update(np.array(row, dtype=np.int32).tobytes())
    return digest.hexdigest()
