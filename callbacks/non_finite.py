"""What happens to a step whose loss or gradient is not finite."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.provenance import RowPlaces
from hbat_lightning.errors import UserError
from hbat_lightning.files import append_text, replace_text, whole_lines
from hbat_lightning.privacy import without_keys
from hbat_lightning.trainer_checks import is_dry_run, scaler_of
from hbat_lightning.training_data import MicroBatch

FILE = "nonfinite.jsonl"


class NonFiniteGuard(Callback):
    """Keeps a step away from the weights whose loss or gradient is infinite or no number, and names what was in it.

    Losses of all micro-batches and the norm of every tensor's gradient are looked at together, once per optimizer step,
    before any other callback sees the gradients, whatever the order of callbacks: so no importance is fed by such a step.
    ``nonfinite.jsonl`` in the run folder gets a line per step, with the rows' files, numbers, ids and labels, the losses,
    the tensors and the learning rate.

    In fp16 (``16-mixed``) infinite gradients are part of finding the scale, and the scaler leaves such steps out by
    itself; they count here only where the scale has come down to 1, or where a loss is not finite.

    Args:
        action: ``stop`` ends the run with a line that names the rows. ``skip`` leaves the optimizer step out: weights and
            moments stay as they are to the last bit, while steps and learning rates are counted on.
        limit: So many steps left out in a row end the run all the same.
    """

    def __init__(self, action: Literal["stop", "skip"] = "stop", limit: int = 10) -> None:
        if limit < 1:
            raise ValueError(f"limit must be at least 1, got {limit}")
        self.action, self.limit = action, limit
        self._in_a_row = 0
        self._batches: list[MicroBatch] = []
        self._losses: list[Tensor] = []

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier run; a checkpoint is loaded after this."""
        if stage == "fit":
            self._in_a_row, self._batches, self._losses = 0, [], []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the lines of an earlier run, or in a resumed one those of steps that will be done again."""
        path = self.path(trainer)
        if is_dry_run(trainer) or not path.exists():
            return
        kept = [line + "\n" for line in whole_lines(path) if json.loads(line)["step"] < trainer.global_step]
        replace_text(path, "".join(kept))
        if not kept:
            path.unlink()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note what the window holds."""
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note the micro-batch's loss, without waiting for it."""
        self._losses.append(loss.detach().float())

    @torch.no_grad()
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of a window, look at it."""
        if not isinstance(pl_module, AlignmentModule) or not self._batches[-1].last:
            return
        window = _Window(trainer, pl_module, self._batches, self._losses)
        self._batches, self._losses = [], []
        # One look for all ranks: they share the gradient, but each has its own rows.
        if not trainer.strategy.reduce_boolean_decision(not window.finite, all=False):
            self._in_a_row = 0
        elif window.left_to_scaler:
            pl_module.leave_step_out()
        else:
            self._act(trainer, pl_module, window)

    def state_dict(self) -> dict[str, Any]:
        """How many steps in a row have been left out."""
        return {"in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._in_a_row = state_dict["in_a_row"]

    # ---- what is done ---------------------------------------------------------------------------------------------

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """Where the lines go; every further rank has a file of its own."""
        rank = trainer.global_rank
        return Path(trainer.default_root_dir) / (f"rank{rank}.{FILE}" if rank else FILE)

    def _act(self, trainer: Trainer, module: AlignmentModule, window: _Window) -> None:
        self._in_a_row += 1
        path, said = self.path(trainer), window.describe()
        if not is_dry_run(trainer):
            path.parent.mkdir(parents=True, exist_ok=True)
            append_text(path, without_keys(json.dumps(window.report() | {"action": self.action})) + "\n", sync=True)
        look = f"; {path} has its rows, losses and gradients"
        if self.action == "stop":
            raise UserError(
                f"{said}{look}. Look at the rows, or lower the learning rate; to go on without such steps set the action "
                "of NonFiniteGuard to skip"
            )
        if self._in_a_row >= self.limit:
            raise UserError(
                f"{self._in_a_row} steps in a row were not finite, in the last {said}{look}. Lower the learning rate, or go "
                "on from an earlier checkpoint"
            )
        rank_zero_warn(f"{said}: the optimizer step is left out{look}")
        module.leave_step_out()


class _Window:
    """One window with its losses and gradients."""

    def __init__(
        self, trainer: Trainer, module: AlignmentModule, batches: Sequence[MicroBatch], losses: Sequence[Tensor]
    ) -> None:
        self.trainer, self.module, self.batches, self.losses = cast(Any, trainer), module, batches, losses
        self.scaler = scaler_of(trainer)
        gradients = [p.grad for p in self._parameters() if p.grad is not None]
        norms = torch._foreach_norm(gradients) if gradients else []
        looked_at = torch.stack([*losses, *(norm.float() for norm in norms)])
        self.finite = bool(torch.isfinite(looked_at).all())  # the one synchronisation

    def _parameters(self) -> list[nn.Parameter]:
        return [p for group in self.trainer.optimizers[0].param_groups for p in group["params"]]

    @property
    def left_to_scaler(self) -> bool:
        """Whether a gradient scaler will leave the step out, and has room to find a better scale."""
        return self.scaler is not None and self.scaler.get_scale() > 1 and not self.bad_batches

    @property
    def bad_batches(self) -> list[int]:
        """The micro-batches whose loss is not finite."""
        return [number for number, loss in enumerate(self.losses) if not math.isfinite(loss)]

    @property
    def bad_tensors(self) -> dict[str, float]:
        """Norms of the gradients that are not finite, by name."""
        mine = {id(p) for p in self._parameters()}
        norms = {
            name: float(p.grad.float().norm())
            for name, p in self.module.named_parameters()
            if id(p) in mine and p.grad is not None
        }
        return {name: norm for name, norm in norms.items() if not math.isfinite(norm)}

    def describe(self) -> str:
        """What is not finite, and where, in words."""
        first, bad = self.batches[0], self.bad_batches
        objectives = " and ".join(dict.fromkeys(batch.objective for batch in self.batches))
        where = (
            f"optimizer step {self.trainer.global_step} (round {first.round + 1}, phase {first.phase}, {objectives})"
        )
        if bad:
            numbers = ", ".join(str(number + 1) for number in bad)
            rows = "; ".join(filter(None, (self._rows(self.batches[number]) for number in bad)))
            return f"the loss is not finite at {where}, in micro-batch {numbers} of {len(self.batches)}: {rows}"
        tensors = list(self.bad_tensors)
        rows = "; ".join(filter(None, map(self._rows, self.batches)))
        named = f"of {len(tensors)} tensors ({tensors[0]} first)" if tensors else "of another rank"
        return f"the gradient {named} is not finite at {where}: {rows}"

    def _rows(self, batch: MicroBatch) -> str:
        by_file: dict[str, list[int]] = {}
        for file, number in map(self._place(batch).__getitem__, _indices(batch)):
            by_file.setdefault(file, []).append(number)
        return "; ".join(f"{file}, row {', '.join(map(str, numbers))}" for file, numbers in by_file.items())

    def _place(self, batch: MicroBatch) -> RowPlaces:
        return cast(HybridDataModule, self.trainer.datamodule).places[batch.objective]

    def report(self) -> dict[str, Any]:
        """All of it, in plain types; numbers that are not finite as texts."""
        first = self.batches[0]
        scale = 1.0 if self.scaler is None else self.scaler.get_scale()
        return {
            "step": self.trainer.global_step,
            "phase": first.phase,
            "round": first.round,
            "objective": self.module.plan.objective_of(first.phase),
            "learning_rates": [group["lr"] for group in self.trainer.optimizers[0].param_groups],
            "gradient_norms": {name: str(norm) for name, norm in self.bad_tensors.items()},
            "micro_batches": [
                {"objective": batch.objective, "loss": _number(float(loss) / scale), "rows": self._contents(batch)}
                for batch, loss in zip(self.batches, self.losses, strict=True)
            ],
        }

    def _contents(self, batch: MicroBatch) -> list[dict[str, Any]]:
        indices, inputs, place = batch.inputs["index"].tolist(), batch.inputs, self._place(batch)
        single = {
            name: value.tolist() for name, value in inputs.items() if name != "index" and value.shape == (len(indices),)
        }
        return [
            {"index": index, "file": place[index][0], "row": place[index][1]}
            | {name: _number(values[number]) for name, values in single.items()}
            # pairs have two texts for a row, those of the first side first
            | {"texts": [_text(inputs, line) for line in range(number, len(inputs["input_ids"]), len(indices))]}
            for number, index in enumerate(indices)
            if index >= 0
        ]


def _indices(batch: MicroBatch) -> list[int]:
    """The rows of a micro-batch, each once; one without labels is none."""
    return [index for index in dict.fromkeys(batch.inputs["index"].tolist()) if index >= 0]


def _text(inputs: dict[str, Tensor], line: int) -> dict[str, list[int]]:
    """A text without its padding."""
    kept = inputs["attention_mask"][line].bool()
    return {name: inputs[name][line][kept].tolist() for name in ("input_ids", "labels")}


def _number(value: Any) -> Any:
    """JSON knows no infinity."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
