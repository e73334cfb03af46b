"""Dynamic sampling: how many completions each prompt gets, by which figures, and what becomes of them."""

from __future__ import annotations

import random
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hbat_lightning import DataSource, GenerationSettings, HybridDataModule, LoraSettings, PPOModule
from hbat_lightning.callbacks import WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.objectives.critic_free import GRPOModule, REINFORCEModule, RLOOModule
from hbat_lightning.objectives.raft import RAFTModule
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.sampling import DynamicSampling, EntropyCapability, RewardCapability
from hbat_lightning.schedules import Interval
from hbat_lightning.values import AdapterValue
from tests.objectives.test_rollouts import letters, scripted
from tests.support import Recorder, Run, largest_difference, same_bits, shake

CPU = torch.device("cpu")
SAMPLING = GenerationSettings(max_new_tokens=6, temperature=0.8, top_k=20)


# ---- numbers ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capabilities", "samples", "bounds", "truth"),
    [
        ([0.0, -1.0, -2.0, -3.0], 3, (1, 8), [1, 2, 4, 5]),  # eight to hand out, in proportion 0 : 1 : 2 : 3
        ([0.0, -1.0, -2.0, -3.0], 3, (1, 4), [1, 3, 4, 4]),  # bounded above: the rest to the next
        ([0.0, -1.0, -2.0, -3.0], 4, (1, 4), [4, 4, 4, 4]),
        ([0.0, -1.0, -2.0, -3.0], 1, (1, 4), [1, 1, 1, 1]),
        ([5.0, 5.0, 5.0], 2, (1, 8), [2, 2, 2]),  # no prompt needs more than another
        ([1.0, 1.0, 0.0], 2, (1, 3), [2, 1, 3]),
        ([0.7], 3, (2, 5), [3]),
    ],
)
def test_samples_go_where_capability_is_missing(
    capabilities: list[float], samples: int, bounds: tuple[int, int], truth: list[int]
) -> None:
    assert DynamicSampling(None, *bounds).counts(capabilities, samples) == truth


def test_bounds_and_budget_hold_and_who_needs_more_has_not_less() -> None:
    draw = random.Random(0)
    for _ in range(200):
        low = draw.randint(1, 3)
        high = draw.randint(low, 9)
        samples = draw.randint(low, high)
        capabilities = [draw.choice([draw.gauss(0, 3), 0.0]) for _ in range(draw.randint(1, 12))]
        counts = DynamicSampling(None, low, high).counts(capabilities, samples)
        assert sum(counts) == samples * len(counts)
        assert all(low <= count <= high for count in counts)
        pairs = [(a, b) for a in range(len(counts)) for b in range(len(counts)) if capabilities[a] < capabilities[b]]
        assert all(counts[a] >= counts[b] for a, b in pairs)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="minimum must be from 1 to maximum, got 0 and 8"):
        DynamicSampling(minimum=0)
    reward = FunctionReward(letters)
    with pytest.raises(ValueError, match=r"samples is the average here, .* got 1, 2, 4"):
        REINFORCEModule(reward, dynamic_sampling=DynamicSampling(None, 2, 4))
    for kind in (RLOOModule, GRPOModule):
        with pytest.raises(ValueError, match=r"dynamic_sampling.minimum must be at least 2, got 1"):
            kind(reward, samples=4, dynamic_sampling=DynamicSampling())
        kind(reward, samples=4, dynamic_sampling=DynamicSampling(minimum=2))


# ---- capability ---------------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_sampling_distribution_over_the_completion_alone(make_policy: Any) -> None:
    """From all logits of each completion without padding: neither prompt nor what would follow the stop token counts."""
    policy = make_policy(double=True)
    policy.build(CPU)
    shake(policy.trained_parameters())
    policy.eval()
    part = [[Rollout([1, 30, 31, 32], [40, 41, 2])], [Rollout([1, 50], [60, 61, 62, 63, 64]), Rollout([1, 50], [2])]]
    found = EntropyCapability().of(policy, part, SAMPLING, CPU)
    for completions, capability in zip(part, found, strict=True):
        entropies = []
        for one in completions:
            with torch.no_grad():
                logits = policy.model(input_ids=torch.tensor([one.prompt + one.completion])).logits[0]
            for place in range(len(one.prompt) - 1, len(one.prompt) + len(one.completion) - 1):
                scaled = np.sort(logits[place].numpy() / 0.8)[::-1][:20]
                chance = np.exp(scaled - scaled.max()) / np.exp(scaled - scaled.max()).sum()
                entropies.append(-(chance * np.log(chance)).sum())
        assert capability == pytest.approx(-np.mean(entropies), rel=1e-5)
    assert abs(found[0] - found[1]) > 1e-4


def test_reward_is_the_mean_of_the_first_completions(make_policy: Any) -> None:
    part = [
        [Rollout([1], [2], figures={"reward": reward}) for reward in rewards] for rewards in ((1.0, 2.0), (-1.0, 0.0))
    ]
    assert RewardCapability().of(make_policy(), part, SAMPLING, CPU) == [1.5, -0.5]


# ---- runs ---------------------------------------------------------------------------------------------------------------


def unequal(prompt: str, completion: str) -> float:
    """A reward in which no two needs are as good as equal, so that rounding decides nothing."""
    return zlib.crc32(f"{prompt} {completion}".encode()) / 2**32


def make(kind: Any, capability: Any, minimum: int = 1, reward: Any = letters, **settings: Any) -> Any:
    dynamic = DynamicSampling(capability, minimum, 5)
    extra: dict[str, Any] = {"value": AdapterValue(LoraSettings(r=4, alpha=8))} if kind is PPOModule else {}
    extra |= {"sampling": SAMPLING, "samples": 3, "rollout_windows": 2, "passes": 2, "lr": 5e-3}
    return kind(FunctionReward(reward), dynamic_sampling=dynamic, **(extra | settings))


@pytest.mark.parametrize(
    ("kind", "capability", "minimum"),
    [
        (PPOModule, EntropyCapability(), 1),
        (REINFORCEModule, RewardCapability(), 1),
        (RLOOModule, EntropyCapability(), 2),
        (GRPOModule, RewardCapability(), 2),
    ],
)
def test_every_cycle_spends_its_budget_by_the_capabilities_of_its_prompts(
    kind: Any, capability: Any, minimum: int, make_policy: Any, fit: Any
) -> None:
    recorder, module = Recorder(), make(kind, capability, minimum, unequal, policy=make_policy())
    data = HybridDataModule(preference=DataSource(embedded.PREFERENCE, limit=12, val_fraction=0.0), batch_size=2)
    run = fit(module, recorder, data=data, accumulate_grad_batches=2)
    cycles = [recorder.windows[begin : begin + 2] for begin in (0, 2, 4)]
    assert [len(cycle) for cycle in cycles] == [2, 2, 2]  # eight prompts twice over, then the other four twice
    for first, prompts in ((cycles[0], 8), (cycles[2], 4)):
        seen: Counter[tuple[int, ...]] = Counter()
        known: dict[tuple[int, ...], float] = {}
        for batch in (batch for window in first[: prompts // 4] for batch in window):
            for ids, labels, keep, value in zip(
                *(batch.inputs[name] for name in ("input_ids", "labels", "attention_mask", "capability")), strict=True
            ):
                prompt = tuple(ids[(labels == -100) & keep.bool()].tolist())
                seen[prompt] += 1
                known[prompt] = float(value)
        assert len(seen) == prompts
        assert list(seen.values()) == module.dynamic_sampling.counts([known[prompt] for prompt in seen], 3)
        assert len(set(seen.values())) > 1
    ratios = run.log.column("train/preference/ratio")
    assert ratios[0] == ratios[4] == 1.0
    assert ratios[1] != 1.0
    assert len(run.log.column("train/preference/capability")) == 6


@pytest.mark.parametrize("kind", [PPOModule, RAFTModule])
def test_a_run_goes_on_bit_identical_from_inside_a_cycle(
    kind: Any, make_hybrid: Any, make_policy: Any, fit: Any, tmp_path: Path
) -> None:
    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Run:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        data = HybridDataModule(
            DataSource(embedded.INSTRUCTION, limit=16, val_fraction=0.1),
            DataSource(embedded.PREFERENCE, limit=16, val_fraction=0.1),
            batch_size=2,
        )
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = make_hybrid(policy, preference=make(kind, EntropyCapability(), 2), schedule=Interval(2, 2, 6))
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt_path} | trainer
        done: Run = fit(module, checkpoint, data=data, **settings)
        return done

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    parts = [run("parts", max_steps=5), run("parts", last, max_steps=12), run("parts", last)]
    assert parts[-1].trainer.global_step == whole.trainer.global_step == 16
    assert same_bits(whole.weights, parts[-1].weights)
    for name in ("loss", "reward", "capability"):
        pieces = [value for part in parts for value in part.log.column(f"train/preference/{name}")]
        assert pieces == whole.log.column(f"train/preference/{name}") != [], name


@pytest.mark.parametrize("kind", [REINFORCEModule, RAFTModule])
def test_a_window_s_gradient_does_not_depend_on_its_split(kind: Any, make_policy: Any, fit: Any) -> None:
    """Needs are compared over the cycle, not within a micro-batch. The completions are those of a script."""
    found = []
    for batch_size, accumulate in ((8, 1), (3, 3), (1, 8)):
        module = make(kind, RewardCapability(), 2, policy=make_policy(double=True))
        scripted(module.policy)
        recorder = Recorder()
        data = HybridDataModule(
            preference=DataSource(embedded.PREFERENCE, limit=7, val_fraction=0.0), batch_size=batch_size
        )
        fit(module, recorder, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
        found.append(recorder.gradients)
    for step, truth in enumerate(found[0]):
        assert any(float(value.abs().max()) > 1e-3 for value in truth.values())
        assert all(largest_difference(other[step], truth) < 1e-6 for other in found[1:])
