"""Reward models: a number for each answer, learnt from pairs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hbat_lightning.classifier import ClassifierPolicy
from hbat_lightning.completions import Completed
from hbat_lightning.data.kinds import PAIRS
from hbat_lightning.data.sets import PromptBatch
from hbat_lightning.errors import UserError
from hbat_lightning.functional import bradley_terry_loss, preference_calibration
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import HEAD_FILE
from hbat_lightning.scalars import apply_head, last_positions, make_head
from hbat_lightning.schedules import PREFERENCE
from hbat_lightning.scoring import IGNORE
from hbat_lightning.sums import Sums, of_all, of_each


class BradleyTerryModule(ObjectiveModule):
    """Base of the reward models: a mean over the window's pairs of :func:`~hbat_lightning.functional.bradley_terry_loss`.

    Margins are those of the data, 0 where there are none. Logged are the means over pairs of the ``loss``; of the rewards
    (``chosen_reward``, ``rejected_reward``, and ``margin``, their difference); ``accuracy``, the share of pairs whose chosen
    answer has the higher reward, ties counting half; and for calibration ``confidence`` and ``brier``
    (:func:`~hbat_lightning.functional.preference_calibration`): a confidence above the accuracy is more than the model
    knows. Held-out pairs have the same figures.

    Args:
        settings: See :class:`ObjectiveModule`.
    """

    slot = PREFERENCE
    rows = PAIRS
    dropout = False  # noise of its own in each answer would drown small differences between them

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @abstractmethod
    def rewards(self, policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
        """Of every row of a batch, ``(2B,)`` fp32."""

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`. Pairs without a supervised token count for nothing."""
        return of_all(self._values(policy, inputs))

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """The same of held-out pairs, each for itself."""
        return of_each(self._values(policy, inputs))

    def _values(self, policy: Policy, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is logged, of each pair."""
        real = (inputs["labels"] != IGNORE).any(-1).view(2, -1).any(0)
        chosen, rejected = self.rewards(policy, inputs).view(2, -1)[:, real]
        losses = bradley_terry_loss(chosen, rejected, inputs["margin"][real])
        chosen, rejected = chosen.detach(), rejected.detach()
        confidence, brier = preference_calibration(chosen, rejected)
        return {
            "loss": losses,
            "accuracy": (chosen > rejected) + 0.5 * (chosen == rejected),
            "chosen_reward": chosen,
            "rejected_reward": rejected,
            "margin": chosen - rejected,
            "confidence": confidence,
            "brier": brier,
        }

    def complete(self, batch: PromptBatch) -> list[Completed]:
        """Refuse: what has learnt to judge answers has not learnt to write them.

        Raises:
            UserError: Always.
        """
        raise UserError("a reward model does not complete prompts: hbat validate has its held-out figures")


class RewardModule(BradleyTerryModule):
    """A reward model on the policy's base: the policy's adapter, and a linear map to one number.

    The reward of an answer is what the map makes of the last hidden state before the output layer, at the answer's last
    token. It begins as a map to 0, so that the first loss is ln 2 where there are no margins. ``adapter/`` gets the map in
    ``reward_head.safetensors`` beside the adapter, and is what :class:`~hbat_lightning.rewards.AdapterReward` takes.

    Args:
        settings: See :class:`ObjectiveModule`.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.head: nn.Linear | None = None

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return "reward model (Bradley-Terry): a scalar head on the policy's base"

    def build(self, policy: Policy, device: torch.device) -> None:
        """Make the head. Idempotent."""
        if self.head is None:
            self.head = make_head(policy, device)
            # A constant cancels in every pair: its gradient is rounding alone, which Adam would scale up to steps.
            self.head.bias.requires_grad_(False)

    def own_parameters(self, policy: Policy) -> Sequence[nn.Parameter]:
        """The head's."""
        return [parameter for parameter in self._head.parameters() if parameter.requires_grad]

    def rewards(self, policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
        """See :meth:`BradleyTerryModule.rewards`."""
        return apply_head(self._head, policy.hidden(inputs, *last_positions(inputs)))

    def export(self, folder: Path) -> list[str]:
        """See :meth:`ObjectiveModule.export`."""
        save_file({name: value.detach().cpu() for name, value in self._head.state_dict().items()}, folder / HEAD_FILE)
        return [
            f"Reward model: {HEAD_FILE} maps the hidden state of an answer's last token, before the output layer, to its "
            "reward; hbat_lightning.rewards.AdapterReward loads both"
        ]

    @property
    def _head(self) -> nn.Linear:
        assert self.head is not None, "build() comes first"
        return self.head


class ClassifierRewardModule(BradleyTerryModule):
    """A reward model that is a sequence classifier of transformers with a single output, trained fully or by LoRA.

    The reward is the classifier's logit. The result is one that plain transformers (or PEFT) loads, and that
    :class:`~hbat_lightning.rewards.ClassifierReward` takes.

    Args:
        policy: The classifier.
        settings: See :class:`ObjectiveModule`.
    """

    def __init__(self, policy: ClassifierPolicy | None = None, **settings: Any) -> None:
        super().__init__(policy=policy, **settings)

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return "reward model (Bradley-Terry): a sequence classifier"

    def rewards(self, policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
        """See :meth:`BradleyTerryModule.rewards`."""
        return cast(ClassifierPolicy, policy).classify(inputs)
