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


def _int8_codes(inputs: Tensor, threshold: float = 0.0) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows as bytes, with a scale each. Columns of outliers, kept in 16 bits, depend on values: none are counted."""
    outliers = torch.empty(0, dtype=torch.int64) if threshold > 0 else None
    return torch.empty_like(inputs, dtype=torch.int8), inputs.new_empty(len(inputs), dtype=torch.float32), outliers


def _int8_products(
    inputs: Tensor,
    codes: Tensor,
    weight: Tensor,
    scales: Tensor,
    weight_scales: Tensor,
    outliers: Tensor | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The product of bytes, and the columns of outliers."""
    products = bnb.int8_scaled_mm.default(codes, weight, scales, weight_scales, bias=bias, dtype=inputs.dtype)
    return products, inputs.new_empty(0)


REPLAYED: dict[Any, Callable[..., Any]] = {
    # Dequantises the whole weight, then multiplies: on a CPU always, on GPUs for all but short inputs.
    bnb.gemm_4bit.default: _gemm_4bit_default_impl,
    bnb.int8_vectorwise_quant.default: _int8_codes,
    bnb.int8_mixed_scaled_mm.default: _int8_products,
}
"""Operations with a kernel of Python, that can run on tensors without values."""


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _as_input(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    return _size(inputs[0])


def _sums(inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """int32 sums of products."""
    return 4 * outputs[0].numel()


_WORKSPACES: dict[Any, Callable[[list[Tensor], list[Tensor]], int]] = {
    aten.logsumexp.default: _as_input,  # exp(x - max)
    bnb.int8_scaled_mm.default: _sums,
}


def workspace(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation allocates beside its outputs, and frees before it returns."""
    size = _WORKSPACES.get(func)
    return 0 if size is None else size(inputs, outputs)
