"""When checkpoints are written, and what a run that goes on from each of them gives: all of one run's are tried."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from hbat_lightning import DataSource, HybridDataModule, LoraSettings
from hbat_lightning.callbacks import ElasticWeightConsolidation, WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.schedules import Interval, Rounds
from tests.support import same_bits


class KeepAll(WindowCheckpoint):
    """Keeps a copy of every file that is written, with its step and how many validations there had been."""

    def __init__(self, folder: Path, every: int | None) -> None:
        super().__init__(every, str(folder))
        self.copies: list[tuple[int, int, Path]] = []
        self.validated_at: list[int] = []

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self.validated_at.append(trainer.global_step)
        super().on_validation_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        copy = Path(filepath).parent / f"copy-{len(self.copies)}.ckpt"
        shutil.copy(filepath, copy)
        self.copies.append((trainer.global_step, len(self.validated_at), copy))


def position(path: Path) -> int:
    """Micro-batches of the round that are done, by the file."""
    state = torch.load(path, weights_only=True)
    return int(state["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]["position"])


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
    assert [step for step, _, _ in keep.copies] == steps
    for step, _, path in keep.copies:
        assert position(path) == 3 * (step % 5 or 5)  # never inside a window of three micro-batches
    files = sorted(path.name for path in tmp_path.glob("*.ckpt") if not path.name.startswith("copy"))
    assert files == [
        "last.ckpt",
        "step=10.ckpt",
        f"step={steps[-2]}.ckpt",
    ]  # the link to the newest, and the one before
    assert (tmp_path / "last.ckpt").is_symlink()
    assert (tmp_path / "last.ckpt").resolve() == tmp_path / "step=10.ckpt"


@pytest.mark.parametrize("interval", [1.0, 6], ids=["at switches", "and in between"])
def test_every_file_of_a_run_leads_to_the_same_end(
    interval: Any, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    """Growing rounds, dropout, EWC: at each switch, behind it and inside, with no validation lost or doubled."""

    def run(folder: str, ckpt_path: Path | None = None) -> tuple[Any, KeepAll]:
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = make_hybrid(policy, schedule=Rounds(2, 2, 1), optimizer_state="per_objective")
        ewc, keep = ElasticWeightConsolidation(20.0), KeepAll(tmp_path / folder, 1)
        settings = {"data": make_data(22, 14), "enable_checkpointing": True, "val_check_interval": interval}
        return fit(module, ewc, keep, ckpt_path=ckpt_path, **settings), keep

    whole, keep = run("whole")
    assert len(keep.copies) >= 10
    ended = whole.module.plan.ended_at
    for number, (step, validated, path) in enumerate(keep.copies):
        switched = ended(step) is not None or ended(step - 1) is not None
        if switched != (interval == 1.0):
            continue  # inside phases one interval is enough, at switches the other
        done, again = run(f"from {number}", path)
        assert done.trainer.global_step == whole.trainer.global_step
        assert same_bits(whole.weights, done.weights), step
        assert keep.validated_at[:validated] + again.validated_at == keep.validated_at, step
        # Nor does the run that goes on save inside a window, whose gradients would be lost if it were stopped there.
        later = [found for found in keep.copies if found[0] > step]
        assert [(at, position(copy)) for at, _, copy in again.copies if at > step] == [
            (at, position(copy)) for at, _, copy in later
        ]
        assert all(position(copy) % 3 == 0 for _, _, copy in again.copies), step


@pytest.mark.parametrize("held_out", [0.25, 0.0])
def test_the_link_that_a_run_did_not_get_to_is_set_by_the_one_that_goes_on(
    held_out: float, make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    """After a disk that was full behind the last file: there is no further one to save, and perhaps nothing to train."""

    def run(ckpt_path: Path | None = None) -> None:
        paths = (embedded.INSTRUCTION, embedded.PREFERENCE)
        data = HybridDataModule(*(DataSource(path, limit=12, val_fraction=held_out) for path in paths), batch_size=2)
        keep = WindowCheckpoint(1, str(tmp_path))
        module = make_hybrid(schedule=Interval(1, 2, 2))
        fit(module, keep, data=data, ckpt_path=ckpt_path, enable_checkpointing=True)

    run()
    link, newest, before = tmp_path / "last.ckpt", tmp_path / "step=4.ckpt", tmp_path / "step=3.ckpt"
    for found in (None, before):
        link.unlink()
        if found:
            link.symlink_to(found.name)
        run(newest)
        assert link.is_symlink()
        assert link.resolve() == newest.resolve()


def test_nothing_is_written_in_a_dry_run(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    fit(make_hybrid(), WindowCheckpoint(1), fast_dev_run=3, enable_checkpointing=True)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_without_held_out_rows_it_saves_at_the_end_of_rounds(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    def data() -> HybridDataModule:
        sources = [DataSource(path, limit=12, val_fraction=0.0) for path in (embedded.INSTRUCTION, embedded.PREFERENCE)]
        return HybridDataModule(*sources, batch_size=2)

    keep = KeepAll(tmp_path / "whole", None)
    whole = fit(make_hybrid(schedule=Interval(3, 3, 2)), keep, data=data(), enable_checkpointing=True)
    assert [(step, validated) for step, validated, _ in keep.copies] == [(5, 0), (10, 0), (15, 0)]
    for _, _, path in keep.copies[:2]:
        rest = fit(make_hybrid(schedule=Interval(3, 3, 2)), data=data(), ckpt_path=path)
        assert rest.trainer.global_step == 15
        assert same_bits(whole.weights, rest.weights)


def test_the_newest_good_files_are_kept_and_nothing_of_others_is_removed(
    make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    """A run of its own leaves what it finds; one that goes on removes a damaged file, and keeps what it came from."""

    def run(**settings: Any) -> list[str]:
        module = make_hybrid(schedule=Interval(1, 6, 2))
        fit(module, WindowCheckpoint(1, str(tmp_path)), enable_checkpointing=True, **settings)
        return sorted(path.name for path in tmp_path.iterdir() if not path.is_symlink())

    (tmp_path / "step=99.ckpt").write_text("of another run")
    assert run(max_steps=4) == ["step=3.ckpt", "step=4.ckpt", "step=99.ckpt"]
    (tmp_path / "step=99.ckpt").rename(tmp_path / "other.ckpt")
    (tmp_path / "step=4.ckpt").write_text("damaged")
    (tmp_path / ".step=4.ckpt.partial").write_text("what a killed process leaves")
    shutil.copy(tmp_path / "step=3.ckpt", tmp_path / "step=2.ckpt")
    assert run(max_steps=5, ckpt_path=tmp_path / "step=3.ckpt") == ["other.ckpt", "step=4.ckpt", "step=5.ckpt"]
    (tmp_path / "step=5.ckpt").rename(tmp_path / "step=6.ckpt")  # as if it were of a later step, and damaged
    assert run(max_steps=5, ckpt_path=tmp_path / "step=4.ckpt") == ["other.ckpt", "step=4.ckpt", "step=5.ckpt"]
