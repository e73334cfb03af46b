"""Peak memory of a large JSON Lines file: ``hbat inspect``, and the way of the data of fit from the file to shards.

``python benchmarks/big_file.py --rows 1000000`` writes the file into a temporary folder and prints a line of the table in
``big_file.md`` for each. Each is measured in a process of its own, by its peak resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from hbat_lightning import DataSource, HybridDataModule, Policy
from hbat_lightning.cli import main as hbat
from hbat_lightning.data import embedded
from hbat_lightning.stream import make_shards

WORDS = [f"w{number}" for number in range(40)]
ROUNDS = 10


def write_rows(path: Path, rows: int) -> None:
    """Instructions of some 300 to 500 bytes, no two alike."""
    draw = random.Random(0)
    with path.open("w") as file:
        for number in range(rows):
            prompt, answer = (" ".join(draw.choices(WORDS, k=draw.randint(40, 60))) for _ in range(2))
            file.write(json.dumps({"instruction": f"{number} {prompt}", "output": answer}) + "\n")


def inspect(path: str) -> None:
    """``hbat inspect`` of a run that trains on the file."""
    config = str(Path(__file__).parents[1] / "configs" / "sft.yaml")
    arguments = ["--config", config, "--data.instruction.path", path, "--data.template", "plain", "--examples", "0"]
    hbat(["inspect", *arguments, "--trainer.default_root_dir", str(Path(path).parent)])


def load(path: str) -> None:
    """What fit does with the file before the first step."""
    data = HybridDataModule(DataSource(path), template="plain")
    data.load("instruction", Policy(embedded.TINY_LLAMA).tokenizer, seed=0)
    rows = data.train_sets["instruction"]
    shards = make_shards(rows, "instruction", ROUNDS, seed=0)
    tokens = sum(rows.rows.lengths())  # type: ignore[attr-defined]
    print(f"{len(rows)} training rows of {tokens} tokens in {len(shards)} shards, {'; '.join(data.notes)}")


def measure(what: str, path: Path) -> tuple[int, float]:
    """Peak resident set in KiB of a child that does it, and seconds of processor time."""
    command = [sys.executable, __file__, "--child", what, "--path", str(path)]
    child = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise SystemExit(f"{what} failed")
    return usage.ru_maxrss, usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[10**5, 10**6])
    parser.add_argument("--what", nargs="+", default=["nothing", "load", "inspect"])
    parser.add_argument("--child", default="")
    parser.add_argument("--path", default="")
    given = parser.parse_args()
    if given.child:
        {"inspect": inspect, "load": load, "nothing": lambda _: None}[given.child](given.path)
        return
    print("| rows | file (MB) | what | peak (MiB) | processor time (s) |\n| --- | --- | --- | --- | --- |")
    for rows in given.rows:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "rows.jsonl")
            write_rows(path, rows)
            for what in given.what:
                peak, seconds = measure(what, path)
                size = path.stat().st_size / 1e6
                print(f"| {rows:,} | {size:,.0f} | {what} | {peak / 1024:,.0f} | {seconds:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
