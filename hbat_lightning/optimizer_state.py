"""What becomes of the optimizer's moments when the objective changes."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from hbat_lightning.errors import UserError


def require_restorable(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer whose state a checkpoint would not bring back as it was.

    Of bitsandbytes' optimizers, those with 8-bit states are restored exactly. Paged ones are not: what is loaded is
    resident, so that a resumed run would need more memory than the one that was stopped; and on a CPU they do not page.

    Raises:
        UserError: When the optimizer is a paged one.
    """
    from bitsandbytes.optim.optimizer import Optimizer8bit  # late: it is slow to import

    if isinstance(optimizer, Optimizer8bit) and optimizer.is_paged:
        plain = type(optimizer).__name__.removeprefix("Paged")
        raise UserError(
            f"model.init_args.optimizer: {type(optimizer).__name__} pages its state out, and a checkpoint would bring it back "
            f"resident; use bitsandbytes.optim.{plain}, or bitsandbytes.optim.AdamW8bit for a quarter of the memory"
        )


class OptimizerStateKeeper:
    """Applies one of three policies at a switch.

    The optimizer's own ``load_state_dict`` would also put back old parameter groups, and with them an old learning rate;
    so only its per-parameter state is exchanged.

    Args:
        policy: ``reset`` begins every phase without moments, ``shared`` lets the moments run on, ``per_objective``
            gives each objective back the moments it had at the end of its last phase.
    """

    def __init__(self, policy: Literal["reset", "shared", "per_objective"]) -> None:
        self.policy = policy
        self._idle: dict[str, dict[int, dict[str, Any]]] = {}

    def switch(self, optimizer: torch.optim.Optimizer, leaving: str, entering: str) -> None:
        """Exchange the state.

        Args:
            optimizer: The run's optimizer.
            leaving: The objective whose phase has ended.
            entering: The objective whose phase begins.
        """
        if self.policy == "shared" or leaving == entering:
            return
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self.policy == "per_objective":
            self._idle[leaving] = {n: optimizer.state[p] for n, p in enumerate(parameters) if p in optimizer.state}
        optimizer.state.clear()
        for number, state in self._idle.pop(entering, {}).items():
            optimizer.state[parameters[number]] = {
                # AdamW keeps its step count on the CPU; a restored one must not move to the parameter's device.
                key: value.to(parameters[number].device) if isinstance(value, Tensor) and key != "step" else value
                for key, value in state.items()
            }

    def state_dict(self) -> dict[str, dict[int, dict[str, Any]]]:
        """The moments of objectives that are not training now."""
        return self._idle

    def load_state_dict(self, state: dict[str, dict[int, dict[str, Any]]]) -> None:
        """Take over saved moments, where the policy has a use for them."""
        self._idle = state if self.policy == "per_objective" else {}
