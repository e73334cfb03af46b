"""Results of a study in one file, and back into folders: so that a study can go on elsewhere without making its runs again."""

from __future__ import annotations

import json
from pathlib import Path

# Others begin from the adapter of this run, which the file does not hold: it is made again.
NEEDED_WHOLE = "sft/chosen-"


def keep(runs: Path, file: Path) -> int:
    """Write the results of all runs that are done into a file, a line each.

    Args:
        runs: The folder of the runs.
        file: Where to.

    Returns:
        How many there are.
    """
    found = sorted(runs.rglob("result.json"))
    lines = [
        json.dumps({"place": path.parent.relative_to(runs).as_posix(), **json.loads(path.read_text())})
        for path in found
    ]
    file.write_text("".join(f"{line}\n" for line in lines))
    return len(lines)


def bring_back(file: Path, runs: Path) -> int:
    """Put results where runs of a study leave them; what is there already stays.

    Args:
        file: As :func:`keep` writes it.
        runs: The folder of the runs.

    Returns:
        How many were put there.
    """
    brought = 0
    for line in file.read_text().splitlines():
        result = json.loads(line)
        place = result.pop("place")
        kept = runs / place / "result.json"
        if place.startswith(NEEDED_WHOLE) or kept.exists():
            continue
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(result, indent=1))
        brought += 1
    return brought
