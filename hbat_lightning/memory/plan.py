"""The memory plan of a run: its moments at full depth, and what the process needs beside them."""

from __future__ import annotations

import copy
import resource
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from hbat_lightning.memory.allocation import Bytes, Moment, Peak
from hbat_lightning.memory.rehearsal import RunSettings, rehearse

CUDA_CONTEXT = 500_000_000
"""Bytes that a CUDA context and the libraries' workspaces take. An assumption: it differs between GPUs and drivers."""

_DEPTHS = (2, 3)  # layers that a deep model is rehearsed with, in periods of its layers' kinds


@dataclass(frozen=True)
class MemoryPlan:
    """What a run will need.

    Attributes:
        moments: Its moments.
        overhead: Bytes of the process beside its tensors.
        overhead_is: Where that figure comes from.
        layers: Layers of the model.
        rehearsed: Layers that were rehearsed; the rest is extrapolated.
    """

    moments: list[Moment]
    overhead: int
    overhead_is: str
    layers: int
    rehearsed: tuple[int, ...]

    @property
    def highest(self) -> Moment:
        """The moment with the highest point."""
        return max(self.moments, key=lambda moment: moment.peak.total)

    @property
    def peak(self) -> int:
        """Allocated bytes at the highest point of all."""
        return self.highest.peak.total

    @property
    def total(self) -> int:
        """The same with the process's own."""
        return self.peak + self.overhead


def make_plan(settings: RunSettings, every_layer: bool, tick: Callable[[str], None]) -> MemoryPlan:
    """Plan a run.

    The memory of every stretch of a run is linear in the number of equal layers, as long as its highest point stays where it
    is. So two rehearsals with few layers say what many need. Stretches are cut where a highest point may move: between the
    forward and the backward pass, and in the middle of that.

    Args:
        settings: The run.
        every_layer: Rehearse all layers, however many.
        tick: Told of every moment.
    """
    config = settings.config
    text = config.get_text_config()
    layers, period = text.num_hidden_layers, _period(text)
    depths = tuple(period * depth for depth in _DEPTHS)
    if every_layer or layers <= sum(depths):
        depths = (layers,)
        moments = rehearse(settings, tick)
    else:
        few, more = (rehearse(replace(settings, config=with_depth(config, depth)), tick) for depth in depths)
        factor = (layers - depths[0]) / (depths[1] - depths[0])
        moments = [_extrapolate(one, other, factor) for one, other in zip(few, more, strict=True)]
    overhead, origin = _overhead(settings.gpu)
    return MemoryPlan(moments, overhead, origin, layers, depths)


def with_depth(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same configuration with only the first layers; lists with an entry per layer are cut as well."""
    config = copy.deepcopy(config)
    text: Any = config.get_text_config()
    before = text.num_hidden_layers
    for name, value in vars(text).items():
        if isinstance(value, list) and len(value) == before:
            setattr(text, name, value[:layers])
    text.num_hidden_layers = layers
    return config


def _period(text: Any) -> int:
    """After how many layers their kinds (full or sliding attention, for one) repeat."""
    kinds = [value for value in vars(text).values() if isinstance(value, list) and len(value) == text.num_hidden_layers]
    patterns = list(zip(*kinds, strict=True))
    for period in range(1, len(patterns)):
        if all(patterns[place] == patterns[place % period] for place in range(len(patterns))):
            return period
    return max(1, len(patterns))


def _extrapolate(few: Moment, more: Moment, factor: float) -> Moment:
    stretches = []
    for one, other in zip(few.stretches, more.stretches, strict=True):
        keys = one.parts.keys() | other.parts.keys()
        parts: Bytes = {key: _line(one.parts.get(key, 0), other.parts.get(key, 0), factor) for key in keys}
        stretches.append(Peak(_line(one.total, other.total, factor), parts))
    return Moment(few.name, stretches, max(few.logits, more.logits))


def _line(one: int, other: int, factor: float) -> int:
    return round(one + (other - one) * factor)


def _overhead(gpu: bool) -> tuple[int, str]:
    if gpu:
        return CUDA_CONTEXT, "CUDA context and workspaces: assumed, not measured here"
    status = Path("/proc/self/status")
    if status.exists():  # what is allocated, without the pages of mapped libraries, and without a parent's high mark
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return 1024 * int(lines["RssAnon"].split()[0]), "interpreter and libraries: what this process takes itself"
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident, "interpreter and libraries: what this process takes itself"
