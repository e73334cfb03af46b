"""Jobs of SLURM that are put back into the queue when their time is nearly over."""

from __future__ import annotations

import os
import signal
import subprocess

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn


def take_over_requeueing(trainer: Trainer) -> signal.Signals | None:
    """Keep Lightning from handling the signal that a job asked for with ``--signal``.

    It would save at once, and go on from that file before any other: inside a window, whose gradients no file holds.

    Returns:
        The signal, by which a job is to be put back into the queue; ``None`` where that is not asked for.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue:
        return None
    environment.auto_requeue = False
    return environment.requeue_signal


def requeue() -> None:
    """Put this job, or this task of a job array, back into the queue; SLURM ends it for that. Says where it cannot be done."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ.get('SLURM_ARRAY_TASK_ID', '')}"
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
        failed = done.returncode and (done.stderr.strip() or f"exit code {done.returncode}")
    except OSError as error:
        failed = str(error)
    if failed:
        rank_zero_warn(f"scontrol requeue {job} failed ({failed}): submit the job again to go on")
    else:
        rank_zero_info(f"job {job} is in the queue again")
