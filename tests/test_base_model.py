"""Loading a base: what was asked for, or nothing."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from hbat_lightning import Policy, base_model
from hbat_lightning.base_model import BaseSpec, fingerprint, load_model, load_tokenizer, same_weights
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize(("quantization", "kind"), [("nf4", bnb.nn.Linear4bit), ("int8", bnb.nn.Linear8bitLt)])
def test_all_linear_layers_but_the_output_are_quantised(quantization: Any, kind: type) -> None:
    model = load_model(BaseSpec(embedded.TINY_LLAMA, quantization), CPU)
    output = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(linear) == 2 * 7 + 1
    assert all(isinstance(module, kind) == (module is not output) for module in linear)
    plain = AutoModelForCausalLM.from_pretrained
    with embedded.materialise(embedded.TINY_LLAMA) as folder:
        names = {name for name, module in plain(folder).named_modules() if isinstance(module, nn.Linear)}
    assert {name for name, module in model.named_modules() if isinstance(module, kind)} == names - {"lm_head"}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_what_stays_in_full_precision_is_named_at_the_start(quantization: Any) -> None:
    policy = Policy(embedded.TINY_LLAMA, quantization=quantization)
    policy.build(CPU)
    with embedded.materialise(embedded.TINY_LLAMA) as folder:
        plain = AutoModelForCausalLM.from_pretrained(folder)
    vocabulary, hidden = plain.lm_head.weight.shape
    mebibytes = vocabulary * hidden * 2 / 2**20
    norms = 2 * 2 * hidden * 2 / 2**20 / 2  # bf16; two layers, one norm of each name
    assert policy.describe()[1] == f"policy: 14 linear layers are {quantization}"
    assert policy.describe()[2] == (
        f"policy: kept in full precision: model.embed_tokens (bfloat16, {mebibytes:.1f} MiB), "
        f"model.layers.*.input_layernorm (bfloat16, {norms:.1f} MiB), "
        f"model.layers.*.post_attention_layernorm (bfloat16, {norms:.1f} MiB), model.norm (bfloat16, {norms / 2:.1f} MiB), "
        f"lm_head (bfloat16, {mebibytes:.1f} MiB)"
    )
    unquantised = Policy(embedded.TINY_LLAMA)
    unquantised.build(CPU)
    assert len(unquantised.describe()) == 1


def test_nf4_is_four_bits_with_double_quantisation() -> None:
    model = load_model(BaseSpec(embedded.TINY_LLAMA, "nf4"), CPU)
    layer = next(module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit))
    assert layer.weight.dtype == torch.uint8
    assert layer.weight.numel() * 2 == layer.in_features * layer.out_features
    assert layer.weight.quant_state.quant_type == "nf4"
    assert layer.weight.quant_state.nested
    assert layer.compute_dtype == torch.bfloat16


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_layer_that_stayed_in_full_precision_is_refused(quantization: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"load_in_4bit": True} if quantization == "nf4" else {"load_in_8bit": True}
    config = BitsAndBytesConfig(**settings, llm_int8_skip_modules=["lm_head", "v_proj"])
    monkeypatch.setattr(base_model, "quantization_config", lambda spec: config)
    message = (
        f"{quantization} was asked for, but 2 linear layers are in full precision (model.layers.0.self_attn.v_proj"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_model(BaseSpec(embedded.TINY_LLAMA, quantization), CPU)


def test_a_model_without_any_quantised_layer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = load_model(BaseSpec(embedded.TINY_LLAMA), CPU)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: plain)
    with pytest.raises(UserError, match="nf4 was asked for, but 14 linear layers are in full precision"):
        load_model(BaseSpec(embedded.TINY_LLAMA, "nf4"), CPU)


@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        (BaseSpec(embedded.TINY_LLAMA), torch.float32),
        (BaseSpec(embedded.TINY_LLAMA, dtype="bfloat16"), torch.bfloat16),
        (BaseSpec(embedded.TINY_LLAMA, "nf4"), torch.bfloat16),
        (BaseSpec(embedded.TINY_LLAMA, "nf4", "float32"), torch.float32),
    ],
)
def test_storage_types_are_those_asked_for(spec: BaseSpec, dtype: torch.dtype) -> None:
    assert load_model(spec, CPU).get_input_embeddings().weight.dtype == dtype


def test_a_full_fine_tune_is_in_fp32_whatever_the_files_are(tmp_path: Path, base_folder: str) -> None:
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert load_model(BaseSpec(str(tmp_path)), CPU).dtype == torch.bfloat16
    policy = Policy(str(tmp_path), lora=None)
    policy.build(CPU)
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_fingerprint_tells_bases_apart_and_folders_not(base_folder: str) -> None:
    first = fingerprint(load_model(BaseSpec(embedded.TINY_LLAMA), CPU))
    assert fingerprint(load_model(BaseSpec(base_folder), CPU)) == first
    assert fingerprint(load_model(BaseSpec(embedded.TINY_LLAMA, "nf4"), CPU)) != first
    assert fingerprint(load_model(BaseSpec(embedded.TINY_LLAMA, dtype="bfloat16"), CPU)) != first


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("shape", [(3,), (1,), (70,), (200, 300), (2, 4096)])
def test_a_fingerprint_changes_with_every_single_value(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The first, the last and those in between, each by its last bit."""
    values = torch.arange(1, 1 + math.prod(shape)).remainder(100).to(dtype)
    module = nn.Module()
    module.weight = nn.Parameter(values.clone().view(shape), requires_grad=False)
    first = fingerprint(module)
    places = sorted({0, *range(values.numel())[-9:], *range(0, values.numel(), 997)})
    for place in places:
        changed = values.clone()
        changed.view(torch.uint8)[place * dtype.itemsize] ^= 1
        module.weight.data = changed.view(shape)
        assert not same_weights(first, fingerprint(module)), place
    module.weight.data = torch.cat([values[:1], values])[1:].view(shape)  # the same numbers somewhere else in memory
    assert fingerprint(module) == first


def test_rows_that_change_places_make_another_fingerprint() -> None:
    module = nn.Module()
    module.weight = nn.Parameter(torch.arange(40_000.0).view(4, 10_000))
    first = fingerprint(module)
    module.weight.data = module.weight.data[[0, 2, 1, 3]]
    assert not same_weights(first, fingerprint(module))


def test_a_fingerprint_of_an_earlier_version_still_serves(base_folder: str) -> None:
    """It was the digest of the first values alone."""
    now = fingerprint(load_model(BaseSpec(base_folder), CPU))
    assert len(now) == 40
    assert same_weights(now[:24], now)
    assert same_weights(now, now[:24])
    assert not same_weights(now[:23] + "-", now)
    assert not same_weights("", now)


@pytest.mark.parametrize("load", [load_tokenizer, lambda spec: load_model(spec, CPU)])
def test_what_is_not_there_ends_in_one_line_that_says_where_to_look(load: Any, tmp_path: Path) -> None:
    for name in (str(tmp_path), "no-such-org/no-such-model"):
        with pytest.raises(UserError, match=r"model_name_or_path: a folder with config\.json, or a hub id") as caught:
            load(BaseSpec(name))
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="mapped files are listed on Linux only")
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_base_lets_go_of_its_files(quantization: Any, base_folder: str, tmp_path: Path) -> None:
    shutil.copytree(base_folder, tmp_path / "halves")
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "halves")
    model = load_model(BaseSpec(str(tmp_path / "halves"), quantization), CPU)
    assert "halves/model.safetensors" not in Path("/proc/self/maps").read_text()
    assert model.lm_head.weight.dtype == torch.bfloat16  # as in the file, so that it could have stayed a view of it
