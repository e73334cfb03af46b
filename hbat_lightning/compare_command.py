"""``hbat compare``: runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from hbat_lightning.comparison import as_csv, as_markdown, compare, comparison_page, read_runs
from hbat_lightning.errors import UserError
from hbat_lightning.files import replace_text
from hbat_lightning.privacy import without_keys


def run_compare(args: list[str]) -> None:
    """Compare, print the table, and write it as Markdown, CSV and a page.

    Args:
        args: Command-line arguments behind ``compare``.

    Raises:
        UserError: A folder holds no run, or the files cannot be written.
    """
    config = _parser().parse_args(args)
    if not 0 < config.confidence < 1 or config.answers < 0:
        raise UserError(
            f"--confidence is a share below 1 and --answers a number, got {config.confidence}, {config.answers}"
        )
    runs = read_runs([Path(folder) for folder in config.runs])
    figures = compare(runs, config.confidence)
    table = without_keys(as_markdown(runs, figures, config.confidence))
    page = comparison_page(runs, figures, config.confidence, config.answers)
    folder = Path(config.output)
    try:
        for name, text in (
            ("comparison.md", table),
            ("comparison.csv", as_csv(runs, figures)),
            ("comparison.html", page),
        ):
            replace_text(folder / name, without_keys(text))
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error}); give another --output") from error
    print(table)
    print(f"written: {folder}\n  comparison.md\n  comparison.csv\n  comparison.html, for any browser")


def _parser() -> ArgumentParser:
    about = (
        "Show runs side by side: a table, with paired intervals where they have the same held-out rows or prompts, and a page "
        "with curves, forgetting, drift, conflict and answers. Differences are to the first run."
    )
    parser = ArgumentParser(prog="hbat compare", description=about, exit_on_error=False)
    add: Any = parser.add_argument
    add("--config", action="config", help="A YAML file with these options.")
    add("runs", type=str, nargs="+", help="Run folders.")
    add(
        "--output", type=str, default="runs/comparison", help="Folder to write; earlier comparisons in it are replaced."
    )
    add("--confidence", type=float, default=0.95, help="Of the intervals.")
    add("--answers", type=int, default=12, help="Prompts that the page shows with every run's answer.")
    return parser
