"""What all objectives have in common that learn from sampled completions and their rewards."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hbat_lightning.data.formats import recognise_prompts
from hbat_lightning.data.kinds import RowKind
from hbat_lightning.data.rollouts import (
    Prompts,
    PromptSet,
    Rollout,
    RolloutSet,
    collate_rollouts,
    draft_opening,
    encode_opening,
    fit_opening,
)
from hbat_lightning.data.sets import pad_left
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.functional import kl_k1, kl_k3
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.moments import RunningMoments
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.rewards import Reward
from hbat_lightning.schedules import PREFERENCE
from hbat_lightning.stream import Cycle
from hbat_lightning.sums import Sums

PAD = 0  # masks go by length, so any id will do
_DIVERGENCES = {"k1": kl_k1, "k3": kl_k3}
_DEFAULT_SAMPLING = GenerationSettings(max_new_tokens=128, temperature=1.0)


class RolloutModule(ObjectiveModule):
    """Base of the objectives that sample completions, have them rewarded, and learn from both.

    The stream asks for rollouts when the rows of a cycle come up: so accumulation, clipping, EWC and resume work as for
    data. Everything that a loss needs is settled then, over all rollouts of the cycle, and no split of a window changes it.

    Logged are, besides what a loss adds, means over completions of the ``reward`` (before it is clipped or whitened), the
    ``kl`` to the reference (k1, summed over tokens), ``length`` and the share that ``stopped``; over tokens ``ratio``, new
    to old probability, and ``clipped``, the share whose ratio is beyond the clip; and ``truncation``, how many nats per
    token the log-probabilities of what was really sampled from are above the policy's: 0 without top-k and top-p.
    Held-out prompts are completed greedily; their ``reward``, ``length`` and ``stopped`` are the figures.

    Args:
        reward: Scores completions.
        sampling: How completions are sampled; log-probabilities are those at its temperature.
        samples: Completions of each prompt.
        reference: What the divergence is measured from: ``phase_start``, ``initial`` or ``base``.
        kl_coefficient: How much a nat of divergence costs.
        kl_estimator: ``k1`` or ``k3``, per token.
        clip: How far a ratio may move before its gradient stops.
        reward_clip: Rewards are cut to plus and minus this; ``null`` leaves them.
        whiten_rewards: Bring rewards to mean 0 and deviation 1, by running statistics that go on over phases.
        missing_stop_penalty: Taken off the reward of a completion that did not stop.
        rollout_windows: Windows' worth of prompts that are answered at once.
        passes: How often rollouts are trained on.
        settings: See :class:`ObjectiveModule`.
    """

    slot = PREFERENCE
    dropout = False  # policy and sampler must agree at the same weights, or the first ratio is not 1

    def __init__(
        self,
        reward: Reward,
        sampling: GenerationSettings = _DEFAULT_SAMPLING,
        samples: int = 1,
        reference: Reference = "phase_start",
        kl_coefficient: float = 0.05,
        kl_estimator: Literal["k1", "k3"] = "k1",
        clip: float = 0.2,
        reward_clip: float | None = 10.0,
        whiten_rewards: bool = False,
        missing_stop_penalty: float = 0.0,
        rollout_windows: int = 1,
        passes: int = 1,
        **settings: Any,
    ) -> None:
        if sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be above 0: greedy completions have nothing to learn from")
        if min(samples, rollout_windows, passes) < 1 or clip <= 0 or kl_coefficient < 0:
            raise ValueError(
                "samples, rollout_windows and passes must be at least 1, clip above 0, kl_coefficient not below: got "
                f"{samples}, {rollout_windows}, {passes}, {clip}, {kl_coefficient}"
            )
        super().__init__(**settings)
        self.reward, self.sampling, self.samples, self.reference = reward, sampling, samples, reference
        self.kl_coefficient, self.kl_estimator, self.clip = kl_coefficient, kl_estimator, clip
        self.reward_clip, self.missing_stop_penalty = reward_clip, missing_stop_penalty
        self.cycle = Cycle(rollout_windows, passes)
        self._moments = RunningMoments() if whiten_rewards else None
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

    @property
    def references(self) -> tuple[Reference, ...]:
        """The one that the divergence is measured from."""
        return (self.reference,)

    # ---- parameters and state of its own --------------------------------------------------------------------------

    def build(self, policy: Policy, device: torch.device) -> None:
        """Load the reward."""
        self.reward.build(policy, device)

    def own_parameters(self, policy: Policy) -> Sequence[nn.Parameter]:
        """None; a reward is frozen."""
        return ()

    def state(self) -> dict[str, Any]:
        """The statistics of rewards."""
        return {} if self._moments is None else {"rewards": self._moments.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take them over."""
        if self._moments is not None:
            self._moments.load_state(state["rewards"])

    # ---- rollouts -------------------------------------------------------------------------------------------------

    def roll_out(self, policy: Policy, prompts: Prompts, device: torch.device) -> list[list[list[Rollout]]]:
        """Sample, score, reward, and settle what the loss will need; in evaluation mode and without a graph."""
        groups = [self._sample(policy, part, device) for part in prompts]
        for group in groups:
            self._look(policy, group, device)
        rollouts = [rollout for group in groups for rollout in group]
        self._shape_rewards(rollouts)
        self.settle(rollouts)
        return [
            [group[begin : begin + self.samples] for begin in range(0, len(group), self.samples)] for group in groups
        ]

    def _sample(self, policy: Policy, prompts: Sequence[list[int]], device: torch.device) -> list[Rollout]:
        repeated = [prompt for prompt in prompts for _ in range(self.samples)]
        completions = self._complete(policy, repeated, self.sampling, device)
        return [Rollout(prompt, ids) for prompt, ids in zip(repeated, completions, strict=True)]

    def _complete(
        self, policy: Policy, prompts: Sequence[list[int]], sampling: GenerationSettings, device: torch.device
    ) -> list[list[int]]:
        inputs = {name: value.to(device) for name, value in pad_left(prompts, PAD).items()}
        return policy.generate(inputs["input_ids"], inputs["attention_mask"], sampling, self._stop, PAD)

    def _look(self, policy: Policy, group: Sequence[Rollout], device: torch.device) -> None:
        """What policy and reference say of a micro-batch's completions, and what they are worth.

        In the very batches of the first pass: so old and new log-probabilities are made by the same sums.
        """
        inputs = {name: value.to(device) for name, value in collate_rollouts(group, PAD).items()}
        temperature = self.sampling.temperature
        log_probs = policy.score(inputs, temperature=temperature).log_probs
        reference = policy.score_reference(inputs, self.reference, temperature).log_probs
        tokens = {
            "old_log_probs": log_probs,
            "reference_log_probs": reference,
            "truncation": -policy.truncation_log_mass(inputs, self.sampling),
            **self.judge(policy, inputs),
        }
        lengths = [len(rollout.completion) for rollout in group]
        for name, values in tokens.items():
            for rollout, part in zip(group, torch.split(values.cpu(), lengths), strict=True):
                rollout.tokens[name] = part.clone()
        for rollout, reward in zip(group, self.reward.score(policy, group, device).tolist(), strict=True):
            own = rollout.tokens
            rollout.figures = {
                "reward": reward,
                "kl": float(kl_k1(own["old_log_probs"], own["reference_log_probs"]).sum()),
                "length": float(len(rollout.completion)),
                "stopped": float(rollout.completion[-1] == self._stop),
            }

    def judge(self, policy: Policy, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Further per-token quantities ``(N,)`` of a micro-batch, such as values."""
        return {}

    def _shape_rewards(self, rollouts: Sequence[Rollout]) -> None:
        """The reward that counts, of each completion: clipped, less what is missing, whitened."""
        values = torch.tensor([rollout.figures["reward"] for rollout in rollouts], dtype=torch.float64)
        if self.reward_clip is not None:
            values = values.clamp(-self.reward_clip, self.reward_clip)
        stopped = torch.tensor([rollout.figures["stopped"] for rollout in rollouts], dtype=torch.float64)
        values = values - self.missing_stop_penalty * (1 - stopped)
        if self._moments is not None:
            self._moments.add(values)
            values = self._moments.whiten(values)
        for rollout, value in zip(rollouts, values.tolist(), strict=True):
            rollout.figures["shaped_reward"] = value

    def divergence(self, rollout: Rollout) -> Tensor:
        """``(n,)`` the estimate of the divergence at each token of a completion."""
        estimate = _DIVERGENCES[self.kl_estimator]
        return estimate(rollout.tokens["old_log_probs"], rollout.tokens["reference_log_probs"])

    @abstractmethod
    def settle(self, rollouts: Sequence[Rollout]) -> None:
        """Give every rollout of a cycle its ``advantages`` ``(n,)``, and whatever else the loss needs."""

    # ---- the loss -------------------------------------------------------------------------------------------------

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`."""
        log_probs = policy.score(inputs, temperature=self.sampling.temperature).log_probs
        losses = self.losses(policy, inputs, log_probs)
        ratio = torch.exp(log_probs.detach() - inputs["old_log_probs"])
        outside = (ratio - 1).abs() > self.clip
        tokens = torch.tensor(len(log_probs), device=log_probs.device)
        per_token = {"ratio": ratio, "clipped": outside.float(), "truncation": inputs["truncation"]}
        per_completion = {name: inputs[name] for name in ("reward", "kl", "length", "stopped")}
        completions = torch.tensor(len(inputs["reward"]), device=log_probs.device)
        return (
            losses
            | {name: (value.sum(), tokens) for name, value in per_token.items()}
            | {name: (value.sum(), completions) for name, value in per_completion.items()}
        )

    @abstractmethod
    def losses(self, policy: Policy, inputs: dict[str, Tensor], log_probs: Tensor) -> Sums:
        """The ``loss``, and what it consists of.

        Args:
            policy: The policy.
            inputs: A batch of :func:`~hbat_lightning.data.rollouts.collate_rollouts`.
            log_probs: ``(N,)`` of its completions' tokens, with their graph.
        """

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
        return {name: (value.sum(), torch.tensor(len(value))) for name, value in figures.items()}
