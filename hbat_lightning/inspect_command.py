"""``hbat inspect``: audits the data of a configuration, before any weight is loaded."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.cli import HbatCLI, make_cli
from hbat_lightning.errors import UserError
from hbat_lightning.findings import Findings
from hbat_lightning.inspection import audit
from hbat_lightning.inspection_view import legend, render, show_tokens, wants_colour
from hbat_lightning.privacy import without_keys


class InspectCLI(HbatCLI):
    """Parses what ``fit`` parses, so that any configuration and override of it will do, and builds no trainer."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options, and those of ``fit``, which a saved ``config.yaml`` holds."""
        super().add_arguments_to_parser(parser)
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        parser.add_argument("--examples", type=int, default=2, help="Rows to show as tokens, per objective.")
        parser.add_argument(
            "--report", type=str | None, default=None, help="JSON report; inspect.json in the run folder."
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """None: an audit needs no device, and shall not fail for the lack of one."""
        return cast(Trainer, None)


def run_inspection(args: list[str]) -> None:
    """Audit, print the report, and write it as JSON.

    Args:
        args: Command-line arguments behind ``inspect``.

    Raises:
        UserError: A whole file cannot be read, or the settings or the tokenizer do not allow encoding.
    """
    about = "Audit the data of a configuration, as fit would read it, without loading any weights."
    cli = make_cli(args, run=False, cli=InspectCLI, prog="hbat inspect", description=about, epilog=None)
    model, config = cast(AlignmentModule, cli.model), cli.config
    if config.examples < 0:
        raise UserError(f"--examples is {config.examples}; give 0 or more")
    model.require_policy()
    cli.datamodule.expect(model.objectives)
    tokenizer = model.policy.tokenizer
    findings = audit(
        cli.datamodule, model.objectives, tokenizer, model.run_seed, model.schedule.shards, config.examples
    )
    print(render(findings))
    colour = wants_colour(sys.stdout)
    if config.examples:
        print(f"\n== tokens and labels ==   {legend(colour)}")
    for source in findings.sources:
        for example in source.examples:
            text = show_tokens(example, tokenizer, source.stop_token["id"], colour)
            print(f"\n-- {source.objective}, {example.title} ({len(example.ids):,} tokens)\n{text}")
    path = Path(config.report) if config.report else cli.run_folder / "inspect.json"
    _write(findings, path)
    print(f"\nreport: {path}")


def _write(findings: Findings, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(
            without_keys(json.dumps(findings.as_json(), indent=2, ensure_ascii=False)) + "\n", encoding="utf-8"
        )
    except OSError as error:
        raise UserError(f"{path}: the report cannot be written ({error.strerror}); give --report FILE") from error
