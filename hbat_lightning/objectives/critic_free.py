"""Learning from rewards without a value function: REINFORCE with a baseline, RLOO and GRPO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.functional import (
    clipped_policy_loss,
    group_advantages,
    kl_k3,
    leave_one_out_advantages,
    whiten,
)
from hbat_lightning.objectives.policy_gradient import PolicyGradientModule
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import Reward
from hbat_lightning.sums import Sums


class REINFORCEModule(PolicyGradientModule):
    """REINFORCE (Williams 1992) with a baseline: every token of a completion has the completion's advantage.

    That is its reward, less ``kl_coefficient`` times its divergence from the reference, less the mean over the cycle's
    completions, in units of their deviation. With several passes the ratio is clipped as in PPO. The loss is a mean over
    tokens. It is what the official Hbat script means to run: PPO without a critic.

    Args:
        reward: Scores completions.
        settings: See :class:`PolicyGradientModule`.
    """

    def __init__(self, reward: Reward, **settings: Any) -> None:
        super().__init__(reward, **settings)

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return f"REINFORCE with a baseline: KL {self.kl_coefficient:g} ({self.kl_estimator}) to {self.reference}"

    def settle_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """The same advantage at every token of a completion."""
        rollouts = [rollout for group in groups for rollout in group]
        _spread(rollouts, whiten(_penalised(self, rollouts)))

    def losses(self, policy: Policy, inputs: dict[str, Tensor], log_probs: Tensor) -> Sums:
        """See :meth:`PolicyGradientModule.losses`."""
        losses = clipped_policy_loss(log_probs, inputs["old_log_probs"], inputs["advantages"], self.clip)
        return {"loss": (losses.sum(), torch.tensor(len(losses), device=losses.device))}


class RLOOModule(PolicyGradientModule):
    """REINFORCE leave-one-out (Ahmadian et al. 2024): the baseline is the mean of the same prompt's other completions.

    A completion is one action: its ratio is that of whole completions, and the loss is a mean over completions.

    Args:
        reward: Scores completions.
        samples: Completions of each prompt, at least 2.
        settings: See :class:`PolicyGradientModule`.
    """

    def __init__(self, reward: Reward, samples: int = 4, **settings: Any) -> None:
        super().__init__(reward, samples=samples, **settings)
        _require_groups(self)

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return f"RLOO: {self.samples} samples, KL {self.kl_coefficient:g} ({self.kl_estimator}) to {self.reference}"

    def count(self, rollout: Rollout) -> int:
        """A completion counts once."""
        return 1

    def settle_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Rewards against the others of their prompt; every token carries its completion's."""
        for group in groups:
            _spread(group, leave_one_out_advantages(_penalised(self, group)))

    def actions(self, inputs: dict[str, Tensor], log_probs: Tensor) -> tuple[Tensor, Tensor]:
        """Whole completions."""
        row, first = _completions(inputs)
        return _row_sums(log_probs, row, len(first)), _row_sums(inputs["old_log_probs"], row, len(first))

    def losses(self, policy: Policy, inputs: dict[str, Tensor], log_probs: Tensor) -> Sums:
        """See :meth:`PolicyGradientModule.losses`."""
        _, first = _completions(inputs)
        losses = clipped_policy_loss(*self.actions(inputs, log_probs), inputs["advantages"][first], self.clip)
        return {"loss": (losses.sum(), torch.tensor(len(losses), device=losses.device))}


class GRPOModule(PolicyGradientModule):
    """Group relative policy optimisation (Shao et al. 2024): rewards against their group's mean and deviation.

    The divergence is no part of the reward but of the loss, by k3 under the policy that trains, with its gradient, as in the
    paper; TRL multiplies it with the ratio unless ``use_bias_correction_kl`` is off. The loss is a mean over tokens, of the
    whole window and not of each completion first, as in DAPO (Yu et al. 2025): long answers are not favoured where they are
    wrong.

    Args:
        reward: Scores completions.
        samples: Completions of each prompt, at least 2.
        scale_rewards: Divide by the group's deviation; ``false`` is Dr. GRPO (Liu et al. 2025).
        kl_coefficient: Weight of the divergence in the loss.
        kl_estimator: ``k3``; with its gradient no other estimator is one of the divergence.
        settings: See :class:`PolicyGradientModule`.
    """

    def __init__(
        self,
        reward: Reward,
        samples: int = 8,
        scale_rewards: bool = True,
        kl_coefficient: float = 0.04,
        kl_estimator: Literal["k1", "k3"] = "k3",
        **settings: Any,
    ) -> None:
        if kl_estimator != "k3":
            raise ValueError(f"kl_estimator must be k3, got {kl_estimator}: GRPO has the divergence in its loss")
        super().__init__(reward, samples=samples, kl_coefficient=kl_coefficient, kl_estimator=kl_estimator, **settings)
        _require_groups(self)
        self.scale_rewards = scale_rewards

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return f"GRPO: {self.samples} samples, KL {self.kl_coefficient:g} (k3, in the loss) to {self.reference}"

    def settle_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Rewards against their group's."""
        for group in groups:
            rewards = torch.tensor([rollout.figures["shaped_reward"] for rollout in group])
            _spread(group, group_advantages(rewards, self.scale_rewards))

    def losses(self, policy: Policy, inputs: dict[str, Tensor], log_probs: Tensor) -> Sums:
        """See :meth:`PolicyGradientModule.losses`."""
        surrogate = clipped_policy_loss(log_probs, inputs["old_log_probs"], inputs["advantages"], self.clip)
        divergence = kl_k3(log_probs, inputs["reference_log_probs"])
        count = torch.tensor(len(log_probs), device=log_probs.device)
        return {
            "loss": ((surrogate + self.kl_coefficient * divergence).sum(), count),
            "divergence": (divergence.sum(), count),
        }


def _require_groups(module: PolicyGradientModule) -> None:
    dynamic = module.dynamic_sampling
    name, least = ("samples", module.samples) if dynamic is None else ("dynamic_sampling.minimum", dynamic.minimum)
    if least < 2:
        raise ValueError(f"{name} must be at least 2, got {least}: a completion is judged against others of its prompt")


def _penalised(module: PolicyGradientModule, rollouts: Sequence[Rollout]) -> Tensor:
    """``(S,)`` rewards less what their divergence costs."""
    return torch.tensor(
        [
            rollout.figures["shaped_reward"] - module.kl_coefficient * float(module.divergence(rollout).sum())
            for rollout in rollouts
        ]
    )


def _spread(rollouts: Sequence[Rollout], advantages: Tensor) -> None:
    """Give every token of a completion the completion's advantage."""
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rollout.tokens["advantages"] = advantage.float().expand(len(rollout.completion)).clone()


def _completions(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For each of N tokens its completion ``(N,)``, and each completion's first token ``(S,)``; empty ones are left out."""
    lengths = (inputs["labels"][:, 1:] >= 0).sum(-1)
    lengths = lengths[lengths > 0]
    row = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    return row, lengths.cumsum(0) - lengths


def _row_sums(values: Tensor, row: Tensor, rows: int) -> Tensor:
    return values.new_zeros(rows).index_add(0, row, values)
