"""How time and memory of a step grow with length, rows, vocabulary, model, trained parameters, and rows of data.

    python benchmarks/scaling.py OUT --picture OUT/scaling.png

Everything but one quantity stays as it is; the slope is that of a straight line through the logarithms: 1 is proportional.
Steps are forward, backward and optimizer of SFT, medians; memory is what tensors take at most, of rows of data what the
resident size rises by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timing import allocated_by, in_turns, peak_of, random_rows
from transformers import LlamaConfig, LlamaForCausalLM

from hbat_lightning import LoraSettings, Policy, SFTModule
from hbat_lightning.data import embedded
from hbat_lightning.data.encoded import Encoded
from hbat_lightning.data.sets import InstructionSet

BASE = {"length": 512, "batch": 2, "vocabulary": 32000, "hidden": 256, "layers": 4, "rank": 16}
SWEEPS: dict[str, tuple[str, list[int]]] = {
    "length": ("tokens of a row", [128, 256, 512, 1024, 2048, 4096]),
    "batch": ("rows of a step", [1, 2, 4, 8]),
    "vocabulary": ("vocabulary", [8000, 32000, 128000]),
    "hidden": ("model (hidden size)", [64, 128, 256, 512, 1024]),
    "rank": ("rank of LoRA", [4, 16, 64, 256]),
}


def make_policy(shape: dict[str, int]) -> Policy:
    """A Llama of this shape with random weights, in memory."""
    hidden = shape["hidden"]
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4,
        num_hidden_layers=shape["layers"],
        num_attention_heads=max(1, hidden // 64),
        max_position_embeddings=8192,
    )
    torch.manual_seed(0)
    policy = Policy(embedded.TINY_LLAMA, lora=LoraSettings(r=shape["rank"]))
    policy.adopt(LlamaForCausalLM(config))
    policy.set_training(dropout=True)
    return policy


def measure(shape: dict[str, int], times: int) -> dict[str, float]:
    """Seconds and bytes of a step, and parameters."""
    policy, objective = make_policy(shape), SFTModule()
    trained = list(policy.trained_parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows = random_rows(shape["batch"], shape["length"], shape["length"] // 4, shape["vocabulary"])

    def step() -> None:
        objective.loss(policy, rows)["loss"][0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    memory = allocated_by(step)
    return {
        "seconds": in_turns({"step": step}, times, warm_up=0)["step"],
        "bytes": float(max(memory, 1)),
        "parameters": float(sum(parameter.numel() for parameter in policy.parameters())),
        "trained": float(sum(parameter.numel() for parameter in trained)),
    }


def measure_data(count: int) -> dict[str, float]:
    """Seconds and bytes of taking in so many encoded rows of 100 tokens."""
    ids, supervised = np.arange(100, dtype=np.int32), np.arange(100) > 20
    held: list[Any] = []

    def take_in() -> None:
        held.append(InstructionSet((Encoded(ids, supervised, 21) for _ in range(count)), "", 0))

    begin = time.perf_counter()
    memory = peak_of(take_in)
    return {"seconds": time.perf_counter() - begin, "bytes": float(max(memory, 1))}


def slope(sizes: list[float], values: list[float]) -> float:
    """Of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Time and memory over every quantity."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, len(found), figsize=(3 * len(found), 5), squeeze=False)
    for column, (name, one) in enumerate(found.items()):
        for row, (what, unit) in enumerate((("seconds", "s"), ("bytes", "bytes"))):
            axes[row][column].loglog(one["sizes"], one[what], "o-")
            axes[row][column].set_title(f"{name}: {slope(one['sizes'], one[what]):.2f}", fontsize=9)
            axes[row][column].set_ylabel(unit)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the numbers")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--first", type=int, help="only so many sizes of each, to try the script")
    parser.add_argument("--rows", type=int, nargs="+", default=[10**3, 10**4, 10**5, 10**6])
    parser.add_argument("--times", type=int, default=3)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, list[float]]] = {}

    def sweep(name: str, sizes: list[int], one: Callable[[int], dict[str, float]]) -> None:
        results = []
        for size in sizes[: args.first]:
            results.append(one(size) | {"sizes": float(size)})
            print(name, {key: float(f"{value:.3g}") for key, value in results[-1].items()}, flush=True)
        found[name] = {key: [result[key] for result in results] for key in results[0]}

    for key, (name, sizes) in SWEEPS.items():
        sweep(name, sizes, lambda size, key=key: measure(BASE | {key: size}, args.times))  # type: ignore[misc]
    sweep("rows of data", args.rows, measure_data)
    (args.out / "scaling.json").write_text(json.dumps(found, indent=1))
    print("| | from | to | slope of time | slope of memory |\n| --- | --- | --- | --- | --- |")
    for name, one in found.items():
        # A model grows by its parameters, which its hidden size is only the root of.
        sizes = one["parameters"] if name.startswith("model") else one["sizes"]
        slopes = [slope(sizes, one[what]) for what in ("seconds", "bytes")]
        print(f"| {name} | {sizes[0]:,.0f} | {sizes[-1]:,.0f} | {slopes[0]:.2f} | {slopes[1]:.2f} |")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
