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


def best(runs: Sequence[Mapping[str, Any]], golds: Mapping[int, float] | None) -> dict[str, Any]:
    """What was chosen in the runs with the highest mean score.

    Args:
        runs: Of one method.
        golds: As for :func:`score`; ``None`` goes by exact match alone.
    """
    tried: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for one in runs:
        tried[repr(one["chosen"])].append(one)

    def mean(some: list[Mapping[str, Any]]) -> float:
        return statistics.mean(one["exact"] if golds is None else score(one, golds) for one in some)

    return dict(max(tried.values(), key=mean)[0]["chosen"])
