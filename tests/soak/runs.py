"""Runs in processes of their own, and what they leave."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from tests.soak.traps import Fault, Stop, Traps

FOLDER = "run"  # in the directory where the command is given, so that no file differs by its place
FINISHED, REFUSED, TERMINATED, INTERRUPTED, BROKEN = 0, 2, 143, 130, 70
SECONDS = 1500
"""No run of these takes as long, even on a machine that is busy with other things."""


@dataclass(frozen=True)
class Outcome:
    """How a run's process has ended.

    Attributes:
        code: Its exit code; below 0 the signal that has killed it.
        seconds: How long it took.
    """

    code: int
    seconds: float

    def is_of(self, stop: Stop, counts: Mapping[str, int]) -> bool:
        """Whether it ended as it must, wherever the stop came; one that comes late may find a finished run.

        Args:
            stop: What it was to meet.
            counts: How often it came to each place, if it could say so.
        """
        if isinstance(stop.signal, Fault):
            came = counts.get(stop.place, 0) >= stop.count
            return self.code in ((BROKEN, REFUSED) if came else (FINISHED,))
        asked = {signal.SIGTERM: TERMINATED, signal.SIGINT: INTERRUPTED}
        return self.code in (-stop.signal, asked.get(stop.signal, -stop.signal), FINISHED)


class Launcher:
    """Starts ``hbat fit`` in forked children, once its arguments are parsed: that takes longer than the runs themselves.

    Args:
        command: The parsed command line, which children go on with.
    """

    def __init__(self, command: Any) -> None:
        self._command = command
        gc.collect()
        gc.freeze()  # nobody looks through all modules again in every child

    def fit(self, place: Path, resume: bool = False, stop: Stop | None = None) -> Outcome:
        """Run, and wait for the end.

        Args:
            place: The directory where the command is given; the run folder lies in it.
            resume: With ``--ckpt_path last``.
            stop: A signal that it gets.
        """
        place.mkdir(parents=True, exist_ok=True)
        (place / "counts.json").unlink(missing_ok=True)
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            self._command.config["fit"]["ckpt_path"] = "last" if resume else None
            raise _InChild(place, stop)
        return _wait(child, began, stop)


class Commands:
    """Starts whole ``hbat fit`` command lines.

    Args:
        arguments: Of ``hbat fit``, without the run folder.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = list(arguments)

    def fit(self, place: Path, resume: bool = False, stop: Stop | None = None) -> Outcome:
        """See :meth:`Launcher.fit`."""
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "hbat_lightning", "fit", *self._arguments]
        command += ["--trainer.default_root_dir", FOLDER, *(["--ckpt_path", "last"] if resume else [])]
        began = time.monotonic()
        with (place / "log.txt").open("ab") as log:
            child = subprocess.Popen(command, cwd=place, stdout=log, stderr=log, preexec_fn=_as_from_a_shell)
        return _wait(child.pid, began, stop)


class _InChild(BaseException):
    """Takes a child out of what its parent does."""

    def __init__(self, place: Path, stop: Stop | None) -> None:
        super().__init__()
        self.place, self.stop = place, stop


def with_launcher(arguments: Sequence[str], work: Callable[[Launcher], Any], result: Path) -> Outcome:
    """Do some work with a launcher, in a process of its own.

    Args:
        arguments: Of ``hbat fit``, without the run folder.
        work: What to do; what it returns is left in a file.
        result: The file.
    """
    from hbat_lightning import cli

    began = time.monotonic()
    process = os.fork()
    if process:
        return _wait(process, began, None, patience=None)
    go_on = cli.HbatCLI.before_instantiate_classes
    traps: Traps | None = None

    def launch(command: Any) -> None:
        nonlocal traps
        try:
            result.write_text(json.dumps(work(Launcher(command))))
        except _InChild as child:
            traps = _become_a_command(child)
            go_on(command)
        else:
            os._exit(FINISHED)

    cli.HbatCLI.before_instantiate_classes = launch  # type: ignore[method-assign]
    code = BROKEN
    try:
        cli.main(["fit", *arguments, "--trainer.default_root_dir", FOLDER])
        code = FINISHED
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except KeyboardInterrupt:  # before or behind main()
        code = INTERRUPTED
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code, traps)


def _as_from_a_shell() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def _become_a_command(child: _InChild) -> Traps:
    """Handlers, directory and output as a command has them that a shell has started; and traps."""
    _as_from_a_shell()
    os.chdir(child.place)
    log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(log, stream)
    traps = Traps(child.stop)
    traps.install()
    return traps


def _leave(code: int, traps: Traps | None) -> NoReturn:
    if traps is not None:
        Path("counts.json").write_text(json.dumps(traps.counts))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, began: float, stop: Stop | None, patience: float | None = SECONDS) -> Outcome:
    if stop is not None and stop.place == "time" and not isinstance(stop.signal, Fault):
        time.sleep(stop.count / 1000)
        os.kill(child, stop.signal)  # not reaped yet, so the number is still its own
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return Outcome(os.waitstatus_to_exitcode(status), time.monotonic() - began)
        if patience is not None and time.monotonic() - began > patience:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.02)


# ---- what is left -------------------------------------------------------------------------------------------------


def differences(truth: Path, run: Path) -> list[str]:
    """In what two run folders differ: all files bit by bit, the newest checkpoint tensor by tensor.

    Args:
        truth: The folder of the run that was never stopped.
        run: The folder of another.
    """
    mine, theirs = _files(run), _files(truth)
    found = [f"{name}: {'missing' if name in theirs else 'too many'}" for name in sorted(mine.keys() ^ theirs.keys())]
    found += [f"{name}: differs" for name in sorted(mine.keys() & theirs.keys()) if mine[name] != theirs[name]]
    one, other = _newest(truth), _newest(run)
    if one is None or other is None or one.name != other.name:
        return [*found, f"newest checkpoint: {other and other.name}, not {one and one.name}"]
    kept = sorted(path.name for path in (run / "checkpoints").iterdir())
    if len(kept) > 3:
        found.append(f"checkpoints: {', '.join(kept)} are left")
    pair = (torch.load(path, weights_only=True) for path in (one, other))
    return found + list(_unequal("checkpoint", *pair))


def _files(folder: Path) -> dict[str, bytes]:
    """All files of a run but its checkpoints; among those, the one before the newest need not be of the same step."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.parent.name != "checkpoints"}


def _newest(folder: Path) -> Path | None:
    link = folder / "checkpoints" / "last.ckpt"
    return link.resolve() if link.exists() else None


def _unequal(name: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        if one.dtype != other.dtype or not torch.equal(one, other):
            yield name
    elif isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        for key in one:
            yield from _unequal(f"{name}.{key}", one[key], other[key])
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        for number, (first, second) in enumerate(zip(one, other, strict=True)):
            yield from _unequal(f"{name}[{number}]", first, second)
    elif one != other:
        yield f"{name}: {str(other)[:100]}, not {str(one)[:100]}"
