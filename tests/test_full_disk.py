"""A disk that gets full while a run writes its checkpoint: a real one, of a megabyte."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from hbat_lightning.checkpoint_io import damage
from hbat_lightning.cli import main
from tests.test_cli import POLICY, config, few_rows, in_folder


def test_the_run_ends_in_one_line_and_goes_on_when_there_is_room(
    small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One checkpoint fits, and no second."""
    command = ["fit", *config("sft"), *few_rows("instruction"), f"{POLICY}.lora.r", "8"]
    command += ["--model.init_args.epochs", "2"]
    main([*command, *in_folder(tmp_path / "whole")])
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([*command, *in_folder(small_disk)])
    assert ended.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hbat: ")]
    assert line.startswith(f"hbat: error: {small_disk}: cannot be written ([Errno 28] No space left on device")
    assert line.endswith("make room and go on with --ckpt_path last")
    (kept,) = (small_disk / "checkpoints").glob("*step*")
    assert damage(kept) is None
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    main([*command, *in_folder(small_disk), "--ckpt_path", "last"])
    for name in ("metrics.csv", "switches.jsonl", "adapter/adapter_model.safetensors"):
        assert (small_disk / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
