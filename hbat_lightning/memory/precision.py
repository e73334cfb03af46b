"""What depends on the device that is planned for, on CPU tensors without values: autocast's lists, logits made at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hbat_lightning.functional import log_probs

# Under autocast CUDA computes these in fp32, and CPUs in what they are given (torch's autocast_mode.h). The second tuple's
# take their result's type as an argument, and widen as they go.
_WIDENED = (
    "acos", "asin", "cosh", "tan", "sinh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2", "logsumexp",
    "reciprocal", "rsqrt", "pow", "square", "__pow__", "__rpow__", "__rtruediv__", "softplus", "layer_norm",
    "group_norm", "rms_norm", "norm", "dist", "renorm", "cosine_similarity", "kl_div", "l1_loss", "smooth_l1_loss",
    "mse_loss", "nll_loss", "cross_entropy", "binary_cross_entropy_with_logits",
)  # fmt: skip
_WIDENING = ("prod", "softmax", "log_softmax", "softmin", "cumprod", "cumsum", "sum")


def _functions(names: tuple[str, ...]) -> set[Any]:
    """All under these names: of ``torch``, of ``torch.nn.functional``, and tensors' methods."""
    owners = (torch, torch.nn.functional, Tensor)
    return {getattr(owner, name) for name in names for owner in owners if hasattr(owner, name)}


class CudaLists(TorchFunctionMode):
    """Has CPU autocast compute in fp32 what CUDA autocast would.

    The other list, of what goes to 16 bits, is the same on both as far as language models are concerned. Outside of autocast,
    as in backward passes, it does nothing.
    """

    _widened, _widening = _functions(_WIDENED), _functions(_WIDENING)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cpu"):
            if func in self._widened:
                args, kwargs = tuple(map(_wide, args)), {name: _wide(value) for name, value in kwargs.items()}
            elif func in self._widening and _is_narrow(args[0] if args else kwargs.get("input")):
                kwargs = kwargs if kwargs.get("dtype") is not None else kwargs | {"dtype": torch.float32}
        return func(*args, **kwargs)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _wide(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value


@contextlib.contextmanager
def lists_of(gpu: bool) -> Iterator[None]:
    """For a whole rehearsal: autocast by the lists of this kind of device."""
    with CudaLists() if gpu else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def chunks_of(gpu: bool) -> Iterator[None]:
    """For a whole rehearsal: as many logits at a time as on this kind of device."""
    before = log_probs.CPU_CHUNK_ELEMENTS
    log_probs.CPU_CHUNK_ELEMENTS = log_probs.CHUNK_ELEMENTS if gpu else before
    try:
        yield
    finally:
        log_probs.CPU_CHUNK_ELEMENTS = before
