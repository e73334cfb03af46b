"""Runs side by side in figures, with intervals where they have answered the same prompts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

from hbat_lightning.comparison.runs import FORGOTTEN, Run
from hbat_lightning.metrics import MIN_ROWS, Interval, bootstrap, paired_bootstrap


@dataclass(frozen=True)
class Cell:
    """What one run has of a figure.

    Attributes:
        value: The figure; ``None`` where the run has none.
        spread: Its interval, where it is a mean over answers or held-out rows.
        lead: By how much it is ahead of the first run on the prompts that both have answered, or on the held-out rows where
            they are the same; ``None`` for the first.
    """

    value: float | None
    spread: Interval | None = None
    lead: Interval | None = None


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        group: What kind of figure it is.
        name: Its name.
        cells: A cell for each run.
    """

    group: str
    name: str
    cells: tuple[Cell, ...]


def compare(runs: Sequence[Run], confidence: float = 0.95) -> list[Figure]:
    """All figures that some run has.

    Args:
        runs: The runs; differences are to the first.
        confidence: Of the intervals.
    """
    groups: list[tuple[str, list[dict[str, float]]]] = [
        ("training", [_training(run) for run in runs]),
        (AT_END, [_at_end(run) for run in runs]),
        ("held out, mean change by the other's phases", [_forgetting(run) for run in runs]),
        ("conflict", [_conflict(run) for run in runs]),
        ("hbat validate and hbat test", [_evaluation(run) for run in runs]),
    ]
    figures = [
        _of_held_out(name, runs, values, confidence)
        if group == AT_END
        else Figure(group, name, tuple(Cell(own.get(name)) for own in values))
        for group, values in groups
        for name in _names(values)
    ]
    figures += [_of_answers(name, runs, confidence) for name in _names([run.scores for run in runs])]
    variety = [run.variety for run in runs]
    return figures + [Figure(ANSWERS, name, tuple(Cell(own.get(name)) for own in variety)) for name in _names(variety)]


AT_END, ANSWERS = "held out, at the end", "hbat predict, mean over answers"


def as_markdown(runs: Sequence[Run], figures: Sequence[Figure], confidence: float = 0.95) -> str:
    """The table in Markdown."""
    head = ["", *(run.name for run in runs), *(f"{run.name} − {runs[0].name}" for run in runs[1:])]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    group = ""
    for figure in figures:
        if figure.group != group:
            group = figure.group
            lines.append([f"**{group}**", *[""] * (len(head) - 1)])
        own = [format_cell(cell) for cell in figure.cells]
        lines.append([figure.name, *own, *(format_lead(cell) for cell in figure.cells[1:])])
    table = "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)
    return f"{table}\n\n{about_intervals(confidence)} Differences are paired; * marks those without 0.\n"


def about_intervals(confidence: float) -> str:
    """What intervals are of, and which figures have none."""
    return (
        f"Intervals are of {confidence:.0%}, from a bootstrap over held-out rows or prompts. They know nothing of other seeds. "
        f"Fewer than {MIN_ROWS} have none, and other figures neither. Held-out figures of two runs are compared where rows, "
        "loss, reference and reward are the same."
    )


def as_csv(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    """A row for each run and figure: the value, its interval, the difference from the first run with its interval, and rows."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ["value", "low", "high", "rows", "difference", "difference_low", "difference_high", "difference_rows"]
    writer.writerow(["group", "figure", "run", *ends])
    for figure in figures:
        for run, cell in zip(runs, figure.cells, strict=True):
            if cell.value is None:
                continue
            spread = ["", "", ""] if cell.spread is None else [cell.spread.low, cell.spread.high, cell.spread.rows]
            lead: Sequence[object] = ["", "", "", ""] if cell.lead is None else cell.lead
            writer.writerow([figure.group, figure.name, run.name, cell.value, *spread, *lead])
    return text.getvalue()


def held_out_spread(run: Run, name: str, confidence: float) -> Interval | None:
    """Interval of a held-out figure at the end of a run; none where too few rows of it are known."""
    own = run.rows.get(name)
    if own is None or sum(count > 0 for count in own.counts) < MIN_ROWS:
        return None
    return bootstrap(own.sums, confidence, counts=own.counts)


def answer_spread(run: Run, name: str, confidence: float) -> Interval | None:
    """Interval of a mean over answers; none where there are too few."""
    values = list(run.scores.get(name, {}).values())
    return bootstrap(values, confidence) if len(values) >= MIN_ROWS else None


def format_cell(cell: Cell) -> str:
    """A value, with its interval where it has one."""
    if cell.value is None:
        return "–"
    spread = "" if cell.spread is None else f" [{number(cell.spread.low)}, {number(cell.spread.high)}]"
    return number(cell.value) + spread


def format_lead(cell: Cell) -> str:
    """A difference with its interval, marked where 0 is outside; empty where there is none."""
    if cell.lead is None:
        return ""
    mark = " *" if cell.lead.decided else ""
    return f"{cell.lead.value:+.3f} [{cell.lead.low:+.3f}, {cell.lead.high:+.3f}]{mark}"


def number(value: float) -> str:
    """A figure as it is shown."""
    if not math.isfinite(value):
        return f"{value:g}"
    if value == int(value) and (value == 0 or abs(value) >= 2):
        return f"{value:,.0f}"
    return f"{value:.3g}" if abs(value) < 0.01 else f"{value:,.3f}"


# ---- where figures come from --------------------------------------------------------------------------------------------


def _training(run: Run) -> dict[str, float]:
    found = {"optimizer steps": float(run.steps), "phases": float(len(run.spans))}
    for column in ("train/instruction/loss", "train/preference/loss", "ewc/penalty"):
        curve = run.curve(column)
        if curve:
            found[f"{column}, last"] = curve[-1][1]
    return found


def _at_end(run: Run) -> dict[str, float]:
    if run.switches and run.switches[-1]["after"]:
        return dict(run.switches[-1]["after"])
    last: dict[str, float] = {}
    for row in run.metrics:
        last |= {name: value for name, value in row.items() if name.startswith("val/")}
    return last


def _forgetting(run: Run) -> dict[str, float]:
    found = {}
    for objective, figure in FORGOTTEN:
        changes = [value for _, value in run.forgetting(figure, objective)]
        if changes:
            found[figure] = sum(changes) / len(changes)
    return found


def _conflict(run: Run) -> dict[str, float]:
    found = {}
    for name in ("cosine", "plain_cosine", "interference", "tug_of_war"):
        values = [row["all"][name] for row in run.conflict if name in row["all"]]
        if values:
            found[f"{name}, mean"] = sum(values) / len(values)
    return found


def _evaluation(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.evaluation.items() if name.startswith(("val/", "test/"))}


def _of_held_out(name: str, runs: Sequence[Run], values: Sequence[dict[str, float]], confidence: float) -> Figure:
    cells, first = [], runs[0].rows.get(name)
    for run, figures in zip(runs, values, strict=True):
        own, spread, lead = run.rows.get(name), held_out_spread(run, name, confidence), None
        if own and spread and first and run is not runs[0] and own.compares_with(first):
            lead = paired_bootstrap(own.sums, first.sums, confidence, counts=own.counts)
        cells.append(Cell(figures.get(name), spread, lead))
    return Figure(AT_END, name, tuple(cells))


def _of_answers(name: str, runs: Sequence[Run], confidence: float) -> Figure:
    first = runs[0].scores.get(name, {})
    cells = []
    for run in runs:
        own = run.scores.get(name, {})
        shared, spread, lead = [key for key in own if key in first], answer_spread(run, name, confidence), None
        if spread and len(shared) >= MIN_ROWS and run is not runs[0]:
            lead = paired_bootstrap([own[key] for key in shared], [first[key] for key in shared], confidence)
        cells.append(Cell(mean(own.values()) if own else None, spread, lead))
    return Figure(ANSWERS, name, tuple(cells))


def _names(values: Sequence[object]) -> list[str]:
    return list(dict.fromkeys(name for own in values if isinstance(own, dict) for name in own))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
