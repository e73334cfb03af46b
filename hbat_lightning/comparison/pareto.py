"""Where runs lie between ROUGE and reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from hbat_lightning.comparison.charts import Spot
from hbat_lightning.comparison.runs import Run, scores_of
from hbat_lightning.comparison.table import answer_spread, held_out_spread

# What stands for reward in the picture of ROUGE against reward: the first that most runs have.
HEIGHTS = ("reward", "reward_win_rate", "judge_win_rate", "val/preference/reward", "val/preference/accuracy")


def spots_of(runs: Sequence[Run], name: str, confidence: float) -> list[Spot]:
    """Of every run that has both, ROUGE-L and a figure of reward, with the ends of their intervals.

    Args:
        runs: The runs.
        name: The figure.
        confidence: Of the intervals.
    """
    pairs = [(_of_answers(run, "rougeL", confidence), _height(run, name, confidence)) for run in runs]
    return [
        Spot(run.name, f"run{number % 6}", across, up)
        for number, (run, (across, up)) in enumerate(zip(runs, pairs, strict=True))
        if across and up and all(map(math.isfinite, (*across, *up)))
    ]


def _of_answers(run: Run, name: str, confidence: float) -> Sequence[float] | None:
    """Of what it has predicted, or else of what it was tested on."""
    values = next((own[name] for own in map(scores_of, (run.answers, run.tested)) if name in own), {}).values()
    spread = answer_spread(values, confidence)
    return spread[:3] if spread else (mean(values),) * 3 if values else None


def _height(run: Run, name: str, confidence: float) -> Sequence[float] | None:
    """With its interval where it has one; at the end of the run where it is of held-out rows."""
    points = run.held_out(name) if name.startswith("val/") else []
    if not points:
        return _of_answers(run, name, confidence)
    spread = held_out_spread(run.rows.get(name), confidence)
    return (points[-1][1],) * 3 if spread is None else spread[:3]
