"""What would lower the memory of a run: options, each with the plan that comes of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from hbat_lightning.memory.architecture import storage_dtype
from hbat_lightning.memory.plan import MemoryPlan
from hbat_lightning.memory.rehearsal import RunSettings

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
        Those that gain anything, most first; the sum of all stands last.
    """
    changes = list(possible_changes(settings))
    found = [_advice(change, before, plan(change.options)) for change in changes]
    useful = sorted((one for one in found if one.gain > 0), key=lambda one: one.gain, reverse=True)
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
    if policy.lora is None:
        yield Change("LoRA of rank 16 in the place of a full fine-tune", ("--model.policy.lora.r", "16"))
    elif policy.spec.quantization == "none":
        yield Change("a base in 4 bits (NF4)", ("--model.policy.quantization", "nf4"))
        if storage_dtype(policy.spec, settings.config) == torch.float32:
            yield Change("a base in bfloat16", ("--model.policy.dtype", "bfloat16"))
    elif policy.spec.quantization == "int8":
        yield Change("a base in 4 bits (NF4)", ("--model.policy.quantization", "nf4"))
    anchored = bool(settings.penalties)
    others = [one for one in settings.module.objectives.values() if set(one.references) - {"base"}]
    if policy.lora is not None and others and not anchored:
        yield Change("the bare base as reference", ("--model.preference.reference", "base"))


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
    if data.max_length > 64:
        yield Change("half the length, for rows that allow it", ("--data.max_length", str(data.max_length // 2)))
