"""What all objectives have in common that learn from sampled completions and their rewards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from hbat_lightning.data.formats import recognise_prompts
from hbat_lightning.data.kinds import RowKind
from hbat_lightning.data.length_order import LengthOrder
from hbat_lightning.data.rollouts import (
    Each,
    Prompts,
    PromptSet,
    Rollout,
    RolloutSet,
    draft_opening,
    encode_opening,
    fit_opening,
    one_by_one,
)
from hbat_lightning.data.sets import pad_left
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.generation import GenerationSettings, LogProbRecorder
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.phases import Progress
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import Reward
from hbat_lightning.sampling import DynamicSampling
from hbat_lightning.schedules import PREFERENCE
from hbat_lightning.sums import Sums, of_each
from hbat_lightning.training_data import Cycle

PAD = 0  # masks go by length, so any id will do
_DEFAULT_SAMPLING = GenerationSettings(max_new_tokens=128, temperature=1.0)


class RolloutModule(ObjectiveModule):
    """Base of the objectives that sample completions, have them rewarded, and learn from both.

    The stream asks for rollouts when the rows of a cycle come up: so accumulation, clipping, EWC and resume work as for
    data. Everything that a loss needs is settled then, over all rollouts of the cycle, and no split of a window changes it.
    Completions are sampled without a graph; those that are trained on go through the policy once more, in one pass.

    Logged are, besides what a loss adds, means over completions of the ``reward`` (as it was given), the ``length`` and the
    share that ``stopped``. Held-out prompts are completed greedily and have the same three figures.

    Args:
        reward: Scores completions.
        sampling: How completions are sampled.
        samples: Completions of each prompt.
        dynamic_sampling: Has some prompts get more completions than others, with ``samples`` as the average; logs the
            ``capability`` that it goes by.
        missing_stop_penalty: Taken off the reward of a completion that did not stop.
        rollout_windows: Windows' worth of prompts that are answered at once.
        passes: How often rollouts are trained on.
        settings: See :class:`ObjectiveModule`.
    """

    slot = PREFERENCE
    figures: tuple[str, ...] = ("reward", "length", "stopped")
    """Per-completion values that are logged."""

    def __init__(
        self,
        reward: Reward,
        sampling: GenerationSettings = _DEFAULT_SAMPLING,
        samples: int = 1,
        dynamic_sampling: DynamicSampling | None = None,
        missing_stop_penalty: float = 0.0,
        rollout_windows: int = 1,
        passes: int = 1,
        **settings: Any,
    ) -> None:
        if sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be above 0: greedy completions have nothing to learn from")
        if min(samples, rollout_windows, passes) < 1:
            raise ValueError(
                f"samples, rollout_windows and passes must be at least 1: got {samples}, {rollout_windows}, {passes}"
            )
        if dynamic_sampling is not None:
            dynamic_sampling.require(samples)
        super().__init__(**settings)
        if dynamic_sampling is not None:
            self.figures = (*self.figures, "capability")
        self.dynamic_sampling = dynamic_sampling
        self.reward, self.sampling, self.samples = reward, sampling, samples
        self.missing_stop_penalty = missing_stop_penalty
        self.rollout_windows, self.passes = rollout_windows, passes
        self.cycle = Cycle(rollout_windows, passes)
        self._stop = -1

    # ---- data -----------------------------------------------------------------------------------------------------

    @cached_property
    def rows(self) -> RowKind:  # type: ignore[override]
        """Prompts, from any format; the answers in the data are not looked at."""
        return RowKind(
            "prompts",
            recognise_prompts,
            self._encode,
            self._collect,
            held_out=PromptSet,
            answered=False,
            draft=lambda encoder, row: draft_opening(encoder, row, self.sampling.max_new_tokens),
            fit=fit_opening,
        )

    def _encode(self, encoder: Encoder, row: Any) -> list[int] | None:
        self._stop = encoder.stop_token_id
        return encode_opening(encoder, row, self.sampling.max_new_tokens)

    def _collect(self, rows: Iterable[list[int]], source: str, pad_id: int) -> RolloutSet:
        return RolloutSet(rows, source, pad_id, self.cycle, self.count, self.roll_out)

    def count(self, rollout: Rollout) -> int:
        """What a completion counts in the mean of the loss: its tokens."""
        return len(rollout.completion)

    def build(self, policy: Policy, device: torch.device) -> None:
        """Load the reward."""
        self.reward.build(policy, device)

    def identity(self) -> dict[str, tuple[str, str]]:
        """The reward."""
        return {"reward": self.reward.identity()}

    def held_out_scale(self, figure: str) -> str:
        """The reward, and how long greedy completions may be."""
        return f"{self.reward.identity()[0]}, up to {self.sampling.max_new_tokens} tokens"

    # ---- rollouts -------------------------------------------------------------------------------------------------

    def roll_out(
        self, policy: Policy, prompts: Prompts, device: torch.device, each: Each = one_by_one
    ) -> list[list[list[Rollout]]]:
        """Sample, reward, and settle what the loss will need; in evaluation mode and without a graph.

        Micro-batches may be answered by several processes; what is settled, is over all of them.
        """
        parts = self._answer(policy, prompts, device, each)
        parts = [[self.keep(completions) for completions in part] for part in parts]
        parts = each(lambda part: self._looked_at(policy, part, device), parts)
        self.settle([completions for part in parts for completions in part])
        return parts

    def _answer(self, policy: Policy, prompts: Prompts, device: torch.device, each: Each) -> list[list[list[Rollout]]]:
        """Rewarded completions of all prompts of a cycle, those of like lengths sampled together."""
        dynamic, order = self.dynamic_sampling, LengthOrder(prompts)
        first = self.samples if dynamic is None else dynamic.minimum
        alike = order.apply(prompts)
        sampled = each(lambda part: self._sample(policy, part, [first] * len(part), device), alike)
        parts = order.undo(sampled)
        if dynamic is None:
            return parts
        capabilities = each(lambda part: dynamic.capability.of(policy, part, self.sampling, device), sampled)
        known = list(chain.from_iterable(order.undo(capabilities)))
        further = iter([count - first for count in dynamic.counts(known, self.samples)])
        counts = order.apply([list(islice(further, len(part))) for part in prompts])
        work = list(zip(alike, counts, strict=True))
        added = order.undo(each(lambda own: self._sample(policy, own[0], own[1], device), work))
        completed = zip(chain.from_iterable(parts), chain.from_iterable(added), known, strict=True)
        for completions, more, value in completed:
            completions += more
            for rollout in completions:
                rollout.figures["capability"] = value
        return parts

    def _looked_at(self, policy: Policy, part: list[list[Rollout]], device: torch.device) -> list[list[Rollout]]:
        self.look(policy, [rollout for completions in part for rollout in completions], device)
        return part

    def _sample(
        self, policy: Policy, prompts: Sequence[list[int]], counts: Sequence[int], device: torch.device
    ) -> list[list[Rollout]]:
        """Rewarded completions of each prompt of a micro-batch, as many as its count says."""
        repeated = [prompt for prompt, count in zip(prompts, counts, strict=True) for _ in range(count)]
        if not repeated:
            return [[] for _ in prompts]
        rollouts = self.draw(policy, repeated, device)
        for rollout, reward in zip(rollouts, self.reward.score(policy, rollouts, device).tolist(), strict=True):
            stopped = float(rollout.completion[-1] == self._stop)
            rollout.figures = {"reward": reward, "length": float(len(rollout.completion)), "stopped": stopped}
        rest = iter(rollouts)
        return [[next(rest) for _ in range(count)] for count in counts]

    def draw(self, policy: Policy, prompts: Sequence[list[int]], device: torch.device) -> list[Rollout]:
        """A completion of each prompt."""
        completions = self._complete(policy, prompts, self.sampling, device)
        return [Rollout(prompt, ids) for prompt, ids in zip(prompts, completions, strict=True)]

    def _complete(
        self,
        policy: Policy,
        prompts: Sequence[list[int]],
        sampling: GenerationSettings,
        device: torch.device,
        recorder: LogProbRecorder | None = None,
    ) -> list[list[int]]:
        inputs = {name: value.to(device) for name, value in pad_left(prompts, PAD).items()}
        return policy.generate(inputs["input_ids"], inputs["attention_mask"], sampling, self._stop, PAD, recorder)

    def keep(self, completions: list[Rollout]) -> list[Rollout]:
        """Those of a prompt's completions that are trained on: all."""
        return completions

    def look(self, policy: Policy, part: Sequence[Rollout], device: torch.device) -> None:
        """Add what the policy says of a micro-batch's completions: nothing, unless the loss compares with it."""

    def settle(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Give the rollouts of a cycle, by prompt, what the loss needs of all of them together: nothing."""

    # ---- figures --------------------------------------------------------------------------------------------------

    def figure_sums(self, inputs: dict[str, Tensor]) -> Sums:
        """Sums of the per-completion figures of a micro-batch."""
        count = torch.tensor(len(inputs["reward"]), device=inputs["reward"].device)
        return {name: (inputs[name].sum(), count) for name in self.figures}

    def progress(self, means: Mapping[str, float]) -> Progress:
        """The mean reward: the loss is 0 on average where a baseline is well chosen, however good the policy is."""
        return Progress(means["reward"], rising=True)

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Rewards of greedy completions of held-out prompts."""
        ids, mask, device = inputs["input_ids"], inputs["attention_mask"].bool(), inputs["input_ids"].device
        prompts = [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)]
        greedy = GenerationSettings(max_new_tokens=self.sampling.max_new_tokens)
        completions = self._complete(policy, prompts, greedy, device)
        rollouts = [Rollout(prompt, answer) for prompt, answer in zip(prompts, completions, strict=True)]
        figures = {
            "reward": self.reward.score(policy, rollouts, device),
            "length": torch.tensor([float(len(answer)) for answer in completions]),
            "stopped": torch.tensor([float(answer[-1] == self._stop) for answer in completions]),
        }
        return of_each(figures)
