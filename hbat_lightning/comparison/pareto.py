"""Where runs lie between ROUGE and reward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from hbat_lightning.comparison.charts import Spot
from hbat_lightning.comparison.runs import Run
from hbat_lightning.comparison.table import answer_spread, held_out_spread
from hbat_lightning.completions import Completed

# What stands for reward in the picture of ROUGE against reward: the first that most runs have.
HEIGHTS = ("reward", "reward_win_rate", "judge_win_rate", "val/preference/reward", "val/preference/accuracy")


def spots_of(runs: Sequence[Run], name: str, confidence: float) -> list[Spot]:
    """Of every run that has both, ROUGE-L and a figure of reward, with the ends of their intervals.

    Those that :func:`unlike` names are left out.

    Args:
        runs: The runs.
        name: The figure.
        confidence: Of the intervals.
    """
    left_out = unlike(runs, name)
    pairs = [
        (None, None)
        if run.name in left_out
        else (_of_answers(run, "rougeL", confidence), _height(run, name, confidence))
        for run in runs
    ]
    return [
        Spot(run.name, f"run{number % 6}", across, up)
        for number, (run, (across, up)) in enumerate(zip(runs, pairs, strict=True))
        if across and up and all(map(math.isfinite, (*across, *up)))
    ]


def unlike(runs: Sequence[Run], name: str) -> list[str]:
    """Names of the runs whose figure depends on something else than the first one's, such as another reward or judge.

    Args:
        runs: The runs.
        name: The figure.
    """
    scales = [_scales(run, name) for run in runs]
    first = next((own for own in scales if own), set())
    return [run.name for run, own in zip(runs, scales, strict=True) if own and own != first]


def _answers(run: Run, name: str) -> list[Completed]:
    """Answers that have a score: those that it has predicted, or else those that it was tested on."""
    with_score = ([one for one in own.values() if name in one.scores] for own in (run.answers, run.tested))
    return next((own for own in with_score if own), [])


def _scales(run: Run, name: str) -> set[str]:
    """What a figure depends on beside the answers; nothing where the run has none of it, or it depends on nothing."""
    own = run.rows.get(name)
    return {own.scale} if own else {one.scales[name] for one in _answers(run, name) if name in one.scales}


def _of_answers(run: Run, name: str, confidence: float) -> Sequence[float] | None:
    values = [answer.scores[name] for answer in _answers(run, name)]
    spread = answer_spread(values, confidence)
    return spread[:3] if spread else (mean(values),) * 3 if values else None


def _height(run: Run, name: str, confidence: float) -> Sequence[float] | None:
    """With its interval where it has one; at the end of the run where it is of held-out rows."""
    points = run.held_out(name) if name.startswith("val/") else []
    if not points:
        return _of_answers(run, name, confidence)
    spread = held_out_spread(run.rows.get(name), confidence)
    return (points[-1][1],) * 3 if spread is None else spread[:3]
