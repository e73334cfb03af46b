"""Shows what the policy writes as training goes."""

from __future__ import annotations

import json
from functools import singledispatch
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.completions import Completed
from hbat_lightning.data.sets import Prompt, PromptLoader, pad_id
from hbat_lightning.errors import UserError
from hbat_lightning.files import append_text, replace_text
from hbat_lightning.generation import GenerationSettings, completed
from hbat_lightning.metrics import standard_metrics
from hbat_lightning.report import Row, read_switches
from hbat_lightning.stream import stable_seed
from hbat_lightning.switches import PhaseCallback
from hbat_lightning.trainer_checks import is_dry_run
from hbat_lightning.training_data import MicroBatch


class SampleGenerations(PhaseCallback):
    """Completes the same held-out prompts before the run and at the end of every phase.

    Of each objective whose held-out rows have prompts, the first few. Where a schedule has no phases, it does so at the end of
    every round. ``samples.jsonl`` in the run folder gets a row for each: ``step``, ``phase`` (``null`` before the first),
    ``round``, ``objective`` (whose prompt it is), ``prompt``, ``completion``, ``reference`` (the data's answer; of a pair the
    chosen one), ``tokens`` and ``stopped``. Loggers get ROUGE, exact match, length and the like of each objective's samples as
    ``samples/…``, and those that take texts (TensorBoard, Weights & Biases) the texts.

    The same weights write the same texts, whatever was sampled before: random numbers are drawn from a seed of the prompts'
    place, and training's are left alone. Each time costs as much as generating ``prompts`` completions of each objective.

    Args:
        prompts: Prompts of each objective.
        generation: How they are completed; as in ``test`` when not given.
    """

    def __init__(self, prompts: int = 8, generation: GenerationSettings | None = None) -> None:
        if prompts < 1:
            raise ValueError(f"prompts must be at least 1, got {prompts}")
        self.prompts, self.generation = prompts, generation
        self._prompts: dict[str, list[Prompt]] = {}

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the prompts.

        Raises:
            UserError: There are none.
        """
        if stage != "fit":
            return
        if not isinstance(pl_module, AlignmentModule):
            raise UserError(f"SampleGenerations needs a module of hbat_lightning, not {type(pl_module).__name__}")
        data, tokenizer = pl_module.data, pl_module.policy.tokenizer
        found = {
            name: data.held_out_prompts(name, tokenizer, pl_module.run_seed, self.prompts)
            for name in pl_module.objectives
        }
        self._prompts = {name: prompts for name, prompts in found.items() if prompts}
        if not self._prompts:
            raise UserError(
                "SampleGenerations completes held-out prompts, and there are none: give val_path or val_fraction, or leave it "
                "out of trainer.callbacks"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Drop the rows of an earlier run, or in a resumed one those of steps that will be done again."""
        if is_dry_run(trainer):
            return
        rows = read_switches(self.path(trainer)) if trainer.global_step else []
        self._keep(trainer, [row for row in rows if row["step"] <= trainer.global_step])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete them before anything is trained."""
        # Not at the start of training: the log of an earlier run is still there then.
        if isinstance(pl_module, AlignmentModule) and trainer.global_step == 0 and not is_dry_run(trainer):
            self._sample(trainer, pl_module, {"step": 0, "phase": None, "round": 0})

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: MicroBatch, batch_idx: int
    ) -> None:
        """Complete them at the end of a phase."""
        if not isinstance(pl_module, AlignmentModule) or not batch.last or is_dry_run(trainer):
            return
        step, plan = trainer.global_step, pl_module.plan
        if plan.ended_at(step) is not None or (plan.mixed and plan.round_ends_at(step)):
            self._sample(trainer, pl_module, {"step": step, "phase": batch.phase, "round": batch.round})

    # ---- sampling -------------------------------------------------------------------------------------------------

    def _sample(self, trainer: Trainer, module: AlignmentModule, when: Row) -> None:
        answers = {name: self._complete(module, name) for name in self._prompts}
        rows = [when | {"objective": name} | _row(answer) for name, own in answers.items() for answer in own]
        self._write(trainer, rows)
        figures: dict[str, float] = {}
        for name, own in answers.items():
            for metric in standard_metrics():
                metric.update(own)
                figures |= {f"samples/{name}/{figure}": float(value) for figure, value in metric.compute().items()}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=max(0, when["step"] - 1))
            log_texts(logger, rows, when["step"])

    def _complete(self, module: AlignmentModule, name: str) -> list[Completed]:
        """Completions of an objective's prompts, of all processes."""
        tokenizer, data, ranks = module.policy.tokenizer, module.data, module.ranks
        stop = data.encoder(name, tokenizer).stop_token_id
        settings = self.generation or module.generation
        devices = [module.device] if module.device.type == "cuda" else []
        found: list[Completed] = []
        loader = PromptLoader(self._prompts[name], data.val_batch_size, pad_id(tokenizer), ranks)
        for number, batch in enumerate(loader):
            own: list[Completed] = []
            with ranks.together(), torch.random.fork_rng(devices):
                torch.manual_seed(stable_seed(module.run_seed, "samples", name, number * ranks.world + ranks.rank))
                if batch.prompts:
                    inputs = batch.input_ids.to(module.device), batch.attention_mask.to(module.device)
                    with module.trainer.precision_plugin.forward_context():
                        completions = module.policy.generate(*inputs, settings, stop, pad_id(tokenizer))
                    own = completed(batch, completions, tokenizer, stop)
            found += [answer for answers in ranks.gather(own) for answer in answers]
        return found

    # ---- files ----------------------------------------------------------------------------------------------------

    @rank_zero_only
    def _keep(self, trainer: Trainer, rows: list[Row]) -> None:
        if rows:
            replace_text(self.path(trainer), "".join(_line(row) for row in rows))
        else:
            self.path(trainer).unlink(missing_ok=True)

    @rank_zero_only
    def _write(self, trainer: Trainer, rows: list[Row]) -> None:
        path = self.path(trainer)
        path.parent.mkdir(parents=True, exist_ok=True)
        append_text(path, "".join(_line(row) for row in rows), sync=True)

    @staticmethod
    def path(trainer: Trainer) -> Path:
        """Where the rows are kept."""
        return Path(trainer.default_root_dir) / "samples.jsonl"


def _row(answer: Completed) -> Row:
    row = answer.row()
    del row["scores"]
    return row


def _line(row: Row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


@singledispatch
def log_texts(logger: Logger, rows: list[Row], step: int) -> None:
    """Hand samples to a logger that takes texts; others get none.

    Args:
        logger: The logger.
        rows: Rows of ``samples.jsonl``.
        step: The optimizer step.
    """


@log_texts.register
@rank_zero_only
def _to_tensorboard(logger: TensorBoardLogger, rows: list[Row], step: int) -> None:
    for number, row in enumerate(rows):
        text = f"{row['prompt']}\n\n---\n\n{row['completion']}\n\n---\n\n{row['reference']}"
        indented = text.replace("\n", "\n    ")  # as it stands: TensorBoard reads Markdown
        cast(Any, logger.experiment).add_text(f"samples/{row['objective']}/{number}", f"    {indented}", step)


@log_texts.register
@rank_zero_only
def _to_wandb(logger: WandbLogger, rows: list[Row], step: int) -> None:
    logger.log_text("samples", list(rows[0]), [list(row.values()) for row in rows], step=step)
