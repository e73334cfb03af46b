"""Freezing what the other objective needs most."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.callbacks.importance import ImportanceCallback
from hbat_lightning.importance import Importance, Tensors
from hbat_lightning.switches import PhaseKey


class ImportanceFreeze(ImportanceCallback):
    """Freezes, while one objective trains, the tensors most important to the other: Hbat-Freeze (arXiv 2406.15178).

    A control for EWC, which pulls on all tensors instead. Frozen tensors lose their gradient after accumulation and before
    clipping, and an optimizer leaves out what has none: no step, no weight decay, no change of its moments. Their
    ``requires_grad`` stays, since PEFT sets it anew whenever adapters are chosen, and since what trains is named by it.
    At the next switch all are free again, and others are chosen. Tensors of importance 0 are never frozen, nor is anything
    in the first phase: no other objective has trained yet.

    Logs ``freeze/tensors``, how many tensors stand still.

    Args:
        fraction: Share of the trained tensors that are frozen.
        importance: Measures what the other objective's phases did; drift per tensor when not given. Of values per element
            the mean counts.
    """

    def __init__(self, fraction: float = 0.2, importance: Importance | None = None) -> None:
        if not 0 < fraction < 1:
            raise ValueError(f"fraction must be between 0 and 1, got {fraction}")
        super().__init__(importance)
        self.fraction = fraction
        self.frozen: tuple[str, ...] = ()

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.switches.PhaseCallback.describe`."""
        share = f"{self.fraction:.0%} of the tensors"
        return f"Freezing: {share} stand still, those most important to the other objective ({type(self.importance).__name__})"

    def on_switch(self, trainer: Trainer, module: AlignmentModule, ended: PhaseKey | None, begun: PhaseKey) -> None:
        """See :meth:`ImportanceCallback.on_switch`; tells how much is frozen."""
        super().on_switch(trainer, module, ended, begun)
        if ended is not None:
            count = len(module.policy.trained_parameters())
            rank_zero_info(
                f"freeze, phase {begun.number} ({begun.objective}): {len(self.frozen)} of {count} tensors stand still"
            )

    def protect(self, importance: Tensors | None) -> None:
        """Choose the tensors that stand still."""
        means = {name: float(value.mean()) for name, value in (importance or {}).items()}
        ranked = sorted(means, key=lambda name: (-means[name], name))
        self.frozen = tuple(name for name in ranked[: round(self.fraction * len(ranked))] if means[name] > 0)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take the gradients of frozen tensors away, and log how many there are."""
        module = self.owner(pl_module)
        if module.step_left_out:
            module.retire_logged("freeze/")
            return
        values = self.pull(module)
        pl_module.log("freeze/tensors", values["tensors"], on_step=True, on_epoch=False, batch_size=1)

    def pull(self, module: AlignmentModule) -> dict[str, Tensor]:
        """See :meth:`ImportanceCallback.pull`: what is frozen has no gradient, so the optimizer leaves it alone."""
        trained = module.policy.trained_parameters()
        self.observe(trained)
        for name in self.frozen:
            trained[name].grad = None
        return {"tensors": torch.tensor(float(len(self.frozen)))}
