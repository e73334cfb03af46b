"""Preference losses other than DPO's against formulas by hand, published golden values, and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hbat_lightning.functional import (
    dpo_loss,
    hinge_loss,
    ipo_loss,
    kto_loss,
    kto_reference_point,
    log1mexp,
    log_odds,
    orpo_loss,
    robust_dpo_loss,
    rpo_loss,
    rrhf_loss,
    simpo_loss,
)
from tests.functional.test_losses import POLICY, REFERENCE, tensor

TOKENS = tensor(2.0, 5.0, 4.0)


def random_scores(rows: int, seed: int = 1) -> Tensor:
    return torch.randn(rows, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 5


# ---- against a reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "golden"),
    [
        (lambda *scores: robust_dpo_loss(*scores, beta=0.1, label_smoothing=0.1), [0.693147, 0.188262, -0.123072]),
        (lambda *scores: ipo_loss(*scores, beta=0.1), [25.0, 25.0, 225.0]),
        (lambda *scores: hinge_loss(*scores, beta=0.1), [1.0, 0.0, 0.0]),
        # the sigmoid loss, and the nll of the chosen answers: 0.5 / 2, 10 / 5, 1 / 4
        (lambda *scores: rpo_loss(*scores, TOKENS, beta=0.1, alpha=1.0), [0.943147, 2.313262, 0.376928]),
    ],
    ids=["robust", "ipo", "hinge", "rpo"],
)
def test_golden_values(loss: Callable[..., Any], golden: list[float]) -> None:
    """Robust and hinge as in TRL, IPO on sums as in Mitchell's code; log-ratio margins of 0, 10 and 20."""
    losses, chosen, rejected = loss(*POLICY, *REFERENCE)
    assert losses.tolist() == pytest.approx(golden, abs=1e-6)
    assert chosen.tolist() == pytest.approx([0.0, 0.01, -0.09], abs=1e-12)
    assert rejected.tolist() == pytest.approx([0.0, -0.99, -2.09], abs=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.3, 2.0])
def test_equations_by_hand(beta: float) -> None:
    """One pair at a time, in plain Python."""
    scores, tokens = random_scores(4), torch.arange(1.0, 7.0, dtype=torch.float64)
    robust = robust_dpo_loss(*scores, beta=beta, label_smoothing=0.2)[0]
    squared = ipo_loss(*scores, beta=beta)[0]
    hinge = hinge_loss(*scores, beta=beta)[0]
    with_nll = rpo_loss(*scores, tokens, beta=beta, alpha=0.7)[0]
    for n, (w, l, rw, rl) in enumerate(zip(*scores.tolist(), strict=True)):  # noqa: E741  w won, l lost
        margin = (w - rw) - (l - rl)
        right, wrong = math.log1p(math.exp(-beta * margin)), math.log1p(math.exp(beta * margin))
        assert robust[n].item() == pytest.approx((0.8 * right - 0.2 * wrong) / 0.6, rel=1e-12)
        assert squared[n].item() == pytest.approx((margin - 1 / (2 * beta)) ** 2, rel=1e-12)
        assert hinge[n].item() == pytest.approx(max(0.0, 1 - beta * margin), rel=1e-12, abs=1e-12)
        assert with_nll[n].item() == pytest.approx(right - 0.7 * w / (n + 1), rel=1e-12)


def test_robust_loss_under_flipped_labels_has_the_mean_of_the_clean_loss() -> None:
    scores, share = random_scores(4), 0.3
    settings = {"beta": 0.4, "label_smoothing": share}
    right = robust_dpo_loss(*scores, **settings)[0]
    flipped = robust_dpo_loss(scores[1], scores[0], scores[3], scores[2], **settings)[0]
    assert torch.allclose((1 - share) * right + share * flipped, dpo_loss(*scores, beta=0.4)[0])


def test_slopes_at_the_reference() -> None:
    """With rewards of 0: what each loss is there, and its derivative by the chosen answer's log-probability."""
    beta = 0.25
    for loss, value, slope in (
        (lambda *s: robust_dpo_loss(*s, beta=beta, label_smoothing=0.1), math.log(2), -beta / 2 / 0.8),
        (lambda *s: ipo_loss(*s, beta=beta), 1 / (2 * beta) ** 2, -1 / beta),
        (lambda *s: hinge_loss(*s, beta=beta), 1.0, -beta),
    ):
        chosen, rejected = (one.clone().requires_grad_() for one in POLICY)
        losses, *rewards = loss(chosen, rejected, *POLICY)
        losses.sum().backward()
        assert losses.tolist() == pytest.approx([value] * 3)
        assert chosen.grad.tolist() == pytest.approx([slope] * 3)
        assert rejected.grad.tolist() == pytest.approx([-slope] * 3)
        assert all(not reward.requires_grad and not reward.any() for reward in rewards)


# ---- without one ------------------------------------------------------------------------------------------------------


def test_simpo_by_hand() -> None:
    losses, chosen, rejected = simpo_loss(tensor(-1.0, -0.5), tensor(-1.0, -2.0), beta=2.0, gamma=0.5)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(0.5)), math.log1p(math.exp(-2.5))], rel=1e-12)
    assert chosen.tolist() == [-2.0, -1.0]
    assert rejected.tolist() == [-2.0, -4.0]


def test_orpo_by_hand() -> None:
    """Probabilities per token of 0.8 and 0.5: odds of 4 and 1."""
    losses, chosen, rejected = orpo_loss(tensor(math.log(0.8)), tensor(math.log(0.5)), weight=0.1)
    assert chosen.item() == pytest.approx(math.log(4.0))
    assert rejected.item() == pytest.approx(0.0, abs=1e-15)
    assert losses.item() == pytest.approx(-math.log(0.8) + 0.1 * math.log(1 + 1 / 4))


def test_orpo_slope_is_that_of_the_paper() -> None:
    """Sec. 4.3 there: d log σ(log OR) is δ·h with δ = 1 / (1 + odds ratio), h by each side's 1 / (1 - p)."""
    means = [tensor(-0.3).requires_grad_(), tensor(-1.1).requires_grad_()]
    orpo_loss(*means, weight=1.0)[0].sum().backward()
    p, q = math.exp(-0.3), math.exp(-1.1)
    delta = 1 / (1 + (p / (1 - p)) / (q / (1 - q)))
    assert means[0].grad.item() == pytest.approx(-1 - delta / (1 - p))
    assert means[1].grad.item() == pytest.approx(delta / (1 - q))


@pytest.mark.parametrize("value", [-1e-6, -1e-3, -0.5, -math.log(2), -0.7, -5.0, -40.0, -90.0])
def test_log1mexp_keeps_its_digits_in_fp32(value: float) -> None:
    exact = float(torch.tensor(value))  # what fp32 makes of it
    truth = math.log(-math.expm1(exact)) if exact > -1 else math.log1p(-math.exp(exact))
    given = torch.tensor(value, requires_grad=True)
    result = log1mexp(given)
    result.backward()
    assert result.item() == pytest.approx(truth, rel=1e-6)
    assert given.grad.item() == pytest.approx(1 / math.expm1(exact) + 1 if exact < -20 else -1 / math.expm1(-exact))


@pytest.mark.parametrize("value", [0.0, -1e-30, -1e-9, -1e-8, -200.0, -1e4])
def test_certain_and_hopeless_answers_stay_finite(value: float) -> None:
    """The other form of the logarithm has no number there, and neither has its derivative."""
    given = torch.tensor([value, -1.0], requires_grad=True)
    losses = orpo_loss(given[:1], given[1:], weight=0.1)[0]
    losses.sum().backward()
    assert bool(torch.isfinite(losses).all())
    assert bool(torch.isfinite(given.grad).all())
    assert bool(torch.isfinite(log_odds(given)).all())


def test_rrhf_by_hand() -> None:
    """Three answers, the best first. Scores -1, -0.5, -2: only the second is above one that is better."""
    sums, tokens = tensor(-2.0, -2.0, -2.0).unsqueeze(0), tensor(2.0, 4.0, 1.0).unsqueeze(0)
    losses, scores = rrhf_loss(sums, tokens, rank_weight=3.0)
    assert scores.tolist() == [[-1.0, -0.5, -2.0]]
    assert losses.tolist() == pytest.approx([3.0 * 0.5 + 1.0])
    unpenalised = rrhf_loss(sums, tokens, rank_weight=3.0, length_penalty=0.0)
    assert unpenalised[1].tolist() == [[-2.0, -2.0, -2.0]]
    assert unpenalised[0].tolist() == pytest.approx([1.0])


def test_rrhf_sums_over_all_pairs_of_ranks() -> None:
    sums, tokens = -random_scores(5).abs().T, torch.full((6, 5), 2.0, dtype=torch.float64)
    losses = rrhf_loss(sums, tokens, rank_weight=0.5, length_penalty=2.0)[0]
    for row, loss in zip((sums / 4).tolist(), losses.tolist(), strict=True):
        excess = sum(max(0.0, row[j] - row[i]) for i in range(5) for j in range(i + 1, 5))
        assert loss == pytest.approx(0.5 * excess - 2 * row[0])


# ---- unpaired ---------------------------------------------------------------------------------------------------------


def test_kto_by_hand() -> None:
    policy, reference = tensor(-1.0, -3.0, -2.0, -2.0), tensor(-2.0, -2.0, -4.0, -1.0)
    desirable = torch.tensor([True, True, False, False])
    settings = {"beta": 0.5, "desirable_weight": 1.5, "undesirable_weight": 0.8}
    losses, rewards = kto_loss(policy, reference, desirable, torch.tensor(0.4), **settings)
    ratios = [1.0, -1.0, 2.0, -1.0]
    assert rewards.tolist() == [0.5 * ratio for ratio in ratios]

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    good = [1.5 * (1 - sigmoid(0.5 * (ratio - 0.4))) for ratio in ratios[:2]]
    bad = [0.8 * (1 - sigmoid(0.5 * (0.4 - ratio))) for ratio in ratios[2:]]
    assert losses.tolist() == pytest.approx(good + bad, rel=1e-7)


def test_kto_at_the_reference_is_half_the_weight() -> None:
    scores = random_scores(1)[0].requires_grad_()
    desirable = torch.tensor([True, False] * 3)
    losses, rewards = kto_loss(scores, scores.detach(), desirable, torch.tensor(0.0), 0.3, 1.0, 2.0)
    losses.sum().backward()
    assert losses.tolist() == [0.5, 1.0] * 3
    assert rewards.tolist() == [0.0] * 6
    assert scores.grad.tolist() == pytest.approx([-0.3 / 4, 2 * 0.3 / 4] * 3)


def test_the_reference_point_is_a_mean_that_is_never_negative_and_carries_no_graph() -> None:
    policy = tensor(-1.0, -2.0).requires_grad_()
    point = kto_reference_point(policy, tensor(-2.0, -1.5))
    assert point.item() == pytest.approx(0.25)
    assert not point.requires_grad
    assert kto_reference_point(policy, tensor(0.0, 0.0)).item() == 0.0
    assert kto_reference_point(policy[:0], tensor()).item() == 0.0


# ---- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_autograd_of_the_written_formulas(seed: int) -> None:
    """Each formula once more, as one writes it from the paper with torch's primitives."""
    beta, tokens = 0.7, torch.arange(1.0, 7.0, dtype=torch.float64)
    given = random_scores(4, seed).requires_grad_()
    w, l, rw, rl = -given.abs() - 0.1  # noqa: E741  w won, l lost
    h = beta * ((w - l) - (rw - rl))
    p, q = (w / tokens).exp(), (l / tokens).exp()
    desirable = torch.tensor([True, False, True, True, False, False])
    kl = torch.tensor(0.2, dtype=torch.float64)
    value = torch.where(desirable, torch.sigmoid(beta * (w - rw - kl)), torch.sigmoid(beta * (kl - w + rw)))
    pairs = (w, l, rw, rl)
    written = {
        "robust": (
            (-0.9 * logsigmoid(h) + 0.1 * logsigmoid(-h)) / 0.8,
            robust_dpo_loss(*pairs, beta=beta, label_smoothing=0.1)[0],
        ),
        "ipo": ((h / beta - 1 / (2 * beta)) ** 2, ipo_loss(*pairs, beta=beta)[0]),
        "hinge": ((1 - h).clamp(min=0), hinge_loss(*pairs, beta=beta)[0]),
        "rpo": (-logsigmoid(h) - 0.5 * w / tokens, rpo_loss(*pairs, tokens, beta=beta, alpha=0.5)[0]),
        "simpo": (
            -(beta * (w - l) / tokens - 0.3).sigmoid().log(),
            simpo_loss(w / tokens, l / tokens, beta=beta, gamma=0.3)[0],
        ),
        "orpo": (
            -p.log() - 0.2 * torch.log(1 / (1 + (q / (1 - q)) / (p / (1 - p)))),
            orpo_loss(w / tokens, l / tokens, weight=0.2)[0],
        ),
        "rrhf": (
            2 * (l - w).div(tokens**0.5).clamp(min=0) - w / tokens,
            rrhf_loss(torch.stack([w, l], -1), torch.stack([tokens] * 2, -1), 2.0, 0.5)[0],
        ),
        "kto": (
            torch.where(desirable, tensor(1.3), tensor(0.6)) * (1 - value),
            kto_loss(w, rw, desirable, kl, beta, desirable_weight=1.3, undesirable_weight=0.6)[0],
        ),
    }
    for name, (truth, ours) in written.items():
        assert torch.allclose(ours, truth, rtol=1e-12), name
        mine, theirs = (torch.autograd.grad(one.sum(), given, retain_graph=True)[0] for one in (ours, truth))
        assert torch.allclose(mine, theirs, rtol=1e-6, atol=1e-9), name
        assert bool(mine.any()), name
