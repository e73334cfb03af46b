"""Shows how far the two objectives pull against each other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.conflict import conflict_figures, draw_conflict
from hbat_lightning.errors import UserError
from hbat_lightning.files import append_text, replace_text
from hbat_lightning.phases import BOTH, INSTRUCTION, PREFERENCE
from hbat_lightning.probes import Halves, Probe
from hbat_lightning.report import read_switches
from hbat_lightning.switches import PhaseCallback
from hbat_lightning.trainer_checks import is_dry_run
from hbat_lightning.training_data import MicroBatch


class GradientConflict(PhaseCallback):
    r"""Measures, at the end of every phase, how the two objectives' gradients and phases stand to each other.

    Gradients are of held-out rows (:class:`~hbat_lightning.probes.Probe` says which, and what objectives on rollouts have in
    their place), at the parameters as they are, without dropout; in the coordinates that train, with LoRA those of its
    matrices. Half of an objective's rows gives :math:`a_1`, the other half :math:`a_2`; those of the other objective
    :math:`b_1, b_2`. Figures are of the whole model, and of each layer:

    - ``cosine``, freed of noise: :math:`\frac14\sum_{ij}\langle a_i, b_j\rangle / \sqrt{\langle a_1, a_2\rangle\langle
      b_1, b_2\rangle}`, the product of two unbiased halves over the root of the product of the halves' self-similarities
      (:func:`~hbat_lightning.functional.cosine`). It may lie outside [-1, 1]. Where a self-similarity is not positive, noise
      hides a direction: there is no such figure then; give more ``rows``.
    - ``plain_cosine``, of the means of both halves: pulled towards 0 by their noise.
    - ``…_agreement``, the cosine of an objective's own two halves: how much of a gradient is no noise; and ``…_norm``,
      :math:`\sqrt{\langle a_1, a_2\rangle}`.
    - ``interference``: :math:`\langle g, \theta - \theta^*\rangle`, with g the gradient of the objective that does *not*
      train and :math:`\theta^*` the start of the phase: to first order, by how much the phase has changed the other
      objective's loss; above 0 it has done harm. The gradient is that of the phase's end, so the change of ``val/…/loss`` is
      smaller where the loss is convex on the way.
    - ``drift``: root-mean-square of :math:`\theta - \theta^*`.
    - ``tug_of_war``: cosine of the phase's drift and that of the phase before; -1 is the other's work undone.

    They are written to ``conflict.jsonl`` in the run folder, to the loggers (``conflict/…``, of layers ``conflict/cosine/…``)
    and, at the end of a phase, to its row of ``switches.jsonl``; ``conflict.png`` shows them. What trains, and every random
    number, stay as they would be without.

    A measurement costs a forward and a backward pass over ``rows`` rows of each objective in micro-batches of ``batch_size``;
    for its time memory for four copies of what trains, in its own precision; and with ``drift`` one copy for all of the run,
    in checkpoints too, beside the phase-start snapshot, which EWC and phase-start references have anyway.

    Args:
        rows: Held-out rows of each objective. Where rows are scored together (KTO) there are at least two micro-batches of
            ``val_batch_size``.
        every_n_steps: Measure also inside phases, after every so many optimizer steps of the run.
        drift: Measure what needs the drift of phases.
    """

    def __init__(self, rows: int = 64, every_n_steps: int | None = None, drift: bool = True) -> None:
        if rows < 2 or (every_n_steps is not None and every_n_steps < 1):
            raise ValueError(f"rows must be at least 2 and every_n_steps at least 1, got {rows} and {every_n_steps}")
        self.rows, self.every_n_steps, self.drift = rows, every_n_steps, drift
        self._drift: dict[str, Tensor] = {}
        self._report: dict[str, Any] = {}
        self._seconds, self._count = 0.0, 0

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be compared, ask for the phase-start snapshot, and forget an earlier run.

        Raises:
            UserError: There are no two objectives, or no rows to probe one of them with.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, AlignmentModule) or {INSTRUCTION, PREFERENCE} != set(pl_module.objectives):
            raise UserError(
                "GradientConflict compares the gradients of two objectives: leave it out of trainer.callbacks, or train a "
                "HybridAlignmentModule"
            )
        for name in pl_module.objectives:
            if Probe(pl_module, name, self.rows).held_out_halves < 2:
                raise UserError(
                    f"GradientConflict takes its gradients from two halves of the held-out {name} rows, and there are too few: "
                    f"give data.init_args.{name}.val_path or val_fraction, or where rows are scored together a smaller "
                    "data.init_args.val_batch_size"
                )
        self._drift, self._report = {}, {}
        self._seconds, self._count = 0.0, 0
        if self.drift:
            pl_module.keep_phase_start()

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows of an earlier run, or in a resumed one those of steps that will be done again."""
        if is_dry_run(trainer):
            return
        rows = [row for row in read_switches(self.path(trainer)) if 0 < row["step"] <= trainer.global_step]
        if rows:
            replace_text(self.path(trainer), "".join(json.dumps(row) + "\n" for row in rows))
        else:
            self.path(trainer).unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: MicroBatch, batch_idx: int
    ) -> None:
        """Measure at the end of a phase, and where a step is due."""
        if not isinstance(pl_module, AlignmentModule) or not batch.last or is_dry_run(trainer):
            return
        ends = pl_module.plan.ended_at(trainer.global_step) is not None
        if ends or (self.every_n_steps and trainer.global_step % self.every_n_steps == 0):
            began = time.perf_counter()
            self._measure(trainer, pl_module, batch, ends)
            self._seconds, self._count = self._seconds + time.perf_counter() - began, self._count + 1

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the picture, and say what the measurements cost."""
        rows = [] if is_dry_run(trainer) else read_switches(self.path(trainer))
        if rows:
            draw_conflict(rows, self.path(trainer).with_suffix(".png"))
        if self._count:
            rank_zero_info(f"gradient conflict: {self._count} measurements took {self._seconds:.1f} s")

    def report(self) -> dict[str, Any]:
        """See :meth:`~hbat_lightning.switches.PhaseCallback.report`."""
        return {"conflict": self._report} if self._report else {}

    def state_dict(self) -> dict[str, Any]:
        """The drift of the last whole phase."""
        return {"drift": self._drift}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it over."""
        self._drift = state_dict["drift"]

    # ---- measuring ------------------------------------------------------------------------------------------------

    def _measure(self, trainer: Trainer, module: AlignmentModule, batch: MicroBatch, ends: bool) -> None:
        self._report = {}
        halves = self._halves(module)
        phase, done = module.plan.at(trainer.global_step - 1)
        drift, before = self._moved(module), self._drift if ends else {}
        if ends and drift:
            self._drift = drift
        if halves is None:
            rank_zero_info(
                f"gradient conflict: nothing to measure at step {trainer.global_step}: there are no rollouts yet"
            )
            return
        trained = None if phase.objective == BOTH else phase.objective
        before = {name: value.to(module.device) for name, value in before.items()}
        figures = conflict_figures(halves[INSTRUCTION], halves[PREFERENCE], trained, drift, before)
        row: dict[str, Any] = {
            "step": trainer.global_step,
            "phase": phase.index,
            "round": phase.round,
            "objective": phase.objective,
            "steps": done + 1,
            "ends": ends,
            "rows": {name: halves[name].rows for name in (INSTRUCTION, PREFERENCE)},
            "all": figures.pop(""),
            "layers": figures,
        }
        if ends:
            self._report = {"all": row["all"], "layers": row["layers"]}
        self._write(trainer, row)
        values = {f"conflict/{name}": value for name, value in row["all"].items()}
        values |= {f"conflict/cosine/{layer}": own["cosine"] for layer, own in figures.items() if "cosine" in own}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)

    def _halves(self, module: AlignmentModule) -> dict[str, Halves] | None:
        """Both objectives' gradients; ``None`` where one of them has none."""
        devices = [module.device] if module.device.type == "cuda" else []
        module.without_dropout()
        found: dict[str, Halves] = {}
        with torch.random.fork_rng(devices):
            for name in module.objectives:
                halves = Probe(module, name, self.rows).halves()
                if halves is None:
                    return None
                found[name] = halves
        return found

    @torch.no_grad()
    def _moved(self, module: AlignmentModule) -> dict[str, Tensor]:
        start = module.policy.snapshot("phase_start") if self.drift else None
        if start is None:
            return {}
        return {name: value.detach() - start[name] for name, value in module.policy.trained_parameters().items()}

    @rank_zero_only
    def _write(self, trainer: Trainer, row: dict[str, Any]) -> None:
        path = self.path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        append_text(path, json.dumps(row) + "\n", sync=True)

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """Where the rows are kept."""
        return Path(trainer.default_root_dir) / "conflict.jsonl"
