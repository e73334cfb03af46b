"""Runs side by side as one page of HTML that asks for nothing: no network, no other file."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import partial
from html import escape
from importlib.resources import files
from typing import NamedTuple

from hbat_lightning.comparison.answers import answer_cards, sample_cards
from hbat_lightning.comparison.charts import (
    Frame,
    Line,
    Point,
    bar_chart,
    frame_of,
    heat_map,
    line_chart,
    scatter,
)
from hbat_lightning.comparison.pareto import HEIGHTS, spots_of, unlike
from hbat_lightning.comparison.runs import FORGOTTEN, OTHER, Run
from hbat_lightning.comparison.table import (
    Figure,
    about_intervals,
    format_cell,
    format_lead,
)
from hbat_lightning.phases import BOTH, INSTRUCTION, PREFERENCE

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
_WIDE = 5  # columns of figures that stand side by side with their intervals in one line
_SHORT = {INSTRUCTION: "instr.", PREFERENCE: "pref.", BOTH: "both"}


class _Section(NamedTuple):
    anchor: str
    title: str
    about: str
    content: str


def comparison_page(runs: Sequence[Run], figures: Sequence[Figure], confidence: float = 0.95, answers: int = 12) -> str:
    """The page.

    Args:
        runs: The runs; differences are to the first.
        figures: The table, of :func:`~hbat_lightning.comparison.table.compare`.
        confidence: Of its intervals.
        answers: How many prompts are shown with their answers.

    Returns:
        HTML; all that comes from the runs is escaped.
    """
    found = [
        _Section("figures", "Figures", _about_figures(runs, confidence), _table(runs, figures)),
        _Section(
            "settings", "Settings that differ", "Where nothing stands, the run has no such setting.", _settings(runs)
        ),
        *_curves(runs),
        _forgetting(runs),
        *_layers(runs),
        _pull(runs),
        *_conflict(runs),
        _pareto(runs, confidence),
        _Section(
            "answers",
            "Answers",
            "What hbat predict, or else hbat test, wrote for the same prompts; marked is what differs from the first run. "
            "Where answers differ in ROUGE-L or exact match most comes first.",
            answer_cards(runs, answers),
        ),
        _Section(
            "samples",
            "Samples at the switches",
            "The same held-out prompts as training went; marked is what has changed since the switch before.",
            sample_cards(runs),
        ),
    ]
    sections = [section for section in found if section.content]
    title = escape(" · ".join(run.name for run in runs))
    links = "".join(f'<a href="#{one.anchor}">{escape(one.title)}</a>' for one in sections)
    body = "".join(
        f'<section id="{one.anchor}"><h2>{escape(one.title)}</h2><p>{escape(one.about)}</p>{one.content}</section>'
        for one in sections
    )
    style, script = (
        files("hbat_lightning.comparison").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js")
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{style}</style></head>"
        f"<body><h1>{title}</h1><nav>{links}</nav>{body}<script>{script}</script></body></html>\n"
    )


# ---- tables -------------------------------------------------------------------------------------------------------------


def _about_figures(runs: Sequence[Run], confidence: float) -> str:
    differences = f" Differences are to {runs[0].name}, row by row; bold are those whose interval is without 0."
    return about_intervals(confidence) + (differences if len(runs) > 1 else "")


def _table(runs: Sequence[Run], figures: Sequence[Figure]) -> str:
    leads = any(cell.lead or cell.why for figure in figures for cell in figure.cells)
    head = "".join(f"<th>{_breakable(run.name)}</th>" for run in runs)
    if leads:
        head += "".join(f"<th>{_breakable(run.name)} − {_breakable(runs[0].name)}</th>" for run in runs[1:])
    lines, group = [f"<tr><th></th>{head}</tr>"], ""
    columns = 1 + len(runs) + (len(runs) - 1 if leads else 0)
    for figure in figures:
        if figure.group != group:
            group = figure.group
            lines.append(f'<tr class="group"><th colspan="{columns}">{escape(group)}</th></tr>')
        cells = [f"<td>{_soft_interval(format_cell(figure, cell))}</td>" for cell in figure.cells]
        if leads:
            cells += [
                f'<td class="{"decided" if cell.lead and cell.lead.decided else ""}">{_soft_interval(format_lead(cell))}</td>'
                for cell in figure.cells[1:]
            ]
        lines.append(f"<tr><td>{_breakable(figure.name)}</td>{''.join(cells)}</tr>")
    many = ' class="many"' if columns > _WIDE else ""
    return f'<div class="scroll"><table{many}>{"".join(lines)}</table></div>'


def _breakable(name: str) -> str:
    """A name that may go on in another line behind its parts."""
    return re.sub(r"([/._])", r"\1<wbr>", escape(name))


def _soft_interval(text: str) -> str:
    value, bracket, rest = escape(text.removesuffix(" *")).partition(" [")
    return f"{value} <small>[{rest}</small>" if bracket else value


def _settings(runs: Sequence[Run]) -> str:
    names = dict.fromkeys(name for run in runs for name in run.settings)
    differ = [
        name
        for name in names
        if not name.endswith("default_root_dir") and len({repr(run.settings.get(name)) for run in runs}) > 1
    ]
    if len(runs) < 2 or not differ:
        return ""
    head = "".join(f'<th class="text">{_breakable(run.name)}</th>' for run in runs)
    lines = []
    for name in differ:
        cells = "".join(f'<td class="text">{escape(str(run.settings.get(name, "")))}</td>' for run in runs)
        lines.append(f"<tr><td>{_breakable(name)}</td>{cells}</tr>")
    return f'<div class="scroll"><table><tr><th></th>{head}</tr>{"".join(lines)}</table></div>'


# ---- pictures, a panel for each run -------------------------------------------------------------------------------------


def _panels(runs: Sequence[Run], chart: Callable[[Run], str]) -> str:
    drawn = [(run, chart(run)) for run in runs]
    shown = "".join(f"<figure><figcaption>{escape(run.name)}</figcaption>{svg}</figure>" for run, svg in drawn if svg)
    return f'<div class="panels">{shown}</div>' if shown else ""


def _legend(*keys: tuple[str, str]) -> str:
    shown = "".join(f'<span><i class="key {kind}"></i>{escape(label)}</span>' for kind, label in keys)
    return f'<div class="legend">{shown}</div>'


def _end(runs: Sequence[Run]) -> float:
    return float(max((run.steps for run in runs), default=1))


_PHASES = _legend((INSTRUCTION, "instruction phase"), (PREFERENCE, "preference phase"))


def _curves(runs: Sequence[Run]) -> list[_Section]:
    training, held_out = "", ""
    for kind in (INSTRUCTION, PREFERENCE):
        for figure in ("loss", "reward"):
            training += _same_frame(runs, f"train/{kind}/{figure}", kind, dots=False)
        for figure in ("loss", "exact_match", "accuracy", "reward"):
            held_out += _same_frame(runs, f"val/{kind}/{figure}", kind, dots=True)
    return [
        _Section(
            "training", "Training", "Shaded are the phases; all runs on one scale.", training and _PHASES + training
        ),
        _Section("held-out", "Held-out rows", "At the switches.", held_out and _PHASES + held_out),
    ]


def _same_frame(runs: Sequence[Run], column: str, kind: str, dots: bool) -> str:
    def points(run: Run) -> list[Point]:
        return run.held_out(column) if dots else run.curve(column)

    curves = [points(run) for run in runs]
    if not any(curves):
        return ""
    frame = frame_of(curves, _end(runs), log=column.endswith("/loss"))

    def chart(run: Run) -> str:
        own = points(run)
        return (own and line_chart(f"{column}, {run.name}", frame, [Line(column, own, kind, dots)], run.spans)) or ""

    return f"<h3>{escape(column)}</h3>" + _panels(runs, chart)


def _forgetting(runs: Sequence[Run]) -> _Section:
    shown = ""
    for kind, figure in FORGOTTEN:
        changes = [[(float(step), value) for step, value in run.forgetting(figure, kind)] for run in runs]
        if not any(changes):
            continue
        expected = [run.interference(kind) for run in runs] if figure.endswith("/loss") else []
        frame = frame_of([*changes, *expected], _end(runs), zero=True)
        shown += f"<h3>change of {escape(figure)} by {OTHER[kind]} phases</h3>"
        shown += _panels(runs, partial(_forgetting_chart, kind=kind, figure=figure, frame=frame))
    keys = [(INSTRUCTION, "instruction figure"), (PREFERENCE, "preference figure")]
    if any(run.interference(kind) for run in runs for kind in OTHER):
        keys.append(("expected", "pale: first order, from GradientConflict"))
    about = "What each phase did to the objective that it did not train: a loss that rises, an accuracy that falls."
    return _Section("forgetting", "Forgetting at each switch", about, shown and _legend(*keys) + shown)


def _forgetting_chart(run: Run, kind: str, figure: str, frame: Frame) -> str:
    bars = [(float(step), value, kind, f"{figure}, step {step}") for step, value in run.forgetting(figure, kind)]
    if not bars:
        return ""
    expected = run.interference(kind) if figure.endswith("/loss") else []
    shift = 0.04 * frame.x[1]  # beside the bar of what came
    bars += [(step - shift, value, f"{kind} expected", f"first order, step {step:.0f}") for step, value in expected]
    return bar_chart(f"change of {figure}, {run.name}", frame, bars, run.spans)


def _layers(runs: Sequence[Run]) -> list[_Section]:
    def section(what: str, title: str, about: str) -> _Section:
        def chart(run: Run) -> str:
            columns = run.by_layer(what)
            names = list(dict.fromkeys(name for column in columns for name in column))
            values = [[column.get(name) for column in columns] for name in names]
            labels = [f"{number + 1} {_SHORT[row['objective']]}" for number, row in enumerate(run.switches)]
            return heat_map(f"{title}, {run.name}", names, labels, values, signed=False) if names else ""

        return _Section(what, title, about, _panels(runs, chart))

    return [
        section(
            "drift",
            "Drift per layer",
            "Root mean square of what each phase moved; as strong as the root of the share of the run's largest.",
        ),
        section(
            "importance",
            "Importance per layer",
            "What EWC or freezing protected in each phase: how much the other objective's phases had moved a layer.",
        ),
    ]


def _pull(runs: Sequence[Run]) -> _Section:
    shown = ""
    for column in ("ewc/penalty", "ewc/pull_norm", "ewc/task_gradient_norm"):
        if any(value for run in runs for _, value in run.curve(column)):
            shown += _same_frame(runs, column, "debiased", dots=False)
    about = "The penalty, and the norms of its gradient and of the task's, step by step."
    return _Section("pull", "EWC's pull", about, shown)


def _conflict(runs: Sequence[Run]) -> list[_Section]:
    names = (("cosine", "debiased", "gradients, debiased"), ("plain_cosine", "noisy dashed", "gradients, with noise"))
    kinds = (*names, ("tug_of_war", "tug", "drifts of consecutive phases"))

    def points(run: Run, name: str) -> list[Point]:
        return [(float(row["step"]), row["all"][name]) for row in run.conflict if name in row["all"]]

    frame = frame_of([points(run, name) for run in runs for name, _, _ in kinds], _end(runs), zero=True)

    def curves(run: Run) -> str:
        lines = [Line(label, points(run, name), kind, dots=True) for name, kind, label in kinds]
        return line_chart(f"cosines, {run.name}", frame, lines, run.spans) if run.conflict else ""

    def layers(run: Run) -> str:
        names = list(dict.fromkeys(name for row in run.conflict for name in row["layers"]))
        values = [[row["layers"].get(name, {}).get("cosine") for row in run.conflict] for name in names]
        steps = [f"{row['step']}" for row in run.conflict]
        return heat_map(f"cosine by layer, {run.name}", names, steps, values, signed=True) if names else ""

    shown, by_layer = _panels(runs, curves), _panels(runs, layers)
    legend = _legend(*((kind.split()[0], label) for _, kind, label in kinds))
    signs = _legend((INSTRUCTION, "with each other"), (PREFERENCE, "against each other"))
    return [
        _Section(
            "conflict",
            "Gradient conflict",
            "Cosine of the two objectives' gradients on held-out rows; below 0 they pull against each other. A debiased "
            "cosine beyond 1 or -1 comes from noise that more rows would take away.",
            shown and legend + shown,
        ),
        _Section(
            "layers",
            "Gradient conflict per layer",
            "Debiased cosines, by optimizer step.",
            by_layer and signs + by_layer,
        ),
    ]


def _pareto(runs: Sequence[Run], confidence: float) -> _Section:
    about = "Up and to the right is better. The dotted line joins the runs that no other beats in both."
    spots = {name: spots_of(runs, name, confidence) for name in HEIGHTS}
    label = max(spots, key=lambda name: len(spots[name]))  # one figure for all, that as many as can be have
    if not spots[label]:
        return _Section("pareto", "", "", "")
    shown = {spot.name for spot in spots[label]}
    others = unlike(runs, label)
    missing = [run.name for run in runs if run.name not in shown and run.name not in others]
    if missing:
        about += f" Without ROUGE-L or {label}, and so not here: {', '.join(missing)}."
    if others:
        about += f" Their {label} is another measure, and so they are not here: {', '.join(others)}."
    chart = scatter("ROUGE-L against reward", ("ROUGE-L", label), spots[label])
    content = f'<div class="panels"><figure><figcaption>{escape(label)} over ROUGE-L</figcaption>{chart}</figure></div>'
    return _Section("pareto", "ROUGE against reward", about, content)
