"""The command ``hbat``: a LightningCLI, and the small commands beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback

import hbat_lightning.importance
import hbat_lightning.lr
import hbat_lightning.schedules  # noqa: F401  imported so that short class names work in configurations
from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.callbacks import PhaseProgressBar, PolicyExport, PredictionWriter, SwitchReport, WindowCheckpoint
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.errors import UserError
from hbat_lightning.metrics_logger import MetricsLogger
from hbat_lightning.run_folder import latest_checkpoint, mark_finished, require_free
from hbat_lightning.trainer_checks import is_dry_run

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/hbat",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # the figures before the first phase
    "reload_dataloaders_every_n_epochs": 1,  # rounds may differ in length
    "enable_model_summary": False,  # it miscounts 4-bit weights; the policy describes itself
}


class SaveFitConfig(SaveConfigCallback):
    """Writes ``config.yaml`` for ``fit`` only, so that a later ``test`` does not overwrite how a run was made."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """See the base class."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class HbatCLI(LightningCLI):
    """LightningCLI with a run folder, standard callbacks, and ``--ckpt_path last`` that finds the run's own checkpoint."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See the base class."""
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run in the run folder.")

    def before_instantiate_classes(self) -> None:
        """Refuse to write over a run."""
        config = self._run_config
        if self.subcommand == "fit" and not config.trainer.fast_dev_run and not config.ckpt_path:
            require_free(self.run_folder, config.overwrite)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the standard callbacks that were not given, ``metrics.csv``, and the schedule's number of rounds."""
        given = self._get(self.config_init, "trainer")
        if given.get("max_epochs") is None:
            kwargs["max_epochs"] = self.model.schedule.rounds
        loggers = given.get("logger")
        if loggers is not False:
            extra = [] if loggers in (None, True) else loggers if isinstance(loggers, list) else [loggers]
            kwargs["logger"] = [MetricsLogger(str(self.run_folder)), *extra]
        own = given.get("callbacks") or []
        own = list(own) if isinstance(own, list) else [own]
        kwargs["callbacks"] = own + _standard_callbacks(own, given)
        return super().instantiate_trainer(**kwargs)

    def after_fit(self) -> None:
        """Mark the run as finished, and say where things are."""
        if is_dry_run(self.trainer):
            return
        mark_finished(self.run_folder, {"steps": self.trainer.global_step, "rounds": self.trainer.current_epoch})
        names = ("metrics.csv", "switches.jsonl", "switches.png", "config.yaml", "checkpoints", "adapter", "model")
        present = [name for name in names if (self.run_folder / name).exists()]
        print(f"run folder: {self.run_folder}\n" + "\n".join(f"  {name}" for name in present))

    def after_predict(self) -> None:
        """Say where the completions are."""
        print(f"completions: {self.run_folder / 'predictions.jsonl'}")

    @property
    def run_folder(self) -> Path:
        """The run folder."""
        return Path(self._run_config.trainer.default_root_dir)

    @property
    def _run_config(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    def _parse_ckpt_path(self) -> None:
        """Do nothing, where Lightning would let hyperparameters in the checkpoint override the command line."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs: dict[str, Any] = super()._prepare_subcommand_kwargs(subcommand)
        if kwargs.get("ckpt_path") == "last":
            newest = latest_checkpoint(self.run_folder)
            if newest is None and subcommand != "fit":
                raise UserError(f"{self.run_folder} holds no whole checkpoint: run fit first, or give --ckpt_path FILE")
            print(
                f"going on from {newest}"
                if newest
                else f"no checkpoint in {self.run_folder} yet: starting from the beginning"
            )
            kwargs["ckpt_path"] = None if newest is None else str(newest)
        elif kwargs.get("ckpt_path") and not Path(kwargs["ckpt_path"]).is_file():
            raise UserError(f"{kwargs['ckpt_path']}: no such checkpoint; --ckpt_path takes a file, or last")
        return kwargs


def _standard_callbacks(own: list[Callback], trainer: dict[str, Any]) -> list[Callback]:
    """Those of the standard callbacks that the configuration did not give itself, or switch off."""
    standard: list[tuple[type[Callback], Callback, bool]] = [
        (ProgressBar, PhaseProgressBar(), trainer.get("enable_progress_bar") is not False),
        (Checkpoint, WindowCheckpoint(), trainer.get("enable_checkpointing") is not False),
        (SwitchReport, SwitchReport(), True),
        (PolicyExport, PolicyExport(), True),
        (PredictionWriter, PredictionWriter(), True),
    ]
    return [made for kind, made, wanted in standard if wanted and not any(isinstance(one, kind) for one in own)]


def make_cli(args: ArgsType = None, run: bool = True) -> HbatCLI:
    """Parse and, with ``run``, carry out a command.

    Args:
        args: Arguments; those of the process when not given.
        run: ``False`` only builds model, data and trainer, and takes no subcommand.
    """
    return HbatCLI(
        AlignmentModule,
        HybridDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        trainer_defaults=TRAINER_DEFAULTS,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"overwrite": True},  # require_free() has had its say
        parser_kwargs={"exit_on_error": False},
        args=args,
        run=run,
    )


def main(args: list[str] | None = None) -> None:
    """Entry point of ``hbat`` and ``python -m hbat_lightning``. A user's mistake ends in one line and exit code 2."""
    try:
        make_cli(args)
    except (UserError, ArgumentError) as error:
        print("hbat: error: " + " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None
