"""GRPO and RLOO through TRL and through this package, on completions that TRL has sampled: advantages, loss and gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hbat_lightning import GRPOModule, LoraSettings, Policy, RLOOModule
from hbat_lightning.data import embedded
from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.rewards import FunctionReward
from tests.support import shake
from tests.test_against_trl import plain_model, settings, trained, trl
from tests.test_losses_against_trl import gradients_of, require_same

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
SAMPLES, PROMPTS, TEMPERATURE, BETA = 3, 2, 0.8, 0.2


def rule(prompt: str, completion: str) -> float:
    return len(completion) % 7 - 2.0


def rule_for_trl(completions: list[str], **rest: Any) -> list[float]:
    return [rule("", completion) for completion in completions]


def sampled(kind: str, base: str, adapter: str, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A trainer whose policy has left its reference, and what it has sampled and settled; then the policy moves on."""
    from datasets import Dataset

    prompts = [{"prompt": row["prompt"]} for row in embedded.rows(embedded.PREFERENCE)[:PROMPTS]]
    shared = settings(folder, beta=BETA, num_generations=SAMPLES, max_completion_length=6, temperature=TEMPERATURE)
    del shared["max_length"]
    # Two passes over each batch of completions: then they keep the log-probabilities of the first.
    shared |= {"per_device_train_batch_size": PROMPTS * SAMPLES, "num_iterations": 2, "top_k": 0}
    if kind == "grpo":
        config, make = (
            trl.GRPOConfig(**shared, loss_type="bnpo", scale_rewards="group", use_bias_correction_kl=False),
            trl.GRPOTrainer,
        )
    else:
        config, make = trl.RLOOConfig(**shared), trl.RLOOTrainer
    trainer = make(
        model=plain_model(base, adapter),
        reward_funcs=rule_for_trl,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        processing_class=AutoTokenizer.from_pretrained(base),
    )
    trainer.model.train()
    shake(trained(trainer.model), seed=1)
    batch = trainer._generate_and_score_completions([one for one in prompts for _ in range(SAMPLES)])
    trainer.current_gradient_accumulation_steps = 1
    shake(trained(trainer.model), seed=2)
    return trainer, batch


def rollouts_of(batch: dict[str, Any], policy: Policy) -> list[list[Rollout]]:
    """TRL's completions as ours, by prompt, with their rewards."""
    found = []
    for prompt, keep, ids, mask in zip(
        *(batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")), strict=True
    ):
        one = Rollout(prompt[keep.bool()].tolist(), ids[mask.bool()].tolist())
        reward = float(FunctionReward(rule).score(policy, [one], CPU))
        one.tokens["sampler_log_probs"] = torch.zeros(len(one.completion))  # only reported
        one.figures = {"reward": reward, "length": float(len(one.completion)), "stopped": 1.0}
        found.append(one)
    return [found[begin : begin + SAMPLES] for begin in range(0, len(found), SAMPLES)]


@pytest.mark.parametrize("kind", ["grpo", "rloo"])
def test_whole_steps(kind: str, base_folder: str, adapter: str, tmp_path: Path) -> None:
    trainer, batch = sampled(kind, base_folder, adapter, tmp_path)
    policy = Policy(base_folder, lora=LoraSettings(r=4, alpha=8), adapter_path=adapter)
    policy.build(CPU)
    policy.add_snapshots(["phase_start"])
    shake(policy.trained_parameters(), seed=1)
    policy.eval()

    shared = {"sampling": GenerationSettings(6, TEMPERATURE), "kl_coefficient": BETA, "samples": SAMPLES}
    objective = (GRPOModule if kind == "grpo" else RLOOModule)(FunctionReward(rule), **shared)
    groups = rollouts_of(batch, policy)
    rollouts = [one for group in groups for one in group]
    with torch.no_grad():
        objective.look(policy, rollouts, CPU)
    objective.settle(groups)
    advantages = torch.stack([one.tokens["advantages"][0] for one in rollouts])
    assert torch.allclose(advantages, batch["advantages"], rtol=1e-4, atol=1e-4)
    assert advantages.abs().min() > 0.01

    shake(policy.trained_parameters(), seed=2)
    theirs = trainer._compute_loss(trainer.model, batch)
    means = require_same(objective, policy, collate_rollouts(rollouts, 0), theirs, gradients_of(theirs, trainer.model))
    assert means["ratio"] != 1.0
