"""How time and memory of a step grow with length, rows, vocabulary, model, trained parameters, and rows of data.

    python benchmarks/scaling.py OUT --picture OUT/scaling.png

Everything but one quantity stays as it is; the slope is that of a straight line through the logarithms: 1 is proportional.
Steps are forward, backward and optimizer of SFT, medians; memory is what tensors take at most. Rows of data are taken in by a
process of their own for each number of rows; their memory is what its resident size rises by.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
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

Shape = dict[str, int]
BASE: Shape = {
    "length": 512,
    "prompt": 128,
    "batch": 2,
    "vocabulary": 32000,
    "hidden": 256,
    "layers": 4,
    "rank": 16,
}
# What differs from BASE, and which of it (or of what is measured) is the size that a slope is over.
SWEEPS: dict[str, tuple[str, list[Shape]]] = {
    "tokens of a row": ("length", [{"length": n, "prompt": n // 4} for n in (128, 256, 512, 1024, 2048, 4096)]),
    "rows of a step": ("batch", [{"batch": n} for n in (1, 2, 4, 8)]),
    "supervised tokens of 1,024": ("supervised", [{"prompt": 512 - n} for n in (8, 32, 128, 384)]),
    "vocabulary": ("vocabulary", [{"vocabulary": n} for n in (8000, 32000, 128000)]),
    "parameters of the model": (
        "parameters",
        [
            {"hidden": hidden, "layers": layers, "vocabulary": 8000}
            for hidden, layers in ((64, 2), (128, 4), (256, 8), (512, 12), (1024, 16), (2048, 20))
        ],
    ),
    "trained parameters": ("trained", [{"rank": n} for n in (4, 16, 64, 256)]),
}


def make_policy(shape: Shape) -> Policy:
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


def measure(shape: Shape, times: int) -> dict[str, float]:
    """Seconds and bytes of a step, and what it is a step of."""
    policy, objective = make_policy(shape), SFTModule()
    trained = list(policy.trained_parameters().values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    rows = random_rows(shape["batch"], shape["length"], shape["prompt"], shape["vocabulary"])

    def step() -> None:
        objective.loss(policy, rows)["loss"][0].backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    memory = allocated_by(step)
    return shape | {
        "supervised": shape["batch"] * (shape["length"] - shape["prompt"]),
        "seconds": in_turns({"step": step}, times, warm_up=0)["step"],
        "bytes": float(max(memory, 1)),
        "parameters": float(sum(parameter.numel() for parameter in policy.parameters())),
        "trained": float(sum(parameter.numel() for parameter in trained)),
    }


def measure_data(count: int) -> dict[str, float]:
    """Seconds and bytes of taking in so many encoded rows of 100 tokens, in a process where nothing was freed before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_take_in, count).result()


def _take_in(count: int) -> dict[str, float]:
    _encoded_set(1)  # what is imported and made once
    held: list[Any] = []
    begin = time.perf_counter()
    memory = peak_of(lambda: held.append(_encoded_set(count)))
    return {"rows": float(count), "seconds": time.perf_counter() - begin, "bytes": float(max(memory, 1))}


def _encoded_set(count: int) -> InstructionSet:
    ids, supervised = np.arange(100, dtype=np.int32), np.arange(100) > 20
    return InstructionSet((Encoded(ids, supervised, 21) for _ in range(count)), "", 0)


def slope(sizes: list[float], values: list[float]) -> float:
    """Of a straight line through the logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def draw(found: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Time and memory over every quantity."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullFormatter

    figure, axes = plt.subplots(2, len(found), figsize=(3 * len(found), 5), squeeze=False)
    for column, (name, one) in enumerate(found.items()):
        for row, (what, unit) in enumerate((("seconds", "s"), ("bytes", "bytes"))):
            axis = axes[row][column]
            axis.loglog(one["sizes"], one[what], "o-")
            axis.set_title(f"{name}: {slope(one['sizes'], one[what]):.2f}", fontsize=9)
            axis.set_ylabel(unit)
            axis.set_ylim(min(one[what]) / 2, 2 * max(one[what]))  # a flat line looks flat
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.yaxis.set_minor_formatter(NullFormatter())
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

    def sweep(name: str, size: str, works: Sequence[Callable[[], dict[str, float]]]) -> None:
        results = []
        for work in works[: args.first]:
            result = work()
            results.append(result | {"sizes": float(result[size])})
            print(name, {key: float(f"{value:.3g}") for key, value in results[-1].items()}, flush=True)
        found[name] = {key: [result[key] for result in results] for key in results[0]}

    for name, (size, shapes) in SWEEPS.items():
        sweep(name, size, [partial(measure, BASE | shape, args.times) for shape in shapes])
    sweep("rows of data", "rows", [partial(measure_data, count) for count in args.rows])
    (args.out / "scaling.json").write_text(json.dumps(found, indent=1))
    print("| | from | to | slope of time | slope of memory |\n| --- | --- | --- | --- | --- |")
    for name, one in found.items():
        sizes = one["sizes"]
        slopes = [slope(sizes, one[what]) for what in ("seconds", "bytes")]
        print(f"| {name} | {sizes[0]:,.0f} | {sizes[-1]:,.0f} | {slopes[0]:.2f} | {slopes[1]:.2f} |")
    if args.picture:
        draw(found, args.picture)


if __name__ == "__main__":
    main()
