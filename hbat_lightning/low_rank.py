"""LoRA's sum in one product: ``base(x) + scale · B A x`` without a tensor of the output's size beside it.

PEFT scales ``B A x`` and adds it to the base layer's output: two more passes over memory, for each of which there is one in
the backward pass. Here the product with B adds to that output as it goes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import LoraLayer, LoraVariant
from torch import Tensor, nn


class _AddProduct(torch.autograd.Function):
    """``total += scale · rows @ weight.T``, in the place of ``total`` ``(…, O)``; ``(…, r)``, ``(O, r)``.

    ``total`` is contiguous and no view: autograd would copy the gradient of what a view is of, several times.
    """

    @staticmethod
    def forward(ctx: Any, total: Tensor, rows: Tensor, weight: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        ctx.save_for_backward(rows, weight)
        ctx.mark_dirty(total)
        total.view(-1, total.shape[-1]).addmm_(rows.flatten(0, -2), weight.T, alpha=scale)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        to_total, to_rows, to_weight, _ = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        d_rows = (flat @ weight).mul_(ctx.scale).view(rows.shape) if to_rows else None
        d_weight = (flat.T @ rows.flatten(0, -2)).mul_(ctx.scale) if to_weight else None
        return gradient if to_total else None, d_rows, d_weight, None


class _InOneProduct(LoraVariant):  # type: ignore[misc]
    """What PEFT's layers call in the place of their own sum; where types differ, it is their own sum."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        down, up = module.lora_A[active_adapter], module.lora_B[active_adapter]
        scale = float(module.scaling[active_adapter])
        rows = down(module.lora_dropout[active_adapter](x))
        if rows.dtype != result.dtype:
            product: Tensor = up(rows) * scale
            dtype = result.dtype if torch.is_autocast_enabled(x.device.type) else product.dtype
            return torch.add(result, product.to(dtype))
        # What a bias has been added to may be a view of another shape, and what is a view is not for others to write to.
        ours = result.is_contiguous() and not result._is_view()
        total = result if ours else result.clone(memory_format=torch.contiguous_format)
        apply: Callable[..., Tensor] = _AddProduct.apply
        return apply(total, rows, up.weight.to(rows.dtype), scale)

    @staticmethod
    def merge_safe(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        change: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight + change

    @staticmethod
    def merge_unsafe(module: Any, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight += module.get_delta_weight(active_adapter)

    @staticmethod
    def unmerge(module: Any, active_adapter: str, orig_weight: Tensor) -> Tensor:
        change: Tensor = module.get_delta_weight(active_adapter)
        return orig_weight - change


def add_in_one_product(adapted: PeftModel, name: str) -> None:
    """Have the layers of an adapter add to what their base layers give.

    Args:
        adapted: The model.
        name: The adapter. Its linear layers without a bias are meant, which LoRA's are unless asked for otherwise.
    """
    layers: list[Any] = [layer for layer in adapted.modules() if isinstance(layer, LoraLayer)]
    for layer in layers:
        if name in layer.lora_A and name not in layer.lora_variant:
            down, up = layer.lora_A[name], layer.lora_B[name]
            if type(down) is nn.Linear and type(up) is nn.Linear and len(list(up.parameters())) == 1:
                layer.lora_variant[name] = _InOneProduct()
