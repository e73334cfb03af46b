"""What kernels allocate inside themselves, where no dispatch mode sees it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import bitsandbytes  # noqa: F401  registers its operations
import torch
from bitsandbytes.backends.default.ops import _gemm_4bit_default_impl
from torch import Tensor

aten = torch.ops.aten
bnb = torch.ops.bitsandbytes

REPLAYED: dict[Any, Callable[..., Any]] = {
    # Dequantises the whole weight, then multiplies: on a CPU always, on GPUs for all but short inputs.
    bnb.gemm_4bit.default: _gemm_4bit_default_impl,
}
"""Operations whose kernel is Python, so that it can run on tensors without values."""


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_input(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return _size(inputs[0])


_WORKSPACES: dict[Any, Callable[[list[Tensor], list[Tensor]], int]] = {
    aten.logsumexp.default: _as_input,  # exp(x - max)
}


def workspace(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation allocates beside its outputs, and frees before it returns."""
    size = _WORKSPACES.get(func)
    return 0 if size is None else size(inputs, outputs)
