"""A dozen of the soak's stops: runs of DPO and of PPO with rollouts, each compared with the run that was never stopped."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_runs_that_are_stopped_anywhere_end_as_if_they_had_not_been(tmp_path: Path) -> None:
    """In a process of its own, since it forks."""
    lives = tmp_path / "lives.jsonl"
    command = [
        sys.executable,
        "-m",
        "tests.soak.soak",
        "--seed",
        "5",
        "--stops",
        "12",
        "--folder",
        str(tmp_path / "runs"),
    ]
    command += ["--kinds", "Rounds DPO", "Rounds PPO", "--lives", str(lives)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    told = [json.loads(line) for line in lives.read_text().splitlines()] if lives.exists() else []
    assert done.returncode == 0, (told, done.stderr[-2000:])
    assert sum(len(life["stops"]) for life in told) >= 12
    assert {life["kind"] for life in told} == {"Rounds DPO", "Rounds PPO"}
    assert not any(life["failures"] for life in told)
