"""Files that a killed process leaves whole, and errors that mean that there is no room for them."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from safetensors import SafetensorError

PARTIAL = ".partial"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write that takes the place of another when it is whole, and on the disk.

    Whoever is stopped in between leaves what was there before, and perhaps a hidden ``.partial`` file beside it.

    Args:
        path: Where it goes.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}{PARTIAL}")
    try:
        with partial.open("w+b") as file:
            yield cast(BinaryIO, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """Write a text file anew, whole or not at all."""
    with replacing(path) as file:
        file.write(text.encode())


def share_weights(folder: Path) -> None:
    """Let those read weights who can read the settings beside them: safetensors writes a file for its owner alone.

    Args:
        folder: Of a model or an adapter, with its ``.json`` files.
    """
    settings = next(folder.glob("*.json"))
    for path in folder.glob("*.safetensors"):
        path.chmod(settings.stat().st_mode & 0o777)


def append_text(path: Path, text: str, sync: bool = False) -> None:
    """Add to a text file; where there is no room, it is left as it was.

    Args:
        path: The file.
        text: What is added.
        sync: Whether it must be on the disk, should the power fail.

    Raises:
        OSError: It cannot be written.
    """
    with path.open("ab") as file:
        before = file.tell()
        try:
            file.write(text.encode())
            file.flush()
            if sync:
                os.fsync(file.fileno())
        except OSError:
            # Closing would try again to write what is still in the buffer, so the file is cut off behind it.
            with contextlib.suppress(OSError):
                file.close()
            os.truncate(path, before)
            raise


def whole_lines(path: Path) -> list[str]:
    """Lines of a text file, without their ends; a last one that was torn as it was written is left out."""
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def sync_file(path: Path) -> None:
    """See to it that what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """See to it that a folder's entries are on the disk: a rename is not there before them."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def out_of_room(error: BaseException) -> bool:
    """Whether an error means that the disk is full, a quota is used up, or a file would be larger than is allowed."""
    if isinstance(error, OSError):
        return error.errno in _NO_ROOM
    return isinstance(error, SafetensorError) and f"os error {errno.ENOSPC}" in str(error)
