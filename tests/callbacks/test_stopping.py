"""SIGTERM and Ctrl-C at awkward moments; rows of the log that belong before a checkpoint."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from hbat_lightning.callbacks import SwitchReport, WindowCheckpoint
from hbat_lightning.errors import UserError
from hbat_lightning.metrics_logger import MetricsLogger
from hbat_lightning.run_folder import newest_first
from hbat_lightning.schedules import Interval
from hbat_lightning.slurm import requeue
from tests.support import same_bits


class Sender(Callback):
    """Sends this process a signal when a hook is called for the n-th time."""

    def __init__(self, number: signal.Signals, hook: str, count: int, times: int = 1) -> None:
        self.number, self.hook, self.left, self.times = number, hook, count, times

    def _reach(self, hook: str, trainer: Any) -> None:
        if self.hook != hook + (", sanity check" if trainer.sanity_checking else ""):
            return
        self.left -= 1
        if self.left == 0:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._reach("micro-batch", trainer)

    def on_validation_batch_start(self, trainer: Any, *_: Any) -> None:
        self._reach("validation", trainer)


def ended(fit: Any, *args: Any, **settings: Any) -> tuple[int, bool]:
    """Exit code of a run that was stopped, and whether Ctrl-C stopped it."""
    with pytest.raises(SystemExit) as stopped:
        fit(*args, enable_checkpointing=True, **settings)
    return stopped.value.code, isinstance(stopped.value.__context__, KeyboardInterrupt)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("number", "hook", "count", "step"),
    [
        (signal.SIGTERM, "micro-batch", 5, 2),
        (signal.SIGTERM, "micro-batch", 9, 3),
        (signal.SIGTERM, "validation", 1, 3),
        (signal.SIGTERM, "validation", 6, 5),
        (signal.SIGINT, "micro-batch", 6, 2),
    ],
    ids=["inside a window", "end of a phase", "validation", "validation of a round", "ctrl-c, last of a window"],
)
def test_it_stops_where_it_can_go_on(
    number: signal.Signals, hook: str, count: int, step: int, make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    """Phases of 3 + 2 windows of three micro-batches, five batches of held-out rows: window and validation are finished."""
    before = signal.getsignal(signal.SIGTERM)
    checkpoint = WindowCheckpoint(None, str(tmp_path / "checkpoints"))
    code, interrupted = ended(fit, make_hybrid(schedule=Interval(2, 3, 2)), Sender(number, hook, count), checkpoint)
    assert (code, interrupted) == ((143, False) if number == signal.SIGTERM else (1, True))
    assert signal.getsignal(signal.SIGTERM) == before
    newest = newest_first(tmp_path / "checkpoints")[0]
    assert newest.name == f"step={step}.ckpt"
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve() == newest
    state = torch.load(newest, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0]
    assert state["position"] == 3 * (step % 5 or 5)


def test_a_sanity_check_stops_at_once(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    stop = Sender(signal.SIGTERM, "validation, sanity check", 1)
    assert ended(fit, make_hybrid(), stop, WindowCheckpoint(1), num_sanity_val_steps=-1) == (143, False)
    assert stop.left == 0
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_second_ctrl_c_stops_at_once_and_leaves_the_checkpoint_before(
    make_hybrid: Any, fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stop = Sender(signal.SIGINT, "micro-batch", 5, times=2)
    assert ended(fit, make_hybrid(), stop, WindowCheckpoint(1, str(tmp_path)))[1]
    assert [path.name for path in newest_first(tmp_path)] == ["step=1.ckpt"]
    assert f"--ckpt_path last goes on from {tmp_path}/step=1.ckpt" in capsys.readouterr().out


def test_a_run_that_was_stopped_can_be_run_again_with_the_same_callback(make_hybrid: Any, fit: Any) -> None:
    checkpoint = WindowCheckpoint(1)
    ended(fit, make_hybrid(), Sender(signal.SIGTERM, "micro-batch", 1), checkpoint)
    assert fit(make_hybrid(), checkpoint, enable_checkpointing=True).trainer.global_step > 1


# ---- SLURM ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A job of SLURM as Lightning recognises it; the file holds what its ``scontrol`` was asked."""
    variables = {"NTASKS": "1", "JOB_ID": "4711", "JOB_NAME": "train", "PROCID": "0", "LOCALID": "0", "NODEID": "0"}
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    asked, tool = tmp_path / "asked", tmp_path / "bin" / "scontrol"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\necho "$@" >> "{asked}"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    return asked


def test_a_job_that_is_requeued_goes_on_to_the_same_bits(job: Path, make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    """SIGUSR1 in the middle of a window, where Lightning itself would save: the window is finished first."""
    before = signal.getsignal(signal.SIGUSR1)
    schedule = Interval(2, 3, 2)

    def keep(folder: str) -> WindowCheckpoint:
        return WindowCheckpoint(None, str(tmp_path / folder))

    whole = fit(make_hybrid(schedule=schedule), keep("whole"), enable_checkpointing=True)
    assert not job.exists()
    sender = Sender(signal.SIGUSR1, "micro-batch", 5)
    assert ended(fit, make_hybrid(schedule=schedule), sender, keep("parts")) == (143, False)
    assert job.read_text() == "requeue 4711\n"
    assert signal.getsignal(signal.SIGUSR1) == before
    assert list(tmp_path.glob("hpc_ckpt*")) == []
    last = tmp_path / "parts" / "last.ckpt"
    assert last.resolve().name == "step=2.ckpt"
    rest = fit(make_hybrid(schedule=schedule), keep("parts"), ckpt_path=last, enable_checkpointing=True)
    assert same_bits(rest.weights, whole.weights)


def test_a_task_of_an_array_is_requeued_by_its_own_number_and_failure_is_said(
    job: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    requeue()
    assert job.read_text() == "requeue 12_3\n"
    (job.parent / "bin" / "scontrol").write_text("#!/bin/sh\necho no such job >&2; exit 1\n")
    with pytest.warns(UserWarning, match=r"scontrol requeue 12_3 failed \(no such job\): submit the job again"):
        requeue()
    monkeypatch.setenv("PATH", "")
    with pytest.warns(UserWarning, match=r"failed \(.*scontrol.*\): submit"):
        requeue()


def test_without_its_checkpoints_nothing_is_requeued(job: Path, make_hybrid: Any, fit: Any) -> None:
    done = fit(make_hybrid(), max_steps=1)
    assert done.trainer._accelerator_connector.cluster_environment.auto_requeue is False


def test_a_file_that_was_saved_inside_a_window_is_refused(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    """As Lightning would save it; its weights can be looked at."""

    class Save(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "inside.ckpt")

    fit(make_hybrid(), Save(), max_steps=2)
    with pytest.raises(UserError, match="saved after micro-batch 2 of a window of 3, and holds no gradients of them"):
        fit(make_hybrid(), ckpt_path=tmp_path / "inside.ckpt")


class Breaks(WindowCheckpoint):
    """Ends the process's work as soon as the checkpoint of a step is on the disk."""

    def __init__(self, step: int, folder: Path) -> None:
        super().__init__(1, str(folder))
        self.step = step

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def test_no_row_is_missing_behind_a_checkpoint_and_none_is_there_twice(
    make_hybrid: Any, fit: Any, make_trainer: Any, make_data: Any, tmp_path: Path
) -> None:
    """Lightning logs a step after the hook in which its checkpoint is saved."""

    def run(folder: str, checkpoint: WindowCheckpoint, ckpt_path: Path | None = None) -> None:
        place = tmp_path / folder
        trainer = make_trainer(
            default_root_dir=place,
            logger=MetricsLogger(str(place)),
            callbacks=[SwitchReport(), checkpoint],
            enable_checkpointing=True,
        )
        trainer.fit(make_hybrid(schedule=Interval(2, 3, 2)), make_data(), ckpt_path=ckpt_path)

    run("whole", WindowCheckpoint(1))
    with pytest.raises(RuntimeError, match="killed"):
        run("broken", Breaks(2, tmp_path / "broken" / "checkpoints"))
    newest = newest_first(tmp_path / "broken" / "checkpoints")[0]
    assert torch.load(newest, weights_only=True)["global_step"] == 2
    run("broken", WindowCheckpoint(1), newest)
    for name in ("metrics.csv", "switches.jsonl"):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
