"""The controlled study: all methods on a small task whose gold reward can be computed.

    python benchmarks/study/study.py                       # everything, into runs/study; what is done already is not done again
    python benchmarks/study/study.py --smoke               # two methods in tiny worlds, in a minute
    python benchmarks/study/study.py --tldr-share 0.1 --output runs/study-gentle --methods "two-stage DPO" "Hbat-DPO, none"

Stages: worlds are made; SFT is tuned; every other method is tuned, by as many draws from its ranges, on the validation
prompts of the first tuning world, the best third of them on the other one too; then each method's best draw is run on the
worlds of the final seeds and judged on their test prompts; and variants of some are run in the same way. What would count as
the paper's claim holding is written in README.md beside this file, before the final runs.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from kept import bring_back, keep
from methods import draws, read_methods
from report import report
from runs import Method, Trial, run
from scores import best, merit, starting_gold
from workers import Workers
from world import SMOKE, Sizes, make_world

SFT = "sft"
TUNING = (1, 2)  # seeds of the worlds that methods are tuned on
ROUNDS = ("Hbat-DPO, none", "Hbat-DPO, drift", "Hbat-DPO, uniform")
STATES = ("Hbat-DPO, none", "Hbat-DPO, drift")
FULL = (
    "sft",
    "two-stage DPO",
    "two-stage DPO, EWC, uniform",
    "two-stage DPO, EWC, drift",
    "Hbat-DPO, none",
    "Hbat-DPO, drift",
)


@dataclass(frozen=True)
class Plan:
    """How much is done.

    Attributes:
        output: Folder of everything.
        sizes: Of the worlds.
        tuning: Seeds that methods are tuned on.
        final: Seeds of the final runs.
        draws: What is tried of each method.
    """

    output: Path
    sizes: Sizes
    tuning: Sequence[int]
    final: Sequence[int]
    draws: int

    def world(self, seed: int) -> Path:
        """Folder of a world."""
        return self.output / "worlds" / f"world-{seed}"

    def trial(self, method: Method, chosen: Mapping[str, Any], seed: int, name: str, full: bool = False) -> Trial:
        """A run in the folder of this name."""
        split = "validation" if seed in self.tuning else "test"
        start = self.output / "runs" / SFT / f"chosen-{seed}" / "adapter"
        folder = self.output / "runs" / method.name.replace(", ", "/") / f"{name}-{seed}"
        return Trial(method, chosen, self.world(seed), split, folder, seed, start, full)


def carry_out(
    plan: Plan, methods: Mapping[str, Method], workers: Workers, variants: bool
) -> Iterator[list[dict[str, Any]]]:
    """All stages.

    Yields:
        Results so far, each with the name of its stage: of the final runs, and with those of the variants.
    """
    seeds = [*plan.tuning, *plan.final]
    workers.all("worlds", make_world, [(plan.output / "worlds", seed, plan.sizes) for seed in seeds])
    chosen = {SFT: best(_tuned(plan, [methods[SFT]], workers, None), None)}
    starts = workers.all("SFT", run, [plan.trial(methods[SFT], chosen[SFT], seed, "chosen") for seed in seeds])
    golds = starting_gold(starts)
    others = [method for name, method in methods.items() if name != SFT]
    results = _tuned(plan, others, workers, golds)
    for method in others:
        chosen[method.name] = best([one for one in results if one["method"] == method.name], golds)
    final = [
        plan.trial(method, chosen[method.name], seed, "chosen") for method in methods.values() for seed in plan.final
    ]
    done = [{"stage": "tuning", **one} for one in results]
    done += [{"stage": "final", **one} for one in workers.all("final", run, final)]
    yield done
    if variants:
        yield done + _variants(plan, methods, chosen, workers, golds)


def _tuned(
    plan: Plan, methods: Sequence[Method], workers: Workers, golds: Mapping[int, float] | None, full: bool = False
) -> list[dict[str, Any]]:
    """Results of all draws in the first tuning world, and of each method's best third in the others."""
    first, *further = plan.tuning
    name = "full-draw" if full else "draw"
    tried = {
        (method.name, number): partial(plan.trial, method, draw, name=f"{name}-{number}", full=full)
        for method in methods
        for number, draw in enumerate(draws(method, plan.draws))
    }
    what = "tuning of all parameters" if full else "tuning"
    screened = workers.all(f"{what}, world {first}", run, [trial(seed=first) for trial in tried.values()])
    kept = []
    for method in methods:
        own = [one for one in zip(tried, screened, strict=True) if one[0][0] == method.name]
        own.sort(key=lambda one: -merit(one[1], golds))
        kept += [tried[place] for place, _ in own[: math.ceil(len(own) / 3)]]
    return screened + workers.all(what, run, [trial(seed=seed) for seed in further for trial in kept])


def _variants(
    plan: Plan,
    methods: Mapping[str, Method],
    chosen: Mapping[str, Mapping[str, Any]],
    workers: Workers,
    golds: Mapping[int, float],
) -> list[dict[str, Any]]:
    """Numbers of rounds, policies for the optimizer's state, and full fine-tuning."""
    found = []
    changes = [("rounds", name, "model.schedule.rounds", (1, 2, 5, 10)) for name in ROUNDS]
    changes += [
        ("optimizer state", name, "model.optimizer_state", ("reset", "shared", "per_objective")) for name in STATES
    ]
    for stage, name, key, values in changes:
        for value in values if name in methods else ():
            settings = dict(chosen[name]) | {key: value}
            folder = "chosen" if settings == chosen[name] else f"{stage.split()[-1]}-{value}"
            trials = [plan.trial(methods[name], settings, seed, folder) for seed in plan.final]
            found += [{"stage": stage, **one} for one in workers.all(f"{name}, {value} {stage}", run, trials)]
    for name in (one for one in FULL if one in methods):
        method = replace(methods[name], ranges={**methods[name].ranges, **_gentler(methods[name])})
        known = None if name == SFT else golds
        settings = best(_tuned(plan, [method], workers, known, full=True), known)
        trials = [plan.trial(method, settings, seed, "full", full=True) for seed in plan.final]
        found += [{"stage": "full", **one} for one in workers.all(f"{name}, full", run, trials)]
    return found


def _gentler(method: Method) -> dict[str, list[Any]]:
    """Rates for all parameters: a sixth of those of adapters."""
    return {key: [value / 6 for value in values] for key, values in method.ranges.items() if key.endswith(".lr")}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, help="folder of everything; runs/study, or with --smoke runs/study-smoke"
    )
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="these alone, and sft")
    parser.add_argument("--seeds", type=int, default=5, help="final seeds")
    parser.add_argument("--draws", type=int, default=9, help="tried of each method")
    parser.add_argument(
        "--tldr-share", type=float, default=1 / 3, help="of instruction rows that pull against preferences"
    )
    parser.add_argument(
        "--known", type=Path, help="kept.jsonl of a study with the same worlds: its runs are not made again"
    )
    parser.add_argument("--no-variants", action="store_true", help="end with the final runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true")
    given = parser.parse_args()
    methods = read_methods()
    given.output = given.output or Path("runs/study-smoke" if given.smoke else "runs/study")
    if given.smoke:
        given.methods = given.methods or ["two-stage DPO", "Hbat-DPO, drift"]
        plan = Plan(given.output, SMOKE, (1,), (11,), 1)
    else:
        final = tuple(range(21, 21 + given.seeds))
        plan = Plan(given.output, Sizes(tldr_share=given.tldr_share), TUNING, final, given.draws)
    wanted = {SFT, *(given.methods or methods)}
    unknown = wanted - set(methods)
    if unknown:
        parser.error(f"no such method: {', '.join(sorted(unknown))}; there are {', '.join(methods)}")
    methods = {name: method for name, method in methods.items() if name in wanted}
    runs = given.output / "runs"
    if given.known:
        print(
            f"{bring_back(given.known, runs)} results are in {given.known}; those of the same settings and worlds count"
        )
    try:
        for results in carry_out(plan, methods, Workers(given.workers), not (given.smoke or given.no_variants)):
            report(given.output, results)
    finally:
        print(f"{keep(runs, given.output / 'kept.jsonl')} runs are in {given.output / 'kept.jsonl'}")


if __name__ == "__main__":
    main()
