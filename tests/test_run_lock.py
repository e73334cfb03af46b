"""Two runs in one folder: the second is turned away, and nothing keeps a third out when the first has died."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hbat_lightning import run_lock
from hbat_lightning.cli import main, make_cli
from hbat_lightning.errors import UserError
from hbat_lightning.run_lock import FILE, hold
from tests.test_cli import config, few_rows, in_folder


def in_a_child(folder: Path, work: Callable[[], None]) -> tuple[int, str]:
    """Take the lock of a folder in a forked process, and do something there until it is killed.

    Returns:
        The process, and why it has not got the lock; nothing where it has.
    """
    said, tell = os.pipe()
    child = os.fork()
    if child == 0:
        os.setsid()
        try:
            with hold(folder):
                work()
                os.write(tell, b"\n")
                time.sleep(60)
        except UserError as error:
            os.write(tell, f"{error}\n".encode())
        finally:
            os._exit(0)
    os.close(tell)
    with open(said) as lines:
        return child, lines.readline().strip()


def sleep_in_a_child_of_its_own() -> None:
    if os.fork() == 0:
        time.sleep(60)
        os._exit(0)


@pytest.fixture
def holder() -> Iterator[Callable[..., int]]:
    """Another process that holds the lock of a folder."""
    started = []

    def start(folder: Path, work: Callable[[], None] = lambda: None) -> int:
        child, refused = in_a_child(folder, work)
        started.append(child)
        assert refused == ""
        return child

    yield start
    for child in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def sft(folder: Path) -> list[str]:
    return ["fit", *config("sft"), *few_rows("instruction", rows=8), *in_folder(folder)]


def test_the_second_command_is_refused_in_one_line_and_touches_nothing(
    holder: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whether it would begin, go on, or replace the run."""
    other = holder(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    for more in ([], ["--ckpt_path", "last"], ["--overwrite", "true"]):
        with pytest.raises(SystemExit) as ended:
            main([*sft(tmp_path / "run"), *more])
        assert ended.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hbat: ")]
        assert f"{tmp_path / 'run'} is in use by a run that has not ended (process {other} on " in line
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_command_holds_its_folder_while_it_runs_and_leaves_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other way round: the lock is asked for by another process in the middle of a run."""
    said = []

    def ask(*_: object) -> None:
        child, refused = in_a_child(tmp_path, lambda: None)
        os.waitpid(child, 0)
        said.append(refused)

    monkeypatch.setattr("hbat_lightning.callbacks.WindowCheckpoint.on_sanity_check_start", ask)
    main([*sft(tmp_path), "--trainer.max_steps", "1"])
    assert f"is in use by a run that has not ended (process {os.getpid()} on " in said[0]
    assert not (tmp_path / FILE).exists()


def test_a_run_that_was_killed_holds_nothing(holder: Callable[..., int], tmp_path: Path) -> None:
    """Nor do processes that it had forked, as those that read data, and that live on for a while."""
    other = holder(tmp_path, sleep_in_a_child_of_its_own)
    with pytest.raises(UserError, match=f"process {other} on"), hold(tmp_path):
        pass
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert (tmp_path / FILE).exists()
    with hold(tmp_path):
        assert (tmp_path / FILE).read_text().startswith(f"process {os.getpid()} on ")
    assert not (tmp_path / FILE).exists()


def test_a_refused_command_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        main([*sft(tmp_path / "a" / "b"), "--ckpt_path", str(tmp_path / "none.ckpt")])
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "kept").mkdir()
    with hold(tmp_path / "kept" / "made"):
        (tmp_path / "kept" / "made" / "metrics.csv").write_text("")
    assert (tmp_path / "kept" / "made" / "metrics.csv").exists()


def test_further_processes_of_a_run_share_its_lock(
    holder: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They meet a lock that the first one holds, and go past it to the next thing to look at."""
    holder(tmp_path)
    monkeypatch.setattr("lightning.pytorch.utilities.rank_zero_only.rank", 1)
    with pytest.raises(UserError, match="no such checkpoint"):
        make_cli([*sft(tmp_path), "--ckpt_path", str(tmp_path / "none.ckpt")])


def test_a_file_that_its_holder_has_removed_is_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opened before the holder let go, locked after: whoever comes third must not get another lock beside it."""
    real, opened = run_lock._lock, []

    def slow(file: object, path: Path) -> None:
        if not opened:
            path.unlink()
        opened.append(file)
        real(file, path)  # type: ignore[arg-type]

    monkeypatch.setattr(run_lock, "_lock", slow)
    with hold(tmp_path):
        assert (tmp_path / FILE).exists(), "it has locked the file that is there"
        assert len(opened) == 2


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UserError, match=r"file/run: cannot be written or locked \(Not a directory\)"),
        hold(tmp_path / "file" / "run"),
    ):
        pass
