"""Writing a checkpoint: straight to disk, never half of one, and with a checksum that says so."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from hbat_lightning.errors import UserError
from hbat_lightning.files import replacing

_MARK = b"hbat blake2b "
_DIGEST = 32  # bytes
_SEAL = len(_MARK) + 2 * _DIGEST
_LENGTH = struct.pack("<H", _SEAL)
_END = 22  # bytes of a zip archive's last record, of which the last two are the length of the comment behind it
_CHUNK = 2**20


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the place and moves the file there when it is whole; refuses to load what is not as it was written.

    Lightning's own way makes the whole file in memory first, and a second time as one piece: more than a gigabyte beside a
    7B model with QLoRA. A process that is killed in between leaves the checkpoint before, and a hidden ``.partial`` file.

    A checkpoint of torch is a zip archive. The checksum of all its bytes is the archive's comment: part of the file, so
    that one rename brings both, it goes wherever a copy goes, and whoever reads zip archives or checkpoints need not know
    of it (``unzip -z`` shows it).
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: A local file.
            storage_options: None there are.

        Raises:
            TypeError: When storage options are given.
            OSError: It cannot be written; what was there before still is.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files: there are no storage options")
        with replacing(Path(path)) as file:
            writer = _DigestingWriter(file)
            try:
                torch.save(checkpoint, cast(Any, writer))
            except RuntimeError as error:
                if writer.error is None:
                    raise
                raise writer.error from error  # torch tells of a full disk as an "unexpected pos"
            _seal(file, writer.digest.hexdigest())

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain types, whatever was asked for: anything else would be code that runs.

        Raises:
            UserError: The file is damaged, or holds something else.
        """
        if Path(path).is_file() and (damaged := damage(Path(path))):
            raise UserError(f"{path}: {damaged}; load another checkpoint")
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} holds more than tensors and plain types, and a pickled object can run code when it is loaded, so "
                "it is refused: give a checkpoint that hbat fit has written"
            ) from error


class _DigestingWriter:
    """What is written goes to a file, and into a digest.

    Args:
        file: The file.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.digest = blake2b(digest_size=_DIGEST)
        self.error: OSError | None = None
        self._file = file

    def write(self, data: bytes | memoryview) -> int:
        """Write, and remember what goes wrong: torch makes another error of it."""
        try:
            self._file.write(data)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(data)
        return len(data)

    def flush(self) -> None:
        """Hand on what is buffered."""
        self._file.flush()


def _seal(file: BinaryIO, digest: str) -> None:
    """Make the checksum the archive's comment."""
    file.seek(-_END, 2)
    end = file.read(_END)
    if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\0\0")):
        raise RuntimeError("this release of torch ends its archives in another way: no checksum can be added")
    file.seek(-2, 2)
    file.write(_LENGTH + _MARK + digest.encode())


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint file, by its checksum; ``None`` where nothing is.

    Files that other code wrote have no checksum of the whole, and are judged by those that zip archives keep of each part.
    """
    state = path.stat()
    return _damage(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=64)  # a command looks for the file to go on from, and loads it later
def _damage(path: Path, size: int, modified: int) -> str | None:
    try:
        with path.open("rb") as file:
            file.seek(max(0, size - _SEAL - 2))
            length, seal = file.read(2), file.read(_SEAL)
            if seal.startswith(_MARK):
                same = (length, seal) == (_LENGTH, _MARK + _digest_before_seal(file, size).encode())
                return None if same else "damaged, its bytes are not those that were written"
        if not zipfile.is_zipfile(path):
            return "not a whole checkpoint: empty, or cut off as it was written or copied"
        return _damaged_part(path)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def _digest_before_seal(file: BinaryIO, size: int) -> str:
    """Digest of the archive as torch wrote it, with no comment."""
    digest, left = blake2b(digest_size=_DIGEST), size - _SEAL - 2
    file.seek(0)
    while left > 0 and (chunk := file.read(min(_CHUNK, left))):
        digest.update(chunk)
        left -= len(chunk)
    digest.update(b"\0\0")
    return digest.hexdigest()


def _damaged_part(path: Path) -> str | None:
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, ValueError, ArithmeticError, RuntimeError) as error:
        return f"damaged ({error})"
    return None if broken is None else f"damaged in its part {broken}"
