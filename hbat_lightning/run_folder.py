"""A run is a folder: what lies in it, and when it may be written to."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from hbat_lightning.checkpoint_io import damage
from hbat_lightning.errors import UserError
from hbat_lightning.files import PARTIAL, replace_text
from hbat_lightning.run_lock import FILE as LOCK

CHECKPOINTS = "checkpoints"
MARK = "run.json"
OUTPUTS = (
    *(
        "metrics.csv",
        "evaluation.csv",
        "switches.jsonl",
        "switches.png",
        "held_out.json",
        "nonfinite.jsonl",
        MARK,
        "config.yaml",
    ),
    *("predictions.jsonl", "validated.json", "tested.jsonl", "conflict.jsonl", "conflict.png", "samples.jsonl"),
)
_FOLDERS = (CHECKPOINTS, "adapter", "model")
_NAMES = "|".join(map(re.escape, (*OUTPUTS, *_FOLDERS, LOCK)))
_OURS = re.compile(rf"{_NAMES}|\.({_NAMES}){re.escape(PARTIAL)}|rank\d+\.nonfinite\.jsonl")


def newest_first(folder: Path, pattern: str = "step=*.ckpt") -> list[Path]:
    """Checkpoint files in a folder, the newest first; links to them are left out."""
    found = [path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()]
    return sorted(found, key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name), reverse=True)


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest good checkpoint of a run; newer ones that are damaged are named on stderr.

    Args:
        folder: The run folder.

    Returns:
        The file; ``None`` where there is none at all.

    Raises:
        UserError: There are some, and every one is damaged.
    """
    damaged: list[str] = []
    for path in _candidates(folder / CHECKPOINTS):
        said = damage(path)
        if said is None:
            for line in damaged:
                _warn(f"{line}; going back to {path}")
            return path
        damaged.append(f"{path}: {said}")
    if damaged:
        raise UserError(
            f"no good checkpoint in {folder / CHECKPOINTS}: {'; '.join(damaged)}. Bring one back from a copy, or start over "
            "with --overwrite true and without --ckpt_path"
        )
    return None


def _candidates(checkpoints: Path) -> Iterator[Path]:
    # Ours first: another checkpoint callback may keep the best by some figure, which is no place to go on from.
    ours = newest_first(checkpoints)
    yield from ours
    yield from (path for path in newest_first(checkpoints, "*.ckpt") if path not in ours)


@rank_zero_only
def _warn(line: str) -> None:
    print(f"hbat: warning: {line}", file=sys.stderr)


def require_free(folder: Path) -> None:
    """See to it that a folder holds no run.

    Raises:
        UserError: When it does; says how to go on.
    """
    finished = _is_finished(folder / MARK)
    if finished or next(_candidates(folder / CHECKPOINTS), None) is not None:
        raise UserError(
            f"{folder} holds {'a finished run' if finished else 'an unfinished run'}: go on with --ckpt_path last, give "
            "another --trainer.default_root_dir, or replace it with --overwrite true"
        )


def refuse_links(folder: Path) -> None:
    """See to it that nothing is written through a link to somewhere else: a folder of a stranger may hold such links.

    The folder itself may be one, and links to what lies in it are in order.

    Args:
        folder: The run folder.

    Raises:
        UserError: Where files of a run lie, there is a link that leads out of the folder.
    """
    inside = folder.resolve()
    for place in (folder, *(folder / name for name in _FOLDERS)):
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            ours = place != folder or _OURS.fullmatch(path.name)
            target = Path(os.path.realpath(path))  # resolve() raises where links lead to one another
            if ours and path.is_symlink() and not target.is_relative_to(inside):
                raise UserError(
                    f"{path} is a link that leads out of the run folder, to {target}, and would be written through: "
                    "remove it; the run folder as a whole may be a link"
                )


def _is_finished(mark: Path) -> bool:
    try:
        return bool(json.loads(mark.read_text()).get("status") == "finished")
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def clear(folder: Path) -> None:
    """Remove a run's files, and nothing else that lies beside them."""
    for path in [*(folder / name for name in OUTPUTS), *folder.glob("rank*.nonfinite.jsonl")]:  # of further processes
        path.unlink(missing_ok=True)
    for name in _FOLDERS:
        shutil.rmtree(folder / name, ignore_errors=True)


def find_checkpoint(folder: Path, wanted: str) -> Path | None:
    """The file that ``--ckpt_path`` names, checked by its checksum.

    Args:
        folder: The run folder.
        wanted: A file, or ``last`` for the folder's newest good checkpoint.

    Returns:
        The file; ``None`` where ``last`` finds none.

    Raises:
        UserError: There is no such file, it is damaged, or ``last`` finds damaged ones only.
    """
    if wanted == "last":
        return latest_checkpoint(folder)
    path = Path(wanted)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; --ckpt_path takes a file, or last")
    said = damage(path)
    if said is not None:
        places = dict.fromkeys((path.parent, folder / CHECKPOINTS))
        good = next((one for place in places for one in _candidates(place) if damage(one) is None), None)
        none = f"there is no good one in {' or '.join(str(place) for place in places)}"
        raise UserError(f"{path}: {said}; {none if good is None else f'the newest good one is {good}'}")
    return path


def leave_mark(folder: Path, finished: bool, facts: dict[str, Any]) -> None:
    """Leave the mark of a run that has finished, or was stopped by a limit."""
    status = "finished" if finished else "stopped"
    replace_text(folder / MARK, json.dumps({"status": status, **facts}, indent=2) + "\n")
