"""The pull of EWC, added to gradients where they lie."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

CHUNK = 2**18  # elements; three fp32 chunks of 1 MiB stay in a core's second cache for all that is done with them


class Pull(NamedTuple):
    r"""What a pull was, as scalars.

    Attributes:
        penalty: :math:`\sum_n c_n \lVert\theta_n-\theta^*_n\rVert^2`.
        norm: Of its gradient, over all tensors.
        task_norm: Of the gradients before it was added.
    """

    penalty: Tensor
    norm: Tensor
    task_norm: Tensor


@torch.no_grad()
def add_pull(
    gradients: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    factors: Mapping[str, Tensor | float],
) -> Pull:
    r"""Add :math:`2c_n(\theta_n-\theta^*_n)` to gradients, in place (Hbat, arXiv 2406.15178, the gradient of its EWC term).

    Args:
        gradients: By name, of any shapes; all on one device.
        parameters: At least those, of the same shapes.
        anchors: At least those, of the same shapes.
        factors: At least those: one factor for a tensor, or one per element; all of a kind.

    Returns:
        Penalty and norms.
    """
    on_cpu = all(gradient.device.type == "cpu" for gradient in gradients.values())
    add = _add_by_chunks if on_cpu else _add_at_once
    return add(
        [(gradient, parameters[name].detach(), anchors[name], factors[name]) for name, gradient in gradients.items()]
    )


def _add_by_chunks(tensors: list[tuple[Tensor, Tensor, Tensor, Tensor | float]]) -> Pull:
    """Memory is read once: a chunk stays in the caches, and what is made of it has one place for all chunks."""
    penalty = norm = task = 0.0
    places: dict[torch.dtype, Tensor] = {}
    for gradient, parameter, anchor, factor in tensors:
        scale, per_element = (1.0, factor) if isinstance(factor, Tensor) else (factor, None)
        for into, here, there, each in _chunks(gradient, parameter, anchor, per_element):
            moved = _moved(here, there, places)
            task += _dot(into, into)
            if each is None:  # one scalar factor needs no pass of its own
                square = _dot(moved, moved)
                penalty, norm = penalty + scale * square, norm + scale * scale * square
                into.add_(moved, alpha=2.0 * scale)
            else:
                held = moved * each
                penalty, norm = penalty + _dot(held, moved), norm + _dot(held, held)
                into.add_(held, alpha=2.0)
    return Pull(torch.tensor(penalty), torch.tensor(2.0 * math.sqrt(norm)), torch.tensor(math.sqrt(task)))


def _moved(here: Tensor, there: Tensor, places: dict[torch.dtype, Tensor]) -> Tensor:
    """The difference of two chunks, where that of the last ones was: it is in the caches, as new memory is not."""
    if here.dim() != 1 or here.numel() > CHUNK:
        return here - there
    if here.dtype not in places:
        places[here.dtype] = here.new_empty(CHUNK)
    return torch.sub(here, there, out=places[here.dtype][: here.numel()])


def _dot(one: Tensor, other: Tensor) -> float:
    return torch.dot(one.reshape(-1), other.reshape(-1)).item()


def _chunks(
    gradient: Tensor, parameter: Tensor, anchor: Tensor, factor: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Views of the same elements of all; the whole where they have no common order."""
    tensors = [gradient, parameter, anchor, *([] if factor is None else [factor])]
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield gradient, parameter, anchor, factor
        return
    for into, here, there, *each in zip(*(torch.split(tensor.view(-1), CHUNK) for tensor in tensors), strict=True):
        yield into, here, there, each[0] if each else None


def _add_at_once(tensors: list[tuple[Tensor, Tensor, Tensor, Tensor | float]]) -> Pull:
    """A few launches for all tensors, and nothing that waits for the device."""
    gradients, parameters, anchors, factors = (list(column) for column in zip(*tensors, strict=True))
    task = torch._foreach_norm(gradients)
    moved = torch._foreach_sub(parameters, anchors)
    squares = [_weighted_square(*pair) for pair in zip(factors, moved, strict=True)]
    doubled: list[Any] = [2.0 * factor for factor in factors]
    torch._foreach_mul_(moved, doubled)
    torch._foreach_add_(gradients, moved)
    return Pull(torch.stack(squares).sum(), total_norm(torch._foreach_norm(moved)), total_norm(task))


def _weighted_square(factor: Tensor | float, moved: Tensor) -> Tensor:
    """``sum(factor · moved²)``; for one factor, without a tensor of squares."""
    if isinstance(factor, Tensor):
        return (factor * moved.square()).sum()
    square: Tensor = torch.linalg.vector_norm(moved).square()
    return factor * square


def total_norm(norms: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """The norm of all, from those of each."""
    return torch.stack([norm.float() for norm in norms]).square().sum().sqrt()
