"""Checkpoints go straight to disk, whole or not at all."""

from __future__ import annotations

import hashlib
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from hbat_lightning.checkpoint_io import AtomicCheckpointIO, damage
from hbat_lightning.cli import make_cli
from hbat_lightning.errors import UserError
from hbat_lightning.files import out_of_room

SIZE = 4 * 2**20  # bytes


def checkpoint() -> dict[str, Any]:
    return {"state_dict": {"weight": torch.arange(SIZE // 4, dtype=torch.float32)}, "global_step": 3}


def python_bytes(io: TorchCheckpointIO, path: Path) -> int:
    """The most that saving takes in Python's own memory."""
    whole = checkpoint()
    tracemalloc.start()
    io.save_checkpoint(whole, path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_a_checkpoint_is_not_made_in_memory_first(tmp_path: Path) -> None:
    assert python_bytes(TorchCheckpointIO(), tmp_path / "theirs.ckpt") > SIZE  # what this is there to avoid
    assert python_bytes(AtomicCheckpointIO(), tmp_path / "deeper" / "ours.ckpt") < SIZE / 8
    loaded = torch.load(tmp_path / "deeper" / "ours.ckpt", weights_only=True)
    assert torch.equal(loaded["state_dict"]["weight"], checkpoint()["state_dict"]["weight"])


def test_what_goes_wrong_in_between_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    before = path.read_bytes()

    def full_disk(_: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        AtomicCheckpointIO().save_checkpoint(checkpoint() | {"global_step": 4}, path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


def test_any_damaged_byte_is_found_and_the_file_still_is_a_plain_archive(tmp_path: Path) -> None:
    path = tmp_path / "whole.ckpt"
    AtomicCheckpointIO().save_checkpoint({"state_dict": {"weight": torch.arange(9000)}, "global_step": 3}, path)
    whole = path.read_bytes()
    assert damage(path) is None
    with zipfile.ZipFile(path) as archive:  # whoever does not know of the checksum finds nothing strange
        assert archive.testzip() is None
        said, digest = archive.comment.decode().rsplit(" ", 1)
    assert said == "hbat blake2b"
    assert digest == hashlib.blake2b(whole[: -len(archive.comment) - 2] + b"\0\0", digest_size=32).hexdigest()
    for load in (torch.load, TorchCheckpointIO().load_checkpoint, AtomicCheckpointIO().load_checkpoint):
        assert load(path, weights_only=True)["global_step"] == 3
    places = [*range(0, len(whole), len(whole) // 97), *range(len(whole) - 100, len(whole))]
    for number, place in enumerate(places):
        torn = tmp_path / f"{number}.ckpt"
        torn.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        # Where the mark of the checksum itself is hit, the parts' own checksums say that all of them are whole.
        in_mark = 0 <= place - (len(whole) - len(archive.comment)) < len("hbat blake2b ")
        assert (damage(torn) is None) == in_mark, place
        torn.unlink()
    path.write_bytes(whole[:5000] + b"x" + whole[5001:])
    with pytest.raises(UserError, match=r"whole\.ckpt: damaged"):
        AtomicCheckpointIO().load_checkpoint(path)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_file_that_is_cut_off_is_found(kept: float, tmp_path: Path) -> None:
    path = tmp_path / "cut.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    assert "cut off" in str(damage(path))


def test_files_that_others_wrote_are_judged_by_the_checksums_of_their_parts(tmp_path: Path) -> None:
    path = tmp_path / "theirs.ckpt"
    TorchCheckpointIO().save_checkpoint(checkpoint(), path)
    assert damage(path) is None
    whole = path.read_bytes()
    path.write_bytes(whole[: SIZE // 2] + b"damage" + whole[SIZE // 2 + 6 :])
    assert "damaged in its part" in str(damage(path))


def test_a_real_full_disk_is_told_as_such_and_leaves_the_checkpoint_before(tmp_path: Path, small_disk: Path) -> None:
    path = small_disk / "step=1.ckpt"
    few = {"state_dict": {"weight": torch.zeros(1000)}}
    AtomicCheckpointIO().save_checkpoint(few, path)
    for name in ("step=1.ckpt", "step=2.ckpt"):
        with pytest.raises(OSError, match="No space left") as full:
            AtomicCheckpointIO().save_checkpoint(checkpoint(), small_disk / name)
        assert out_of_room(full.value)
    assert damage(path) is None
    assert [file.name for file in small_disk.iterdir()] == ["step=1.ckpt"]


def test_the_command_saves_in_this_way_unless_told_otherwise() -> None:
    config = ["--config", str(Path(__file__).parents[1] / "configs" / "sft.yaml"), "--trainer.accelerator", "cpu"]
    assert isinstance(make_cli(config, run=False).trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    own = ["--trainer.plugins", "lightning.fabric.plugins.TorchCheckpointIO"]
    assert type(make_cli([*config, *own], run=False).trainer.strategy.checkpoint_io) is TorchCheckpointIO
