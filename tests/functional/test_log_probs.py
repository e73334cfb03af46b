"""Log-probabilities against loops over plain floats."""

from __future__ import annotations

import math

import pytest
import torch

from hbat_lightning.functional import selected_log_probs, sequence_log_probs, token_log_probs

LABELS = torch.tensor([[-100, -100, 3, 0, 4], [-100, 2, -100, 1, -100], [-100, -100, -100, -100, -100]])


def logits(dtype: torch.dtype = torch.float64, scale: float = 3.0) -> torch.Tensor:
    return (scale * torch.randn(3, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)


def by_hand(values: torch.Tensor, labels: torch.Tensor, ignore: int = -100) -> list[list[float]]:
    """log softmax(logits[t])[labels[t + 1]], and 0 where nothing is supervised."""
    rows = []
    for row, targets in zip(values.tolist(), labels.tolist(), strict=True):
        out = []
        for scores, target in zip(row[:-1], targets[1:], strict=True):
            total = math.fsum(math.exp(score) for score in scores)
            out.append(0.0 if target == ignore else scores[target] - math.log(total))
        rows.append(out)
    return rows


def test_tokens_are_predicted_from_the_position_before() -> None:
    truth = torch.tensor(by_hand(logits(), LABELS), dtype=torch.float64)
    assert torch.allclose(token_log_probs(logits(), LABELS), truth, rtol=1e-14, atol=0)
    assert torch.allclose(sequence_log_probs(logits(), LABELS), truth.sum(-1), rtol=1e-14, atol=0)
    assert sequence_log_probs(logits(), LABELS)[2] == 0.0


def test_another_ignore_index() -> None:
    labels = LABELS.masked_fill(LABELS == -100, 5)
    truth = torch.tensor(by_hand(logits(), labels, ignore=5), dtype=torch.float64)
    assert torch.allclose(token_log_probs(logits(), labels, ignore_index=5), truth, rtol=1e-14, atol=0)


def test_gradient_is_that_of_the_formula_and_zero_where_nothing_is_supervised() -> None:
    values = logits().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, LABELS), values)
    sequence_log_probs(values, LABELS).sum().backward()
    ignored = torch.nn.functional.pad(LABELS[:, 1:] == -100, (0, 1), value=True)  # the last position predicts nothing
    assert bool((values.grad[ignored] == 0).all())
    assert bool((values.grad[~ignored] != 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_logits_are_normalised_in_fp32(dtype: torch.dtype) -> None:
    values = logits(dtype)
    got = token_log_probs(values, LABELS)
    assert got.dtype == torch.float32
    truth = torch.tensor(by_hand(values.double(), LABELS))
    assert torch.allclose(got, truth, rtol=1e-5, atol=1e-6)


def test_large_logits_do_not_overflow() -> None:
    got = selected_log_probs(torch.tensor([[1e4, 0.0], [-1e4, -1e4]]), torch.tensor([1, 0]))
    assert got.tolist() == pytest.approx([-1e4, -math.log(2)], abs=1e-3)  # what fp32 resolves at 1e4
