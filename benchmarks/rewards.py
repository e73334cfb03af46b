"""Raise a known reward on the embedded task with every objective that learns from rewards, over several seeds.

    python benchmarks/rewards.py

For every seed the embedded model is first trained by SFT on instructions and, of half of the pairs, the rejected answer: so the
policy knows the request and several styles, none of them the best one, as a model does that imitates people. From that
adapter each objective goes on alone, on prompts, with the task's own rule for a reward (``conflict_task.preference_reward``,
from 0 to 1). The table gives, per objective, mean and standard deviation over seeds: held-out reward of greedy completions
before and after, the reward of sampled ones in the first and the last tenth of the steps, and the divergence from the start
at the end, in nats per completion: a mean over completions sampled from the trained policy of held-out prompts, of the
log-ratio to the start. "rise / spread" is the mean rise of the greedy reward over its standard deviation.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch
import yaml
from tqdm import tqdm

from hbat_lightning import GenerationSettings, Policy
from hbat_lightning.cli import main as hbat
from hbat_lightning.data import conflict_task
from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.data.sets import pad_id, pad_left

CONFIGS = Path(__file__).parents[1] / "configs"
OBJECTIVES = {"ppo": 1, "esrl": 2, "reinforce": 1, "rloo": 4, "grpo": 4, "raft": 4}  # with completions per prompt
COMPLETIONS = 32  # in a step
SAMPLES = 8  # of each held-out prompt, for the divergence
WARM_UP = {
    "model.optimizer.lr": 5e-3,
    "model.epochs": 1,
    "model.lr_schedule.warmup": 10,
    "data.instruction.val_path": "embedded://conflict/instruction-validation",
    "data.batch_size": 32,
}
LEARNING = {
    "model.optimizer.lr": 1e-3,
    "model.lr_schedule.warmup": 10,
    "data.preference.val_path": "embedded://conflict/preference-validation",
    "data.val_batch_size": 96,
}
SHARED = {"trainer.accumulate_grad_batches": 1, "trainer.enable_progress_bar": "false"}


def write_rows(path: Path) -> Path:
    """Rows for the warm-up."""
    instructions, _ = conflict_task.instruction_rows()
    pairs, _ = conflict_task.preference_rows()
    imitated = [{"prompt": pair["prompt"], "completion": pair["rejected"]} for pair in pairs[::2]]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in instructions[: 2 * len(imitated)] + imitated))
    return path


def write_config(name: str, path: Path) -> Path:
    """The objective of a layer of Hbat, alone: ``configs/ppo.yaml`` with its settings."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "ppo.yaml").read_text())
    if name != "ppo":
        layer = yaml.safe_load((CONFIGS / "reinforcement" / f"{name}.yaml").read_text())["model"]["init_args"][
            "preference"
        ]
        if "class_path" in layer and layer["class_path"] != config["model"]["class_path"]:
            kept = {key: config["model"]["init_args"][key] for key in ("policy", "epochs", "optimizer", "lr_schedule")}
            config["model"] = {"class_path": layer["class_path"], "init_args": kept}
        config["model"]["init_args"] |= layer["init_args"]
        config["model"]["init_args"].pop("lr", None)
    path.write_text(yaml.safe_dump(config))
    return path


def fit(config: Path, folder: Path, seed: int, options: dict[str, Any]) -> None:
    """A run, whose own files say all about it; one that has ended is left as it is."""
    options = SHARED | options | {"seed_everything": seed, "trainer.default_root_dir": folder}
    arguments = [part for key, value in options.items() for part in (f"--{key}", str(value))]
    with contextlib.redirect_stdout(io.StringIO()):
        hbat(["fit", "--config", str(config), *arguments, "--ckpt_path", "last"])


def learn(name: str, seed: int, folder: Path) -> dict[str, float]:
    """Warm up, train, and read the run's files."""
    start = folder / f"start-{seed}"
    if not (start / "adapter").is_dir():
        rows = write_rows(folder / "rows.jsonl")
        fit(CONFIGS / "sft.yaml", start, seed, WARM_UP | {"data.instruction.path": rows})
    run = folder / f"{name}-{seed}"
    samples = OBJECTIVES[name]
    options = LEARNING | {"model.policy.adapter_path": start / "adapter", "data.batch_size": COMPLETIONS // samples}
    if samples > 1:
        options["model.samples"] = samples
    fit(write_config(name, folder / f"{name}.yaml"), run, seed, options)
    switch = json.loads((run / "switches.jsonl").read_text().splitlines()[-1])
    with (run / "metrics.csv").open(newline="") as file:
        rows_of = [row for row in csv.DictReader(file) if row["train/preference/reward"]]
    tenth = max(1, len(rows_of) // 10)
    sampled = [float(row["train/preference/reward"]) for row in rows_of]
    return {
        "greedy before": switch["before"]["val/preference/reward"],
        "greedy after": switch["after"]["val/preference/reward"],
        "sampled, first tenth": statistics.mean(sampled[:tenth]),
        "sampled, last tenth": statistics.mean(sampled[-tenth:]),
        "KL to the start": divergence(run / "adapter", start / "adapter", seed),
        "steps": float(len(rows_of)),
    }


@torch.no_grad()
def divergence(adapter: Path, start: Path, seed: int) -> float:
    """KL(trained‖start) in nats per completion, from sampled completions of the held-out prompts."""
    trained, began = (load(folder) for folder in (adapter, start))
    words = trained.tokenizer
    _, rows = conflict_task.preference_rows()
    asked = [
        words.apply_chat_template(
            [{"role": "user", "content": row["prompt"]}], return_dict=True, add_generation_prompt=True
        )["input_ids"]
        for row in rows
        for _ in range(SAMPLES)
    ]
    prompts = pad_left(asked, pad_id(words))
    torch.manual_seed(seed)
    completions = trained.generate(
        prompts["input_ids"],
        prompts["attention_mask"],
        GenerationSettings(24, temperature=1.0),
        words.eos_token_id,
        pad_id(words),
    )
    rollouts = [Rollout(list(prompt), completion) for prompt, completion in zip(asked, completions, strict=True)]
    inputs = collate_rollouts(rollouts, pad_id(words))
    return float((trained.score(inputs).row_sums() - began.score(inputs).row_sums()).mean())


def load(adapter: Path) -> Policy:
    """The embedded model with an adapter, to look at."""
    policy = Policy("embedded://tiny-llama", adapter_path=str(adapter))
    policy.build(torch.device("cpu"))
    return policy.eval()


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--output", type=Path, default=Path("runs/rewards"))
    parser.add_argument("--table", type=Path, default=Path(__file__).with_suffix(".md"))
    args = parser.parse_args()
    lines: list[str] = []
    progress = tqdm(total=len(args.objectives) * args.seeds, unit="run")
    for name in args.objectives:
        found = []
        for seed in range(1, args.seeds + 1):
            found.append(learn(name, seed, args.output))
            progress.update()
        if not lines:
            lines = [
                f"| objective | {' | '.join(found[0])} | rise / spread |",
                f"|{' --- |' * (2 + len(found[0]))}",
            ]
        cells = [[one[key] for one in found] for key in found[0]]
        lines.append(f"| {name} | {' | '.join(map(_spread, cells))} | {_signal(found)} |")
        progress.write(lines[-1])
        args.table.write_text(_about(args.seeds) + "\n".join(lines) + "\n")


def _about(seeds: int) -> str:
    return (
        f"`python benchmarks/rewards.py`, seeds 1 to {seeds}, {os.cpu_count()} CPU cores without a GPU, {date.today()}; "
        "mean ± standard deviation\n"
        "over seeds. All begin at the same SFT policy of their seed, learn at one learning rate, "
        f"{LEARNING['model.optimizer.lr']}, that was not tuned, and see as many\n"
        "prompts; objectives with several samples of each make more steps. The divergence is in nats per completion.\n"
        "With five seeds a rise of n spreads is 2.2 n standard errors.\n\n"
    )


def _spread(cell: list[float]) -> str:
    return f"{statistics.mean(cell):.3f} ± {statistics.stdev(cell) if len(cell) > 1 else 0:.3f}"


def _signal(found: list[dict[str, float]]) -> str:
    rises = [one["greedy after"] - one["greedy before"] for one in found]
    return f"{statistics.mean(rises) / statistics.stdev(rises):.1f}" if len(rises) > 1 else "–"


if __name__ == "__main__":
    main()
