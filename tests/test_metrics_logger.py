"""metrics.csv is whole at any moment, and holds every row once."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hbat_lightning import files
from hbat_lightning.files import append_text, out_of_room, whole_lines
from hbat_lightning.metrics_logger import MetricsLogger


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def written(folder: Path, count: int = 4) -> MetricsLogger:
    logger = MetricsLogger(str(folder))
    for step in range(count):
        logger.log_metrics({"loss": step / 2, "lr": 0.5}, step)
    return logger


@pytest.mark.parametrize("torn", ["0.5", "0.5,3", "1.0,0.5", "\x00\x00\x00"], ids=["a value", "two", "no end", "zeros"])
def test_a_torn_last_line_is_dropped_when_a_run_goes_on(torn: str, tmp_path: Path) -> None:
    written(tmp_path)
    whole = (tmp_path / "metrics.csv").read_bytes()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write(torn)
    MetricsLogger(str(tmp_path)).forget_from(4)
    assert (tmp_path / "metrics.csv").read_bytes() == whole
    MetricsLogger(str(tmp_path)).forget_from(2)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1"]


@pytest.mark.parametrize("left", ["", "lo"], ids=["nothing", "half a header"])
def test_a_file_without_a_header_is_begun_anew(left: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text(left)
    logger = MetricsLogger(str(tmp_path))
    logger.forget_from(0)
    logger.log_metrics({"loss": 1.0}, 0)
    assert rows(tmp_path) == [{"loss": "1.0", "step": "0"}]


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_process_killed_while_columns_are_added_loses_no_row(moment: str, tmp_path: Path) -> None:
    """A real process and a real SIGKILL."""
    written(tmp_path)
    before = rows(tmp_path)
    child = os.fork()
    if child == 0:
        setattr(files.os, moment, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        MetricsLogger(str(tmp_path)).log_metrics({"loss": 2.0, "new": 1.0}, 4)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert rows(tmp_path) == before
    MetricsLogger(str(tmp_path)).log_metrics({"loss": 2.0, "new": 1.0}, 4)
    assert [(row["step"], row["new"]) for row in rows(tmp_path)] == [*((str(n), "") for n in range(4)), ("4", "1.0")]


def test_a_row_that_was_written_ahead_is_there_once(tmp_path: Path) -> None:
    logger = written(tmp_path)
    logger.log_ahead({"loss": float("nan"), "lr": 0.5}, 4)
    assert len(rows(tmp_path)) == 5
    logger.log_metrics({"loss": float("nan"), "lr": 0.5}, 4)
    assert len(rows(tmp_path)) == 5
    logger.log_metrics({"loss": float("nan"), "lr": 0.5}, 4)  # another of the same step is another
    logger.log_ahead({"loss": 1.0, "lr": 0.5}, 5)
    logger.log_metrics({"val": 2.0}, 5)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3", "4", "4", "5", "5"]


class _FullError(Exception):
    """The disk is full."""


def log(logger: MetricsLogger, step: int) -> None:
    try:
        logger.log_metrics({"loss": 1 / 3, "lr": 0.5}, step)
    except OSError as error:
        raise (_FullError if out_of_room(error) else error) from None


def test_a_full_disk_leaves_no_part_of_a_row(small_disk: Path) -> None:
    logger = written(small_disk)
    whole = (small_disk / "metrics.csv").read_bytes()
    filler = small_disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(2**21))
    step = 4
    with contextlib.suppress(_FullError):
        for step in range(4, 400):  # the file's last page has room for some
            log(logger, step)
    assert step < 399
    logger.finalize("failed")  # as Lightning does then; nothing is tried again
    left = (small_disk / "metrics.csv").read_bytes()
    assert left.startswith(whole)
    assert left.endswith(b"\r\n")
    assert [row["step"] for row in rows(small_disk)] == [str(n) for n in range(step)]
    filler.unlink()
    MetricsLogger(str(small_disk)).log_metrics({"loss": 1.0, "lr": 0.5}, step)
    assert rows(small_disk)[-1]["step"] == str(step)


def test_text_is_added_or_not(small_disk: Path) -> None:
    path: Any = small_disk / "switches.jsonl"
    append_text(path, "one\n")
    with pytest.raises(OSError, match="No space"):
        append_text(path, "x" * 2**21 + "\n")
    assert path.read_text() == "one\n"
    path.write_text("one\ntwo\nthr")
    assert whole_lines(path) == ["one", "two"]
