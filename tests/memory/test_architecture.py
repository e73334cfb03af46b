"""Models from their configuration alone hold as many bytes as loaded ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PretrainedConfig, Qwen3Config

from hbat_lightning.base_model import BaseSpec, load_config, load_model
from hbat_lightning.errors import UserError
from hbat_lightning.memory.allocation import AllocationTracker, Category, valueless
from hbat_lightning.memory.architecture import build_base
from hbat_lightning.memory.optimizers import optimizer_step

SIZES: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, intermediate_size=160),
    "qwen3, tied": Qwen3Config(
        **SIZES, intermediate_size=160, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True
    ),
    "gemma2": Gemma2Config(**SIZES, intermediate_size=160, num_key_value_heads=2, head_dim=16),
}


def held(tensors: list[Tensor]) -> int:
    """Bytes of the storages of some tensors, each once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def quantised_tensors(model: nn.Module) -> list[Tensor]:
    """Everything that a loaded model holds, with what belongs to its quantised weights."""
    found = [*model.parameters(), *model.buffers()]
    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            state: Any = layer.weight.quant_state
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        if isinstance(layer, bnb.nn.Linear8bitLt):
            found.append(layer.weight.SCB)
    return found


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_bytes_of_a_loaded_model(name: str, quantization: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.bfloat16).save_pretrained(tmp_path)
    spec = BaseSpec(str(tmp_path), quantization)
    model = load_model(spec, torch.device("cpu"))
    tracker = AllocationTracker()
    base = build_base(spec, load_config(spec), valueless(), tracker)
    planned = tracker.live[Category.BASE] + tracker.live[Category.CONSTANTS]
    # 4-bit tables of 16 values are one for the process here, and one per layer there.
    assert planned == pytest.approx(held(quantised_tensors(model)), abs=80 * 16)
    assert {n: p.dtype for n, p in base.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_bytes_of_a_base_that_is_quantised_in_its_files(quantization: Any, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["llama"], dtype=torch.bfloat16).save_pretrained(tmp_path / "16")
    load_model(BaseSpec(str(tmp_path / "16"), "nf4"), torch.device("cpu")).save_pretrained(tmp_path / "4")
    spec = BaseSpec(str(tmp_path / "4"), quantization)
    model = load_model(spec, torch.device("cpu"))
    tracker = AllocationTracker()
    base = build_base(spec, load_config(spec), valueless(), tracker)
    planned = tracker.live[Category.BASE] + tracker.live[Category.CONSTANTS]
    assert planned == pytest.approx(held(quantised_tensors(model)), abs=80 * 16)
    assert {n: p.dtype for n, p in base.named_parameters()} == {n: p.dtype for n, p in model.named_parameters()}


def test_another_kind_of_quantised_base_is_refused(tmp_path: Path) -> None:
    CONFIGS["llama"].save_pretrained(tmp_path)
    config = load_config(BaseSpec(str(tmp_path)))
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(UserError, match="quantised by gptq cannot be planned"):
        build_base(BaseSpec(str(tmp_path)), config, valueless(), AllocationTracker())


def test_a_missing_dtype_is_fp32(tmp_path: Path) -> None:
    config: PretrainedConfig = LlamaConfig(**SIZES, intermediate_size=160)
    config.dtype = None
    config.save_pretrained(tmp_path)
    spec = BaseSpec(str(tmp_path))
    base = build_base(spec, load_config(spec), valueless(), AllocationTracker())
    assert next(base.parameters()).dtype == torch.float32


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD, bnb.optim.AdamW8bit, bnb.optim.AdamW])
def test_optimizer_states_have_the_bytes_of_a_real_step(make: Any) -> None:
    def states(parameters: list[nn.Parameter], step: Any) -> list[Tensor]:
        optimizer = make(parameters, lr=1e-3)
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step(optimizer)
        return [leaf for leaf in tree_leaves(list(optimizer.state.values())) if isinstance(leaf, Tensor)]

    shapes = [(100, 100), (8,), (512, 64)]
    real = states([nn.Parameter(torch.ones(shape)) for shape in shapes], lambda optimizer: optimizer.step())
    tracker = AllocationTracker()
    with valueless(), tracker:
        fake = states([nn.Parameter(torch.ones(shape)) for shape in shapes], lambda one: optimizer_step(one, gpu=False))
        assert held(fake) == held(real)
