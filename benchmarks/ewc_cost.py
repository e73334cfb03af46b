"""What EWC and a switch add to training, beside the official way and beside starting a process for every phase.

    python benchmarks/ewc_cost.py FOLDER --size 60m --rank 512

Steps with EWC, without, and in the official way take turns. The official way (written here from its formula): the penalty
``sum_n w_n (strength · |θ_n - θ*_n|)²`` is a part of the loss of every micro-batch, with anchors that lie on the CPU and
are copied to the device for each; its gradient is a second backward pass.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from random_llama import SIZES, make_config, write
from timing import in_turns, random_rows
from torch import Tensor

from hbat_lightning import DPOModule, HybridAlignmentModule, LoraSettings, Policy, SFTModule
from hbat_lightning.callbacks import ElasticWeightConsolidation
from hbat_lightning.optimizer_state import OptimizerStateKeeper


class Training:
    """A policy in its second phase, with drift behind it and on its way from the anchor."""

    def __init__(self, base: Path, size: str, args: argparse.Namespace) -> None:
        self.policy = Policy(str(base), lora=LoraSettings(r=args.rank), dtype="float32")
        self.module = HybridAlignmentModule(self.policy, SFTModule(), DPOModule())
        self.policy.build(torch.device(args.device))
        self.policy.to(args.device)
        self.policy.add_snapshots(["phase_start"])
        self.policy.set_training(dropout=False)
        self.ewc = ElasticWeightConsolidation(strength=1e-3)
        self.parameters = self.policy.trained_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=1e-5)
        self.keeper = OptimizerStateKeeper("per_objective")
        rows = random_rows(args.batch, args.length, args.length // 4, make_config(size).vocab_size)
        self.rows = {name: value.to(args.device) for name, value in rows.items()}
        self.move()
        self.switch("instruction", "preference")
        self.move()
        self.anchors = {name: value.cpu().clone() for name, value in (self.policy.snapshot() or {}).items()}
        self.weights = torch.rand(len(self.parameters)).tolist()
        self.device = args.device

    @torch.no_grad()
    def move(self) -> None:
        """Away from where it is."""
        for parameter in self.parameters.values():
            parameter.add_(1e-3 * torch.randn_like(parameter))

    def switch(self, ended: str, begun: str) -> None:
        """What a phase switch does beside validation."""
        self.ewc.weigh(self.module, ended, begun, iter(()))
        self.keeper.switch(self.optimizer, ended, begun)
        self.policy.take_snapshot()

    def step(self, penalty: Any = None) -> None:
        """An optimizer step of one micro-batch."""
        loss = self.module.instruction.loss(self.policy, self.rows)["loss"][0] / self.rows["labels"].numel()
        loss.backward()
        if penalty is not None:
            penalty()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def ours(self) -> None:
        """The pull of this package."""
        self.ewc.pull(self.module)

    def official(self) -> None:
        """The penalty as a loss."""
        pairs = zip(self.weights, self.parameters.items(), strict=True)
        terms: list[Tensor] = [
            weight * (1e-3 * (p - self.anchors[name].to(self.device, copy=True)).norm()) ** 2
            for weight, (name, p) in pairs
        ]
        torch.stack(terms).sum().backward()


def starts(base: Path, count: int) -> list[float]:
    """Seconds of starting an interpreter and loading the model, each time anew."""
    program = f"import torch\nfrom hbat_lightning import Policy\nPolicy({str(base)!r}).build(torch.device('cpu'))"
    took = []
    for _ in range(count):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
        took.append(time.perf_counter() - begin)
    return took


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--rank", type=int, default=512, help="of LoRA: with 60m, 512 gives 40 M trained parameters")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--starts", type=int, default=20, help="processes, one for each phase of ten rounds")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    base = args.folder / args.size
    if not (base / "config.json").exists():
        write(args.size, base)
    training = Training(base, args.size, args)
    millions = sum(parameter.numel() for parameter in training.parameters.values()) / 1e6

    def synchronised(work: Any) -> Any:
        def run() -> None:
            work()
            if args.device == "cuda":
                torch.cuda.synchronize()

        return run

    phases = iter([("preference", "instruction"), ("instruction", "preference")] * (args.steps + 1))
    training.step()  # gradients and moments are there
    for parameter in training.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    alone = in_turns(
        {
            "EWC": synchronised(training.ours),
            "official": synchronised(training.official),
            "switch": synchronised(lambda: training.switch(*next(phases))),
        },
        args.steps,
    )
    training.switch("instruction", "preference")
    training.move()
    whole = in_turns(
        {
            "without": synchronised(training.step),
            "EWC": synchronised(lambda: training.step(training.ours)),
            "official": synchronised(lambda: training.step(training.official)),
        },
        args.steps,
    )
    print(
        f"{millions:.1f} M trained parameters of {args.size}, {args.batch} rows of {args.length} tokens, {args.device}"
    )
    print("| | alone | per million parameters | of a step without | a whole step |\n| --- | --- | --- | --- | --- |")
    print(f"| no EWC | | | | {1000 * whole['without']:.0f} ms |")
    for name in ("EWC", "official"):
        print(
            f"| {name} | {1000 * alone[name]:.1f} ms | {1000 * alone[name] / millions:.2f} ms "
            f"| {alone[name] / whole['without']:.1%} | {1000 * whole[name]:.0f} ms |"
        )
    print(
        f"| a switch | {1000 * alone['switch']:.1f} ms | {1000 * alone['switch'] / millions:.2f} ms "
        f"| {alone['switch'] / whole['without']:.1%} | |"
    )
    print(f"\nThe official way takes {alone['official'] / alone['EWC']:.1f} times as long.")
    if args.starts:
        took = starts(base, args.starts)
        print(f"{args.starts} starts with the model's loading: {sum(took):.0f} s, each {median(took):.1f} s.")


if __name__ == "__main__":
    main()
