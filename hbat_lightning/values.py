"""Value functions: what a completion is expected to earn from each of its tokens on."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from hbat_lightning.adapters import LoraSettings
from hbat_lightning.checkpoint_state import require_identity
from hbat_lightning.errors import UserError
from hbat_lightning.policy import Policy
from hbat_lightning.scalars import ScalarAdapter, apply_head, make_head

_DEFAULT_LORA = LoraSettings()


class Value(nn.Module):
    """A number for each position of a batch. It trains, in the phases of its objective only."""

    @abstractmethod
    def build(self, policy: Policy, device: torch.device) -> None:
        """Make what it consists of; the policy has its weights. Idempotent."""

    @abstractmethod
    def parameters_of(self, policy: Policy) -> list[nn.Parameter]:
        """What trains."""

    @abstractmethod
    def forward(self, policy: Policy, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        """Values at N positions of a batch.

        Args:
            policy: The policy whose completions they are.
            inputs: ``input_ids`` and ``attention_mask``, each ``(B, T)``.
            row: ``(N,)`` rows of the positions.
            column: ``(N,)`` their columns.

        Returns:
            ``(N,)`` fp32.
        """

    def state(self) -> dict[str, Any]:
        """What a checkpoint of it only fits on, in plain types; nothing that the policy does not say already."""
        return {}

    def require_state(self, state: dict[str, Any]) -> None:
        """Refuse a checkpoint that does not fit."""


class AdapterValue(ScalarAdapter, Value):
    """An adapter of its own on the policy's base, and a scalar head: no second model. The policy must train by LoRA.

    Args:
        lora: Settings of the adapter.
    """

    def __init__(self, lora: LoraSettings = _DEFAULT_LORA) -> None:
        super().__init__("value", lora)


class ModelValue(Value):
    """A model of its own, and a scalar head: for another base than the policy's, or beside a full fine-tune.

    It reads the policy's tokens, so both models must have one vocabulary. It trains without dropout, since values are
    compared with earlier ones, and checkpoints hold what trains of it.

    Args:
        model: The language model whose last hidden states are mapped to values: trained fully, by LoRA, or on a quantised base.
    """

    def __init__(self, model: Policy) -> None:
        super().__init__()
        if model.task != Policy.task:
            raise ValueError(f"value.model: a {type(model).__name__} has no hidden state for each token; give a Policy")
        self.model = model
        self.head: nn.Linear | None = None

    def build(self, policy: Policy, device: torch.device) -> None:
        """See :meth:`Value.build`.

        Raises:
            UserError: When the model cannot be built, or has other tokens than the policy.
        """
        if self.head is not None:
            return
        if self.model.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise UserError(
                f"the value function's {self.model.spec.name} has another vocabulary than {policy.spec.name}: give a model of "
                "the same family as value.init_args.model"
            )
        self.model.build(device)
        self.head = make_head(self.model, device)

    def parameters_of(self, policy: Policy) -> list[nn.Parameter]:
        """See :meth:`Value.parameters_of`."""
        return [*self.model.trained_parameters().values(), *self._head.parameters()]

    def forward(self, policy: Policy, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        """See :meth:`Value.forward`."""
        if self.model.training:  # Lightning puts all of a module into training mode
            self.model.eval()
            self.model.set_training(dropout=False)
        return apply_head(self._head, self.model.hidden(inputs, row, column))

    def state(self) -> dict[str, Any]:
        """See :meth:`Value.state`."""
        return self.model.identity()

    def require_state(self, state: dict[str, Any]) -> None:
        """See :meth:`Value.require_state`.

        Raises:
            UserError: When the checkpoint is of another model.
        """
        require_identity(state, self.model, "the checkpoint's value function")

    @property
    def _head(self) -> nn.Linear:
        assert self.head is not None, "build() comes first"
        return self.head
