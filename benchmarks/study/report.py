"""Tables and pictures of the study, from the results of its runs."""

from __future__ import annotations

import json
import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from scores import score, starting_gold

Result = Mapping[str, Any]
SFT, BASELINE = "sft", "two-stage DPO"
CLAIMS = {  # as README.md has them
    "alternation is better than two stages (DPO)": ("Hbat-DPO, none", "two-stage DPO"),
    "alternation is better than two stages (PPO)": ("Hbat-PPO, none", "two-stage PPO"),
    "EWC adds to alternation (DPO)": ("Hbat-DPO, drift", "Hbat-DPO, none"),
    "EWC adds to alternation (PPO)": ("Hbat-PPO, drift", "Hbat-PPO, none"),
    "EWC adds to two stages (DPO)": ("two-stage DPO, EWC, drift", "two-stage DPO"),
    "EWC adds to two stages (PPO)": ("two-stage PPO, EWC, drift", "two-stage PPO"),
    "importance is better than a uniform pull (alternation)": ("Hbat-DPO, drift", "Hbat-DPO, uniform"),
    "importance is better than a uniform pull (two stages)": (
        "two-stage DPO, EWC, drift",
        "two-stage DPO, EWC, uniform",
    ),
    "importance is better than a uniform pull (alternation, PPO)": ("Hbat-PPO, drift", "Hbat-PPO, uniform"),
    "importance is better than a random one": ("Hbat-DPO, drift", "Hbat-DPO, random"),
    "modified EWC is better than original EWC": ("Hbat-DPO, drift", "Hbat-DPO, Fisher"),
    "the literal softmax differs from no EWC": ("Hbat-DPO, literal", "Hbat-DPO, none"),
    "Hbat is better than a joint loss": ("Hbat-DPO, drift", "joint DPO"),
    "Hbat is better than SFT+ppo": ("Hbat-PPO, drift", "SFT+ppo"),
}
# What a reader asks first, but nobody had written down before the runs of methods with DPO were seen.
LATER = {
    "Hbat is better than two stages (DPO)": ("Hbat-DPO, drift", "two-stage DPO"),
    "Hbat is better than two stages (PPO)": ("Hbat-PPO, drift", "two-stage PPO"),
    "Hbat is better than SFT+dpo": ("Hbat-DPO, drift", "SFT+dpo"),
    "SFT+dpo is better than two stages": ("SFT+dpo", "two-stage DPO"),
    "SFT+dpo is better than RAFT as a second stage": ("SFT+dpo", "two-stage RAFT"),
    "SFT+ppo is better than two stages": ("SFT+ppo", "two-stage PPO"),
    "alternation is better than SFT+ppo": ("Hbat-PPO, none", "SFT+ppo"),
}
# Student's t, 95 %, of 2, 3, … 30 values.
_QUANTILES = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045),
)
STUDENT = dict(enumerate(_QUANTILES, start=2))


def report(folder: Path, results: Sequence[Result]) -> None:
    """Write ``results.jsonl``, ``tables.md`` and ``fronts.png``.

    Args:
        folder: Of the study.
        results: Of all runs, each with its stage.
    """
    (folder / "results.jsonl").write_text("".join(json.dumps(one) + "\n" for one in results))
    golds = _golds(folder)
    parts = ["# Tables of the study", "Every run: `results.jsonl` beside the runs, and `kept.jsonl`."]
    final = [one for one in results if one["stage"] == "final"]
    for stage in ("final", "rounds", "optimizer state", "full"):
        own = [one for one in results if one["stage"] == stage]
        if own:
            parts += [f"## {stage.capitalize()}", table(own, own if stage == "full" else final, golds)]
        if stage == "final" and len({one["seed"] for one in own}) > 1:
            parts += ["## Claims", claims(own, golds), "Written after runs had been seen:", claims(own, golds, LATER)]
        if stage == "full" and len({one["seed"] for one in own}) > 1:
            parts += ["Claims of full fine-tunes:", claims(own, golds)]
    (folder / "tables.md").write_text("\n\n".join(parts) + "\n")
    draw_fronts(folder / "fronts.png", [one for one in results if one["stage"] == "tuning"], golds)
    print(*parts, sep="\n\n")


def table(results: Sequence[Result], beside: Sequence[Result], golds: Mapping[int, float]) -> str:
    """Mean and standard deviation over seeds, and the paired difference in score to two-stage DPO with its 95 % interval.

    Args:
        results: Of one stage.
        beside: Those in which two-stage DPO is.
        golds: Gold of the SFT policy, by seed.
    """
    rows: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for one in results:
        rows[one["method"], json.dumps(one["chosen"])].append(one)
    baseline = {one["seed"]: score(one, golds) for one in beside if one["method"] == BASELINE}
    lines = [
        "| method | exact | plain | ROUGE-L | gold | score | against two-stage DPO | steps | settings |",
        "| --- | --- | --- | --- | --- | --- | --- | ---: | --- |",
    ]
    for (method, chosen), own in rows.items():
        figures = [_spread([one[name] for one in own]) for name in ("exact", "plain", "rougeL", "gold")]
        scores = {one["seed"]: score(one, golds) for one in own}
        paired = [scores[seed] - baseline[seed] for seed in scores if seed in baseline]
        difference = "" if method == BASELINE or len(paired) < 2 else interval(paired)
        settings = ", ".join(
            f"{key.removeprefix('model.')} {_short(value)}" for key, value in json.loads(chosen).items()
        )
        cells = [method, *figures, _spread(list(scores.values())), difference, str(own[0]["steps"]), settings]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def claims(results: Sequence[Result], golds: Mapping[int, float], which: Mapping[str, tuple[str, str]] = CLAIMS) -> str:
    """The paired difference in score that every claim is about, and what follows from its interval.

    Args:
        results: Of the final runs.
        golds: Gold of the SFT policy, by seed.
        which: By what is claimed, the two methods.
    """
    scores: dict[str, dict[int, float]] = defaultdict(dict)
    for one in results:
        scores[one["method"]][one["seed"]] = score(one, golds)
    lines = ["| claim | difference in score | per seed | holds |", "| --- | --- | --- | --- |"]
    for claim, (method, against) in which.items():
        if method not in scores or against not in scores:
            continue
        paired = [scores[method][seed] - scores[against][seed] for seed in sorted(scores[method])]
        mean, half = _interval(paired)
        verdict = "yes" if mean - half > 0 else "no: the reverse" if mean + half < 0 else "not shown"
        each = " ".join(f"{one:+.2f}" for one in paired)
        lines.append(f"| {claim} | {interval(paired)} | {each} | {verdict} |")
    return "\n".join(lines)


def interval(differences: Sequence[float]) -> str:
    """Mean of paired differences with Student's 95 % interval; of more than 30 it is that of 30, which is wider."""
    mean, half = _interval(differences)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}]"


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    count = len(differences)
    half = STUDENT[min(count, 30)] * statistics.stdev(differences) / math.sqrt(count)
    return statistics.mean(differences), half


def front(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other is at least as good as in both, by the first coordinate."""
    kept: list[tuple[float, float]] = []
    for point in sorted(set(points), reverse=True):
        if not kept or point[1] > kept[-1][1]:
            kept.append(point)
    return kept[::-1]


def draw_fronts(path: Path, tuning: Sequence[Result], golds: Mapping[int, float]) -> None:
    """Every draw of every method in the first tuning world, and each method's front: exact match against the share of gold.

    Draws that lost most of either lie outside of the picture.

    Args:
        path: The picture.
        tuning: Results of the draws.
        golds: Gold of the SFT policy, by seed.
    """
    methods: dict[str, list[Result]] = defaultdict(list)
    for one in tuning:
        if one["seed"] == tuning[0]["seed"]:
            methods[one["method"]].append(one)
    columns = 4
    height = max(1, math.ceil(len(methods) / columns))
    figure = Figure(figsize=(4 * columns, 3 * height), layout="constrained")
    axes = list(figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True).flat)
    axes[0].set(xlim=(0.4, 1.02), ylim=(-0.3, 1.05))  # what lost more than this is no trade-off
    clouds = {name: [(one["exact"], score(one, golds) - one["exact"]) for one in own] for name, own in methods.items()}
    everything = [point for points in clouds.values() for point in points]
    for axis, (name, points) in zip(axes, clouds.items(), strict=False):
        axis.plot(*zip(*front(everything), strict=True), color="0.8", linewidth=3, label="all methods")
        axis.scatter(*zip(*points, strict=True), s=14)
        axis.plot(*zip(*front(points), strict=True))
        axis.set_title(name, fontsize=9)
    for place, axis in enumerate(axes):
        if place >= len(clouds):
            axis.remove()
        elif place >= len(clouds) - columns:  # the lowest of its column
            axis.tick_params(labelbottom=True)
    figure.supxlabel("exact match of instructions")
    figure.supylabel("share of the missing gold that is gained")
    figure.savefig(path, dpi=100)


def _golds(folder: Path) -> dict[int, float]:
    starts = [json.loads(path.read_text()) for path in sorted((folder / "runs" / SFT).glob("chosen-*/result.json"))]
    return starting_gold(starts)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _spread(values: Sequence[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"
