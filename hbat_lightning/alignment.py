"""The module that Lightning trains: owns the policy, follows the schedule, logs, and checkpoints what trains.

An objective alone and the hybrid of two are both an :class:`AlignmentModule`, so there is one training step.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, cast

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from hbat_lightning.between_steps import measure_progress, roll_out
from hbat_lightning.checkpoint_state import adopt_state, own_parameters, trained_state
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.rollouts import RolloutSet
from hbat_lightning.errors import UserError
from hbat_lightning.evaluating import EvaluatingModule
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.lr import Cosine, LRSchedule
from hbat_lightning.metrics import CompletionMetric
from hbat_lightning.metrics_logger import MetricsLogger
from hbat_lightning.optimization import ParameterGroup, configure, put_in_force
from hbat_lightning.optimizer_state import OptimizerStateKeeper
from hbat_lightning.policy import Policy
from hbat_lightning.privacy import without_secret_settings
from hbat_lightning.ranks import ALONE, Ranks
from hbat_lightning.run_record import BASE, go_on, record_run, warn_of_other_text
from hbat_lightning.schedules import Plan, Schedule
from hbat_lightning.strategies import (
    find_unused_parameters,
    leave_group_at_exit,
    leaves_parameters_unused,
    stay_in_group_at_exit,
)
from hbat_lightning.stream import stable_seed
from hbat_lightning.sums import WindowTotals
from hbat_lightning.switches import PhaseCallback, PhaseKey
from hbat_lightning.trainer_checks import check_trainer, next_validation, scaler_of
from hbat_lightning.training_data import MicroBatch

OptimizerState = Literal["reset", "shared", "per_objective"]


class AlignmentModule(EvaluatingModule):
    """Trains a policy on one or several objectives, as a schedule says.

    Args:
        policy: The policy; ``None`` only for an objective that serves inside a hybrid.
        schedule: Which objective trains when.
        optimizer: Makes the one optimizer from the trained parameters.
        optimizer_state: At a switch: ``reset`` (as the official code), ``shared``, or ``per_objective``.
        lr_schedule: Shape of the learning rate, per phase or over the run.
        generation: How ``test`` and ``predict`` complete prompts.
        seed: Seed of row order, held-out rows, adapter weights and dropout; that of ``seed_everything`` when not given.
        metrics: What ``test`` and ``predict`` say of completions; ROUGE, exact match, length and variety when not given.
    """

    def __init__(
        self,
        policy: Policy | None,
        schedule: Schedule,
        optimizer: OptimizerCallable,
        optimizer_state: OptimizerState,
        lr_schedule: LRSchedule | None,
        generation: GenerationSettings,
        seed: int | None,
        metrics: Sequence[CompletionMetric] | None,
    ) -> None:
        super().__init__(generation, metrics)
        self.policy = cast(Policy, policy)  # None only inside a hybrid, where nobody asks; see require_policy()
        self.schedule, self.optimizer = schedule, optimizer
        self.lr_schedule = lr_schedule or Cosine()
        self.seed = seed
        self.strict_loading = False  # checkpoints hold what trains; adopt_state() compares the names
        self.optimizer_state = optimizer_state
        self._optimizer_states = OptimizerStateKeeper(optimizer_state)
        self._wants_snapshot = False
        self._record: dict[str, Any] | None = None
        self._gone_on_from: Mapping[str, Any] | None = None
        self._phase: PhaseKey | None = None
        self._step_left_out = False
        self._mode: str | None = None  # the objective that the policy's dropout is set for
        self._window = WindowTotals()

    # ---- what a run consists of -----------------------------------------------------------------------------------

    def require_policy(self) -> None:
        """Refuse to run without a policy.

        Raises:
            UserError: When the module was made without one.
        """
        if not isinstance(self.policy, Policy):
            raise UserError("no policy: give --model.init_args.policy.init_args.model_name_or_path")

    @property
    def run_seed(self) -> int:
        """The seed in force."""
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    @property
    def plan(self) -> Plan:
        """The phases of the run."""
        return self.data.stream.plan

    @property
    def data(self) -> HybridDataModule:
        """The run's data."""
        data = cast(Any, self.trainer).datamodule
        if not isinstance(data, HybridDataModule):
            raise UserError("training needs a HybridDataModule: trainer.fit(module, datamodule=HybridDataModule(...))")
        return data

    @property
    def ranks(self) -> Ranks:
        """The processes that train together; without a trainer, as in a memory plan, there is this one alone."""
        return ALONE if self._trainer is None else Ranks.of(self.trainer)

    @property
    def origin(self) -> dict[str, Any]:
        """What the trained weights come from, in plain types: the policy's base, the data and the seed."""
        return {"policy": self.policy.identity(), "data": self.data.fingerprint(), "seed": self.run_seed}

    @property
    def record(self) -> dict[str, Any]:
        """What the run is made of; see :mod:`~hbat_lightning.run_record`."""
        if self._record is None:
            self._record = record_run(self, self.data)
        return self._record

    def keep_phase_start(self) -> None:
        """Have a snapshot taken at every phase start. For callbacks, in their ``setup``."""
        self._wants_snapshot = True

    def leave_step_out(self) -> None:
        """Have the optimizer leave out the step of the window in hand. For callbacks, in ``on_after_backward``."""
        self._step_left_out = True
        if scaler_of(self.trainer) is not None:
            # Leaving steps out is a scaler's own business: it does so wherever it finds something infinite.
            next(p.grad for p in self.parameters() if p.grad is not None).fill_(math.inf)

    @property
    def step_left_out(self) -> bool:
        """Whether the window in hand makes no optimizer step, so that its gradients say nothing."""
        return self._step_left_out

    # ---- set-up ---------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse what cannot work, before weights are loaded."""
        stay_in_group_at_exit()
        if stage == "fit":
            # A second run of the same module begins anew; a checkpoint, loaded after this, will say otherwise.
            self._phase = self._mode = None
            self._record = self._gone_on_from = None
            self._window = WindowTotals()
            self._optimizer_states.load_state_dict({})
            check_trainer(self.trainer, self.plan)
            for what, value in self.data.stream.fingerprint().items():
                self.ranks.require_equal(what, value)
            self.ranks.require_equal("the checkpoint to go on from", self.trainer.ckpt_path)
            self.data.stream.measure_with(partial(measure_progress, self))
            for name, rows in self.data.train_sets.items():
                if isinstance(rows, RolloutSet):
                    rows.answer_with(partial(roll_out, self, name, rows.roll_out))
            for note in self.data.notes:
                rank_zero_info(note)

    def teardown(self, stage: str) -> None:
        """The end, where no error has come before it."""
        leave_group_at_exit()

    def configure_model(self) -> None:
        """Build the policy; Lightning calls this for every entry point, before it restores a checkpoint."""
        with self.ranks.together():
            self._build()
        self.ranks.require_equal("the base model's weights", self.policy.base_fingerprint)
        if self.trainer.state.fn == TrainerFn.FITTING:
            find_unused_parameters(self.trainer, leaves_parameters_unused(self.policy, self.objectives))

    def _build(self) -> None:
        device, fresh = self.trainer.strategy.root_device, not self.policy.built
        lines: list[str] = []
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(stable_seed(self.run_seed, "policy"))
            self.policy.build(device)
            for objective in self.objectives.values():
                objective.build(self.policy, device)
            if self.trainer.state.fn == TrainerFn.FITTING:
                references = {reference for objective in self.objectives.values() for reference in objective.references}
                lines = self.policy.add_snapshots(references | ({"phase_start"} if self._wants_snapshot else set()))
                self.policy.take_snapshot("initial")
        for line in (self.policy.describe() if fresh else []) + lines:
            rank_zero_info(line)
        if self.trainer.state.fn in (TrainerFn.FITTING, TrainerFn.VALIDATING):
            self.show_held_out_rows(device, began=self._phase is not None)

    def configure_optimizers(self) -> Any:
        """The one optimizer, and a learning rate that is a function of the absolute step."""
        own = {name: list(objective.own_parameters(self.policy)) for name, objective in self.objectives.items()}
        groups = [ParameterGroup(list(self.policy.trained_parameters().values()), None)]
        groups += [ParameterGroup(parameters, name) for name, parameters in own.items() if parameters]
        rates = {name: objective.lr for name, objective in self.objectives.items()}
        return configure(self.optimizer, groups, self.plan, self.lr_schedule, rates)

    # ---- phases ---------------------------------------------------------------------------------------------------

    def begin_phase(self, phase: PhaseKey) -> None:
        """Tell callbacks, then renew the snapshot and the optimizer state. Does nothing in the middle of a phase."""
        ended = self._phase
        if phase == ended:
            return
        for callback in cast(Any, self.trainer).callbacks:
            if isinstance(callback, PhaseCallback):
                callback.on_switch(self.trainer, self, ended, phase)
        if ended is not None:
            optimizer = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False))
            self._optimizer_states.switch(optimizer, ended.objective, phase.objective)
        self._phase = phase
        self.policy.take_snapshot()

    def train_mode(self, objective: str) -> None:
        """Dropout as an objective wants it in training."""
        self.policy.set_training(self.objectives[objective].dropout)
        self._mode = objective

    def without_dropout(self) -> None:
        """Layers as in training, but for dropout; the next micro-batch sets it anew."""
        self.policy.set_training(dropout=False)
        self._mode = None

    def on_train_start(self) -> None:
        """In a resumed run put settings of the optimizer in force, and drop logged rows of steps that it will do again."""
        if self._gone_on_from is not None:
            put_in_force(self.trainer, self._gone_on_from["settings"], self.record["settings"])
        for logger in self.loggers:
            if isinstance(logger, MetricsLogger):
                logger.forget_from(self.trainer.global_step)

    def on_train_epoch_start(self) -> None:
        """Place the next validation: at the start of an epoch it is where Lightning's defaults have it."""
        next_validation(self.trainer, self.plan, self.trainer.fit_loop.epoch_loop.batch_progress.current.ready - 1)

    def on_train_batch_start(self, batch: MicroBatch, batch_idx: int) -> None:
        """Begin a phase, place the next validation at a switch, and set dropout and seed of the micro-batch."""
        self._step_left_out = False
        self.begin_phase(PhaseKey(batch.phase, self.plan.objective_of(batch.phase)))
        if batch.objective != self._mode:
            self.train_mode(batch.objective)
        # The step that loggers are told. A checkpoint taken at a validation inside an epoch holds one too few.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        next_validation(self.trainer, self.plan, batch_idx)
        # Seeding every micro-batch, instead of saving generators, makes a resumed run draw the same dropout.
        torch.manual_seed(batch.seed)

    def training_step(self, batch: MicroBatch, batch_idx: int) -> Tensor:
        """Sum of the micro-batch's loss, scaled so that the window's mean comes out."""
        sums = self.objectives[batch.objective].loss(self.policy, batch.inputs)
        loss = sums["loss"][0] * batch.scale
        self._window.add(batch.objective, sums, loss)
        if batch.last:
            self._log_window(batch)
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Take the gradients of a step away that is left out: an optimizer leaves alone what has none, moments included."""
        if self.step_left_out and scaler_of(self.trainer) is None:
            optimizer.zero_grad(set_to_none=True)

    def _log_window(self, batch: MicroBatch) -> None:
        idle = set(self.objectives) - set(self._window.objectives)
        self.retire_logged(*(f"train/{objective}/" for objective in idle))
        means, loss = self._window.means(self.ranks, self.device)
        values = {f"train/{of}/{name}": value for of, figures in means.items() for name, value in figures.items()}
        for objective, figures in means.items():
            progress = self.objectives[objective].progress(figures)
            if math.isfinite(progress.value):
                self.plan.report(objective, progress)
        values |= self.plan.figures | {"phase/round": float(batch.round), "phase/index": float(batch.phase)}
        values["lr"] = cast(torch.optim.Optimizer, self.optimizers(use_pl_optimizer=False)).param_groups[0]["lr"]
        self.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
        self.log("loss", loss, on_step=True, on_epoch=False, prog_bar=True, logger=False, batch_size=1)
        self._window = WindowTotals()

    def retire_logged(self, *beginnings: str) -> None:
        """Stop logging what this window has no value of: Lightning would repeat the last one until the epoch ends."""
        for metric in (cast(Any, self.trainer)._results or {}).values():
            if metric.meta.name.startswith(beginnings):
                metric.reset()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What trains and its snapshots; never the base of an adapter."""
        return trained_state(super().state_dict(*args, **kwargs), self.policy, own_parameters(self))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the weights fit on, the phase in hand and idle optimizer states."""
        checkpoint["hbat"] = {
            **without_secret_settings(self.origin),
            "run": self.record if self.trainer.state.fn == TrainerFn.FITTING else self._record,
            "phase": None if self._phase is None else tuple(self._phase),
            "idle_optimizer_states": self._optimizer_states.state_dict(),
            "objectives": {name: objective.state() for name, objective in self.objectives.items()},
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else, by name; take over the phase in hand."""
        if self._trainer is None:
            raise UserError(
                "load_from_checkpoint has no base model to put the adapter on: pass ckpt_path to the Trainer's fit, validate, "
                "test or predict, or load the run's adapter/ with PEFT"
            )
        training = self.trainer.state.fn == TrainerFn.FITTING
        if training:
            with self.ranks.together():
                self._gone_on_from = go_on(checkpoint, self, self.data)
            check_trainer(self.trainer, self.plan)  # it may be laid out anew
        other_base = training and BASE in self.data.accept_changes  # which the user has been told of by go_on()
        adopt_state(checkpoint, self.policy, training, own_parameters(self), other_base)
        if not training:
            warn_of_other_text(checkpoint, self, self.data)
            # What is logged of it then stands at the step that it was saved after, as in the run's own log.
            self.trainer.fit_loop.epoch_loop._batches_that_stepped = max(0, checkpoint["global_step"] - 1)
        state = checkpoint["hbat"]
        self._phase = None if state["phase"] is None else PhaseKey(*state["phase"])
        self._optimizer_states.load_state_dict(state["idle_optimizer_states"])
        for name, objective in self.objectives.items():
            objective.load_state(state["objectives"][name])
