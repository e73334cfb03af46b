"""The base model from its configuration alone: every tensor has its shape, dtype and device, and no values."""

from __future__ import annotations

from typing import Any, cast

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.quantizers import AutoHfQuantizer
from transformers.quantizers.auto import AutoQuantizationConfig

from hbat_lightning.base_model import BaseSpec, keep_differentiable, quantization_config, require_quantised
from hbat_lightning.errors import UserError
from hbat_lightning.memory.allocation import AllocationTracker, Category


def build_base(
    spec: BaseSpec, config: PretrainedConfig, fake: FakeTensorMode, tracker: AllocationTracker
) -> PreTrainedModel:
    """Build the base as loading would, tensor by tensor, and count its bytes.

    Args:
        spec: How it is to be held in memory.
        config: Its configuration.
        fake: The mode that makes tensors without values; not entered.
        tracker: Counts; not entered.

    Raises:
        UserError: transformers cannot build this architecture, or bitsandbytes cannot quantise it.
    """
    dtype = storage_dtype(spec, config)
    arguments = {} if spec.attn_implementation is None else {"attn_implementation": spec.attn_implementation}
    try:
        with fake:
            with no_init_weights():
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, trust_remote_code=spec.trust_remote_code, **arguments
                )
            model.tie_weights()  # is left out with the initialisation
    except (ValueError, ImportError) as error:
        raise UserError(f"{spec.name}: this model cannot be planned ({str(error).splitlines()[0]})") from error
    quantization = quantization_of(spec, config)
    if quantization is not None:
        _quantise(model, spec, quantization, dtype, fake, tracker)
    for buffer in model.buffers():
        cast(Any, buffer).constant = None  # a value that was kept all the same, with which it could not be copied
    tracker.adopt([*model.parameters(), *model.buffers()], Category.BASE)
    return cast(PreTrainedModel, model)


def quantization_of(spec: BaseSpec, config: PretrainedConfig) -> Any:
    """How the base is quantised: as its own files are, else as the settings ask for; ``None`` where neither is.

    Raises:
        UserError: Its files are quantised in a way that is not known here.
    """
    own = getattr(config, "quantization_config", None)
    if own is None:
        return None if spec.quantization == "none" else quantization_config(spec)
    given = own if isinstance(own, dict) else own.to_dict()
    if given.get("quant_method") != "bitsandbytes":
        raise UserError(
            f"{spec.name}: a base quantised by {given.get('quant_method')} cannot be planned; take one in 16 bits, which nf4 "
            "and int8 quantise as they load it"
        )
    return AutoQuantizationConfig.from_dict(given)


def storage_dtype(spec: BaseSpec, config: PretrainedConfig) -> torch.dtype:
    """The dtype of weights that are not quantised; fp32 where neither settings nor configuration name one."""
    wanted = spec.torch_dtype
    if isinstance(wanted, torch.dtype):
        return wanted
    return config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32


def _quantise(
    model: PreTrainedModel,
    spec: BaseSpec,
    how: Any,
    dtype: torch.dtype,
    fake: FakeTensorMode,
    tracker: AllocationTracker,
) -> None:
    """Let transformers replace the layers, and bitsandbytes quantise their weights one after the other."""
    quantizer = AutoHfQuantizer.from_config(how)
    quantizer._process_model_before_weight_loading(model, device_map={"": "cpu"})
    quantizer._process_model_after_weight_loading(model)
    make = _four_bits if how.load_in_4bit else _eight_bits
    bnb.functional.quantize_blockwise(torch.ones(256))  # its table is kept for the process, and must have values
    with fake, tracker, torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt):
                if layer.bias is not None:
                    layer.bias = nn.Parameter(torch.empty(layer.out_features, dtype=dtype), requires_grad=False)
                with tracker.category(Category.BASE):
                    weight = torch.empty(layer.out_features, layer.in_features, dtype=dtype)
                    layer.weight, constants = make(weight, layer.weight)
                    del weight
                tracker.assign(constants, Category.CONSTANTS)
    if spec.quantization != "none":
        require_quantised(model, spec)
    keep_differentiable(model)


def _four_bits(weight: Tensor, meta: Any) -> tuple[nn.Parameter, list[Tensor]]:
    """A weight as bitsandbytes packs it, in a plain parameter: its own class is not made for tensors without values."""
    packed, state = bnb.functional.quantize_4bit(
        weight, blocksize=meta.blocksize, compress_statistics=meta.compress_statistics, quant_type=meta.quant_type
    )
    made: Any = nn.Parameter(packed, requires_grad=False)
    made.quant_state, made.compress_statistics, made.quant_type = state, meta.compress_statistics, meta.quant_type
    nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
    return made, [state.absmax, state.code, *nested]


def _eight_bits(weight: Tensor, meta: Any) -> tuple[nn.Parameter, list[Tensor]]:
    """The same in 8 bits, with a scale per row."""
    made: Any = nn.Parameter(torch.empty_like(weight, dtype=torch.int8), requires_grad=False)
    made.CB, made.SCB = made.data, torch.empty(len(weight), dtype=torch.float32)
    made.has_fp16_weights = False
    return made, [made.SCB]
