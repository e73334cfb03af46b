"""Raise a known reward on the embedded task with every objective that learns from rewards, over several seeds.

    python benchmarks/rewards.py

Each run warms the embedded model up with SFT, in the first phase of a hybrid with one round, and then trains on prompts with
the task's own rule for a reward (``conflict_task.preference_reward``, from 0 to 1). What it is warmed up on are instructions
and, of half of the pairs, the rejected answer: so the policy knows the request and several styles, none of them the best one,
as a model does that imitates people. The table gives, per objective, mean and
standard deviation over seeds: held-out reward of greedy completions before and after the phase, the reward of sampled ones in
its first and last tenth, and the divergence from the phase's start at its end, in nats per completion.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import statistics
from datetime import date
from pathlib import Path

from hbat_lightning.cli import main as hbat
from hbat_lightning.data import conflict_task

ROOT = Path(__file__).parents[1]
OBJECTIVES = {"ppo": None, "esrl": "esrl", "reinforce": "reinforce", "rloo": "rloo", "grpo": "grpo", "raft": "raft"}
SAMPLES = {"esrl": 2, "rloo": 4, "grpo": 4, "raft": 4}
SETTINGS = {
    "model.schedule.rounds": 1,
    "model.schedule.instruction_epochs": 1,
    "model.instruction.lr": 5e-3,
    "model.preference.lr": 1e-3,
    "model.lr_schedule.warmup": 10,
    "data.instruction.val_path": "embedded://conflict/instruction-validation",
    "data.preference.val_path": "embedded://conflict/preference-validation",
    "data.batch_size": 32,
    "data.val_batch_size": 96,
    "trainer.accumulate_grad_batches": 1,
    "trainer.callbacks.strength": 0,
    "trainer.enable_progress_bar": "false",
}


def write_warm_up(folder: Path) -> Path:
    """Rows for the warm-up."""
    instructions, _ = conflict_task.instruction_rows()
    pairs, _ = conflict_task.preference_rows()
    imitated = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in pairs[::2]]
    path = folder / "warm_up.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in instructions[: 2 * len(imitated)] + imitated))
    return path


def run(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Train, and read the run's own files."""
    layer = OBJECTIVES[name]
    configs = ["configs/hbat_ppo.yaml"] + ([f"configs/reinforcement/{layer}.yaml"] if layer else [])
    options = SETTINGS | {"seed_everything": seed, "trainer.default_root_dir": folder}
    options["data.instruction.path"] = write_warm_up(folder.parent)
    if name in SAMPLES:  # as many completions in a step
        options |= {"data.batch_size": 32 // SAMPLES[name], "model.preference.samples": SAMPLES[name]}
    arguments = [part for config in configs for part in ("--config", str(ROOT / config))]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):  # the run's own files say it all
        hbat(["fit", *arguments, "--overwrite", "true"])
    switch = json.loads((folder / "switches.jsonl").read_text().splitlines()[-1])
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["train/preference/reward"]]
    tenth = max(1, len(rows) // 10)
    sampled = [float(row["train/preference/reward"]) for row in rows]
    return {
        "greedy before": switch["before"]["val/preference/reward"],
        "greedy after": switch["after"]["val/preference/reward"],
        "sampled, first tenth": statistics.mean(sampled[:tenth]),
        "sampled, last tenth": statistics.mean(sampled[-tenth:]),
        "KL": statistics.mean(float(row.get("train/preference/kl") or "nan") for row in rows[-tenth:]),
        "steps": float(len(rows)),
    }


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--output", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    lines: list[str] = []
    for name in args.objectives:
        found = [run(name, seed, args.output / f"{name}-{seed}") for seed in range(1, args.seeds + 1)]
        if not lines:
            lines = [f"| objective | {' | '.join(found[0])} |", f"|{' --- |' * (1 + len(found[0]))}"]
        cells = [[one[key] for one in found] for key in found[0]]
        lines.append(f"| {name} | {' | '.join(map(_spread, cells))} |")
        print(lines[-1], flush=True)
        told = f"`python benchmarks/rewards.py`, {args.seeds} seeds, CPU, {date.today()}; mean ± standard deviation over seeds."
        why = "A window of the warm-up has as many rows as one of prompts, so objectives with several samples begin elsewhere."
        args.table.write_text(f"{told}\n{why}\n\n" + "\n".join(lines) + "\n")


def _spread(cell: list[float]) -> str:
    if any(math.isnan(value) for value in cell):
        return "–"  # RAFT has no reference
    return f"{statistics.mean(cell):.3f} ± {statistics.stdev(cell) if len(cell) > 1 else 0:.3f}"


if __name__ == "__main__":
    main()
