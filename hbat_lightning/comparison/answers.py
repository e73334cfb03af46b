"""What runs have written, prompt by prompt, as HTML."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from hbat_lightning.comparison.differences import marked
from hbat_lightning.comparison.runs import Key, Row, Run

_SHOWN = ("rougeL", "exact_match", "reward", "judge_win_rate")
_MOST_PROMPTS = 8


def answer_cards(runs: Sequence[Run], count: int) -> str:
    """A card for each of some prompts: the data's answer, and every run's.

    Args:
        runs: The runs; those that have answered nothing are left out, and the others' answers marked against the first's.
        count: How many prompts; those first on which the runs differ most.
    """
    runs = [run for run in runs if run.shown]
    if not runs:
        return ""
    shared = [key for key in runs[0].shown if all(key in run.shown for run in runs)]
    chosen = sorted(shared, key=lambda key: -_disagreement(runs, key))[:count]
    return "".join(_card(runs, key) for key in chosen)


def _disagreement(runs: Sequence[Run], key: Key) -> float:
    spreads = []
    for name in _SHOWN[:2]:
        values = [run.shown[key].scores[name] for run in runs if name in run.shown[key].scores]
        spreads.append(max(values) - min(values) if values else 0.0)
    return sum(spreads)


def _card(runs: Sequence[Run], key: Key) -> str:
    first = runs[0].shown[key]
    parts = [_answer("the data's answer", escape(first.reference), "")] if first.reference else []
    for run in runs:
        own = run.shown[key]
        text = escape(own.completion) if run is runs[0] else _marked(own.completion, first.completion)
        scores = " · ".join(f"{name} {own.scores[name]:.3f}" for name in _SHOWN if name in own.scores)
        parts.append(_answer(run.name, text, scores))
    return f'<article><div class="prompt">{escape(first.prompt)}</div><div class="answers">{"".join(parts)}</div></article>'


def _marked(text: str, other: str) -> str:
    """Nothing of an empty answer: all of the other one, struck out, would be read as if it said that."""
    return marked(text, other) if text.strip() else ""


def _answer(name: str, text: str, note: str) -> str:
    shown = text or "<small>(nothing)</small>"
    return f'<div class="answer"><b>{escape(name)}</b><div>{shown}</div><small>{escape(note)}</small></div>'


def sample_cards(runs: Sequence[Run]) -> str:
    """Samples of the switches, with a chooser of the switch for each run."""
    return "".join(_samples(run, number) for number, run in enumerate(runs) if run.samples)


def _samples(run: Run, number: int) -> str:
    steps = list(dict.fromkeys(row["step"] for row in run.samples))
    by_step: list[list[Row]] = [[row for row in run.samples if row["step"] == step] for step in steps]
    labels = [_label(run, rows[0]) for rows in by_step]
    last = len(steps) - 1
    options = "".join(
        f'<option value="{place}"{" selected" if place == last else ""}>{escape(label)}</option>'
        for place, label in enumerate(labels)
    )
    parts = []
    for place, rows in enumerate(by_step):
        before = by_step[place - 1] if place else [None] * len(rows)
        kinds = dict.fromkeys(row["objective"] for row in rows)
        most = {kind: [row for row in rows if row["objective"] == kind][:_MOST_PROMPTS] for kind in kinds}
        shown = [
            _sample(row, earlier)
            for row, earlier in zip(rows, before, strict=False)
            if any(row is one for one in most[row["objective"]])
        ]
        parts.append(
            f'<div data-part="run{number}" data-choice="{place}"><h3>{escape(labels[place])}</h3>{"".join(shown)}</div>'
        )
    chooser = f'<label hidden>show <select data-of="run{number}">{options}</select></label>'
    return f"<h3>{escape(run.name)}</h3>{chooser}{''.join(parts)}"


def _sample(row: Row, earlier: Row | None) -> str:
    text = escape(row["completion"]) if earlier is None else _marked(row["completion"], earlier["completion"])
    parts = [_answer("the data's answer", escape(row["reference"]), "")] if row["reference"] else []
    parts.append(_answer("completion", text, "" if row["stopped"] else "cut off"))
    return (
        f'<article><div class="prompt">{escape(row["objective"])} · {escape(row["prompt"])}</div>'
        f'<div class="answers">{"".join(parts)}</div></article>'
    )


def _label(run: Run, row: Row) -> str:
    ended = next((span.objective for span in run.spans if span.end == row["step"]), None)
    if row["step"] == 0:
        return "before training"
    return f"step {row['step']}" + (f", after a phase of {ended}" if ended else "")
