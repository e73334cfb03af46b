"""What PPO's rollouts give in tokens per second, beside plain transformers, and what share of a step they are.

    python benchmarks/rollouts.py FOLDER --size 60m

The prompts are random tokens of lengths between a quarter of the longest and the longest. Sampling never stops early, so
that both make the same number of tokens. A step is a cycle of one window: rollout, scoring by policy, reference and value,
and the updates of all its passes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from random_llama import SIZES, make_config, write
from timing import in_turns

from hbat_lightning import LoraSettings, Policy, PPOModule
from hbat_lightning.data.rollouts import collate_rollouts
from hbat_lightning.data.sets import pad_left
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.rewards import FunctionReward


def length_reward(prompt: str, completion: str) -> float:
    """Anything: its value is of no matter here."""
    return float(len(completion) % 7)


class Cycle:
    """The parts of a PPO step, with the time that each has taken."""

    def __init__(self, policy: Policy, sampling: GenerationSettings, passes: int, device: torch.device) -> None:
        self.policy, self.device = policy, device
        self.module = PPOModule(FunctionReward(length_reward), sampling=sampling, passes=passes)
        self.module.build(policy, device)
        self.module._stop = -1  # no token: completions have their full length
        trained = [*policy.trained_parameters().values(), *self.module.own_parameters(policy)]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5)
        self.seconds = {"rollout": 0.0, "scoring": 0.0, "update": 0.0}

    def step(self, prompts: list[list[int]]) -> None:
        """Sample, score, and train on it in every pass."""
        whole = time.perf_counter()
        complete: Any = self.module._complete
        sampled = 0.0

        def timed(*args: Any) -> Any:
            nonlocal sampled
            begin = time.perf_counter()
            out = complete(*args)
            sampled += time.perf_counter() - begin
            return out

        self.module._complete = timed  # type: ignore[method-assign]
        with torch.no_grad():
            self.policy.eval()
            (groups,) = self.module.roll_out(self.policy, [prompts], self.device)
        self.module._complete = complete  # type: ignore[method-assign]
        batch = collate_rollouts([rollout for group in groups for rollout in group], 0)
        batch = {name: value.to(self.device) for name, value in batch.items()}
        scored = time.perf_counter()
        for _ in range(self.module.passes):
            self.policy.set_training(self.module.dropout)
            self.module.loss(self.policy, batch)["loss"][0].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["rollout"] += sampled
        self.seconds["scoring"] += scored - whole - sampled
        self.seconds["update"] += time.perf_counter() - scored


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--longest", type=int, default=256, help="tokens of the longest prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--passes", type=int, default=4)
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    base, device = args.folder / args.size, torch.device(args.device)
    if not (base / "config.json").exists():
        write(args.size, base)
    policy = Policy(str(base), lora=LoraSettings(r=16), dtype="float32")
    policy.build(device)
    policy.to(device)
    policy.add_snapshots(["phase_start"])
    sampling = GenerationSettings(args.new_tokens, temperature=1.0)

    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(args.longest // 4, args.longest, args.prompts).int().tolist()
    high = make_config(args.size).vocab_size if policy.tokenizer.vocab_size > 1000 else policy.tokenizer.vocab_size
    prompts = [torch.randint(5, high, (length,), generator=generator).tolist() for length in lengths]
    inputs = {name: value.to(device) for name, value in pad_left(prompts, 0).items()}
    cycle = Cycle(policy, sampling, args.passes, device)

    def plain() -> None:
        with torch.no_grad():
            model: Any = policy.model
            model.eval()
            settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": args.new_tokens}
            model.generate(**inputs, **settings, min_new_tokens=args.new_tokens, pad_token_id=0)

    def ours() -> None:
        policy.generate(inputs["input_ids"], inputs["attention_mask"], sampling, -1, 0)

    took = in_turns({"transformers": plain, "ours": ours}, args.times)
    tokens = args.prompts * args.new_tokens
    print("| | tokens per second |\n| --- | --- |")
    for name, seconds in took.items():
        print(f"| {name} | {tokens / seconds:.0f} |")
    for _ in range(args.times):
        cycle.step(prompts)
    total = sum(cycle.seconds.values())
    print(f"\nA step of {args.prompts} completions, {args.passes} passes: {total / args.times:.2f} s")
    print(", ".join(f"{name} {seconds / total:.0%}" for name, seconds in cycle.seconds.items()))


if __name__ == "__main__":
    main()
