"""What a run folder holds, as far as it is there."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from hbat_lightning.completions import Completed
from hbat_lightning.conflict import layer_of
from hbat_lightning.errors import UserError
from hbat_lightning.files import whole_lines
from hbat_lightning.metrics import CompletionMetric, Distinct, standard_metrics
from hbat_lightning.metrics_logger import read_rows
from hbat_lightning.phases import INSTRUCTION, PREFERENCE
from hbat_lightning.privacy import without_secret_settings

OTHER = {INSTRUCTION: PREFERENCE, PREFERENCE: INSTRUCTION}
Row = dict[str, Any]
UNKNOWN = "unknown"  # what a score depends on that another program, or an earlier version, has written
Key = tuple[str, int]
"""A prompt, and how many rows before it have the same one."""


@dataclass(frozen=True)
class Span:
    """Optimizer steps of a phase.

    Attributes:
        begin: Steps before it.
        end: Steps up to its end.
        objective: What it trained.
    """

    begin: int
    end: int
    objective: str


@dataclass(frozen=True)
class HeldOut:
    """What a held-out figure at the end of a run is the mean of.

    Attributes:
        rows: Digest of the set of held-out rows.
        scale: What it depends on beside rows and policy.
        sums: Of each row, or micro-batch.
        counts: How many units each is a sum of.
    """

    rows: str
    scale: str
    sums: list[float]
    counts: list[float]

    def differs_from(self, other: HeldOut) -> str:
        """Why the two are not compared: other rows, or another measure; empty where they are."""
        if (self.rows, self.counts) != (other.rows, other.counts):
            return "other rows"
        return "" if self.scale == other.scale else "other measure"


@dataclass(frozen=True)
class Run:
    """A run, by what it has written. A file that is not there is as good as empty.

    Attributes:
        name: What it is called in a comparison.
        metrics: Rows of ``metrics.csv``, of each the figures that it has.
        evaluation: The last value of every column of ``evaluation.csv``.
        switches: Rows of ``switches.jsonl``.
        conflict: Rows of ``conflict.jsonl``.
        samples: Rows of ``samples.jsonl``.
        answers: Rows of ``predictions.jsonl``, with the scores of the standard metrics.
        tested: Rows of ``tested.jsonl``.
        rows: Figures of ``held_out.json``, if it is of the last switch.
        validated: Figures of ``validated.json``.
        settings: ``config.yaml``, flat, without what is named like a secret.
    """

    name: str
    metrics: list[dict[str, float]] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    switches: list[Row] = field(default_factory=list)
    conflict: list[Row] = field(default_factory=list)
    samples: list[Row] = field(default_factory=list)
    answers: dict[Key, Completed] = field(default_factory=dict)
    tested: dict[Key, Completed] = field(default_factory=dict)
    rows: dict[str, HeldOut] = field(default_factory=dict)
    validated: dict[str, HeldOut] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def spans(self) -> list[Span]:
        """Its phases."""
        return [Span(row["step"] - row["steps"], row["step"], row["objective"]) for row in self.switches]

    @cached_property
    def steps(self) -> int:
        """Optimizer steps that it has logged."""
        logged = [int(row["step"]) + 1 for row in self.metrics]
        return max([*logged, *(span.end for span in self.spans)], default=0)

    def curve(self, column: str) -> list[tuple[float, float]]:
        """A column of ``metrics.csv`` over the optimizer steps that were made."""
        return [(row["step"] + 1, row[column]) for row in self.metrics if column in row]

    def held_out(self, figure: str) -> list[tuple[float, float]]:
        """A held-out figure at the switches, the one before the first phase too; else of all validations."""
        points = [(row["step"], row["after"][figure]) for row in self.switches if figure in row["after"]]
        first = self.switches[0] if self.switches else None
        if points and first is not None and figure in first["before"]:
            points = [(first["step"] - first["steps"], first["before"][figure]), *points]
        return points or self.curve(figure)

    def forgetting(self, figure: str, objective: str) -> list[tuple[int, float]]:
        """Changes of a figure in the phases of the other objective alone, by their last steps."""
        own = [row for row in self.switches if row["objective"] == OTHER[objective] and figure in row["change"]]
        return [(row["step"], row["change"][figure]) for row in own]

    def interference(self, objective: str) -> list[tuple[float, float]]:
        """What the phases of the other objective were predicted to change of an objective's loss, by their last steps."""
        rows = [row for row in self.conflict if row["ends"] and row["objective"] == OTHER[objective]]
        return [(float(row["step"]), row["all"]["interference"]) for row in rows if "interference" in row["all"]]

    def by_layer(self, what: str) -> list[dict[str, float]]:
        """Root mean square over the tensors of each layer, phase by phase, of a figure of ``switches.jsonl``."""
        found = []
        for row in self.switches:
            squares: dict[str, list[float]] = {}
            for name, value in row.get(what, {}).items():
                squares.setdefault(layer_of(name), []).append(value**2)
            found.append({layer: math.sqrt(sum(values) / len(values)) for layer, values in squares.items()})
        return found

    @cached_property
    def variety(self) -> dict[str, float]:
        """Distinct-n of its answers."""
        metric = Distinct()
        metric.update(list(self.answers.values()))
        return {name: float(value) for name, value in metric.compute().items()}

    @cached_property
    def shown(self) -> dict[Key, Completed]:
        """Its answers to look at: those of ``hbat predict``, and where there are none those of ``hbat test``."""
        return self.answers or self.tested


def scores_of(answers: Mapping[Key, Completed]) -> dict[str, dict[Key, float]]:
    """Of every score the value of each answer that has it."""
    found: dict[str, dict[Key, float]] = {}
    for key, answer in answers.items():
        for name, value in answer.scores.items():
            found.setdefault(name, {})[key] = value
    return found


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders.

    Raises:
        UserError: One holds no run, or a file in it cannot be understood.
    """
    return [_read(folder, name) for folder, name in zip(folders, _shown(folders), strict=True)]


def _shown(folders: Sequence[Path]) -> list[str]:
    """What runs are called: their folders' names, and of those with the same name all that tells them apart."""
    whole = [folder.resolve() for folder in folders]
    names = Counter(folder.name for folder in whole)
    alike = [folder for folder in whole if names[folder.name] > 1]
    above = os.path.commonpath([folder.parent for folder in alike]) if alike else ""
    return [folder.relative_to(above).as_posix() if folder in alike else folder.name for folder in whole]


_ANY = ("metrics.csv", "switches.jsonl", "predictions.jsonl", "tested.jsonl", "validated.json")


def _read(folder: Path, name: str) -> Run:
    if not any((folder / file).is_file() for file in _ANY):
        raise UserError(
            f"{folder} holds no run: give folders that --trainer.default_root_dir named, as in hbat compare A B"
        )
    try:
        switches = _rows(folder / "switches.jsonl")
        return Run(
            name=name,
            metrics=_numbers(folder / "metrics.csv"),
            evaluation={key: value for row in _numbers(folder / "evaluation.csv") for key, value in row.items()},
            switches=switches,
            conflict=_rows(folder / "conflict.jsonl"),
            samples=_rows(folder / "samples.jsonl"),
            answers=_answers(_rows(folder / "predictions.jsonl"), standard_metrics()),
            tested=_answers(_rows(folder / "tested.jsonl"), ()),
            rows=_held_out(folder / "held_out.json", switches),
            validated=_figures(folder / "validated.json"),
            settings=_settings(folder / "config.yaml"),
        )
    except (ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(
            f"{folder}: a file of the run cannot be understood ({type(error).__name__}: {error}); was it changed by hand?"
        ) from error


def _rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in whole_lines(path)] if path.exists() else []


def _held_out(path: Path, switches: Sequence[Row]) -> dict[str, HeldOut]:
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not switches or kept.get("step") != switches[-1]["step"]:
        return {}  # a run that was stopped while it wrote the two
    return _figures(path)


def _figures(path: Path) -> dict[str, HeldOut]:
    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"figures": {}}
    return {name: HeldOut(**values) for name, values in kept["figures"].items()}


def _numbers(path: Path) -> list[dict[str, float]]:
    rows = read_rows(path)[1]
    return [{column: float(value) for column, value in row.items() if value} for row in rows]


def _answers(rows: Sequence[Row], metrics: Sequence[CompletionMetric]) -> dict[Key, Completed]:
    """Answers by prompt, with what further metrics say of them where the rows do not say it already."""
    seen: Counter[str] = Counter()
    found: dict[Key, Completed] = {}
    plain = {name for metric in standard_metrics() for name in metric.names}
    for row in rows:
        fields = {name: row[name] for name in ("prompt", "completion", "reference", "tokens", "stopped")}
        found[row["prompt"], seen[row["prompt"]]] = Completed(
            **fields,
            scores=dict(row.get("scores", {})),
            scales=dict(row["scales"]) if "scales" in row else _unknown(row, plain),
        )
        seen[row["prompt"]] += 1
    answers = list(found.values())
    further = [replace(answer, scores={}, scales={}) for answer in answers]
    for metric in metrics:
        metric.annotate(further)
    for answer, more in zip(answers, further, strict=True):
        scales = {name: scale for name, scale in more.scales.items() if name not in answer.scores}
        answer.scores, answer.scales = more.scores | answer.scores, scales | answer.scales
    return found


def _unknown(row: Row, plain: Collection[str]) -> dict[str, str]:
    """Scales of a row that has none: only what the standard metrics say, ``plain``, is known to depend on nothing else."""
    return {name: UNKNOWN for name in row.get("scores", {}) if name not in plain}


def _settings(path: Path) -> dict[str, Any]:
    settings = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(_flat(without_secret_settings(settings)))


def _flat(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _flat(inner, path if key == "init_args" else f"{path}.{key}".lstrip("."))
    elif isinstance(value, list) and any(isinstance(one, dict) for one in value):
        for one in value:
            name = str(one.get("class_path", "")).rpartition(".")[2] if isinstance(one, dict) else str(one)
            yield from _flat(one, f"{path}.{name}")
    else:
        yield path, value


FORGOTTEN = (
    (INSTRUCTION, "val/instruction/loss"),
    (INSTRUCTION, "val/instruction/exact_match"),
    (PREFERENCE, "val/preference/loss"),
    (PREFERENCE, "val/preference/accuracy"),
    (PREFERENCE, "val/preference/reward"),
)
"""Objectives, and the held-out figures that say what the other one's phases have cost them."""
