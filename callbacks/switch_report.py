"""Keeps what every phase did to both objectives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.files import append_text, replace_text
from hbat_lightning.report import draw_switches, read_switches, switch_table
from hbat_lightning.schedules import Phase
from hbat_lightning.switches import PhaseCallback
from hbat_lightning.trainer_checks import is_dry_run

HELD_OUT = "held_out.json"


class SwitchReport(PhaseCallback):
    """Writes ``switches.jsonl`` in the run folder, a row per phase; at the end prints a table and draws ``switches.png``.

    ``held_out.json`` has what the figures after the last phase are means of, row by row: intervals can be drawn from it.

    A row holds the held-out figures of both objectives before and after the phase, how far each trained tensor moved,
    the EWC pull, and what other callbacks report. The module validates at every switch; the figures before the first phase
    come from the sanity check, which therefore must run over all held-out rows (``num_sanity_val_steps: -1``, the command
    line's default).

    Args:
        drift: Record the root-mean-square change of each trained tensor. In a full fine-tune only where EWC or a
            phase-start reference keeps a copy of the model anyway.
    """

    def __init__(self, drift: bool = True) -> None:
        self.drift = drift
        self._before: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the phase-start snapshot."""
        if stage != "fit" or not self.drift or not isinstance(pl_module, AlignmentModule):
            return
        if pl_module.policy.lora is not None:
            pl_module.keep_phase_start()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows of an earlier run, or in a resumed one those of steps that will be done again."""
        if is_dry_run(trainer):
            return
        if trainer.global_step == 0:
            for path in (self.path(trainer), self.path(trainer).with_name(HELD_OUT)):
                path.unlink(missing_ok=True)
            return
        rows = [row for row in read_switches(self.path(trainer)) if row["step"] <= trainer.global_step]
        replace_text(self.path(trainer), "".join(json.dumps(row) + "\n" for row in rows))
        if rows:
            self._before = rows[-1]["after"]

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the figures; where a phase has just ended, write its row."""
        if not isinstance(pl_module, AlignmentModule) or is_dry_run(trainer):
            return
        results = dict(pl_module.validation_results)
        if trainer.sanity_checking:
            self._before = results if _sees_all(trainer) else {}  # figures of a few batches are no "before"
        elif trainer.training or trainer.validating:
            phase = pl_module.plan.ended_at(trainer.global_step) if trainer.state.fn == "fit" else None
            if phase is not None:
                self._write(trainer, pl_module, phase, results)

    @rank_zero_only
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Without held-out rows there is no validation to wait for; drift and the EWC pull are kept all the same."""
        if not isinstance(pl_module, AlignmentModule) or is_dry_run(trainer) or any(trainer.num_val_batches):
            return
        phase = pl_module.plan.ended_at(trainer.global_step)
        if phase is not None and batch.last:
            self._write(trainer, pl_module, phase, {})

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the table and draw the picture."""
        rows = [] if is_dry_run(trainer) else read_switches(self.path(trainer))
        if rows and not any(row["after"] for row in rows):
            print("\nno held-out rows, so no figures at the switches: give val_path or val_fraction\n")
        elif rows:
            draw_switches(rows, self.path(trainer).with_suffix(".png"))
            print("\nheld-out figures, before → after each phase\n" + switch_table(rows) + "\n")

    def state_dict(self) -> dict[str, Any]:
        """The figures before the phase in hand: a run that goes on inside the first phase could not tell them."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take them over."""
        self._before = state_dict["before"]

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """Where the rows are kept."""
        return Path(trainer.default_root_dir) / "switches.jsonl"

    def _write(self, trainer: Trainer, module: AlignmentModule, phase: Phase, results: dict[str, float]) -> None:
        metrics = sorted(trainer.callback_metrics.items())
        logged = {name: float(value) for name, value in metrics if name.startswith("ewc/")}
        row: dict[str, Any] = {
            "phase": phase.index,
            "round": phase.round,
            "objective": phase.objective,
            "step": trainer.global_step,
            "steps": phase.length,
            "before": self._before,
            "after": results,
            "change": {name: value - self._before[name] for name, value in results.items() if name in self._before},
            "ewc": logged,
            "drift": self._drift(module),
        }
        for callback in cast(Any, trainer).callbacks:
            if isinstance(callback, PhaseCallback):
                row |= callback.report()
        path = self.path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        if results:
            kept = {"step": trainer.global_step, "figures": module.held_out_rows()}
            replace_text(path.with_name(HELD_OUT), json.dumps(kept) + "\n")
        append_text(path, json.dumps(row) + "\n", sync=True)
        changes = {f"switch/{name.removeprefix('val/')}": value for name, value in row["change"].items()}
        for logger in trainer.loggers:
            logger.log_metrics(changes, step=trainer.global_step - 1)
        self._before = results

    @torch.no_grad()
    def _drift(self, module: AlignmentModule) -> dict[str, float]:
        before = module.policy.snapshot("phase_start") if self.drift else None
        if before is None:
            return {}
        names = list(before)
        after = module.policy.trained_parameters()
        norms = torch._foreach_norm(torch._foreach_sub([after[n].detach() for n in names], [before[n] for n in names]))
        return {name: float(norm) / before[name].numel() ** 0.5 for name, norm in zip(names, norms, strict=True)}


def _sees_all(trainer: Any) -> bool:
    """Whether the sanity check runs over all held-out rows."""
    return all(
        some >= every for some, every in zip(trainer.num_sanity_val_batches, trainer.num_val_batches, strict=True)
    )
