"""Two real processes under torchrun (gloo, CPU) against one process at the same global batch; see ``processes.py``.

What two processes end with differs from one process's by the order of sums: gradients are added up over processes before the
last micro-batches', not after. AdamW makes more of it where a gradient is next to nothing.
"""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hbat_lightning.cli import main
from hbat_lightning.run_folder import latest_checkpoint
from tests import processes

pytestmark = pytest.mark.timeout(1500)  # what starts the processes counts for the first test, and machines may be busy
ROOT = Path(__file__).parents[1]
# Norm of the difference of all that trains, relative to its norm; measured on a CPU: see the README.
LIMITS = {
    "single precision": 1e-4,
    "every parameter": 1e-10,
    "ppo": 1e-6,  # the value function is in fp32
}
EXACT = 1e-12


class Launched(NamedTuple):
    folder: Path
    killed: subprocess.CompletedProcess[str]
    resumed: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """The runs of two processes, and the one that was killed and went on."""
    folder = tmp_path_factory.mktemp("processes")

    def launch(what: str) -> subprocess.CompletedProcess[str]:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*torchrun, "-m", "tests.processes", str(folder), what]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, check=False)

    killed = launch("begin")
    assert (folder / "whole" / "run.json").exists(), killed.stderr[-4000:]
    resumed = launch("go_on")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    return Launched(folder, killed, resumed)


def left(launched: Launched, name: str) -> list[dict[str, Any]]:
    return [torch.load(launched.folder / f"{name}.{rank}.pt") for rank in range(processes.WORLD)]


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list | tuple):
        for key, one in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(one, f"{path}/{key}")
    else:
        yield path, value


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Relative to the other's norm, over all tensors."""
    assert one.keys() == other.keys()
    assert one
    mine, theirs = (torch.cat([side[name].double().flatten() for name in sorted(side)]) for side in (one, other))
    return float((mine - theirs).norm() / theirs.norm())


def completions(run: dict[str, Any]) -> dict[int, list[list[int]]]:
    """Of the rollouts at hand, by row."""
    sampled = run["stream"]["sampled"].get("preference", {"rollouts": {}})
    return {row: [rollout["completion"] for rollout in rollouts] for row, rollouts in sampled["rollouts"].items()}


@pytest.mark.parametrize("name", processes.RUNS)
def test_all_ranks_end_with_the_same_bits(launched: Launched, name: str) -> None:
    """Weights, moments, snapshots, importances, rollouts at hand, running statistics, and every figure that was logged."""
    first, second = (dict(leaves(state)) for state in left(launched, name))
    assert first.keys() == second.keys()
    assert sum(isinstance(value, Tensor) for value in first.values()) > 50
    for path, value in first.items():
        same = torch.equal(value, second[path]) if isinstance(value, Tensor) else repr(value) == repr(second[path])
        assert same, path


@pytest.mark.parametrize("name", processes.RUNS)
def test_two_processes_end_where_one_does(launched: Launched, name: str, tmp_path: Path) -> None:
    two = left(launched, name)[0]
    one = processes.train(name, tmp_path, world=1)
    limit = LIMITS.get(name, EXACT)
    assert two["steps"] == one["steps"] >= 4
    assert distance(two["weights"], one["weights"]) < limit
    for kind, tensors in one["snapshots"].items():
        assert not tensors or distance(two["snapshots"][kind], tensors) < limit
    held, truth = (
        {path: v.double() for path, v in leaves(side["callbacks"]) if isinstance(v, Tensor)} for side in (two, one)
    )
    assert not truth or distance(held, truth) < max(limit, 1e-6)  # importances are kept in fp32
    assert dict(leaves(two["objectives"])) == pytest.approx(dict(leaves(one["objectives"])), rel=limit)
    assert completions(two) == completions(one)
    assert two["figures"] == pytest.approx(one["figures"], rel=100 * limit, abs=100 * limit)
    assert len(two["log"]) == len(one["log"])
    for mine, theirs in zip(two["log"], one["log"], strict=True):  # loggers get fp32
        assert mine == pytest.approx(theirs, rel=max(100 * limit, 1e-6), abs=1e-5, nan_ok=True)


def test_a_step_that_one_process_finds_bad_is_left_out_by_both(launched: Launched) -> None:
    """Each writes what it had itself: only one had the row; and both have counted the same steps in a row."""
    name = "dropout, and steps left out"
    first, second = left(launched, name)
    files = [launched.folder / f"{name} 2" / file for file in ("nonfinite.jsonl", "rank1.nonfinite.jsonl")]
    mine, theirs = ([json.loads(line) for line in file.read_text().splitlines()] for file in files)
    steps = [row["step"] for row in first["log"] if math.isnan(row.get("train/instruction/loss", 0.0))]
    assert [line["step"] for line in mine] == [line["step"] for line in theirs] == steps != []
    losses = [{part["loss"] == "nan" for line in lines for part in line["micro_batches"]} for lines in (mine, theirs)]
    assert sorted(losses, key=len) == [{False}, {False, True}]
    assert first["callbacks"]["NonFiniteGuard"] == second["callbacks"]["NonFiniteGuard"]


def test_another_run_is_refused_once_for_all_processes(launched: Launched) -> None:
    (line,) = [line for line in launched.resumed.stderr.splitlines() if "hbat: error" in line]
    assert "this checkpoint is of another run, seed: was 42, is 7" in line


def test_a_run_goes_on_with_another_number_of_devices(launched: Launched, tmp_path: Path) -> None:
    """The same rows in every window, if batch_size × devices stays: here four rows on one device for two on each of two."""
    file = launched.folder / "double precision.ckpt"
    end = left(launched, "double precision")[0]
    again = processes.train("double precision", tmp_path, world=1, batch_size=4, ckpt_path=file)
    assert again["steps"] == end["steps"]
    assert distance(again["weights"], end["weights"]) < EXACT


def test_processes_leave_their_group_before_the_interpreter_comes_down(launched: Launched) -> None:
    """A thread of the group that needs the interpreter later aborts its process, as in 4 of 25 short runs on a busy CPU."""
    groups = [(launched.folder / f"group.{rank}.txt").read_text() for rank in range(processes.WORLD)]
    assert groups == ["False", "False"]


def test_a_mistake_that_one_process_meets_ends_all_with_the_same_line(launched: Launched) -> None:
    lines = [(launched.folder / f"failing.{rank}.txt").read_text() for rank in range(processes.WORLD)]
    assert lines[0] == lines[1]
    assert lines[0].startswith("SharedError: process 1: reward function fails_on_rank_1 gave nan")


def test_ppo_of_two_processes_goes_on_between_two_passes_to_the_same_bits(launched: Launched) -> None:
    """In processes of another launch, from a checkpoint that holds rollouts which wait for their second pass."""
    held = torch.load(launched.folder / "ppo.ckpt")["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert held["sampled"]["preference"]["rollouts"]
    for end, again in zip(left(launched, "ppo"), left(launched, "ppo, gone on"), strict=True):
        steps = [row for row in end.pop("log") if row["step"] >= processes.BETWEEN_PASSES and "lr" in row]
        assert [row for row in again.pop("log") if "lr" in row] == steps != []
        mine, truth = dict(leaves(again)), dict(leaves(end))
        assert mine.keys() == truth.keys()
        for path, value in truth.items():
            same = torch.equal(value, mine[path]) if isinstance(value, Tensor) else repr(value) == repr(mine[path])
            assert same, path


# ---- the command line ---------------------------------------------------------------------------------------------------


def table(file: Path) -> list[dict[str, float]]:
    """Rows without the columns that hold times."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [{k: float(v) for k, v in row.items() if v and not k.startswith("resources/")} for row in rows]


def test_a_killed_run_of_two_processes_goes_on_to_the_same_bits(launched: Launched) -> None:
    assert launched.killed.returncode != 0
    assert "SIGKILL" in launched.killed.stderr
    assert "going on from" in launched.resumed.stdout
    whole, killed = launched.folder / "whole", launched.folder / "killed"
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, killed))
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert (whole / "switches.jsonl").read_text() == (killed / "switches.jsonl").read_text()
    assert table(whole / "metrics.csv") == table(killed / "metrics.csv")
    one, other = (torch.load(cast(Path, latest_checkpoint(run))) for run in (whole, killed))
    for part in ("state_dict", "optimizer_states", "hbat"):
        mine, theirs = dict(leaves(one[part])), dict(leaves(other[part]))
        assert mine.keys() == theirs.keys()
        for path, value in mine.items():
            assert torch.equal(value, theirs[path]) if isinstance(value, Tensor) else value == theirs[path], path


def test_files_are_those_of_one_process(launched: Launched, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every row once, every figure of the whole window and of all held-out rows; what is said is said once."""
    monkeypatch.chdir(ROOT)
    main([*processes.fit_arguments(tmp_path / "one", world=1), *processes.DOUBLE])
    whole, one = launched.folder / "double", tmp_path / "one"
    assert {path.name for path in whole.iterdir()} == {path.name for path in one.iterdir()}
    mine, theirs = table(whole / "metrics.csv"), table(one / "metrics.csv")
    assert len(mine) == len(theirs)
    assert len([row for row in mine if "lr" in row]) == json.loads((whole / "run.json").read_text())["steps"]
    for row, truth in zip(mine, theirs, strict=True):
        assert row == pytest.approx(truth, rel=1e-6, abs=1e-6)  # loggers get fp32
    rows, truths = ((run / "switches.jsonl").read_text().splitlines() for run in (whole, one))
    for row, truth in zip(map(json.loads, rows), map(json.loads, truths), strict=True):
        assert row["after"] == pytest.approx(truth["after"], rel=1e-6, abs=1e-6)
        assert row["drift"] == pytest.approx(truth["drift"], rel=1e-6)
    assert launched.killed.stdout.count(f"run folder: {whole}") == 1
    assert launched.resumed.stdout.count("going on from") == 4  # fit that was refused, fit, test and predict


def test_completions_are_those_of_one_process_in_their_order(
    launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    run = launched.folder / "killed"
    two = (run / "predictions.jsonl").read_text()
    alone = ["--ckpt_path", "last", "--trainer.devices", "1", "--trainer.strategy", "auto"]
    main(["predict", "--config", str(run / "config.yaml"), *alone])
    assert (run / "predictions.jsonl").read_text() == two
    rows = [json.loads(line) for line in two.splitlines()]
    assert len(rows) == 6  # an odd number of batches of two: one process has run out before the other
    (measured,) = table(run / "evaluation.csv")
    assert measured["test/length"] == pytest.approx(sum(row["tokens"] for row in rows) / 6)
    assert measured["test/stopped"] == pytest.approx(sum(row["stopped"] for row in rows) / 6)
