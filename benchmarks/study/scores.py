"""What runs of the study are judged by, as one number, and which of them is the best."""

from __future__ import annotations

import random
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import task

_ANY = task.draw_facts(random.Random(0))
IDEAL = task.gold(_ANY, task.ideal(_ANY))  # the same of any post


def starting_gold(runs: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Gold of the SFT policy, by seed."""
    return {one["seed"]: one["gold"] for one in runs}


def score(run: Mapping[str, Any], golds: Mapping[int, float]) -> float:
    """Exact match, plus the share of what gold lacks after SFT: 1 for SFT, 2 for the ideal.

    Args:
        run: A result.
        golds: Gold of the SFT policy, by seed.
    """
    start = golds[run["seed"]]
    return float(run["exact"]) + (float(run["gold"]) - start) / (IDEAL - start)


def merit(run: Mapping[str, Any], golds: Mapping[int, float] | None) -> float:
    """What a run is chosen by: its score, or where gold of SFT is not known yet, exact match alone."""
    return float(run["exact"]) if golds is None else score(run, golds)


def best(runs: Sequence[Mapping[str, Any]], golds: Mapping[int, float] | None) -> dict[str, Any]:
    """What was chosen in the runs with the highest mean merit, among what was run in the most worlds.

    Args:
        runs: Of one method.
        golds: As for :func:`merit`.
    """
    tried: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in runs:
        tried[repr(one["chosen"])].append(one)

    worlds = max(len(some) for some in tried.values())
    whole = [some for some in tried.values() if len(some) == worlds]
    return dict(max(whole, key=lambda some: statistics.mean(merit(one, golds) for one in some))[0]["chosen"])
