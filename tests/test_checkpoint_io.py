"""Checkpoints go straight to disk, whole or not at all."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO

from hbat_lightning.checkpoint_io import AtomicCheckpointIO
from hbat_lightning.cli import make_cli

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


def test_the_command_saves_in_this_way_unless_told_otherwise() -> None:
    config = ["--config", str(Path(__file__).parents[1] / "configs" / "sft.yaml"), "--trainer.accelerator", "cpu"]
    assert isinstance(make_cli(config, run=False).trainer.strategy.checkpoint_io, AtomicCheckpointIO)
    own = ["--trainer.plugins", "lightning.fabric.plugins.TorchCheckpointIO"]
    assert type(make_cli([*config, *own], run=False).trainer.strategy.checkpoint_io) is TorchCheckpointIO
