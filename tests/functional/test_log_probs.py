"""Log-probabilities against loops over plain floats."""

from __future__ import annotations

import math

import pytest
import torch

from hbat_lightning.functional import linear_log_probs, selected_log_probs, sequence_log_probs, token_log_probs

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


# ---- straight from hidden states ---------------------------------------------------------------------------------------


def layer(dtype: torch.dtype = torch.float64, bias: bool = True) -> dict[str, torch.Tensor]:
    """Five rows of hidden size 3 and a vocabulary of 7."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden": (5, 3), "weight": (7, 3)} | ({"bias": (7,)} if bias else {})
    made = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name, shape in shapes.items()
    }
    return made | {"targets": torch.tensor([6, 0, 3, 3, 1])}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("rows", [None, 2, 9])
@pytest.mark.parametrize(
    "trains", [("hidden",), ("hidden", "weight"), ("weight", "bias"), ("hidden", "weight", "bias")]
)
def test_linear_log_probs_and_their_gradients(trains: tuple[str, ...], rows: int | None, temperature: float) -> None:
    given = layer()
    for name in trains:
        given[name].requires_grad_()
    logits = given["hidden"] @ given["weight"].T + given["bias"]
    truth = torch.log_softmax(logits / temperature, -1)[torch.arange(5), given["targets"]]
    got = linear_log_probs(**given, rows=rows, temperature=temperature)
    assert torch.allclose(got, truth, rtol=1e-12, atol=0)
    upstream = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0], dtype=torch.float64)
    leaves = [given[name] for name in trains]
    for mine, theirs in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(truth, leaves, upstream), strict=True
    ):
        assert torch.allclose(mine, theirs, rtol=1e-10, atol=1e-14)


def test_linear_log_probs_of_no_rows() -> None:
    given = layer() | {"hidden": torch.zeros(0, 3, requires_grad=True), "targets": torch.zeros(0, dtype=torch.long)}
    given |= {name: given[name].float() for name in ("weight", "bias")}
    got = linear_log_probs(**given)
    assert got.shape == (0,)
    got.sum().backward()
    assert given["hidden"].grad.shape == (0, 3)


@pytest.mark.parametrize("trained", [False, True])
def test_linear_log_probs_in_half_precision_are_normalised_in_fp32(trained: bool) -> None:
    given = layer(torch.bfloat16, bias=False)
    given["hidden"].requires_grad_()
    given["weight"].requires_grad_(trained)
    logits = (given["hidden"] @ given["weight"].T).detach().float()
    truth = torch.log_softmax(logits, -1)[torch.arange(5), given["targets"]]
    got = linear_log_probs(**given, rows=2)
    assert got.dtype == torch.float32
    assert torch.allclose(got, truth, rtol=1e-6, atol=1e-6)
    got.sum().backward()
    slope = torch.nn.functional.one_hot(given["targets"], 7) - torch.softmax(logits, -1)
    assert torch.allclose(given["hidden"].grad.float(), slope @ given["weight"].detach().float(), rtol=2e-2, atol=1e-2)


def test_under_autocast_products_are_in_its_dtype() -> None:
    given = layer(torch.float32)
    given["weight"].requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = linear_log_probs(**given)
    halves = {name: value if name == "targets" else value.bfloat16() for name, value in given.items()}
    assert torch.equal(got, linear_log_probs(**halves))
    got.sum().backward()
    assert given["weight"].grad.dtype == torch.float32


@pytest.mark.parametrize("trained", [False, True])
def test_no_logits_of_all_rows_are_ever_made(trained: bool) -> None:
    rows, vocabulary, width, chunk = 512, 8192, 16, 32
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=trained)
    targets = torch.randint(vocabulary, (rows,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_log_probs(hidden, weight, targets, rows=chunk).sum().backward()
    largest = max(event.cpu_memory_usage for event in profile.events())  # the largest allocation of an operation
    assert largest <= max(chunk * vocabulary * 4, vocabulary * width * 4)
    assert largest < rows * vocabulary * 4 / 8
