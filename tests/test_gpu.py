"""What needs a CUDA device."""

from __future__ import annotations

import csv
import math
import subprocess
import sys
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


def test_the_plan_of_qlora_holds_at_several_lengths(tmp_path: Path) -> None:
    """The benchmark writes its table, and what torch's allocator had in training steps is what was planned."""
    table, lengths = tmp_path / "qlora.md", ("512", "1024", "2048")
    script = [sys.executable, str(CONFIGS.parent / "benchmarks" / "qlora.py"), "--size", "1b", "--accelerator", "gpu"]
    places = ["--base", str(tmp_path / "llama"), "--output", str(tmp_path / "runs"), "--table", str(table)]
    subprocess.run([*script, *places, "--lengths", *lengths], check=True, cwd=tmp_path)
    names, _, *rows = [line.strip("| ").split(" | ") for line in table.read_text().splitlines()]
    found = [dict(zip(names, row, strict=True)) for row in rows]
    assert [row["length"] for row in found] == list(lengths)
    for row in found:  # cuBLAS has its workspace, up to 32 MiB, from the same allocator
        assert float(row["allocated (GiB)"]) == pytest.approx(float(row["planned (GiB)"]), rel=0.1)
