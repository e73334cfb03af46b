"""``hbat plan``: what a run will need of memory, before anything is downloaded or loaded."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.cli import LightningArgumentParser
from tqdm.auto import tqdm

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.base_model import load_config
from hbat_lightning.callbacks.importance import ImportanceCallback
from hbat_lightning.cli import HbatCLI, make_cli
from hbat_lightning.errors import UserError
from hbat_lightning.memory.advice import advise
from hbat_lightning.memory.plan import MemoryPlan, make_plan
from hbat_lightning.memory.rehearsal import PRECISIONS, RunSettings
from hbat_lightning.memory.view import answer, as_json, render, render_advice
from hbat_lightning.privacy import without_keys

_UNITS = {"": 10**9, "GB": 10**9, "GIB": 2**30, "MB": 10**6, "MIB": 2**20}
_PRECISIONS = {"None": "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed"}


class PlanCLI(HbatCLI):
    """Parses what ``fit`` parses, so that any configuration and override of it will do, and builds no trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options, and those of ``fit``, which a saved ``config.yaml`` holds."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        parser.add_argument(
            "--budget", type=str | None, default=None, help="Memory that there is, such as 24GB or 16GiB: does it fit?"
        )
        parser.add_argument(
            "--advice", type=bool, default=False, help="Plan changes as well, even where the run fits or none is asked."
        )
        parser.add_argument("--every_layer", type=bool, default=False, help="Go through all layers, however many.")
        parser.add_argument("--report", type=str | None, default=None, help="JSON report; plan.json in the run folder.")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """None: a plan needs no device, and shall not fail for the lack of one."""
        return cast(Trainer, None)

    @property
    def run_settings(self) -> RunSettings:
        """What of the configuration decides memory."""
        trainer = self.config.trainer
        given = self.config_init.trainer.callbacks or []
        callbacks = given if isinstance(given, list) else [given]
        model = cast(AlignmentModule, self.model)
        model.require_policy()
        return RunSettings(
            module=model,
            config=load_config(model.policy.spec),
            data=self.datamodule,
            penalties=[one for one in callbacks if isinstance(one, ImportanceCallback)],
            precision=_precision(str(trainer.precision)),
            accumulate=trainer.accumulate_grad_batches,
            checkpointing=model.policy.gradient_checkpointing,
            clips=bool(trainer.gradient_clip_val),
            gpu=trainer.accelerator in ("gpu", "cuda")
            or (trainer.accelerator == "auto" and CUDAAccelerator.is_available()),
        )


def run_plan(args: list[str]) -> None:
    """Plan, print the plan, and write it as JSON.

    Args:
        args: Command-line arguments behind ``plan``.

    Raises:
        UserError: The settings do not make a run, or the base's configuration cannot be read.
        SystemExit: With code 1, when everything is said: the run does not fit the budget.
    """
    cli = parse(args)
    settings, config = cli.run_settings, cli.config
    budget = None if config.budget is None else parse_size(config.budget)
    with tqdm(desc="planning", unit=" moments", delay=5, leave=False, file=sys.stderr) as bar:

        def plan(options: Sequence[str] = ()) -> MemoryPlan:
            return _plan(parse([*args, *options]).run_settings, config.every_layer, bar)

        choices = (settings, replace(settings, checkpointing=not settings.checkpointing))
        plans = [(_heading(choice), _plan(choice, config.every_layer, bar)) for choice in choices]
        short = budget is not None and plans[0][1].total > budget
        found = advise(settings, plans[0][1], plan, budget) if short or config.advice else []
    print(render(_title(settings), plans))
    if budget is not None:
        print(f"\n{answer(plans[0][1], budget)}")
    if short or config.advice:
        print(f"\n{render_advice(found, budget)}")
    path = Path(config.report) if config.report else cli.run_folder / "plan.json"
    _write(as_json(plans, found, budget), path)
    print(f"\nreport: {path}")
    if short:
        raise SystemExit(1)


def parse(args: list[str]) -> PlanCLI:
    """Parse a command's arguments, and build model and data module, which are light."""
    about = "Say what a run will need of memory, from the model's config.json alone, without loading weights or data."
    args = [*args, "--seed_everything", "false"]  # nothing is drawn
    return cast(PlanCLI, make_cli(args, run=False, cli=PlanCLI, prog="hbat plan", description=about, epilog=None))


def parse_size(text: str) -> int:
    """Bytes of a size such as ``24GB`` (10⁹) or ``16GiB`` (2³⁰); GB where no unit is given.

    Raises:
        UserError: It is none.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2].upper() not in _UNITS or not float(found[1]):
        raise UserError(f"--budget is {text!r}; give a size such as 24GB, 16GiB or 800MB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def _plan(settings: RunSettings, every_layer: bool, bar: Any) -> MemoryPlan:
    tick: Callable[[str], None] = lambda moment: bar.update()  # noqa: E731
    return make_plan(settings, every_layer, tick)


def _precision(given: str) -> str:
    name = _PRECISIONS.get(given, given)
    if name not in PRECISIONS:
        raise UserError(f"trainer.precision {given} cannot be planned; a run takes {', '.join(PRECISIONS)}")
    return name


def _heading(settings: RunSettings) -> str:
    return "with checkpointing" if settings.checkpointing else "without checkpointing"


def _title(settings: RunSettings) -> str:
    policy, data = settings.module.policy, settings.data
    kind = "full fine-tune" if policy.lora is None else f"LoRA r {policy.lora.r}"
    quantization = "" if policy.spec.quantization == "none" else f", {policy.spec.quantization}"
    if getattr(settings.config, "quantization_config", None) is not None:
        quantization = ", quantised in its own files"
    device = "a GPU" if settings.gpu else "a CPU"
    return (
        f"plan       {policy.spec.name}, {kind}{quantization}, {settings.precision}, on {device}\n"
        f"at most    {data.batch_size} rows or pairs of {data.max_length:,} tokens in a micro-batch, "
        f"{data.val_batch_size} in validation; GB are 10⁹ bytes"
    )


def _write(report: dict[str, Any], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(without_keys(json.dumps(report, indent=2, ensure_ascii=False)) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror}); give --report FILE") from error
