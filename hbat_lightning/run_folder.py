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
OUTPUTS = (
    *("metrics.csv", "evaluation.csv", "switches.jsonl", "switches.png", "nonfinite.jsonl", MARK, "config.yaml"),
    "predictions.jsonl",
)
_FOLDERS = (CHECKPOINTS, "adapter", "model")


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint of a run, or ``None``.

    A file whose archive has no directory at its end was torn while it was written, and is passed over.
    """
    # Ours first: another checkpoint callback may keep the best by some figure, which is no place to go on from.
    for pattern in ("step=*.ckpt", "*.ckpt"):
        found = [path for path in (folder / CHECKPOINTS).glob(pattern) if not path.is_symlink()]
        newest_first = sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)
        whole = next((path for path in newest_first if zipfile.is_zipfile(path)), None)
        if whole is not None:
            return whole
    return None


def require_free(folder: Path) -> None:
    """See to it that a folder holds no run.

    Raises:
        UserError: When it does; says how to go on.
    """
    mark = folder / MARK
    finished = mark.exists() and json.loads(mark.read_text()).get("status") == "finished"
    if finished or latest_checkpoint(folder) is not None:
        raise UserError(
            f"{folder} holds {'a finished run' if finished else 'an unfinished run'}: go on with --ckpt_path last, give "
            "another --trainer.default_root_dir, or replace it with --overwrite true"
        )


def clear(folder: Path) -> None:
    """Remove a run's files, and nothing else that lies beside them."""
    for name in OUTPUTS:
        (folder / name).unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The file that ``--ckpt_path`` names.

    Args:
        folder: The run folder.
        wanted: A file, or ``last`` for the folder's newest whole checkpoint.

    Returns:
        The file; ``None`` where ``last`` finds none.

    Raises:
        UserError: There is no such file, or it is no whole checkpoint.
    """
    if wanted == "last":
        return latest_checkpoint(folder)
    path = Path(wanted)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; --ckpt_path takes a file, or last")
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path}: not a whole checkpoint; give another file to --ckpt_path, or last")
    return path


def leave_mark(folder: Path, finished: bool, facts: dict[str, Any]) -> None:
    """Leave the mark of a run that has finished, or was stopped by a limit."""
    folder.mkdir(parents=True, exist_ok=True)
    status = "finished" if finished else "stopped"
    (folder / MARK).write_text(json.dumps({"status": status, **facts}, indent=2) + "\n")
