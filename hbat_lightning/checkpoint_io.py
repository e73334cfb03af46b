"""Writing a checkpoint: straight to disk, and never half of one."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from hbat_lightning.errors import UserError


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside the place and moves the file there when it is whole.

    Lightning's own way makes the whole file in memory first, and a second time as one piece: more than a gigabyte beside a
    7B model with QLoRA. A process that is killed in between leaves the checkpoint before, and a hidden ``.partial`` file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Save a checkpoint.

        Args:
            checkpoint: What to save.
            path: A local file.
            storage_options: None there are.

        Raises:
            TypeError: When storage options are given.
        """
        if storage_options is not None:
            raise TypeError("checkpoints are local files: there are no storage options")
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.partial")
        try:
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: bool | None = None) -> dict[str, Any]:
        """Load tensors and plain types, whatever was asked for: anything else would be code that runs.

        Raises:
            UserError: The checkpoint holds something else.
        """
        try:
            return super().load_checkpoint(path, map_location, weights_only=True)
        except pickle.UnpicklingError as error:
            raise UserError(
                f"{path} holds more than tensors and plain types, and a pickled object can run code when it is loaded, so "
                "it is refused: give a checkpoint that hbat fit has written"
            ) from error
