"""How far two directions agree, where both are only known with noise."""

from __future__ import annotations

import torch
from torch import Tensor


def split_half_products(first: Tensor, second: Tensor, other_first: Tensor, other_second: Tensor) -> Tensor:
    r"""Inner products of two expectations, from two independent estimates of each; unbiased.

    With halves :math:`a_1, a_2` of one quantity and :math:`b_1, b_2` of the other, all independent:
    :math:`\frac14\sum_{ij}\langle a_i, b_j\rangle`, :math:`\langle a_1, a_2\rangle` and :math:`\langle b_1, b_2\rangle`. The
    product of a mean with itself would have the variance of its noise on top, which makes any two noisy directions look more
    orthogonal than they are. Products of parts of a vector add up to those of the whole.

    Args:
        first: A half, of any shape.
        second: The other half.
        other_first: A half of the other quantity, of the same shape.
        other_second: Its other half.

    Returns:
        ``(3,)`` fp64: what :func:`cosine` takes.
    """
    a, b, c, d = (half.double().flatten() for half in (first, second, other_first, other_second))
    return torch.stack([torch.dot(a + b, c + d) / 4, torch.dot(a, b), torch.dot(c, d)])


def cosine(product: Tensor, square: Tensor, other_square: Tensor) -> Tensor:
    r"""Cosine from inner products, :math:`\langle a, b\rangle / \sqrt{\langle a, a\rangle\langle b, b\rangle}`.

    From those of :func:`split_half_products` it is the cosine of the expectations, freed of the noise that pulls it towards
    0, as Spearman (1904) divides a correlation by the root of two reliabilities. A ratio of unbiased estimates is consistent,
    not unbiased; it may lie outside [-1, 1], and is left as it is.

    Args:
        product: :math:`\langle a, b\rangle`, of any shape.
        square: :math:`\langle a, a\rangle`, of the same shape.
        other_square: :math:`\langle b, b\rangle`, of the same shape.

    Returns:
        The cosines; NaN where a square, or its estimate, is not positive: noise hides the direction, or there is none.
    """
    # Two roots: the product of two squares of small gradients would be 0.
    return product / (square.clamp(min=0).sqrt() * other_square.clamp(min=0).sqrt()) + torch.where(
        (square > 0) & (other_square > 0), 0.0, torch.nan
    )
