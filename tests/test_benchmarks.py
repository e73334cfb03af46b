"""Scripts of ``benchmarks/`` in small: they run to their ends, and tables have figures. For the study see ``test_study.py``."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.timeout(600)


def run(script: str, *arguments: str | Path) -> str:
    """What it prints."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / f"{script}.py"), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def numbers(line: str) -> list[float]:
    return [float(found.replace(",", "")) for found in re.findall(r"-?\d[\d,]*(?:\.\d+)?", line)]


def cells(table: str) -> list[list[str]]:
    """Of a table in Markdown: its head, then its rows."""
    lines = [line for line in table.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_how_cost_grows(tmp_path: Path) -> None:
    text = run(
        "scaling", tmp_path, "--first", "2", "--rows", "100", "1000", "--times", "1", "--picture", tmp_path / "p.png"
    )
    rows = [line for line in text.splitlines() if line.startswith("| ") and "---" not in line][1:]
    assert len(rows) == 7
    assert all(math.isfinite(value) for line in rows for value in numbers(line))
    growth = next(numbers(line) for line in rows if "parameters of the model" in line)
    assert growth[0] < growth[1]
    assert growth[3] > 0.2  # memory
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_cost_of_ewc(tmp_path: Path) -> None:
    small = ["--size", "8m", "--rank", "4", "--batch", "1", "--length", "16", "--steps", "1", "--starts", "1"]
    text = run("ewc_cost", tmp_path, *small)
    costs = {line.split("|")[1].strip(): numbers(line) for line in text.splitlines() if line.startswith("| ")}
    assert {"EWC", "official", "a switch"} <= costs.keys()
    assert all(costs[name][0] > 0 for name in ("EWC", "official", "a switch"))


def test_rollouts(tmp_path: Path) -> None:
    small = ["--prompts", "4", "--batch", "2", "--longest", "16", "--new-tokens", "3", "--passes", "1", "--times", "1"]
    text = run("rollouts", tmp_path, "--size", "8m", *small)
    speeds = [numbers(line)[-1] for line in text.splitlines() if line.startswith(("| ours", "| transformers"))]
    assert len(speeds) == 2
    assert min(speeds) > 0
    assert sum(numbers(text.splitlines()[-1])) == pytest.approx(100, abs=2)  # shares of a step


def test_rewards(tmp_path: Path) -> None:
    """One seed of an objective that samples once per prompt, and so makes the fewest steps."""
    files = ("--output", tmp_path / "runs", "--table", tmp_path / "table.md")
    run("rewards", "--seeds", "1", "--objectives", "reinforce", *files)
    names, row = cells((tmp_path / "table.md").read_text())
    assert row[0] == "reinforce"
    figures = {name: numbers(cell)[0] for name, cell in zip(names[1:-1], row[1:-1], strict=True)}
    assert figures["steps"] > 0
    assert 0 < figures["greedy before"] < figures["greedy after"] <= 1  # the task's own rule gives 0 to 1
    assert 0 < figures["sampled, first tenth"] < figures["sampled, last tenth"] <= 1
    assert figures["KL to the start"] > 0


def test_qlora_in_small(tmp_path: Path) -> None:
    places = ["--base", tmp_path / "base", "--output", tmp_path / "runs", "--table", tmp_path / "table.md"]
    run("qlora", "--size", "8m", "--lengths", "32", *places)
    names, row = cells((tmp_path / "table.md").read_text())
    figures = dict(zip(names, row, strict=True))
    assert figures["length"] == "32"
    assert int(figures["4-bit layers"]) > 0
    planned, allocated = (float(figures[name]) for name in ("planned (GiB)", "allocated (GiB)"))
    assert planned > 0
    # malloc counts more than tensors: some 0.03 GiB of this process, with rows of 32 tokens as with 512
    assert allocated == pytest.approx(planned + 0.03, rel=0.25)


def test_memory_of_big_files() -> None:
    text = run("big_file", "--rows", "50", "--what", "nothing", "load")
    _, *rows = cells(text)
    assert [(row[0], row[2]) for row in rows] == [("50", "nothing"), ("50", "load")]
    assert all(float(figure.replace(",", "")) > 0 for row in rows for figure in row[3:])  # peak and seconds


def test_planned_and_measured_memory() -> None:
    text = run("plan_calibration", "--only", "embedded model")
    ratios = [float(found) for found in re.findall(r"\b([01]\.\d{3})\b", text)]
    assert ratios
    assert min(abs(ratio - 1) for ratio in ratios) < 0.1


def test_side_by_side_with_trl(real_data: Path, tmp_path: Path) -> None:
    """Which compares the loss of every step, and fails where they differ."""
    pytest.importorskip("trl", reason='TRL is not installed: pip install "hbat-lightning[oracles]"')
    files = ["--tokenizer", real_data / "llama2_tokenizer.model", "--instructions", real_data / "alpaca_en_demo.json"]
    files += ["--pairs", real_data / "hh_rlhf_harmless_base_test.jsonl.gz"]
    small = [
        "--size",
        "8m",
        "--batch",
        "2",
        "--max-length",
        "96",
        "--steps",
        "2",
        "--warm-up",
        "1",
        "--precisions",
        "fp32",
    ]
    text = run("against_trl", tmp_path, *files, *small, "--threads", "1")
    assert len([line for line in text.splitlines() if line.startswith(("| sft | fp32", "| dpo | fp32"))]) == 2
