"""A run is a folder: what lies in it, and when it may be written to."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from hbat_lightning.errors import UserError

CHECKPOINTS = "checkpoints"
MARK = "run.json"
_OUTPUTS = ("metrics.csv", "switches.jsonl", "switches.png", MARK, "config.yaml", "predictions.jsonl")
_FOLDERS = (CHECKPOINTS, "adapter", "model")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or ``None``.

    A file whose archive has no directory at its end was torn while it was written, and is passed over.
    """
    found = (folder / CHECKPOINTS).glob("*.ckpt") if (folder / CHECKPOINTS).is_dir() else iter(())
    files = sorted((path for path in found if not path.is_symlink()), key=lambda path: path.stat().st_mtime_ns)
    return next((path for path in reversed(files) if zipfile.is_zipfile(path)), None)


def require_free(folder: Path, overwrite: bool) -> None:
    """See to it that a new run may begin in a folder.

    Args:
        folder: The run folder.
        overwrite: Remove an earlier run's files.

    Raises:
        UserError: When it holds a run and ``overwrite`` is off.
    """
    finished = (folder / MARK).exists()
    if not finished and latest_checkpoint(folder) is None:
        return
    if not overwrite:
        state = "a finished run" if finished else "an unfinished run"
        raise UserError(
            f"{folder} holds {state}: go on with --ckpt_path last, give another --trainer.default_root_dir, or replace it "
            "with --overwrite true"
        )
    for name in _OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def mark_finished(folder: Path, facts: dict[str, Any]) -> None:
    """Leave the mark of a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(json.dumps({"status": "finished", **facts}, indent=2) + "\n")
