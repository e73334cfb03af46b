"""Numbers from a language model's hidden states: value functions and rewards."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hbat_lightning.adapters import LoraSettings
from hbat_lightning.policy import Policy


class ScalarAdapter(nn.Module):
    """An adapter of its own on the policy's base, and a linear map of its hidden states to one number each.

    The base is shared, so that a value function or a reward costs an adapter, and no second model.

    Args:
        name: Name of the adapter.
        lora: Its settings.
        folder: A PEFT folder whose adapter it takes and keeps as it is; a new one trains.
    """

    def __init__(self, name: str, lora: LoraSettings, folder: str | None = None) -> None:
        super().__init__()
        self.name, self.lora, self.folder = name, lora, folder
        self.head: nn.Linear | None = None

    def build(self, policy: Policy, device: torch.device) -> None:
        """Add the adapter, and a head of zeros: everything is worth nothing until there is a reason. Idempotent."""
        if self.head is None:
            policy.add_adapter(self.name, self.lora, self.folder)
            self.head = make_head(policy, device)

    def parameters_of(self, policy: Policy) -> list[nn.Parameter]:
        """What trains: the adapter's, if it is a new one, and the head's."""
        return [*policy.adapter_parameters(self.name).values(), *self.parameters()]

    def forward(self, policy: Policy, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        """A number for each of N positions of a batch, in fp32.

        Args:
            policy: Whose base it is on.
            inputs: ``input_ids`` and ``attention_mask``, each ``(B, T)``.
            row: ``(N,)`` rows of the positions.
            column: ``(N,)`` their columns.

        Returns:
            ``(N,)``.
        """
        assert self.head is not None, "build() comes first"
        return apply_head(self.head, policy.hidden(inputs, row, column, self.name))


def make_head(policy: Policy, device: torch.device) -> nn.Linear:
    """A linear map from hidden states to one number, all zeros, in fp32."""
    head = nn.Linear(policy.hidden_size, 1, device=device, dtype=torch.float32)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def apply_head(head: nn.Linear, hidden: Tensor) -> Tensor:
    """``(N, H)`` -> ``(N,)`` in fp32, also under autocast: a reward in eight bits of mantissa has few values."""
    with torch.autocast(hidden.device.type, enabled=False):
        values: Tensor = head(hidden.float()).squeeze(-1)
    return values


def last_positions(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Row and column, each ``(B,)``, of the last token of every row of a batch, whatever the padding."""
    mask = inputs["attention_mask"]
    column = mask.shape[1] - 1 - mask.flip(-1).argmax(-1)
    return torch.arange(len(mask), device=mask.device), column
