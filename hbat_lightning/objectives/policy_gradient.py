"""What the objectives have in common that follow the policy gradient: old log-probabilities, a reference, advantages."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.functional import kl_k1, kl_k3
from hbat_lightning.generation import LogProbRecorder
from hbat_lightning.moments import RunningMoments
from hbat_lightning.objectives.rollout import PAD, RolloutModule
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.rewards import Reward
from hbat_lightning.sums import Sums

_DIVERGENCES = {"k1": kl_k1, "k3": kl_k3}


class PolicyGradientModule(RolloutModule):
    """Base of the objectives whose loss weighs the ratio of new to old probability with an advantage.

    Logged are, besides what :class:`RolloutModule` and a loss log, over completions the mean of the ``kl`` to the reference
    (k1, summed over tokens) and ``reward_clipped``, the share whose reward was cut; over actions (tokens, with RLOO
    completions) ``ratio``, new to old probability, and ``clipped``, the share whose ratio is beyond the clip; and over tokens
    ``truncation``, how many nats the log-probabilities of what was really sampled from are above the policy's: 0 without
    top-k and top-p; and ``sampler_gap``, how many nats these are on average off those that the sampler itself had, whose
    cached passes over padded prompts add up in another order.

    Args:
        reward: Scores completions.
        reference: What the divergence is measured from: ``phase_start``, ``initial`` or ``base``.
        kl_coefficient: How much a nat of divergence costs.
        kl_estimator: ``k1`` or ``k3``, per token.
        clip: How far a ratio may move before its gradient stops.
        reward_clip: Rewards are cut to plus and minus this; ``null`` leaves them.
        whiten_rewards: Bring rewards to mean 0 and deviation 1, by running statistics that go on over phases.
        settings: See :class:`RolloutModule`; log-probabilities are those at the temperature of ``sampling``.
    """

    dropout = False  # policy and sampler must agree at the same weights, or the first ratio is not 1
    figures = (*RolloutModule.figures, "kl", "reward_clipped")

    def __init__(
        self,
        reward: Reward,
        reference: Reference = "phase_start",
        kl_coefficient: float = 0.05,
        kl_estimator: Literal["k1", "k3"] = "k1",
        clip: float = 0.2,
        reward_clip: float | None = 10.0,
        whiten_rewards: bool = False,
        **settings: Any,
    ) -> None:
        if clip <= 0 or kl_coefficient < 0:
            raise ValueError(f"clip must be above 0, kl_coefficient not below: got {clip}, {kl_coefficient}")
        super().__init__(reward, **settings)
        self.reference, self.kl_coefficient, self.kl_estimator = reference, kl_coefficient, kl_estimator
        self.clip, self.reward_clip, self.whiten_rewards = clip, reward_clip, whiten_rewards
        self._moments = RunningMoments() if whiten_rewards else None

    @property
    def references(self) -> tuple[Reference, ...]:
        """The one that the divergence is measured from."""
        return (self.reference,)

    def state(self) -> dict[str, Any]:
        """The statistics of rewards."""
        return {} if self._moments is None else {"rewards": self._moments.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take them over."""
        if self._moments is not None:
            self._moments.load_state(state["rewards"])

    # ---- rollouts -------------------------------------------------------------------------------------------------

    def draw(self, policy: Policy, prompts: Sequence[list[int]], device: torch.device) -> list[Rollout]:
        """See :meth:`RolloutModule.draw`; with what the sampler thought of its tokens."""
        recorder = LogProbRecorder(self.sampling.temperature)
        completions = self._complete(policy, prompts, self.sampling, device, recorder)
        return [
            Rollout(prompt, ids, {"sampler_log_probs": log_probs})
            for prompt, ids, log_probs in zip(prompts, completions, recorder.log_probs, strict=True)
        ]

    def look(self, policy: Policy, part: Sequence[Rollout], device: torch.device) -> None:
        """What policy and reference say of a micro-batch's completions.

        In the very batches of the first pass: so old and new log-probabilities are made by the same sums.
        """
        inputs = collate_rollouts([Rollout(one.prompt, one.completion) for one in part], PAD)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        temperature = self.sampling.temperature
        log_probs = policy.score(inputs, temperature=temperature).log_probs
        reference = policy.score_reference(inputs, self.reference, temperature).log_probs
        tokens = {
            "old_log_probs": log_probs,
            "reference_log_probs": reference,
            "truncation": -policy.truncation_log_mass(inputs, self.sampling),
            **self.judge(policy, inputs),
        }
        lengths = [len(rollout.completion) for rollout in part]
        for name, values in tokens.items():
            for rollout, own in zip(part, torch.split(values.cpu(), lengths), strict=True):
                rollout.tokens[name] = own.clone()
        for rollout in part:
            gap = rollout.tokens["old_log_probs"] - rollout.tokens.pop("sampler_log_probs")
            rollout.tokens["sampler_gap"] = gap.abs()
            own = kl_k1(rollout.tokens["old_log_probs"], rollout.tokens["reference_log_probs"])
            rollout.figures["kl"] = float(own.sum())

    def judge(self, policy: Policy, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Further per-token quantities ``(N,)`` of a micro-batch, such as values."""
        return {}

    def settle(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Rewards as they count, then advantages."""
        self._shape_rewards([rollout for group in groups for rollout in group])
        self.settle_advantages(groups)

    def _shape_rewards(self, rollouts: Sequence[Rollout]) -> None:
        """The reward that counts, of each completion: clipped, less what is missing, whitened."""
        values = torch.tensor([rollout.figures["reward"] for rollout in rollouts], dtype=torch.float64)
        limit = math.inf if self.reward_clip is None else self.reward_clip
        clipped = values.abs() > limit
        values = values.clamp(-limit, limit)
        stopped = torch.tensor([rollout.figures["stopped"] for rollout in rollouts], dtype=torch.float64)
        values = values - self.missing_stop_penalty * (1 - stopped)
        if self._moments is not None:
            self._moments.add(values)
            values = self._moments.whiten(values)
        for rollout, value, cut in zip(rollouts, values.tolist(), clipped.tolist(), strict=True):
            rollout.figures |= {"shaped_reward": value, "reward_clipped": float(cut)}

    def divergence(self, rollout: Rollout) -> Tensor:
        """``(n,)`` the estimate of the divergence at each token of a completion."""
        estimate = _DIVERGENCES[self.kl_estimator]
        return estimate(rollout.tokens["old_log_probs"], rollout.tokens["reference_log_probs"])

    @abstractmethod
    def settle_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Give every rollout of a cycle its ``advantages`` ``(n,)``, and whatever else the loss needs.

        Args:
            groups: The completions of every prompt.
        """

    # ---- the loss -------------------------------------------------------------------------------------------------

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`."""
        log_probs = policy.score(inputs, temperature=self.sampling.temperature).log_probs
        losses = self.losses(policy, inputs, log_probs)
        new, old = self.actions(inputs, log_probs.detach())
        ratio = torch.exp(new - old)
        outside = (ratio - 1).abs() > self.clip
        means = {"ratio": ratio, "clipped": outside.float()}
        means |= {name: inputs[name] for name in ("truncation", "sampler_gap")}
        counted = {name: (value.sum(), torch.tensor(len(value), device=value.device)) for name, value in means.items()}
        return losses | counted | self.figure_sums(inputs)

    def actions(self, inputs: dict[str, Tensor], log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """New and old log-probabilities of what the loss takes for one action each: tokens."""
        return log_probs, inputs["old_log_probs"]

    @abstractmethod
    def losses(self, policy: Policy, inputs: dict[str, Tensor], log_probs: Tensor) -> Sums:
        """The ``loss``, and what it consists of.

        Args:
            policy: The policy.
            inputs: A batch of :func:`~hbat_lightning.data.rollouts.collate_rollouts`.
            log_probs: ``(N,)`` of its completions' tokens, with their graph.
        """
