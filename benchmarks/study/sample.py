"""How long the study takes, and whether it comes out the same, from some of its runs.

    python benchmarks/study/sample.py                   # all worlds, all of SFT, and 40 of the other runs
    python benchmarks/study/sample.py --runs 10 --output runs/sample

Worlds are made, and with them what other runs start from, as the study makes them; then as many runs as are asked for, drawn
from all that the study has made (``results/kept.jsonl``), are made again. It prints how long all of the study would have taken
at this pace, with a 95 % bootstrap interval over the runs that were drawn, and by how much results differ from those that are
kept: other processors round in another way.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kept import NEEDED_WHOLE
from methods import read_methods
from runs import Method, Trial, run
from study import TUNING, Plan
from workers import Workers
from world import Sizes, make_world

from hbat_lightning.metrics import bootstrap

KEPT = Path(__file__).parent / "results" / "kept.jsonl"
FIGURES = ("exact", "gold", "rougeL")


def timed(trial: Trial) -> dict[str, Any]:
    """A run's result, and the seconds that it took."""
    begun = time.perf_counter()
    result = run(trial)
    return result | {"seconds": time.perf_counter() - begun}


def trial_of(result: Mapping[str, Any], methods: Mapping[str, Method], plan: Plan) -> Trial:
    """What has to be made again for a result.

    Args:
        result: A line of ``kept.jsonl``.
        methods: All methods by name.
        plan: The study's, into a folder of its own.
    """
    name = result["place"].rpartition("/")[2].rpartition("-")[0]
    return plan.trial(methods[result["method"]], result["chosen"], result["seed"], name, result["full"])


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study-sample"), help="folder, which must be a new one"
    )
    parser.add_argument("--runs", type=int, default=40, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    given = parser.parse_args()
    if given.output.exists():
        parser.error(f"{given.output} is there already, and what it holds would take no time; give another --output")
    kept = [json.loads(line) for line in KEPT.read_text().splitlines()]
    first = [one for one in kept if one["place"].startswith(NEEDED_WHOLE)]
    rest = [one for one in kept if one not in first]
    drawn = random.Random(given.seed).sample(rest, given.runs)
    plan = Plan(given.output, Sizes(), TUNING, [], 0)
    methods, workers = read_methods(), Workers(given.workers)
    begun = time.perf_counter()
    workers.all("worlds", make_world, [(given.output / "worlds", one["seed"], Sizes()) for one in first])
    again = workers.all("SFT", timed, [trial_of(one, methods, plan) for one in first])
    before = time.perf_counter() - begun
    again += workers.all("runs", timed, [trial_of(one, methods, plan) for one in drawn])
    tell([*first, *drawn], again, before, len(first), len(rest), given.workers)


def tell(
    kept: Sequence[Mapping[str, Any]],
    again: Sequence[Mapping[str, Any]],
    before: float,
    count: int,
    rest: int,
    workers: int,
) -> None:
    """Print how long, and how like.

    Args:
        kept: Results as the study has them.
        again: The same made again.
        before: Seconds of the worlds and of SFT.
        count: Runs of SFT, which come first.
        rest: How many other runs the study has.
        workers: Processes side by side.
    """
    seconds = [one["seconds"] for one in again[count:]]
    spread = bootstrap(seconds)
    hours = [(before + rest * each / workers) / 3600 for each in (spread.value, spread.low, spread.high)]
    print(
        f"worlds and SFT {before / 60:.1f} minutes; {len(seconds)} of {rest} other runs, {min(seconds):.0f} to "
        f"{max(seconds):.0f} seconds, {spread.value:.1f} on average, {workers} side by side: the study {hours[0]:.2f} hours "
        f"[{hours[1]:.2f}, {hours[2]:.2f}]"
    )
    same = [one["settings"] == other["settings"] for one, other in zip(kept, again, strict=True)]
    print(f"same rows and settings: {sum(same)} of {len(same)}")
    for name in FIGURES:
        apart = [abs(one[name] - other[name]) for one, other in zip(kept, again, strict=True)]
        print(
            f"{name}: the same in {apart.count(0.0)}; {statistics.mean(apart):.4f} apart on average, {max(apart):.4f} at most"
        )


if __name__ == "__main__":
    main()
