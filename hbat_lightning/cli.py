"""The command ``hbat``: a LightningCLI, and the small commands beside it."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError
from lightning.fabric.plugins import CheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import SIGTERMException
from safetensors import SafetensorError

import hbat_lightning.importance
import hbat_lightning.lr
import hbat_lightning.schedules  # noqa: F401  imported so that short class names work in configurations
from hbat_lightning import quiet
from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.callbacks import (
    EvaluationRows,
    NonFiniteGuard,
    PhaseProgressBar,
    PolicyExport,
    PredictionWriter,
    SwitchReport,
    WindowCheckpoint,
)
from hbat_lightning.checkpoint_io import AtomicCheckpointIO
from hbat_lightning.config_errors import readable, refusal
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.provenance import Change
from hbat_lightning.errors import SharedError, UserError, printable
from hbat_lightning.files import out_of_room
from hbat_lightning.metrics_logger import MetricsLogger
from hbat_lightning.privacy import keyless_streams, without_keys, without_secret_settings
from hbat_lightning.run_folder import OUTPUTS, clear, find_checkpoint, leave_mark, refuse_links, require_free
from hbat_lightning.run_lock import hold
from hbat_lightning.stop_signals import INTERRUPTED, TERMINATED
from hbat_lightning.strategies import require_strategy
from hbat_lightning.trainer_checks import is_dry_run

say = rank_zero_only(print)  # once, not once per process

TRAINER_DEFAULTS: dict[str, Any] = {
    "default_root_dir": "runs/hbat",
    "log_every_n_steps": 1,
    "num_sanity_val_steps": -1,  # the figures before the first phase
    "reload_dataloaders_every_n_epochs": 1,  # rounds may differ in length
    "enable_model_summary": False,  # it miscounts 4-bit weights; the policy describes itself
}


class SaveFitConfig(SaveConfigCallback):
    """Writes ``config.yaml`` when training begins, so that neither a ``test`` nor a refused ``fit`` changes how a run was made.

    What says how the command goes about it, and not how the run is made, is left out: with ``overwrite`` or ``ckpt_path:
    last`` in it, the same file would replace the run, or go on with it, unasked. So are settings that look like secrets.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Not yet: settings may still be refused."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make room, where that was asked for: data, model and settings have been checked, and nothing is written yet."""
        if self.config.get("overwrite") and not trainer.ckpt_path:
            clear(Path(trainer.default_root_dir))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it; a resumed run has found its place in the data by now."""
        self.config = self.config.clone()
        self.config.overwrite, self.config.accept_changes = False, []
        if self.config.ckpt_path == "last":
            self.config.ckpt_path = None
        super().setup(trainer, pl_module, "fit")

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it into the run folder, on rank 0."""
        settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))
        shown = without_secret_settings(settings, instead=None)
        note = (
            ""
            if shown == settings
            else "# What looked like a secret is not here: give it in an environment variable.\n"
        )
        path = Path(trainer.default_root_dir) / self.config_filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(note + yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), encoding="utf-8")


class HbatCLI(LightningCLI):
    """LightningCLI with a run folder, standard callbacks, and ``--ckpt_path last`` that finds the run's own checkpoint."""

    checkpoint: Path | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with contextlib.ExitStack() as self._held:  # LightningCLI does in here all that a command does
            super().__init__(*args, **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """See the base class."""
        parser.add_argument("--overwrite", type=bool, default=False, help="Replace the run in the run folder.")
        add_accept_changes(parser)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Without Lightning's warning about arguments from Python, which ours are wherever a small command parses them."""
        self.config = parser.parse_object(args) if isinstance(args, dict) else parser.parse_args(args)  # type: ignore[arg-type]

    def before_instantiate_classes(self) -> None:
        """Keep other runs out of the run folder; find the checkpoint to go on from; refuse to write over a run."""
        if self.subcommand is None:
            return
        refuse_links(self.run_folder)  # the lock's file among them
        if self.subcommand == "fit" and not self._run_config.trainer.fast_dev_run and not rank_zero_only.rank:  # type: ignore[attr-defined]
            self._held.enter_context(hold(self.run_folder))
        wanted = self._run_config.get("ckpt_path")
        self.checkpoint = find_checkpoint(self.run_folder, wanted) if wanted else None
        if wanted == "last" and self.checkpoint is None and self.subcommand != "fit":
            raise UserError(f"{self.run_folder} holds no whole checkpoint: run fit first, or give --ckpt_path FILE")
        own = self.checkpoint is not None and self.run_folder.resolve() in self.checkpoint.resolve().parents
        asked = own or self._run_config.overwrite or self._run_config.trainer.fast_dev_run
        if self.subcommand == "fit" and not asked:
            require_free(self.run_folder)

    def instantiate_classes(self) -> None:
        """Build model, data and trainer.

        Raises:
            UserError: When one of them refuses its settings.
        """
        try:
            super().instantiate_classes()
            self.datamodule.accept_changes += tuple(self._run_config.get("accept_changes") or ())
        except (ValueError, MisconfigurationException) as error:
            said = refusal(str(error)) or str(error)
            raise UserError(f"{said}; change that setting in the configuration or on the command line") from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Add the standard callbacks that were not given, ``metrics.csv``, and the schedule's number of rounds."""
        given = self._get(self.config_init, "trainer")
        if given.get("max_epochs") is None:
            kwargs["max_epochs"] = self.model.schedule.rounds
        loggers = given.get("logger")
        if loggers is not False:
            extra = [] if loggers in (None, True) else loggers if isinstance(loggers, list) else [loggers]
            # Evaluations outside fit would stand in the middle of a curve; Lightning says epoch 0 of any checkpoint there.
            table: dict[str, Any] = {"filename": "evaluation.csv", "leave_out": ["epoch"]}
            fits = self.subcommand in (None, "fit")
            kwargs["logger"] = [MetricsLogger(str(self.run_folder), **({} if fits else table)), *extra]
        own = given.get("callbacks") or []
        own = list(own) if isinstance(own, list) else [own]
        kwargs["callbacks"] = own + _standard_callbacks(own, given)
        plugins = given.get("plugins") or []
        plugins = list(plugins) if isinstance(plugins, list) else [plugins]
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            kwargs["plugins"] = [*plugins, AtomicCheckpointIO()]
        trainer: Trainer = super().instantiate_trainer(**kwargs)
        require_strategy(trainer)
        return trainer

    def _run_subcommand(self, subcommand: str) -> None:
        """Say what to do where the disk is full; whatever was there before, the last checkpoint above all, still is."""
        try:
            super()._run_subcommand(subcommand)
        except (OSError, SafetensorError) as error:
            if not out_of_room(error):
                raise
            raise UserError(
                f"{self.run_folder}: cannot be written ({error}); {_after_full_disk(subcommand)}"
            ) from error

    @rank_zero_only
    def after_fit(self) -> None:
        """Mark the run as finished or stopped, and say where things are."""
        if is_dry_run(self.trainer):
            return
        steps, planned = self.trainer.global_step, self.model.plan.total_steps
        leave_mark(self.run_folder, steps >= planned, {"steps": steps, "planned_steps": planned})
        if steps < planned:
            print(f"stopped after {steps} of {planned} steps: go on with --ckpt_path last")
        names = (*OUTPUTS, "checkpoints", "adapter", "model")
        present = [name for name in names if (self.run_folder / name).exists()]
        print(f"run folder: {self.run_folder}\n" + "\n".join(f"  {name}" for name in present))

    @rank_zero_only
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
            none_yet = f"no checkpoint in {self.run_folder} yet: starting from the beginning"
            say(none_yet if self.checkpoint is None else f"going on from {self.checkpoint}")
        elif self.checkpoint is None and subcommand != "fit":
            say(
                "no --ckpt_path: this is the policy before training; --ckpt_path last takes the run's newest checkpoint"
            )
        kwargs["ckpt_path"] = None if self.checkpoint is None else str(self.checkpoint)
        return kwargs


def add_accept_changes(parser: LightningArgumentParser) -> None:
    """The option that lets a run go on although something about it has changed; a saved ``config.yaml`` holds it."""
    add: Any = parser.add_argument
    about = "Kinds of changes with which training may go on from a checkpoint of another run."
    add("--accept_changes", type=list[Change], default=[], help=about)


def _after_full_disk(subcommand: str) -> str:
    again = "go on with --ckpt_path last" if subcommand == "fit" else "run the command again"
    return f"make room and {again}"


def _standard_callbacks(own: list[Callback], trainer: dict[str, Any]) -> list[Callback]:
    """Those of the standard callbacks that the configuration did not give itself, or switch off."""
    standard: list[tuple[type[Callback], Callback, bool]] = [
        (ProgressBar, PhaseProgressBar(), trainer.get("enable_progress_bar") is not False),
        (WindowCheckpoint, WindowCheckpoint(), trainer.get("enable_checkpointing") is not False),
        (NonFiniteGuard, NonFiniteGuard(), True),
        (SwitchReport, SwitchReport(), True),
        (PolicyExport, PolicyExport(), True),
        (PredictionWriter, PredictionWriter(), True),
        (EvaluationRows, EvaluationRows(), True),
    ]
    return [made for kind, made, wanted in standard if wanted and not any(isinstance(one, kind) for one in own)]


def make_cli(args: ArgsType = None, run: bool = True, cli: type[HbatCLI] = HbatCLI, **parser: Any) -> HbatCLI:
    """Parse and, with ``run``, carry out a command.

    Args:
        args: Arguments; those of the process when not given.
        run: ``False`` only builds model, data and trainer, and takes no subcommand.
        cli: The class that does it.
        parser: Further settings of the parser, such as ``prog``.
    """
    more = "; ".join(f"hbat {name}: {said}" for name, (_, said) in COMMANDS.items())
    parser = {"exit_on_error": False, "description": DESCRIPTION, "epilog": f"There is also {more}."} | parser
    return cli(
        AlignmentModule,
        HybridDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=42,
        trainer_defaults=TRAINER_DEFAULTS,
        save_config_callback=SaveFitConfig,
        save_config_kwargs={"save_to_log_dir": False},  # SaveFitConfig writes it by itself
        parser_kwargs=parser,
        args=args,
        run=run,
    )


def _inspect(args: list[str]) -> None:
    from hbat_lightning.inspect_command import run_inspection  # late: it needs this module

    run_inspection(args)


def _export(args: list[str]) -> None:
    from hbat_lightning.export_command import run_export  # late: it needs this module

    run_export(args)


def _plan(args: list[str]) -> None:
    from hbat_lightning.plan_command import run_plan  # late: it needs this module

    run_plan(args)


def _compare(args: list[str]) -> None:
    from hbat_lightning.compare_command import run_compare  # late, as the others

    run_compare(args)


DESCRIPTION = "Hybrid alignment training: alternate SFT and preference training on one policy."
COMMANDS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "inspect": (_inspect, "audit the data of a configuration, without loading any weights"),
    "plan": (_plan, "say what a run will need of memory, from the model's config.json alone"),
    "compare": (_compare, "show runs side by side: a table and a page that any browser opens"),
    "export": (_export, "write what a run has trained: the adapter, or a model with the adapter merged in"),
}


@contextlib.contextmanager
def _information_on_stdout() -> Iterator[None]:
    """Lightning's information goes where ours goes, so that stderr holds warnings, bars and the error line."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    handlers = [one for logger in loggers for one in logger.handlers if isinstance(one, logging.StreamHandler)]
    before = [handler.setStream(sys.stdout) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)


def main(args: list[str] | None = None) -> None:
    """Entry point of ``hbat`` and ``python -m hbat_lightning``.

    A user's mistake, and a full disk, end in one line and exit code 2; SIGTERM in 143, Ctrl-C in 130.
    """
    args = sys.argv[1:] if args is None else args
    quiet.install()
    try:
        with keyless_streams(), _information_on_stdout():
            if args and args[0] in COMMANDS:
                COMMANDS[args[0]][0](args[1:])
            else:
                make_cli(args)
    except (UserError, ArgumentError) as error:
        line = str(error) if isinstance(error, UserError) else readable(error, args)
        rank = rank_zero_only.rank  # type: ignore[attr-defined]
        if rank == 0 or not isinstance(error, SharedError):
            said = f"process {rank}: {line}" if rank else line
            print("hbat: error: " + without_keys(printable(said)), file=sys.stderr)
        raise SystemExit(2) from None
    except SIGTERMException:
        raise SystemExit(TERMINATED) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning makes exit code 1 of it
            raise SystemExit(INTERRUPTED) from None
        raise
