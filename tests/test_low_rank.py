"""LoRA's sum in one product, against PEFT's own sum."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hbat_lightning.low_rank import add_in_one_product


class Layers(nn.Module):
    """Two layers, the first of which gets what has no gradient."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.one, self.two = layers

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.two(self.one(x).tanh())
        return out


def four_bits() -> nn.Module:
    layer = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": torch.randn(64, 64)})
    return layer.to("cpu")


LAYERS: dict[str, Any] = {
    "linear": lambda: nn.Linear(64, 64, bias=False),
    "with a bias": lambda: nn.Linear(64, 64),
    "Conv1D": lambda: Conv1D(64, 64),
    "4 bits": four_bits,
    "bf16": lambda: nn.Linear(64, 64, bias=False, dtype=torch.bfloat16),
}


def outcome(model: nn.Module, x: Tensor, autocast: bool) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(3)  # of dropout
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(x)
    trained = [p for p in model.parameters() if p.requires_grad]
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out.detach(), list(torch.autograd.grad((out.float() * weights).sum(), trained))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_sum_and_gradients_are_those_of_peft(kind: str, dropout: float, autocast: bool) -> None:
    torch.manual_seed(0)
    base = Layers(LAYERS[kind](), LAYERS[kind]())
    theirs = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=["one", "two"]))
    for name, parameter in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    mine = copy.deepcopy(theirs)
    add_in_one_product(mine, "default")
    assert mine.base_model.model.one.lora_variant  # type: ignore[union-attr]
    x = torch.randn(3, 7, 64, dtype=torch.bfloat16 if kind == "bf16" and not autocast else torch.float32)
    out, gradients = outcome(mine, x, autocast)
    true, true_gradients = outcome(theirs, x, autocast)
    assert out.dtype == true.dtype
    coarse = autocast or kind == "bf16"
    close = {"rtol": 3e-2, "atol": 3e-2} if coarse else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(out, true, **close)
    for one, other in zip(gradients, true_gradients, strict=True):
        assert one.dtype == other.dtype
        scale = float(other.abs().max())
        torch.testing.assert_close(one / scale, other / scale, **close)


def test_merging_is_that_of_peft() -> None:
    torch.manual_seed(0)
    theirs = get_peft_model(
        Layers(nn.Linear(8, 8), nn.Linear(8, 8)),
        LoraConfig(r=2, init_lora_weights=False, target_modules=["one", "two"]),
    )
    mine, x = copy.deepcopy(theirs), torch.randn(2, 8)
    add_in_one_product(mine, "default")
    before = mine(x)
    for safe in (True, False):
        mine.merge_adapter(safe_merge=safe)
        torch.testing.assert_close(mine.base_model.model.one.weight.data, _merged(theirs, safe))
        torch.testing.assert_close(mine(x), before)
        mine.unmerge_adapter()
        torch.testing.assert_close(mine(x), before)


def _merged(model: Any, safe: bool) -> Tensor:
    other = copy.deepcopy(model)
    other.merge_adapter(safe_merge=safe)
    weight: Tensor = other.base_model.model.one.weight.data
    return weight
