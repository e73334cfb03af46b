"""What needs a CUDA device."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch

from hbat_lightning.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def test_qlora_run_in_mixed_precision(tmp_path: Path) -> None:
    """NF4, bf16 compute, checkpointing: ln 2 at each refresh, and adapters that stay in fp32."""
    layers = ("hbat_dpo.yaml", "demo.yaml", "policy/qlora.yaml", "trainer/gpu.yaml")
    configs = [part for layer in layers for part in ("--config", str(CONFIGS / layer))]
    limits = ["--data.init_args.instruction.limit", "256", "--data.init_args.preference.limit", "128"]
    main(["fit", *configs, *limits, "--trainer.default_root_dir", str(tmp_path)])
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/preference/loss"]]
    first = {row["phase/index"]: float(row["train/preference/loss"]) for row in reversed(rows)}
    assert all(loss == pytest.approx(math.log(2), abs=1e-6) for loss in first.values())
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert all(value.dtype == torch.float32 for value in checkpoint["state_dict"].values())
