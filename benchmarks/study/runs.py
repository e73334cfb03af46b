"""One run of one method in one world, and what came of it."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import task
from fits import fit, in_batches
from rouge_score.rouge_scorer import RougeScorer
from world import held_out, in_world

from hbat_lightning import GenerationSettings, Policy

GREEDY = GenerationSettings(max_new_tokens=32)


@dataclass(frozen=True)
class Method:
    """A way to train.

    Attributes:
        name: What tables call it.
        layers: Configurations it is made of, in ``configs/``.
        options: Settings by dotted name; ``{sft}`` and ``{reward}`` stand for the folders of an SFT run and the reward model,
            ``{world}`` for the world's.
        ranges: What is tuned: lists to choose from.
        objectives: Whose data it takes.
    """

    name: str
    layers: tuple[str, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    ranges: Mapping[str, list[Any]] = field(default_factory=dict)
    objectives: tuple[str, ...] = ("instruction", "preference")


@dataclass(frozen=True)
class Trial:
    """A run that is to be made.

    Attributes:
        method: By what.
        chosen: Values of what is tuned.
        world: Folder of the world.
        split: ``validation`` or ``test``.
        folder: The run folder.
        seed: Of the run.
        start: Folder of the adapter that methods begin from which go on from SFT.
        full: Train every parameter, in the place of LoRA.
    """

    method: Method
    chosen: Mapping[str, Any]
    world: Path
    split: str
    folder: Path
    seed: int
    start: Path
    full: bool = False


def run(trial: Trial) -> dict[str, Any]:
    """Train, and judge the result; kept in ``result.json``, which is read where it is there already of the same settings."""
    kept, settings = trial.folder / "result.json", fingerprint(trial)
    if not kept.exists() or json.loads(kept.read_text()).get("settings") != settings:
        module = fit(*_arguments(trial))
        found = {
            "method": trial.method.name,
            "chosen": dict(trial.chosen),
            "full": trial.full,
            "seed": trial.seed,
            "split": trial.split,
            "settings": settings,
            "steps": module.trainer.global_step,
            **judge(module.policy, trial.world / f"{trial.split}.jsonl"),
        }
        kept.write_text(json.dumps(found, indent=1))
        shutil.rmtree(trial.folder / "checkpoints", ignore_errors=True)
    result: dict[str, Any] = json.loads(kept.read_text())
    return result


def fingerprint(trial: Trial) -> str:
    """A digest of all that a result depends on but the code: the settings, and the rows of the world."""
    method = trial.method
    layers = [Path(layer).name for layer in method.layers]  # some are here, wherever this is
    parts = [layers, dict(method.options), dict(trial.chosen), trial.full, trial.seed, trial.split]
    whole = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=8)
    for name in ("instruction", "preference", trial.split):
        whole.update((trial.world / f"{name}.jsonl").read_bytes())
    return whole.hexdigest()


def _arguments(trial: Trial) -> tuple[list[str], Path, int, dict[str, Any]]:
    method, world = trial.method, trial.world
    places = {"world": world, "reward": world / "reward", "sft": trial.start}
    options = {key: _filled(value, places) for key, value in (dict(method.options) | dict(trial.chosen)).items()}
    data = {f"data.{name}.path": world / f"{name}.jsonl" for name in method.objectives}
    settings = {**in_world(world), **data, **held_out(world, *method.objectives), **options}
    layers = list(method.layers)
    if trial.full:
        layers.append("policy/full.yaml")
        del settings["model.policy.lora"]
    return layers, trial.folder, trial.seed, settings


def judge(policy: Policy, prompts: Path) -> dict[str, float]:
    """Exact match of instructions, and gold and ROUGE-L of summaries, all greedy.

    Args:
        policy: What was trained.
        prompts: Rows of a split.
    """
    rows = [json.loads(line) for line in prompts.read_text().splitlines()]
    policy.eval()
    answers = in_batches(policy, [row["prompt"] for row in rows], GREEDY)
    requests = [row["prompt"].split()[-1] for row in rows]
    exact = {request: list[float]() for request in task.EXACT}
    golds, overlaps = [], []
    scorer = RougeScorer(["rougeL"])
    for row, request, answer in zip(rows, requests, answers, strict=True):
        if request == task.TLDR:
            facts = task.facts_of(row["prompt"])
            golds.append(task.gold(facts, answer))
            overlaps.append(scorer.score(facts.summary, answer)["rougeL"].fmeasure)
        else:
            exact[request].append(float(answer == row["completion"]))
    every = [one for values in exact.values() for one in values]
    return {
        "exact": statistics.mean(every),
        "plain": statistics.mean(exact["plain"]) if exact["plain"] else float("nan"),
        "gold": statistics.mean(golds),
        "rougeL": statistics.mean(overlaps),
    }


def _filled(value: Any, places: Mapping[str, Path]) -> Any:
    return value.format(**places) if isinstance(value, str) and "{" in value and '"' not in value else value
