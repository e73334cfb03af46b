"""Modified elastic weight consolidation for alternating objectives."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.callbacks.importance import ImportanceCallback
from hbat_lightning.errors import UserError
from hbat_lightning.functional import add_pull, effective_number, total_norm
from hbat_lightning.importance import Importance, ImportanceWeights, ProportionalWeights, Tensors
from hbat_lightning.switches import PhaseKey


class ElasticWeightConsolidation(ImportanceCallback):
    r"""Holds, while one objective trains, the parameters that the other has just moved (Hbat, arXiv 2406.15178).

    At the start of a phase the parameters are the anchor :math:`\theta^*`, and every trained tensor gets a factor
    :math:`c_n` from its importance to the *other* objective. During the phase the gradient of
    :math:`\sum_n c_n \lVert\theta_n-\theta^*_n\rVert^2`, that is :math:`2c_n(\theta_n-\theta^*_n)`, is added in place, once
    per optimizer step, after accumulation and before clipping: no graph, no second backward pass. (Each factor is a
    scalar per tensor, or a value per element.) The anchor is the policy's phase-start snapshot, the same tensors that
    serve as the reference of DPO.

    The first phase is free: no other objective has trained yet.

    Logs ``ewc/penalty``, ``ewc/effective_tensors`` (how many tensors carry the weights), ``ewc/pull_norm`` and
    ``ewc/task_gradient_norm``.

    Args:
        strength: Strength of the pull. 0 leaves training bit-identical to a run without the callback.
        importance: Measures what the other objective's phases did; drift per tensor when not given.
        weights: Turns importance into factors; proportional when not given.
    """

    def __init__(
        self,
        strength: float = 0.1,
        importance: Importance | None = None,
        weights: ImportanceWeights | None = None,
    ) -> None:
        if strength < 0:
            raise ValueError(f"strength must not be negative, got {strength}")
        super().__init__(importance)
        self.strength = strength
        self.weights = weights or ProportionalWeights()
        self._factors: dict[str, Tensor | float] = {}
        self._effective = 0.0

    @property
    def active(self) -> bool:
        """See :attr:`ImportanceCallback.active`."""
        return self.strength > 0

    def describe(self) -> str:
        """See :meth:`PhaseCallback.describe`."""
        if self.strength == 0:
            return "EWC: switched off (strength 0)"
        parts = f"{type(self.importance).__name__}, {type(self.weights).__name__}"
        return f"Modified EWC: strength {self.strength:g}, {parts}; a pull towards the parameters at the start of each phase"

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def on_switch(self, trainer: Trainer, module: AlignmentModule, ended: PhaseKey | None, begun: PhaseKey) -> None:
        """See :meth:`ImportanceCallback.on_switch`; tells what is held."""
        super().on_switch(trainer, module, ended, begun)
        if self._factors:
            self._warn(module, begun)

    @torch.no_grad()
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Add the pull to the gradients, and log it."""
        module = self.owner(pl_module)
        if self.strength == 0:
            return
        if module.step_left_out:
            module.retire_logged("ewc/")
            return
        values = self.pull(module)
        pl_module.log_dict(
            {f"ewc/{name}": value for name, value in values.items()} | {"ewc/effective_tensors": self._effective},
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )

    # ---- the pull -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pull(self, module: AlignmentModule) -> dict[str, Tensor]:
        """Show the task's gradients to the importance, then add the pull to them; returns what is logged of it."""
        trained = module.policy.trained_parameters()
        gradients = self.observe(trained)
        if not self._factors:
            # The same figures as with a pull: Lightning would go on telling those of an earlier phase.
            norm = total_norm(torch._foreach_norm(list(gradients.values())))
            return {"penalty": torch.zeros(()), "pull_norm": torch.zeros(()), "task_gradient_norm": norm}
        # What has no gradient does not move, so it needs no pull.
        pull = add_pull(gradients, trained, self.anchors(module), self._factors)
        return {"penalty": pull.penalty, "pull_norm": pull.norm, "task_gradient_norm": pull.task_norm}

    # ---- switches -------------------------------------------------------------------------------------------------

    def protect(self, importance: Tensors | None) -> None:
        """Set the factors of the phase in hand."""
        self._factors, self._effective = {}, 0.0
        if importance is None or self.strength == 0:
            return
        factors = self.weights.weights(importance, self.strength)
        mass = torch.stack([factor.double().sum() for factor in factors.values()])
        if not torch.isfinite(mass).all():
            raise UserError(
                f"EWC: the weights that {type(self.weights).__name__} makes of {type(self.importance).__name__} are not "
                "finite: lower the strength, or take another importance"
            )
        self._effective = effective_number(mass)
        if self._effective > 0:
            # Scalars as floats, read once per switch: in every step they would cost a launch or a synchronisation each.
            self._factors = {name: factor if factor.dim() else factor.item() for name, factor in factors.items()}

    def _warn(self, module: AlignmentModule, begun: PhaseKey) -> None:
        steps = next(phase.length for phase in module.plan.phases if phase.index == begun.number)
        where = f"EWC, phase {begun.number} ({begun.objective})"
        count = len(self._factors)
        rank_zero_info(f"{where}: holds {self._effective:.1f} of {count} tensors")
        if count > 1 and self._effective < 1.5:
            rank_zero_warn(
                f"{where}: the weights are saturated, {self._effective:.2f} of {count} tensors are held and the others are "
                "free; use ProportionalWeights, with a larger tau if need be"
            )
        if steps == 1:
            rank_zero_warn(
                f"{where}: a phase of one optimizer step starts and ends at its anchor, where the penalty is zero; "
                "give phases more steps"
            )
