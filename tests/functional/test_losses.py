"""Losses against formulas by hand and published golden values."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from hbat_lightning.functional import dpo_loss, sft_loss


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Inputs of torchtune's test_dpo_loss.py (BSD-3): log-ratios h = 0, 10, 20.
POLICY = tensor(-0.5, -10.0, -1.0), tensor(-0.1, -30.0, -21.0)
REFERENCE = tensor(-0.5, -10.1, -0.1), tensor(-0.1, -20.1, -0.1)


@pytest.mark.parametrize(
    ("smoothing", "golden"),
    [(0.0, [0.693147, 0.313262, 0.126928]), (0.1, [0.693147, 0.413262, 0.326928])],
    ids=["sigmoid", "cDPO"],
)
def test_golden_values(smoothing: float, golden: list[float]) -> None:
    """torchtune, OpenRLHF and the original DPO code agree on these."""
    losses, chosen, rejected = dpo_loss(*POLICY, *REFERENCE, beta=0.1, label_smoothing=smoothing)
    assert losses.tolist() == pytest.approx(golden, abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.0, 0.01, -0.09], abs=1e-12)
    assert rejected.tolist() == pytest.approx([0.0, -0.99, -2.09], abs=1e-12)
    assert (chosen > rejected).double().mean().item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 7.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_equation_7_by_hand(beta: float, smoothing: float) -> None:
    scores = torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 5
    losses, chosen, rejected = dpo_loss(*scores, beta=beta, label_smoothing=smoothing)
    for n, (w, l, rw, rl) in enumerate(zip(*scores.tolist(), strict=True)):  # noqa: E741  w won, l lost
        h = beta * ((w - rw) - (l - rl))
        truth = (1 - smoothing) * math.log1p(math.exp(-h)) + smoothing * math.log1p(math.exp(h))
        assert losses[n].item() == pytest.approx(truth, rel=1e-12)
        assert chosen[n].item() == pytest.approx(beta * (w - rw), rel=1e-12)
        assert rejected[n].item() == pytest.approx(beta * (l - rl), rel=1e-12)


@pytest.mark.parametrize("beta", [0.1, 3.0])
def test_at_the_reference_it_is_ln_2_with_gradient_half_beta(beta: float) -> None:
    scores = [value.clone().requires_grad_() for value in POLICY]
    losses, chosen, rejected = dpo_loss(*scores, *POLICY, beta=beta)
    assert losses.tolist() == pytest.approx([math.log(2)] * 3, rel=1e-15)
    assert chosen.tolist() == rejected.tolist() == [0.0] * 3
    losses.sum().backward()
    assert scores[0].grad.tolist() == pytest.approx([-beta / 2] * 3)
    assert scores[1].grad.tolist() == pytest.approx([beta / 2] * 3)
    assert not chosen.requires_grad
    assert not rejected.requires_grad


def test_swapping_the_answers_changes_the_loss_by_the_margin() -> None:
    one = dpo_loss(*POLICY, *REFERENCE, beta=0.2)[0]
    other = dpo_loss(*POLICY[::-1], *REFERENCE[::-1], beta=0.2)[0]
    assert (one - other).tolist() == pytest.approx([0.0, -0.2 * 10, -0.2 * 20], abs=1e-12)


def test_far_margins_stay_finite() -> None:
    losses = dpo_loss(torch.tensor([0.0, -1e4]), torch.tensor([-1e4, 0.0]), torch.zeros(2), torch.zeros(2), beta=1.0)[0]
    assert losses.tolist() == [0.0, 1e4]


def test_sft_is_a_mean_over_supervised_tokens() -> None:
    logits = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(1))
    labels[:, :3] = -100
    labels[1, 4:] = -100
    truth = cross_entropy(logits[:, :-1].reshape(-1, 11), labels[:, 1:].reshape(-1), ignore_index=-100)
    assert sft_loss(logits, labels).item() == pytest.approx(truth.item(), rel=1e-14)


def test_sft_of_nothing_is_a_differentiable_zero() -> None:
    logits = torch.randn(2, 4, 5, requires_grad=True)
    loss = sft_loss(logits, torch.full((2, 4), -100))
    loss.backward()
    assert loss.item() == 0.0
    assert bool((logits.grad == 0).all())
