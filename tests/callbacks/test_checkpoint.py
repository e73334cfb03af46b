"""When checkpoints are written, and what a run that goes on from each of them gives: all of one run's are tried."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from hbat_lightning import LoraSettings
from hbat_lightning.callbacks import ElasticWeightConsolidation, WindowCheckpoint
from hbat_lightning.schedules import Interval, Rounds
from tests.support import same_bits


class KeepAll(WindowCheckpoint):
    """Keeps a copy of every file that is written, with the step and where in Lightning's loop it was."""

    def __init__(self, folder: Path, every: int | None) -> None:
        super().__init__(every, str(folder))
        self.copies: list[tuple[int, Path]] = []

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        copy = Path(filepath).parent / f"copy-{len(self.copies)}.ckpt"
        shutil.copy(filepath, copy)
        self.copies.append((trainer.global_step, copy))


@pytest.mark.parametrize(
    ("every", "steps"),
    [(None, [3, 5, 8, 10]), (1, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), (2, [2, 3, 4, 5, 6, 8, 10]), (4, [3, 4, 5, 8, 10])],
)
def test_steps_at_which_it_saves(
    every: int | None, steps: list[int], make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    """At every switch, and every n steps in between; at a switch only after the validation."""
    keep = KeepAll(tmp_path, every)
    fit(make_hybrid(schedule=Interval(2, 3, 2)), keep, enable_checkpointing=True)
    assert [step for step, _ in keep.copies] == steps
    for step, path in keep.copies:
        state = torch.load(path, weights_only=True)
        position = state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"]
        assert position == 3 * (step % 5 or 5)  # never inside a window of three micro-batches
    files = sorted(path.name for path in tmp_path.glob("*.ckpt") if not path.name.startswith("copy"))
    assert files == ["last.ckpt", "step=10.ckpt"]  # one file, and the link to it
    assert (tmp_path / "last.ckpt").is_symlink()
    assert (tmp_path / "last.ckpt").resolve() == tmp_path / "step=10.ckpt"


class Validations(Callback):
    def __init__(self) -> None:
        self.at: list[int] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.at.append(trainer.global_step)


@pytest.mark.parametrize("interval", [1.0, 4], ids=["at switches", "and in between"])
def test_every_file_of_a_run_leads_to_the_same_end(
    interval: Any, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    """Growing rounds, dropout, EWC: each checkpoint, switches and round ends included, with no validation lost or doubled."""

    def run(folder: str, ckpt_path: Path | None = None) -> tuple[Any, KeepAll, Validations]:
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = make_hybrid(policy, schedule=Rounds(2, 2, 1), optimizer_state="per_objective")
        keep, seen = KeepAll(tmp_path / folder, 1), Validations()
        done = fit(
            module,
            ElasticWeightConsolidation(20.0),
            keep,
            seen,
            data=make_data(22, 14),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            val_check_interval=interval,
        )
        return done, keep, seen

    whole, keep, validations = run("whole")
    assert len(keep.copies) >= 10
    for number, (step, path) in enumerate(keep.copies):
        done, _, seen = run(f"from {number}", path)
        assert done.trainer.global_step == whole.trainer.global_step
        assert same_bits(whole.weights, done.weights), step
        later = [at for at in validations.at if at > step]
        assert [at for at in seen.at if at > step] == later, step


def test_nothing_is_written_in_a_dry_run(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    fit(make_hybrid(), WindowCheckpoint(1), fast_dev_run=3, enable_checkpointing=True)
    assert not list(tmp_path.rglob("*.ckpt"))
