"""The lists of CUDA autocast, against CUDA autocast itself: its dispatch works on tensors without values, on any machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hbat_lightning.memory.allocation import valueless
from hbat_lightning.memory.precision import CudaLists

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{name: getattr(torch, name) for name in ("exp", "expm1", "log", "log1p", "log2", "rsqrt", "reciprocal")},
    **{
        name: getattr(torch, name)
        for name in ("tanh", "sigmoid", "erf", "sin", "cos", "square", "sqrt", "relu", "mean")
    },
    **{f"method {name}": getattr(Tensor, name) for name in ("exp", "rsqrt", "sum", "prod", "mean", "square")},
    "pow": lambda x: torch.pow(x, 3.0),
    "**": lambda x: x**2,
    "2 **": lambda x: 2**x,
    "1 /": lambda x: 1 / x,
    "1 -": lambda x: 1 - x,
    "/ 2": lambda x: x / 2,
    "softmax": lambda x: torch.softmax(x, -1),
    "functional.softmax": lambda x: functional.softmax(x, dim=-1),
    "softmax of a given type": lambda x: functional.softmax(x, dim=-1, dtype=torch.float64),
    "log_softmax": lambda x: x.log_softmax(-1),
    "logsumexp": lambda x: torch.logsumexp(x, -1),
    "cumsum": lambda x: x.cumsum(-1),
    "sum of a dimension": lambda x: x.sum(-1),
    "layer_norm": lambda x: functional.layer_norm(x, (4,)),
    "rms_norm": lambda x: functional.rms_norm(x, (4,)),
    "group_norm": lambda x: functional.group_norm(x.unsqueeze(-1), 2),
    "norm": lambda x: torch.norm(x),
    "silu": functional.silu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "softplus": functional.softplus,
    "matmul": lambda x: x.float() @ x.float(),
    "linear": lambda x: functional.linear(x.float(), x.float()),
    "cat": lambda x: torch.cat([x, x.float()]),
    "mse_loss": lambda x: functional.mse_loss(x, x),
    "cross_entropy": lambda x: functional.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
    "ids": lambda x: x.long().sum(),
}


def cuda_autocast(operation: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Any:
    """The result's type by CUDA's own rules: the device has to be there for a context manager, but not for them."""
    with valueless():
        torch.set_autocast_enabled("cuda", True)
        torch.set_autocast_dtype("cuda", dtype)
        try:
            with torch.device("cuda"):
                return operation(torch.empty(4, 4, dtype=dtype)).dtype
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_have_the_types_of_cuda_autocast(name: str, dtype: torch.dtype) -> None:
    with valueless(), CudaLists(), torch.autocast("cpu", dtype):
        ours = OPERATIONS[name](torch.empty(4, 4, dtype=dtype)).dtype
    assert ours == cuda_autocast(OPERATIONS[name], dtype)


def test_nothing_is_widened_outside_of_autocast() -> None:
    with valueless(), CudaLists():
        assert torch.exp(torch.empty(4, dtype=torch.bfloat16)).dtype == torch.bfloat16
