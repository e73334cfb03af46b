"""Train Hbat with QLoRA on a base of real size, through ``hbat fit``, and write down what it took.

    python benchmarks/qlora.py --size 7b --base /tmp/llama-7b --lengths 64                            # two CPU cores
    python benchmarks/qlora.py --size 7b --base /tmp/llama-7b --lengths 512 1024 2048 --accelerator gpu

NF4 with double quantisation, LoRA of rank 16 on all linear layers, SFT and DPO in turns over two rounds, EWC, the adapter's
own start of the phase as reference, gradient checkpointing; one row or one pair per step, each cut to exactly the length
asked for. A base that is not there is written with random weights (random_llama.py): memory and time do not depend on
values. With weights of one's own, ``--base`` names their folder. Results go to ``--table``, one row per length.

What is allocated is, on a GPU, the highest figure of torch's allocator in training steps, and on a CPU what malloc says of
the whole run, less what it said before weights were loaded (heap.py); the plan stands beside it. The process has more: on a
CPU its anonymous memory is told, with interpreter, libraries and what malloc keeps of freed memory.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import random_llama
import torch

ROOT = Path(__file__).parents[1]
OBJECTIVES = ("instruction", "preference")
ROUNDS, ROWS_PER_SHARD = 2, 2
WORDS = ("river", "stone", "light", "carries", "small", "green", "under", "where", "house", "open", "never", "sound")
COLUMNS = (
    "base", "hardware", "length", "4-bit layers", "load (s)", "process (GiB)", "allocated (GiB)", "planned (GiB)",
    "SFT step (s)", "DPO step (s)", "whole run (s)", "checkpoint (MiB)", "adapter (MiB)", "date",
)  # fmt: skip


@dataclass
class Watch:
    """What a process took and said. Of bytes: the most allocated since loading, and the most anonymous memory; on a CPU."""

    allocated: int = 0
    process: int = 0
    loaded_after: float = 0.0
    seconds: float = 0.0
    said: list[str] = field(default_factory=list)

    def line(self, name: str) -> str:
        """The rest of the first line that begins with a name."""
        return next(line.removeprefix(name).strip() for line in self.said if line.startswith(name))


def sentence(words: int, generator: random.Random) -> str:
    """Words in a random order."""
    return " ".join(generator.choice(WORDS) for _ in range(words))


def write_data(folder: Path, length: int) -> dict[str, Path]:
    """Rows and pairs of at least ``length`` tokens: as many for each shard as it has steps, and one to hold out."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = random.Random(0)
    columns = {"instruction": ("completion",), "preference": ("chosen", "rejected")}
    files = {}
    for objective, answers in columns.items():
        for part, count in (("train", ROUNDS * ROWS_PER_SHARD), ("val", 1)):
            rows = [
                {"prompt": sentence(max(4, length // 16), generator)}
                | {answer: sentence(length, generator) for answer in answers}
                for _ in range(count)
            ]
            files[f"{objective}.{part}"] = path = folder / f"{objective}-{part}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files


def arguments(base: Path, run: Path, files: dict[str, Path], length: int, accelerator: str) -> list[str]:
    """What follows ``hbat fit`` and ``hbat plan``."""
    layers = ["hbat_dpo.yaml", "policy/qlora.yaml"] + (["trainer/gpu.yaml"] if accelerator == "gpu" else [])
    settings: dict[str, Any] = {
        "model.init_args.policy.init_args.model_name_or_path": base,
        "model.init_args.schedule.init_args.rounds": ROUNDS,
        "model.init_args.schedule.init_args.instruction_epochs": 1,
        "data.init_args.template": "plain",
        "data.init_args.max_length": length,
        "data.init_args.truncation": "completion_right",
        "data.init_args.batch_size": 1,
        "data.init_args.val_batch_size": 1,
        "trainer.default_root_dir": run,
        "trainer.accelerator": accelerator,
        "trainer.accumulate_grad_batches": 1,
    }
    for objective in OBJECTIVES:
        settings[f"data.init_args.{objective}.path"] = files[f"{objective}.train"]
        settings[f"data.init_args.{objective}.val_path"] = files[f"{objective}.val"]
    configs = [part for layer in layers for part in ("--config", str(ROOT / "configs" / layer))]
    return configs + [part for key, value in settings.items() for part in (f"--{key}", str(value))]


def fit(command: list[str], run: Path, accelerator: str) -> Watch:
    """Run ``hbat fit`` in a process of its own, and watch it."""
    watch, began = Watch(), time.perf_counter()
    monitor = ["--trainer.callbacks+=ResourceMonitor", "--overwrite", "true"]
    report = run.with_suffix(".heap.json")
    own = ["-m", "hbat_lightning"] if accelerator == "gpu" else [str(ROOT / "benchmarks" / "heap.py"), str(report)]
    process = subprocess.Popen(
        [sys.executable, *own, "fit", *command, *monitor], stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        watch.said.append(line.rstrip())
        if line.startswith("policy:") and not watch.loaded_after:
            watch.loaded_after = time.perf_counter() - began
    if process.wait():
        raise SystemExit(f"hbat fit ended with exit code {process.returncode}")
    watch.seconds = time.perf_counter() - began
    if accelerator == "cpu":
        heap = json.loads(report.read_text())
        watch.allocated = heap["most"]["allocated"]["allocated"] - heap["before"]
        watch.process = heap["most"]["anonymous"]["anonymous"]
    return watch


def logged(run: Path, column: str, objective: str) -> Iterator[float]:
    """A column's values in the steps of an objective, without the first of every phase, which has the switch in it."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["resources/step_seconds"]]
    phases: set[str] = set()
    for row in rows:
        first = row["phase/index"] not in phases
        phases.add(row["phase/index"])
        if row[f"train/{objective}/loss"] and not first:
            yield float(row[column])


def planned(command: list[str], run: Path, accelerator: str) -> float:
    """Peak of allocated bytes that ``hbat plan`` foresees, in GiB: of the run, or on a GPU, as is measured there, of steps."""
    report = run.with_suffix(".plan.json")
    subprocess.run([sys.executable, "-m", "hbat_lightning", "plan", *command, "--report", str(report)], check=True)
    found = json.loads(report.read_text())
    moments = next(iter(found["plans"].values()))["moments"]
    steps = [moment["peak"] for name, moment in moments.items() if name.endswith((": micro-batch", ": optimizer step"))]
    peak: float = max(steps) if accelerator == "gpu" else found["peak"]
    return peak / 2**30


def require_adapters_only(run: Path) -> int:
    """Check that the checkpoint holds no tensor of the base; its size in bytes."""
    path = (run / "checkpoints" / "last.ckpt").resolve()
    names = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    foreign = [name for name in names if ".lora_" not in name]
    if foreign:
        raise SystemExit(f"{path} holds {len(foreign)} tensors that are no adapter's, for example {foreign[0]}")
    return path.stat().st_size


def hardware(accelerator: str) -> str:
    """What the figures were taken on."""
    if accelerator == "gpu":
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


def measure(args: argparse.Namespace, length: int) -> dict[str, str]:
    """One run of one length."""
    run = args.output / f"{args.size}-{length}"
    command = arguments(args.base, run, write_data(args.output / f"data-{length}", length), length, args.accelerator)
    foreseen = planned(command, run, args.accelerator)
    watch = fit(command, run, args.accelerator)
    switches = [json.loads(line) for line in (run / "switches.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in switches] == list(OBJECTIVES) * ROUNDS, switches
    steps = {name: list(logged(run, "resources/step_seconds", name)) for name in OBJECTIVES}
    allocated, process = watch.allocated / 2**30, f"{watch.process / 2**30:.2f}"
    if args.accelerator == "gpu":
        allocated, process = max(v for name in OBJECTIVES for v in logged(run, "resources/peak_gib", name)), "–"
    adapter = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    layers = next(line.split()[1] for line in watch.said if line.endswith("linear layers are nf4"))
    values = (
        args.base.name, hardware(args.accelerator), length, layers, f"{watch.loaded_after:.0f}", process,
        f"{allocated:.3f}", f"{foreseen:.3f}", f"{statistics.median(steps['instruction']):.1f}",
        f"{statistics.median(steps['preference']):.1f}", f"{watch.seconds:.0f}",
        f"{require_adapters_only(run) / 2**20:.0f}", f"{adapter / 2**20:.0f}", date.today(),
    )  # fmt: skip
    return dict(zip(COLUMNS, map(str, values), strict=True))


def write_table(path: Path, rows: list[dict[str, str]]) -> None:
    """Add rows to the table; those of the same base, hardware and length are replaced."""
    done = []
    if path.exists():
        lines = [line.strip("| \n").split(" | ") for line in path.read_text().splitlines() if line.startswith("|")]
        done = [dict(zip(COLUMNS, line, strict=True)) for line in lines[2:]]
    key = ("base", "hardware", "length")
    fresh = {tuple(row[name] for name in key) for row in rows}
    rows = [row for row in done if tuple(row[name] for name in key) not in fresh] + rows
    lines = [f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}"]
    lines += [f"| {' | '.join(row[name] for name in COLUMNS)} |" for row in rows]
    head, _, _ = path.read_text().partition("| base") if path.exists() else ("", "", "")
    path.write_text(head + "\n".join(lines) + "\n")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=random_llama.SIZES, default="7b")
    parser.add_argument("--base", type=Path, required=True, help="folder of the base; written when it is not there")
    parser.add_argument("--lengths", type=int, nargs="+", default=[64], help="tokens per row")
    parser.add_argument("--accelerator", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model of Llama-2, for a base that is written")
    parser.add_argument("--output", type=Path, default=Path("runs/qlora"))
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    if args.accelerator == "gpu" and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: use --accelerator cpu")
    if not (args.base / "config.json").exists():
        random_llama.write(args.size, args.base, args.tokenizer)
    for length in args.lengths:
        row = measure(args, length)
        write_table(args.table, [row])
        print("\n".join(f"{name:>24}: {value}" for name, value in row.items()))


if __name__ == "__main__":
    main()
