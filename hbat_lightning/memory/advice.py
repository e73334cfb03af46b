"""What would lower the memory of a run: options, each with the plan that comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from hbat_lightning.memory.architecture import quantization_of, storage_dtype
from hbat_lightning.memory.plan import MemoryPlan
from hbat_lightning.memory.rehearsal import RunSettings
from hbat_lightning.objectives.rollout import RolloutModule
from hbat_lightning.rewards import ClassifierReward

WORTH = 1e-3  # of the peak: what gains less is no advice

Planner = Callable[[Sequence[str]], MemoryPlan]
"""Plans the run with further options."""


@dataclass(frozen=True)
class Change:
    """A setting that could be another.

    Attributes:
        what: What it does, in words.
        options: What to add to the command.
    """

    what: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Advice:
    """A change, and what comes of it.

    Attributes:
        change: The change; several, where they were planned together.
        peak: Allocated bytes at the highest point, with it.
        total: The same with the process's own.
        gain: Bytes less than without it.
    """

    change: Change
    peak: int
    total: int
    gain: int


def advise(settings: RunSettings, before: MemoryPlan, plan: Planner, wanted: int | None) -> list[Advice]:
    """Plan every change that applies, and order them by gain.

    Args:
        settings: The run.
        before: Its plan.
        plan: Plans it anew.
        wanted: Bytes that there are; where no change alone comes below, all that help are planned together as well.

    Returns:
        Those that gain something worth it, most first; the sum of all stands last.
    """
    changes = list(possible_changes(settings))
    found = [_advice(change, before, plan(change.options)) for change in changes]
    useful = sorted((one for one in found if one.gain > WORTH * before.peak), key=lambda one: one.gain, reverse=True)
    if wanted is not None and len(useful) > 1 and all(one.total > wanted for one in useful):
        together = Change("all of these", tuple(option for one in useful for option in one.change.options))
        useful.append(_advice(together, before, plan(together.options)))
    return useful


def _advice(change: Change, before: MemoryPlan, after: MemoryPlan) -> Advice:
    return Advice(change, after.peak, after.total, before.peak - after.peak)


def possible_changes(settings: RunSettings) -> Iterator[Change]:
    """Settings that cost memory and could be others."""
    yield from _weights(settings)
    yield from _states(settings)
    yield from _passes(settings)


def _weights(settings: RunSettings) -> Iterator[Change]:
    policy = settings.module.policy
    quantization = quantization_of(policy.spec, settings.config)
    if policy.lora is None:
        yield Change("LoRA of rank 16 in the place of a full fine-tune", ("--model.policy.lora.r", "16"))
    elif quantization is None:
        yield Change("a base in 4 bits (NF4)", ("--model.policy.quantization", "nf4"))
        if storage_dtype(policy.spec, settings.config) == torch.float32:
            yield Change("a base in bfloat16", ("--model.policy.dtype", "bfloat16"))
    elif policy.spec.quantization == "int8":
        yield Change("a base in 4 bits (NF4)", ("--model.policy.quantization", "nf4"))
    for name, objective in settings.module.objectives.items():
        own = set(objective.references) - {"base"}
        if policy.lora is not None and own and not settings.penalties:
            yield Change("the bare base as reference", (f"{_key(settings, name)}.reference", "base"))
        classifies = isinstance(objective, RolloutModule) and isinstance(objective.reward, ClassifierReward)
        if policy.lora is not None and classifies:
            key = f"{_key(settings, name)}.reward"
            what = "a reward model of RewardModule, an adapter on the policy's base"
            yield Change(what, (key, "AdapterReward", f"{key}.path", "ITS_ADAPTER_FOLDER"))


def _key(settings: RunSettings, name: str) -> str:
    """Where an objective's settings are: its own part of a hybrid, or the whole model."""
    alone = cast(Any, settings.module.objectives[name]) is settings.module
    return "--model" if alone else f"--model.{name}"


def _states(settings: RunSettings) -> Iterator[Change]:
    optimizer = settings.module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    if settings.gpu and not isinstance(optimizer, Optimizer8bit):
        yield Change("an optimizer with 8-bit states", ("--model.optimizer", "bitsandbytes.optim.AdamW8bit"))
    if settings.module.optimizer_state == "per_objective":
        yield Change("no optimizer state of its own per objective", ("--model.optimizer_state", "reset"))
    if any(penalty.importance.per_element for penalty in settings.penalties):
        yield Change("importance per tensor", ("--trainer.callbacks.importance.per_element", "false"))


def _passes(settings: RunSettings) -> Iterator[Change]:
    data = settings.data
    if not settings.checkpointing:
        yield Change("gradient checkpointing", ("--model.policy.gradient_checkpointing", "true"))
    if settings.precision == "32-true":
        yield Change("bf16-mixed precision", ("--trainer.precision", "bf16-mixed"))
    if data.batch_size > 1:
        smaller = data.batch_size // 2
        windows = math.ceil(settings.accumulate * data.batch_size / smaller)
        yield Change(
            "half the micro-batch, with more accumulation",
            ("--data.batch_size", str(smaller), "--trainer.accumulate_grad_batches", str(windows)),
        )
    if data.val_batch_size > 1:
        yield Change("validation of one row at a time", ("--data.val_batch_size", "1"))
    rollouts = {name: one for name, one in settings.module.objectives.items() if isinstance(one, RolloutModule)}
    for name, objective in rollouts.items():
        if objective.samples > 2:
            fewer = str(objective.samples // 2)
            yield Change("half the samples of a prompt", (f"{_key(settings, name)}.samples", fewer))
    if data.max_length > 64:
        options = ["--data.max_length", str(data.max_length // 2)]
        for name, objective in rollouts.items():
            new = objective.sampling.max_new_tokens // 2
            options += [f"{_key(settings, name)}.sampling.max_new_tokens", str(max(1, new))]
        yield Change("half the length, for rows that allow it", tuple(options))
