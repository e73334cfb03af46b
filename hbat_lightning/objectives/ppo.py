"""Proximal policy optimisation, with a value function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.functional import clipped_policy_loss, clipped_value_loss, gae, whiten
from hbat_lightning.objectives.policy_gradient import PolicyGradientModule
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import Reward
from hbat_lightning.scoring import predicting
from hbat_lightning.sums import Sums
from hbat_lightning.values import AdapterValue, Value


class PPOModule(PolicyGradientModule):
    """Preference training by PPO (Schulman et al. 2017) with generalised advantages, as in InstructGPT.

    Each token costs ``kl_coefficient`` times its divergence from the reference, and the last one earns the reward. A value
    function says what is to be expected; advantages are estimated from both
    (:func:`~hbat_lightning.functional.gae`) and whitened over the tokens of a cycle. The loss is a mean over tokens of the
    clipped surrogate plus ``value_coefficient`` times the clipped value loss.

    Args:
        reward: Scores completions.
        value: The value function; on an adapter of its own on the policy's base when not given.
        value_coefficient: Weight of the value loss.
        value_clip: How far a value may move from what it was when the completion was sampled.
        gamma: Discount per token.
        lam: How far returns are trusted over values.
        passes: How often rollouts are trained on.
        settings: See :class:`PolicyGradientModule`.
    """

    def __init__(
        self,
        reward: Reward,
        value: Value | None = None,
        value_coefficient: float = 0.1,
        value_clip: float = 0.2,
        gamma: float = 1.0,
        lam: float = 0.95,
        passes: int = 4,
        **settings: Any,
    ) -> None:
        if not (0 <= gamma <= 1 and 0 <= lam <= 1 and value_clip > 0 and value_coefficient >= 0):
            raise ValueError(
                f"gamma and lam must be in [0, 1], value_clip above 0, value_coefficient not below: got {gamma}, {lam}, "
                f"{value_clip}, {value_coefficient}"
            )
        super().__init__(reward, passes=passes, **settings)
        self.value = value or AdapterValue()
        self.value_coefficient, self.value_clip, self.gamma, self.lam = value_coefficient, value_clip, gamma, lam

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return (
            f"PPO: KL {self.kl_coefficient:g} ({self.kl_estimator}) to {self.reference}, clip {self.clip:g}, "
            f"{self.cycle.passes} passes, gamma {self.gamma:g}, lambda {self.lam:g}"
        )

    def build(self, policy: Policy, device: torch.device) -> None:
        """Load the reward, make the value function."""
        super().build(policy, device)
        self.value.build(policy, device)

    def own_parameters(self, policy: Policy) -> Sequence[nn.Parameter]:
        """The value function's."""
        return self.value.parameters_of(policy)

    def state(self) -> dict[str, Any]:
        """Also what the value function is made of."""
        return super().state() | {"value": self.value.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """See :meth:`ObjectiveModule.load_state`."""
        super().load_state(state)
        self.value.require_state(state["value"])

    def judge(self, policy: Policy, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The value before each token."""
        return {"old_values": self._values(policy, inputs)}

    def _values(self, policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
        values: Tensor = self.value(policy, inputs, *predicting(inputs["labels"]))
        return values

    def settle_advantages(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Advantages and returns, over all completions of a cycle."""
        rollouts = [rollout for group in groups for rollout in group]
        rewards = []
        for rollout in rollouts:
            reward = -self.kl_coefficient * self.divergence(rollout)
            reward[-1] += rollout.figures["shaped_reward"]
            rewards.append(reward)
        values = [rollout.tokens["old_values"] for rollout in rollouts]
        mask = pad_sequence([torch.ones_like(value, dtype=torch.bool) for value in values], batch_first=True)
        earned, expected = (pad_sequence(part, batch_first=True) for part in (rewards, values))
        advantages, returns = gae(earned, expected, mask, self.gamma, self.lam)
        advantages = whiten(advantages, mask)
        for number, rollout in enumerate(rollouts):
            length = len(rollout.completion)
            rollout.tokens |= {"advantages": advantages[number, :length], "returns": returns[number, :length]}

    def losses(self, policy: Policy, inputs: dict[str, Tensor], log_probs: Tensor) -> Sums:
        """See :meth:`PolicyGradientModule.losses`."""
        surrogate = clipped_policy_loss(log_probs, inputs["old_log_probs"], inputs["advantages"], self.clip)
        values = self._values(policy, inputs)
        value = clipped_value_loss(values, inputs["old_values"], inputs["returns"], self.value_clip)
        count = torch.tensor(len(log_probs), device=log_probs.device)
        return {
            "loss": ((surrogate + self.value_coefficient * value).sum(), count),
            "policy_loss": (surrogate.sum(), count),
            "value_loss": (value.sum(), count),
        }
