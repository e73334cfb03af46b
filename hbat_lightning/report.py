"""What a run did at its switches, as rows, a table and a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hbat_lightning.files import whole_lines
from hbat_lightning.phases import BOTH, INSTRUCTION, PREFERENCE

Row = dict[str, Any]

_COLUMNS = (
    ("val/instruction/loss", "instr. loss", "{:.3f}"),
    ("val/instruction/exact_match", "exact match", "{:.3f}"),
    ("val/preference/loss", "pref. loss", "{:.3f}"),
    ("val/preference/accuracy", "pref. acc.", "{:.3f}"),
    ("val/preference/reward", "reward", "{:.3f}"),
)
COLOURS = {INSTRUCTION: "#3b6fb6", PREFERENCE: "#c4572e", BOTH: "#6b7280"}


def read_switches(path: Path) -> list[Row]:
    """Rows of a ``switches.jsonl``, up to a last one that was torn as it was written; none where there is no file."""
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def switch_table(rows: Sequence[Row]) -> str:
    """Held-out figures before and after every phase.

    Args:
        rows: Rows of ``switches.jsonl``.

    Returns:
        A text table; each cell is ``before → after``.
    """
    shown = [column for column in _COLUMNS if any(column[0] in row["after"] for row in rows)]
    cells = [["round", "phase", "steps", *(title for _, title, _ in shown)]]
    for row in rows:
        figures = [_change(row, key, form) for key, _, form in shown]
        cells.append([str(row["round"] + 1), row["objective"], str(row["steps"]), *figures])
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def draw_switches(rows: Sequence[Row], path: Path) -> None:
    """Draw the same figures over optimizer steps, phases shaded by objective.

    Args:
        rows: Rows of ``switches.jsonl``, at least one.
        path: The PNG file to write.
    """
    # The object-oriented interface: pyplot would keep state, and pick a backend that may want a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    shown = [column for column in _COLUMNS if any(column[0] in row["after"] for row in rows)]
    figure = Figure(figsize=(4.2 * max(1, (len(shown) + 1) // 2), 6.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, max(1, (len(shown) + 1) // 2), squeeze=False)
    for axis, (key, title, _) in zip(axes.T.flat, shown, strict=False):
        points = [(row["step"] - row["steps"], row["before"][key]) for row in rows[:1] if key in row["before"]]
        points += [(row["step"], row["after"][key]) for row in rows if key in row["after"]]
        for row in rows:
            axis.axvspan(row["step"] - row["steps"], row["step"], color=COLOURS[row["objective"]], alpha=0.13, lw=0)
        colour = COLOURS[key.split("/")[1]]
        axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6)
        axis.set(title=f"held-out {title}", xlabel="optimizer step")
        if key.endswith("/loss"):
            axis.set_yscale("log")  # the first phase's fall would flatten all that follows
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
    for axis in list(axes.T.flat)[len(shown) :]:
        axis.set_visible(False)
    trained = [name for name in COLOURS if any(row["objective"] == name for row in rows)]
    handles = [Patch(color=COLOURS[name], alpha=0.3, label=f"{name} phase") for name in trained]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, dpi=120)


def _change(row: Row, key: str, form: str) -> str:
    before, after = row["before"].get(key), row["after"].get(key)
    sides = ["–" if value is None else form.format(value) for value in (before, after)]
    return " → ".join(sides)
