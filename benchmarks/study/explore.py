r"""Settings beside those that a study has chosen, tried in its final worlds.

    python benchmarks/study/explore.py runs/study "Hbat-DPO, none" \
        --grid model.schedule.rounds 5 10 --grid model.instruction.lr 1.5e-3 3e-3

The first argument is the folder of a study whose worlds and SFT are made. Every combination of the grids takes the place of
what ``results/kept.jsonl`` has as chosen for the method. The table has the figures of every combination, and its paired
difference in score to two-stage DPO, or another method by ``--against``, with the settings chosen for that, with Student's
interval over worlds. Nothing is chosen by it: who takes the best of many rows takes luck with it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from kept import NEEDED_WHOLE
from methods import read_methods
from report import BASELINE, interval
from runs import Method, Trial, run
from scores import score
from study import TUNING, Plan
from workers import Workers
from world import Sizes

KEPT = Path(__file__).parent / "results" / "kept.jsonl"


def chosen(name: str) -> dict[str, Any]:
    """What the study has chosen for a method."""
    kept = (json.loads(line) for line in KEPT.read_text().splitlines())
    place = f"{name.replace(', ', '/')}/chosen"
    return dict(next(one["chosen"] for one in kept if one["place"].rpartition("-")[0] == place))


def combinations(grids: Sequence[Sequence[str]]) -> Iterator[dict[str, Any]]:
    """Settings of every combination of some keys' values.

    Args:
        grids: Of each key its name, and then its values.
    """
    keys, columns = [grid[0] for grid in grids], [grid[1:] for grid in grids]
    for values in itertools.product(*columns):
        yield {key: json.loads(value) for key, value in zip(keys, values, strict=True)}


def trials(
    plan: Plan, method: Method, settings: Mapping[str, Any], changes: Mapping[str, Any], seeds: Sequence[int]
) -> list[Trial]:
    """Runs of a method in several worlds.

    Args:
        plan: The study's.
        method: The method.
        settings: What the study has chosen for it.
        changes: What takes the place of that.
        seeds: Of the worlds.
    """
    name = ",".join(["explored", *(f"{key.rpartition('.')[2]}={value}" for key, value in changes.items())])
    return [plan.trial(method, {**settings, **changes}, seed, name) for seed in seeds]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of a study")
    parser.add_argument("method", help="which method, as in methods.yaml")
    parser.add_argument(
        "--grid", nargs="+", action="append", default=[], metavar="KEY VALUE", help="a key, and its values"
    )
    parser.add_argument("--against", default=BASELINE, metavar="METHOD", help="what differences are to")
    parser.add_argument("--seeds", type=int, nargs="+", default=[21, 22, 23, 24, 25], help="of the worlds")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    methods = read_methods()
    missing = [
        seed for seed in given.seeds if not (given.study / "runs" / f"{NEEDED_WHOLE}{seed}" / "result.json").exists()
    ]
    unknown = [name for name in (given.method, given.against) if name not in methods]
    if unknown:
        parser.error(f"no such method: {', '.join(unknown)}; there are {', '.join(methods)}")
    if missing:
        parser.error(f"no SFT of the worlds {missing} in {given.study}: run study.py first")
    golds = {
        seed: json.loads((given.study / "runs" / f"{NEEDED_WHOLE}{seed}" / "result.json").read_text())["gold"]
        for seed in given.seeds
    }
    plan, workers = Plan(given.study, Sizes(), TUNING, given.seeds, 0), Workers(given.workers)
    cases = list(combinations(given.grid))
    made = [trials(plan, methods[given.against], chosen(given.against), {}, given.seeds)]
    made += [trials(plan, methods[given.method], chosen(given.method), case, given.seeds) for case in cases]
    results = workers.all("runs", run, [trial for own in made for trial in own])
    by_case = [results[place : place + len(given.seeds)] for place in range(0, len(results), len(given.seeds))]
    print(table([given.against, *(_said(given.method, case) for case in cases)], by_case, golds))


def table(names: Sequence[str], by_case: Sequence[Sequence[Mapping[str, Any]]], golds: Mapping[int, float]) -> str:
    """Means over worlds, and differences in score to the first case.

    Args:
        names: Of the cases.
        by_case: Results of each, world by world.
        golds: Gold of SFT, by seed.
    """
    lines = [f"| what | exact | plain | gold | score | against {names[0]} |", "| --- | --- | --- | --- | --- | --- |"]
    scores = [[score(one, golds) for one in own] for own in by_case]
    for name, own, values in zip(names, by_case, scores, strict=True):
        figures = [f"{statistics.mean(one[figure] for one in own):.3f}" for figure in ("exact", "plain", "gold")]
        apart = [one - other for one, other in zip(values, scores[0], strict=True)]
        lead = interval(apart) if any(apart) and len(apart) > 1 else ""
        lines.append(f"| {name} | {' | '.join(figures)} | {statistics.mean(values):.3f} | {lead} |")
    return "\n".join(lines)


def _said(method: str, case: Mapping[str, Any]) -> str:
    return ", ".join([method, *(f"{key.removeprefix('model.')} {value:g}" for key, value in case.items())])


if __name__ == "__main__":
    main()
