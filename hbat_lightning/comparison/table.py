"""Runs side by side in figures, with intervals where they have answered the same prompts."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from hbat_lightning.comparison.runs import FORGOTTEN, OTHER, UNKNOWN, HeldOut, Key, Run, scores_of
from hbat_lightning.completions import Completed
from hbat_lightning.metrics import MIN_ROWS, Interval, bootstrap, paired_bootstrap


@dataclass(frozen=True)
class Cell:
    """What one run has of a figure.

    Attributes:
        value: The figure; ``None`` where the run has none.
        spread: Its interval, where it is a mean over answers or held-out rows.
        lead: By how much it is ahead of the first run on the prompts that both have answered, or on the held-out rows where
            they are the same; ``None`` for the first.
        why: Why there is no lead, where both runs have rows of the figure.
    """

    value: float | None
    spread: Interval | None = None
    lead: Interval | None = None
    why: str = ""


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        group: What kind of figure it is.
        name: Its name.
        cells: A cell for each run.
        counted: It is a number of things.
    """

    group: str
    name: str
    cells: tuple[Cell, ...]
    counted: bool = False


def compare(runs: Sequence[Run], confidence: float = 0.95) -> list[Figure]:
    """All figures that some run has.

    Args:
        runs: The runs; differences are to the first.
        confidence: Of the intervals.
    """
    at_end, validated = [_at_end(run) for run in runs], [_validated(run) for run in runs]
    kept, validated_rows = [run.rows for run in runs], [run.validated for run in runs]
    answers, tested = [run.answers for run in runs], [run.tested for run in runs]
    variety = [run.variety for run in runs]
    return [
        *_plain("training", [_counts(run) for run in runs], counted=True),
        *_plain("training", [_training(run) for run in runs]),
        *_of_held_out("held out, at the end", at_end, kept, confidence),
        *_plain("held out, mean change by the other's phases", [_forgetting(run) for run in runs]),
        *_plain("conflict", [_conflict(run) for run in runs]),
        *_of_held_out("hbat validate", validated, validated_rows, confidence),
        *_of_answers("hbat test, mean over answers", tested, confidence),
        *_plain("hbat test", [_further_tests(run) for run in runs]),
        *_of_answers("hbat predict, mean over answers", answers, confidence),
        *_plain("hbat predict", variety),
    ]


def as_markdown(runs: Sequence[Run], figures: Sequence[Figure], confidence: float = 0.95) -> str:
    """The table in Markdown."""
    head = ["", *(run.name for run in runs), *(f"{run.name} − {runs[0].name}" for run in runs[1:])]
    lines = [head, ["---", *["--:"] * (len(head) - 1)]]
    group = ""
    for figure in figures:
        if figure.group != group:
            group = figure.group
            lines.append([f"**{group}**", *[""] * (len(head) - 1)])
        own = [format_cell(figure, cell) for cell in figure.cells]
        lines.append([figure.name, *own, *(format_lead(cell) for cell in figure.cells[1:])])
    table = "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)
    return f"{table}\n\n{about_intervals(confidence)} Differences are paired; * marks those without 0.\n"


def about_intervals(confidence: float) -> str:
    """What intervals are of, and which figures have none."""
    return (
        f"Intervals are of {confidence:.0%}, from a bootstrap over held-out rows or prompts. They know nothing of other seeds. "
        f"Fewer than {MIN_ROWS} have none, and other figures neither. Two runs are compared where they have the same rows or "
        f"prompts, and the same measure: loss, reference, reward, judge, opponents."
    )


def as_csv(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    """A row for each run and figure: the value, its interval, the difference from the first run with its interval, and rows.

    The last column says why there is no difference, where both runs have rows.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    ends = ["value", "low", "high", "rows", "difference", "difference_low", "difference_high", "difference_rows"]
    writer.writerow(["group", "figure", "run", *ends, "not_compared"])
    for figure in figures:
        for run, cell in zip(runs, figure.cells, strict=True):
            if cell.value is None:
                continue
            spread = ["", "", ""] if cell.spread is None else [cell.spread.low, cell.spread.high, cell.spread.rows]
            lead: Sequence[object] = ["", "", "", ""] if cell.lead is None else cell.lead
            writer.writerow([figure.group, figure.name, run.name, cell.value, *spread, *lead, cell.why])
    return text.getvalue()


def held_out_spread(rows: HeldOut | None, confidence: float) -> Interval | None:
    """Interval of a held-out figure; none where too few rows of it are known."""
    if rows is None or sum(count > 0 for count in rows.counts) < MIN_ROWS:
        return None
    return bootstrap(rows.sums, confidence, counts=rows.counts)


def answer_spread(values: Collection[float], confidence: float) -> Interval | None:
    """Interval of a mean over answers; none where there are too few."""
    return bootstrap(list(values), confidence) if len(values) >= MIN_ROWS else None


def format_cell(figure: Figure, cell: Cell) -> str:
    """A value, with its interval where it has one."""
    if cell.value is None:
        return "–"
    if figure.counted:
        return f"{cell.value:,.0f}"
    spread = "" if cell.spread is None else f" [{number(cell.spread.low)}, {number(cell.spread.high)}]"
    return number(cell.value) + spread


def format_lead(cell: Cell) -> str:
    """A difference with its interval, marked where 0 is outside; where there is none, why."""
    if cell.lead is None:
        return cell.why
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


def _counts(run: Run) -> dict[str, float]:
    return {"optimizer steps": float(run.steps), "phases": float(len(run.spans))}


def _training(run: Run) -> dict[str, float]:
    found = {}
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
            found[figure] = mean(changes)
    return found


def _conflict(run: Run) -> dict[str, float]:
    found = {}
    for name in ("cosine", "plain_cosine", "tug_of_war"):
        values = [row["all"][name] for row in run.conflict if name in row["all"]]
        if values:
            found[f"{name}, mean"] = mean(values)
    for objective in OTHER:  # changes of two losses, which have no mean
        predicted = [value for _, value in run.interference(objective)]
        if predicted:
            found[f"interference with {objective}, mean over phases"] = mean(predicted)
    return found


def _validated(run: Run) -> dict[str, float]:
    return {name: value for name, value in run.evaluation.items() if name.startswith("val/")}


def _further_tests(run: Run) -> dict[str, float]:
    """Figures of ``hbat test`` that are no means over the answers that it has kept."""
    tests = {name.removeprefix("test/"): value for name, value in run.evaluation.items() if name.startswith("test/")}
    means = scores_of(run.tested)
    ends = {f"{name}_{end}" for name in means for end in ("low", "high")}
    return {name: value for name, value in tests.items() if name not in means and name not in ends}


def _plain(group: str, values: Sequence[dict[str, float]], counted: bool = False) -> list[Figure]:
    return [Figure(group, name, tuple(Cell(own.get(name)) for own in values), counted) for name in _names(values)]


def _of_held_out(
    group: str, values: Sequence[dict[str, float]], rows: Sequence[dict[str, HeldOut]], confidence: float
) -> list[Figure]:
    def cell(run: int, name: str) -> Cell:
        value, own, first = values[run].get(name), rows[run].get(name), rows[0].get(name)
        spread = held_out_spread(own, confidence)
        if run == 0 or own is None or spread is None or first is None:
            return Cell(value, spread)
        why = own.differs_from(first)
        lead = None if why else paired_bootstrap(own.sums, first.sums, confidence, counts=own.counts)
        return Cell(value, spread, lead, why)

    return [Figure(group, name, tuple(cell(run, name) for run in range(len(values)))) for name in _names(values)]


def _of_answers(group: str, answers: Sequence[dict[Key, Completed]], confidence: float) -> list[Figure]:
    values = [scores_of(own) for own in answers]

    def cell(run: int, name: str) -> Cell:
        own, first = values[run].get(name, {}), values[0].get(name, {})
        value, spread = mean(own.values()) if own else None, answer_spread(own.values(), confidence)
        if run == 0 or spread is None or not first:
            return Cell(value, spread)
        pairs = [(answers[run][key], answers[0][key]) for key in own if key in first]
        why = _differ(name, pairs)
        lead = None if why else paired_bootstrap(*_paired(name, pairs), confidence)
        return Cell(value, spread, lead, why)

    return [Figure(group, name, tuple(cell(run, name) for run in range(len(values)))) for name in _names(values)]


def _differ(name: str, pairs: Sequence[tuple[Completed, Completed]]) -> str:
    """Why the scores of two runs are not compared; empty where they are."""
    if len(pairs) < MIN_ROWS:
        return "other prompts"
    if any(one.reference != other.reference for one, other in pairs):
        return "other rows"
    scales = {(one.scales.get(name), other.scales.get(name)) for one, other in pairs}
    if any(UNKNOWN in pair for pair in scales):
        return "unknown measure"
    return "other measure" if any(one != other for one, other in scales) else ""


def _paired(name: str, pairs: Sequence[tuple[Completed, Completed]]) -> tuple[list[float], list[float]]:
    return [one.scores[name] for one, _ in pairs], [other.scores[name] for _, other in pairs]


def _names(values: Sequence[Mapping[str, object]]) -> list[str]:
    return list(dict.fromkeys(name for own in values for name in own))


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")
