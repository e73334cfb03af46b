"""Run ``hbat fit`` and write down what its heap held: what was allocated, and what malloc kept of freed memory.

    python benchmarks/heap.py heap.json fit --config configs/sft.yaml      # everything behind the report is hbat's

A thread asks glibc (``mallinfo2``, all arenas and mapped blocks) and the kernel (anonymous pages) many times a second. So
Python's own objects and those of libraries are in it, which torch's profiler does not see, and no events pile up.
"""

from __future__ import annotations

import ctypes
import json
import sys
import threading
from pathlib import Path
from typing import Any

from marks import MarkedCLI, Marks

from hbat_lightning.cli import _information_on_stdout, make_cli

PAUSE = 0.02  # seconds


class _Mallinfo2(ctypes.Structure):
    """See mallinfo(3)."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


_LIBC = ctypes.CDLL("libc.so.6")
_LIBC.mallinfo2.restype = _Mallinfo2


def heap() -> dict[str, int]:
    """Bytes of this process: allocated, kept by malloc although they are free, and anonymous pages."""
    info = _LIBC.mallinfo2()
    status = Path("/proc/self/status").read_text()
    pages = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))
    return {"allocated": info.uordblks + info.hblkhd, "kept": info.fordblks, "anonymous": 1024 * pages}


class Watch(threading.Thread):
    """Keeps the highest figures of every moment of a run, and how things stood when each was highest of all."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._over = threading.Event()
        self.most: dict[str, dict[str, Any]] = {"allocated": heap(), "anonymous": heap()}
        self.moments: dict[str, dict[str, int]] = {}
        self.before = 0

    def run(self) -> None:
        """Watch until told to stop."""
        while not self._over.wait(PAUSE):
            now, moment = heap(), Marks.moment
            for name, most in self.most.items():
                if now[name] > most[name]:
                    self.most[name] = now | {"moment": moment}
            if moment == "starting":
                self.before = now["allocated"]
            peak = self.moments.setdefault(moment, dict(now))
            peak |= {name: max(size, peak[name]) for name, size in now.items()}

    def report(self) -> dict[str, Any]:
        """Stop, and say what was seen; what was allocated before loading is the interpreter's and the libraries'."""
        self._over.set()
        self.join()
        return {"before": self.before, "most": self.most, "moments": self.moments, "at the end": heap()}


def watch(arguments: list[str]) -> dict[str, Any]:
    """Run ``hbat`` with these arguments, and report."""
    thread = Watch()
    thread.start()
    with _information_on_stdout():
        make_cli(arguments, cli=MarkedCLI)
    return thread.report()


def main() -> None:
    """See the module."""
    Path(sys.argv[1]).write_text(json.dumps(watch(sys.argv[2:]), indent=1))


if __name__ == "__main__":
    main()
