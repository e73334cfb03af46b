"""Small things that several measurements share."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor


def status(name: str) -> int:
    """Bytes of a line of the process's own status: ``VmRSS`` now, ``VmHWM`` at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def peak_of(work: Callable[[], object]) -> int:
    """Bytes by which the resident size rises at most while something runs."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the highest size begins anew
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def allocated_by(work: Callable[[], object]) -> int:
    """Bytes of tensors on the CPU that are allocated at most while something runs, by torch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    now = peak = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns()):  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak


def in_turns(works: dict[str, Callable[[], object]], times: int, warm_up: int = 1) -> dict[str, float]:
    """Median seconds of each of several works, done one after the other again and again."""
    took: dict[str, list[float]] = {name: [] for name in works}
    for number in range(warm_up + times):
        for name, work in works.items():
            begin = time.perf_counter()
            work()
            if number >= warm_up:
                took[name].append(time.perf_counter() - begin)
    return {name: median(values) for name, values in took.items()}


def random_rows(count: int, length: int, prompt: int, vocabulary: int) -> dict[str, Tensor]:
    """Rows of random tokens that are learnt from a place on, without padding."""
    ids = torch.randint(1, vocabulary, (count, length), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :prompt] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
