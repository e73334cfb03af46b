"""What PPO's rollouts give in tokens per second, beside plain transformers, and what share of a step they are.

    python benchmarks/rollouts.py FOLDER --size 60m

The prompts are random tokens of lengths between a quarter of the longest and the longest, in random order. Sampling never stops
early, so that both make the same number of tokens. Transformers completes the micro-batches as they come; rollouts are sampled
in the order of their length, and note the log-probability of every token. A step is a cycle of one window: rollout, scoring by
policy, reference and value, and the updates of all its passes.
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
from hbat_lightning.data.rollouts import Prompts, collate_rollouts, one_by_one
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

    def sample(self, parts: Prompts) -> None:
        """Rewarded completions of micro-batches of prompts."""
        with torch.no_grad():
            self.policy.eval()
            self.module._answer(self.policy, parts, self.device, one_by_one)

    def step(self, parts: Prompts) -> None:
        """Sample, score, and train on it in every pass."""
        begun = time.perf_counter()
        answer: Any = self.module._answer
        sampled = 0.0

        def timed(*args: Any) -> Any:
            nonlocal sampled
            out = answer(*args)
            sampled = time.perf_counter() - begun
            return out

        self.module._answer = timed  # type: ignore[method-assign]
        with torch.no_grad():
            self.policy.eval()
            groups = self.module.roll_out(self.policy, parts, self.device)
        self.module._answer = answer  # type: ignore[method-assign]
        batches = [collate_rollouts([one for completions in part for one in completions], 0) for part in groups]
        scored = time.perf_counter()
        for _ in range(self.module.passes):
            self.policy.set_training(self.module.dropout)
            for batch in batches:
                inputs = {name: value.to(self.device) for name, value in batch.items()}
                self.module.loss(self.policy, inputs)["loss"][0].backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds["rollout"] += sampled
        self.seconds["scoring"] += scored - begun - sampled
        self.seconds["update"] += time.perf_counter() - scored


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is written")
    parser.add_argument("--size", choices=SIZES, default="60m")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="prompts in a micro-batch")
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
    lengths = torch.linspace(args.longest // 4, args.longest, args.prompts).int()
    high = make_config(args.size).vocab_size if policy.tokenizer.vocab_size > 1000 else policy.tokenizer.vocab_size
    prompts = [
        torch.randint(5, high, (length,), generator=generator).tolist()
        for length in lengths[torch.randperm(args.prompts, generator=generator)].tolist()
    ]
    parts = [prompts[begin : begin + args.batch] for begin in range(0, args.prompts, args.batch)]
    padded = [{name: value.to(device) for name, value in pad_left(part, 0).items()} for part in parts]
    cycle = Cycle(policy, sampling, args.passes, device)

    def plain() -> None:
        model: Any = policy.model
        model.eval()
        settings = {"do_sample": True, "temperature": 1.0, "top_k": 0, "max_new_tokens": args.new_tokens}
        with torch.no_grad():
            for inputs in padded:
                model.generate(**inputs, **settings, min_new_tokens=args.new_tokens, pad_token_id=0)

    took = in_turns({"transformers": plain, "ours": lambda: cycle.sample(parts)}, args.times)
    tokens = args.prompts * args.new_tokens
    print("| | tokens per second |\n| --- | --- |")
    for name, seconds in took.items():
        print(f"| {name} | {tokens / seconds:.0f} |")
    for _ in range(args.times):
        cycle.step(parts)
    total = sum(cycle.seconds.values())
    print(f"\nA step of {args.prompts} completions, {args.passes} passes: {total / args.times:.2f} s")
    print(", ".join(f"{name} {seconds / total:.0%}" for name, seconds in cycle.seconds.items()))


if __name__ == "__main__":
    main()
