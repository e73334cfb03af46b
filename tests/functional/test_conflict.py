"""The cosine freed of noise against directions whose cosine is known."""

from __future__ import annotations

import math

import pytest
import torch

from hbat_lightning.functional import cosine, split_half_products


def test_without_noise_it_is_the_cosine() -> None:
    one, other = torch.randn(2, 3, 5, dtype=torch.float64)
    expected = torch.cosine_similarity(one.flatten(), other.flatten(), dim=0)
    assert cosine(*split_half_products(one, one, other, other)).item() == pytest.approx(expected.item(), rel=1e-12)


def test_products_of_parts_add_up() -> None:
    halves = torch.randn(4, 10, dtype=torch.float64)
    parts = split_half_products(*halves[:, :3]) + split_half_products(*halves[:, 3:])
    assert torch.allclose(parts, split_half_products(*halves), rtol=1e-12)


def test_noise_is_taken_out_where_the_plain_cosine_is_drawn_to_zero() -> None:
    """Directions at 60 degrees, in noise of four times their length: over many draws the estimate finds the angle."""
    size, sigma = 400, 4 / math.sqrt(400)
    first, second = torch.zeros(2, size, dtype=torch.float64)
    first[0], second[0], second[1] = 1.0, 0.5, math.sqrt(0.75)
    products, plain = torch.zeros(3, dtype=torch.float64), 0.0
    draws = 4000
    for _ in range(draws):
        noise = sigma * torch.randn(4, size, dtype=torch.float64)
        halves = noise + torch.stack([first, first, second, second])
        products += split_half_products(*halves) / draws
        plain += torch.cosine_similarity(halves[0] + halves[1], halves[2] + halves[3], dim=0).item() / draws
    assert products.tolist() == pytest.approx([0.5, 1.0, 1.0], abs=0.05)  # unbiased
    assert cosine(*products).item() == pytest.approx(0.5, abs=0.05)
    assert plain == pytest.approx(0.5 / 9, abs=0.01)  # length² 1, noise 16 / 2 in each mean


def test_where_noise_hides_a_direction_there_is_no_cosine() -> None:
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    for halves in ((one, -one, other, other), (one, one, other, -other), (one, one, 0 * other, 0 * other)):
        assert math.isnan(cosine(*split_half_products(*halves)))
    tiny = 1e-120 * one.double()
    assert cosine(*split_half_products(tiny, tiny, -tiny, -tiny)).item() == pytest.approx(-1.0)
