"""Loading a causal language model and its tokenizer, in full precision or quantised."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hbat_lightning import hub
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError

Quantization = Literal["none", "nf4", "int8"]
DType = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class BaseSpec:
    """Which base model, and how it is held in memory.

    Attributes:
        name: A folder, a hub id or an ``embedded://`` address.
        quantization: ``none``, ``nf4`` (4-bit, double quantisation) or ``int8``.
        dtype: Storage of what is not quantised, and the compute type of what is; ``auto`` is bfloat16 beside quantised
            layers and else the type in the model's files.
        revision: Hub revision.
        attn_implementation: Passed on to transformers; ``None`` lets it choose.
        trust_remote_code: Run code that comes with the model. Off unless the user turns it on.
    """

    name: str
    quantization: Quantization = "none"
    dtype: DType = "auto"
    revision: str | None = None
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    @property
    def torch_dtype(self) -> torch.dtype | str:
        """The dtype to hand to transformers."""
        if self.dtype == "auto":
            return "auto" if self.quantization == "none" else torch.bfloat16
        return cast(torch.dtype, getattr(torch, self.dtype))


@contextlib.contextmanager
def _folder(name: str) -> Iterator[str]:
    if embedded.is_embedded(name):
        with embedded.materialise(name) as folder:
            yield folder
    else:
        yield name


@contextlib.contextmanager
def _loading(spec: BaseSpec, failed: str, *also: type[Exception]) -> Iterator[str]:
    """The folder or hub id to load from; what goes wrong inside ends in a line that says what failed, and why.

    Of errors that may be about something else, as a RuntimeError is where memory runs out, only those named in ``also``.
    """
    _require_present(spec)
    expected: tuple[type[Exception], ...] = (OSError, ValueError, SafetensorError, *also)
    with _folder(spec.name) as folder:
        try:
            yield folder
        except expected as error:
            raise UserError(f"{spec.name}: {failed} ({_first_line(error)}). {_REMEDY}") from error


def load_tokenizer(spec: BaseSpec) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to the base.

    Raises:
        UserError: When there is none to load, with the reason.
    """
    with _loading(spec, "no tokenizer could be loaded") as folder:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    tokenizer.name_or_path = spec.name  # messages name it; a temporary folder would tell nobody anything
    return tokenizer


def _require_present(spec: BaseSpec) -> None:
    """Say at once that a base is nowhere to be had, where transformers would ask again and again."""
    if embedded.is_embedded(spec.name) or Path(spec.name).exists():
        return
    if not hub.is_id(spec.name):
        raise UserError(f"{spec.name}: no such folder. {_REMEDY}")
    host = hub.unreachable()
    if host is not None and try_to_load_from_cache(spec.name, "config.json", revision=spec.revision) is None:
        raise UserError(f"{spec.name}: no such folder, and the hub ({host}) cannot be reached. {_REMEDY}")


def _refuse_pickles(spec: BaseSpec) -> None:
    """Say what to do where a folder holds its weights in no other form; of a hub id, transformers says it."""
    pickles = sorted(path.name for path in Path(spec.name).glob("*.bin"))
    if pickles and not any(Path(spec.name).glob("*.safetensors")):
        raise UserError(
            f"{spec.name} holds its weights as a pickle ({pickles[0]}), which can run code when it is loaded, so it is "
            "refused: give a model in safetensors, or convert this one where you trust it (load it in transformers and "
            "save_pretrained)"
        )


def load_config(spec: BaseSpec) -> PretrainedConfig:
    """Load the base's configuration, and nothing else.

    Raises:
        UserError: When there is none to load, with the reason.
    """
    with _loading(spec, "no config.json could be read") as folder:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, revision=spec.revision, trust_remote_code=spec.trust_remote_code
        )
    return config


def load_model(spec: BaseSpec, device: torch.device) -> PreTrainedModel:
    """Load the base; where it was to be quantised, see to it that it is.

    Args:
        spec: What to load.
        device: Where quantised weights go (others follow the caller's device later).

    Raises:
        UserError: When the model cannot be loaded, or a quantised one has linear layers in full precision.
    """
    _refuse_pickles(spec)
    arguments: dict[str, Any] = {"dtype": spec.torch_dtype, "use_safetensors": True}
    if spec.quantization != "none":
        arguments |= {"quantization_config": quantization_config(spec), "device_map": {"": device}}
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    with _loading(spec, "the model could not be loaded") as folder:
        model = AutoModelForCausalLM.from_pretrained(
            folder, revision=spec.revision, trust_remote_code=spec.trust_remote_code, **arguments
        )
    # A temporary folder must not stand in a saved config; a later load would look for it.
    model.config._name_or_path = model.name_or_path = spec.name
    if spec.quantization != "none":
        require_quantised(model, spec)
        keep_differentiable(model)
        _let_go_of_files(model)
    return cast(PreTrainedModel, model)


def load_classifier(spec: BaseSpec, tokenizer: PreTrainedTokenizerBase, new_output: bool = False) -> PreTrainedModel:
    """Load a sequence classifier with a single output.

    Args:
        spec: What to load; not quantised.
        tokenizer: Its tokenizer. Where the model names no pad token, it is the tokenizer's, or else eos.
        new_output: Whether the files may be without an output layer, which then is a random one.

    Raises:
        UserError: When it cannot be loaded, or it has another number of outputs, or none.
    """
    _refuse_pickles(spec)
    arguments: dict[str, Any] = {"use_safetensors": True} | ({"num_labels": 1} if new_output else {})
    if spec.attn_implementation is not None:
        arguments["attn_implementation"] = spec.attn_implementation
    with _loading(spec, "no sequence classifier could be loaded", RuntimeError) as folder:
        model, found = AutoModelForSequenceClassification.from_pretrained(
            folder,
            revision=spec.revision,
            trust_remote_code=spec.trust_remote_code,
            dtype=spec.torch_dtype,
            output_loading_info=True,
            **arguments,
        )
    if model.config.num_labels != 1:
        raise UserError(f"{spec.name} has {model.config.num_labels} outputs; a reward model has one")
    if found["missing_keys"] and not new_output:
        missing = sorted(found["missing_keys"])[0]
        raise UserError(
            f"{spec.name} has no output layer of a classifier ({missing} is missing): give a trained reward model"
        )
    model.config._name_or_path = model.name_or_path = spec.name
    text = model.config.get_text_config()
    if text.pad_token_id is None:
        text.pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return cast(PreTrainedModel, model)


def require_quantised(model: nn.Module, spec: BaseSpec) -> int:
    """Count the quantised linear layers, and refuse a model that has others outside its output layer.

    Returns:
        How many layers are quantised.

    Raises:
        UserError: When a linear layer is not.
    """
    import bitsandbytes as bnb

    wanted = bnb.nn.Linear4bit if spec.quantization == "nf4" else bnb.nn.Linear8bitLt
    output = cast(Any, model).get_output_embeddings()
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    plain = [name for name, layer in linear.items() if not isinstance(layer, wanted) and layer is not output]
    count = sum(isinstance(layer, wanted) for layer in linear.values())
    if plain or not count:
        raise UserError(
            f"{spec.name}: {spec.quantization} was asked for, but {len(plain)} linear layers are in full precision "
            f"({', '.join(plain[:3]) or 'none is quantised'}). Set quantization to none, or use a model whose layers "
            "bitsandbytes can quantise"
        )
    return count


def _let_go_of_files(model: nn.Module) -> None:
    """Copy what stayed in full precision on the CPU: it is a view of the mapped files.

    A single norm would keep the file of its whole layer mapped, and all of the base's pages with it, although their
    weights have been packed into four or eight bits elsewhere.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def full_precision_parts(model: nn.Module) -> dict[str, tuple[torch.dtype, int]]:
    """What of a quantised base stays in full precision.

    Returns:
        Type and size in bytes, by the name of the layer (or its bias), with ``*`` for the numbers of those that are alike.
    """
    parts: dict[str, tuple[torch.dtype, int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():  # packed 4-bit and 8-bit weights are integers
            layer = re.sub(r"\.\d+\.", ".*.", name.removesuffix(".weight"))
            size = parts.get(layer, (parameter.dtype, 0))[1] + parameter.numel() * parameter.element_size()
            parts[layer] = (parameter.dtype, size)
    return parts


def keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights on a CPU.

    On CPUs with AVX512-BF16 it does so at the first pass in evaluation mode, for a kernel that has no backward pass:
    every gradient after the first validation would silently lack what flows through quantised layers.
    """
    import bitsandbytes as bnb

    for layer in model.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False


_WORDS = 4096  # that are added up together: 32 KiB


def fingerprint(model: nn.Module) -> str:
    """A digest of names, shapes and values of every parameter: tells one base from another, wherever a value differs.

    Quantised weights enter by their packed bytes, so the same base in 4 and in 16 bits differ.

    Returns:
        Two digests, one behind the other: of the first values as they are, and of sums over all of them.
    """
    heads, sums = hashlib.blake2b(digest_size=12), hashlib.blake2b(digest_size=8)
    for name, parameter in model.named_parameters():
        values = parameter.detach().contiguous().flatten()
        heads.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} ".encode())
        heads.update(_bytes(values[:64]))
        for part in _sums(values.view(torch.uint8)):
            sums.update(_bytes(part))
    return heads.hexdigest() + sums.hexdigest()


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, by what both tell: version 0.1.0 noted the first digest alone."""
    told = min(len(one), len(other))
    return told > 0 and one[:told] == other[:told]


def _sums(data: Tensor) -> Iterator[Tensor]:
    """Sums of stretches of bytes, ``(B,)``, as whole numbers: quick where the bytes are, and the same on any device.

    Any one value that changes, and values that move to another stretch, change a sum.
    """
    words = data[: data.numel() // 8 * 8]
    if words.storage_offset() % 8:
        words = words.clone()
    words = words.view(torch.int64)
    whole = words.numel() // _WORDS * _WORDS
    yield words[:whole].view(-1, _WORDS).sum(1)
    yield words[whole:].sum().view(1)
    yield data[words.numel() * 8 :]


def _bytes(values: Tensor) -> bytes:
    return values.to("cpu").contiguous().view(torch.uint8).numpy().tobytes()


_REMEDY = "Check model.init_args.policy.init_args.model_name_or_path: a folder with config.json, or a hub id"


def quantization_config(spec: BaseSpec) -> BitsAndBytesConfig:
    """How bitsandbytes is to quantise: NF4 with double quantisation, or int8."""
    if spec.quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=spec.torch_dtype,
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
