"""Expected gradients against the exact gradient of the expected reward, of a policy small enough to write all out.

The policy is two tables over four tokens, of which 0 stops: 13 completions of at most two tokens. Its probabilities are
multiples of an eighth, so that a cycle of 64 rollouts holds every completion exactly as often as it is to be expected.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hbat_lightning import GenerationSettings
from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.objectives.critic_free import GRPOModule, REINFORCEModule, RLOOModule
from hbat_lightning.objectives.policy_gradient import PolicyGradientModule
from hbat_lightning.objectives.ppo import PPOModule
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.scoring import TokenScores, predicting
from hbat_lightning.values import Value

CPU = torch.device("cpu")
FIRST = torch.tensor([1, 4, 2, 1], dtype=torch.float64) / 8
SECOND = torch.tensor([[2, 2, 2, 2], [1, 1, 4, 2], [4, 2, 1, 1], [2, 1, 1, 4]], dtype=torch.float64) / 8
COMPLETIONS = [(0,), *itertools.product((1, 2, 3), range(4))]
REWARDS = dict(zip(COMPLETIONS, [0.5, -1.0, 2.0, 0.25, 1.5, 0.0, -0.5, 3.0, 1.0, -2.0, 0.75, 1.25, -0.25], strict=True))
COST = 0.3  # of a nat of divergence


class TablePolicy:
    """Log-probabilities from two tables, tempered; the reference is another one."""

    def __init__(self, temperature: float = 1.0) -> None:
        self.logits = [(temperature * table.log()).requires_grad_() for table in (FIRST, SECOND)]
        generator = torch.Generator().manual_seed(0)
        self.reference = [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in (FIRST, SECOND)]

    @staticmethod
    def _look_up(tables: list[Tensor], inputs: dict[str, Tensor], temperature: float) -> TokenScores:
        first, second = (torch.log_softmax(table / temperature, -1) for table in tables)
        ids, (row, column) = inputs["input_ids"], predicting(inputs["labels"])
        targets = ids[row, column + 1]
        log_probs = torch.where(column == 0, first[targets], second[ids[row, column], targets])
        return TokenScores(log_probs, row, None, len(ids))

    def score(self, inputs: dict[str, Tensor], temperature: float = 1.0) -> TokenScores:
        return self._look_up(self.logits, inputs, temperature)

    def score_reference(self, inputs: dict[str, Tensor], reference: str, temperature: float = 1.0) -> TokenScores:
        return self._look_up(self.reference, inputs, temperature)

    def truncation_log_mass(self, inputs: dict[str, Tensor], settings: GenerationSettings) -> Tensor:
        return torch.zeros(len(predicting(inputs["labels"])[0]))


class TableValue(Value):
    """Any baseline of the state will do; it does not train."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.table = torch.randn(5, generator=generator, dtype=torch.float64)

    def build(self, policy: Any, device: torch.device) -> None: ...

    def parameters_of(self, policy: Any) -> list[nn.Parameter]:
        return []

    def forward(self, policy: Any, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        return torch.where(column == 0, self.table[4], self.table[inputs["input_ids"][row, column] % 4])


def probability(completion: tuple[int, ...]) -> float:
    rest = float(SECOND[completion[0], completion[1]]) if len(completion) == 2 else 1.0
    return float(FIRST[completion[0]]) * rest


def rollout(completion: tuple[int, ...]) -> Rollout:
    figures = {"reward": REWARDS[completion], "length": float(len(completion)), "stopped": float(completion[-1] == 0)}
    return Rollout([0], list(completion), {"sampler_log_probs": torch.zeros(len(completion))}, figures)


def in_proportion() -> list[Rollout]:
    return [rollout(one) for one in COMPLETIONS for _ in range(round(64 * probability(one)))]


def exact_gradient(policy: TablePolicy, temperature: float, cost: float) -> list[Tensor]:
    """Of the expected reward less what the expected divergence costs, with every completion's probability written out."""
    first, second = (torch.log_softmax(table / temperature, -1) for table in policy.logits)
    one, two = (torch.log_softmax(table / temperature, -1) for table in policy.reference)
    objective = torch.zeros((), dtype=torch.float64)
    for completion in COMPLETIONS:
        log_prob, reference = first[completion[0]], one[completion[0]]
        if len(completion) == 2:
            log_prob = log_prob + second[completion]
            reference = reference + two[completion]
        objective = objective + log_prob.exp() * (REWARDS[completion] - cost * (log_prob - reference))
    return list(torch.autograd.grad(objective, policy.logits))


def sampled_gradient(objective: PolicyGradientModule, policy: TablePolicy, groups: list[list[Rollout]]) -> list[Tensor]:
    """Of the window's mean loss, by the objective's own way from rollouts to gradients."""
    rollouts = [one for group in groups for one in group]
    with torch.no_grad():
        objective.look(policy, rollouts, CPU)
    objective.settle(groups)
    total, count = objective.loss(policy, collate_rollouts(rollouts, 0))["loss"]
    return [-gradient / count for gradient in torch.autograd.grad(total, policy.logits)]


def make(kind: type[PolicyGradientModule], temperature: float = 1.0, **settings: Any) -> Any:
    sampling = GenerationSettings(max_new_tokens=2, temperature=temperature)
    return kind(FunctionReward(len), sampling=sampling, **({"kl_coefficient": COST} | settings))  # type: ignore[arg-type]


def close(found: list[Tensor], truth: list[Tensor]) -> None:
    for mine, exact in zip(found, truth, strict=True):
        assert float(exact.abs().max()) > 0.01
        assert torch.allclose(mine, exact, rtol=1e-6, atol=2e-7)  # advantages are in fp32


def test_the_proportions_are_exact() -> None:
    assert len(in_proportion()) == 64
    assert sum(map(probability, COMPLETIONS)) == 1.0


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_reinforce_is_the_exact_policy_gradient(temperature: float) -> None:
    """But for the deviation that rewards are divided by, and the mean over tokens: constants, written out here."""
    policy, rollouts = TablePolicy(temperature), in_proportion()
    found = sampled_gradient(make(REINFORCEModule, temperature), policy, [[one] for one in rollouts])
    worth = [one.figures["shaped_reward"] - COST * one.figures["kl"] for one in rollouts]
    scale = np.std(worth, ddof=1) * np.mean([len(one.completion) for one in rollouts])
    close([scale * gradient for gradient in found], exact_gradient(policy, temperature, COST))


@pytest.mark.parametrize("lam", [1.0, 0.95])
def test_ppo_is_the_exact_policy_gradient_with_any_values_where_lambda_is_one(lam: float) -> None:
    policy, value, rollouts = TablePolicy(), TableValue(), in_proportion()
    found = sampled_gradient(make(PPOModule, value=value, lam=lam), policy, [[one] for one in rollouts])
    advantages = []
    for one in rollouts:
        divergence = (one.tokens["old_log_probs"] - one.tokens["reference_log_probs"]).tolist()
        earned = [-COST * nats for nats in divergence]
        earned[-1] += REWARDS[tuple(one.completion)]
        states = [4, *one.completion][: len(earned)]
        advantages += [sum(earned[t:]) - float(value.table[state]) for t, state in enumerate(states)]
    scale = np.std(advantages, ddof=1) * np.mean([len(one.completion) for one in rollouts])
    truth, scaled = exact_gradient(policy, 1.0, COST), [scale * gradient for gradient in found]
    if lam == 1.0:
        close(scaled, truth)
    else:  # trusting wrong values has its price
        assert float((scaled[0] - truth[0]).abs().max()) > 1e-3


def test_rloo_is_without_bias_at_two_samples() -> None:
    """Over all pairs of completions of one prompt, weighted with their probability; no constant is left."""
    policy, objective = TablePolicy(), make(RLOOModule, samples=2)
    mean = [torch.zeros_like(table) for table in policy.logits]
    for pair in itertools.product(COMPLETIONS, repeat=2):
        weight = probability(pair[0]) * probability(pair[1])
        found = sampled_gradient(objective, policy, [[rollout(one) for one in pair]])
        mean = [total + weight * gradient for total, gradient in zip(mean, found, strict=True)]
    close(mean, exact_gradient(policy, 1.0, COST))


@pytest.mark.parametrize(
    ("limit", "cut", "kept"), [(2.0, [1, 0, 0, 1], [2, 2, -1, -2]), (None, [0] * 4, [3, 2, -1, -5])]
)
def test_how_many_rewards_are_cut_is_told(limit: float | None, cut: list[int], kept: list[int]) -> None:
    objective = make(REINFORCEModule, kl_coefficient=0.0, reward_clip=limit)
    policy, rollouts = TablePolicy(), [rollout((1, 2)) for _ in range(4)]
    for one, reward in zip(rollouts, [3.0, 2.0, -1.0, -5.0], strict=True):
        one.figures["reward"] = reward
    with torch.no_grad():
        objective.look(policy, rollouts, CPU)
    objective.settle([[one] for one in rollouts])
    assert [one.figures["reward_clipped"] for one in rollouts] == cut
    assert [one.figures["shaped_reward"] for one in rollouts] == kept
    total, count = objective.loss(policy, collate_rollouts(rollouts, 0))["reward_clipped"]
    assert (float(total), int(count)) == (sum(cut), 4)


def test_groups_of_unequal_size_are_each_judged_by_themselves() -> None:
    """A prompt with three completions and one with two, as dynamic sampling makes them: by hand."""
    rewards = [[1.0, 2.0, 6.0], [0.5, -1.0]]
    for kind, truth in (
        (RLOOModule, [1 - 4.0, 2 - 3.5, 6 - 1.5, 1.5, -1.5]),
        (GRPOModule, [-2.0, -1.0, 3.0, 0.75, -0.75]),
    ):
        extra = {"scale_rewards": False} if kind is GRPOModule else {}
        objective = make(kind, kl_coefficient=0.0, **extra)
        groups = [[rollout((1, 2)) for _ in group] for group in rewards]
        for one, reward in zip(itertools.chain(*groups), itertools.chain(*rewards), strict=True):
            one.figures["reward"] = reward
        sampled_gradient(objective, TablePolicy(), groups)
        assert [float(one.tokens["advantages"][0]) for group in groups for one in group] == pytest.approx(truth)


def test_grpo_without_divergence_and_deviation_is_the_exact_policy_gradient() -> None:
    policy, rollouts = TablePolicy(), in_proportion()
    objective = make(GRPOModule, samples=64, scale_rewards=False, kl_coefficient=0.0)
    found = sampled_gradient(objective, policy, [rollouts])
    scale = np.mean([len(one.completion) for one in rollouts])
    close([scale * gradient for gradient in found], exact_gradient(policy, 1.0, 0.0))
