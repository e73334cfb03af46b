"""Runs side by side, each in a process of one thread."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from hbat_lightning import quiet


class Workers:
    """Processes that make runs side by side, one thread each."""

    def __init__(self, count: int) -> None:
        self._pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"), initializer=_begin_worker)

    def all(self, what: str, work: Any, each: Iterable[Any]) -> list[Any]:
        """Results in order, with progress."""
        jobs = [
            self._pool.submit(work, *one) if isinstance(one, tuple) else self._pool.submit(work, one) for one in each
        ]
        return [job.result() for job in tqdm(jobs, desc=what, unit="run")]


def _begin_worker() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    quiet.install()
