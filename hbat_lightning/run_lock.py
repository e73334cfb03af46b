"""A run folder has one run at a time: the second command in the same folder is turned away."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from hbat_lightning.errors import UserError

FILE = ".lock"
_HELD = (errno.EACCES, errno.EAGAIN)


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep a run folder to this process.

    The lock is the kernel's, on a file in the folder, so it ends with the process however that ends; the file alone means
    nothing. Processes that share a run share its lock: only the first of them takes it. Windows has no such locks.

    Args:
        folder: The run folder; made where there is none, and removed again where nothing was put into it.

    Raises:
        UserError: Another process holds it; or it cannot be written, or its file system has no locks.
    """
    if sys.platform == "win32":
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = _take(folder / FILE)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be written or locked ({error.strerror}); give another --trainer.default_root_dir"
        ) from error
    with file:
        try:
            yield
        finally:
            (folder / FILE).unlink(missing_ok=True)  # while it is held: nobody else's can be there
            for path in made:
                with contextlib.suppress(OSError):  # something lies in it
                    path.rmdir()


def _take(path: Path) -> BinaryIO:
    while True:
        file = path.open("a+b")
        _lock(file, path)
        # Whoever held it before may have removed the file that was opened here: then it locks nothing any more.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        file.close()
    with contextlib.suppress(OSError):  # a full disk: then nobody is told who it is
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        file.flush()
    return file


def _lock(file: BinaryIO, path: Path) -> None:
    import fcntl  # late: Windows has none

    try:
        # By fcntl, not flock: children that are forked, as workers that read data, do not hold it on.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            raise
        file.seek(0)
        who = file.read().decode(errors="replace") or "another process"
        raise UserError(
            f"{path.parent} is in use by a run that has not ended ({who}): wait until it has, stop it, or give another "
            "--trainer.default_root_dir"
        ) from None
