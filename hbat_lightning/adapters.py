"""LoRA adapters through PEFT: attaching one that trains, frozen twins of it, and switching between them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor

from hbat_lightning.errors import UserError
from hbat_lightning.low_rank import add_in_one_product

TRAINED = "default"  # PEFT's own name of the first adapter; an exported folder has no name in its keys


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the linear layers.

    Attributes:
        r: Rank.
        alpha: Scale; the update is ``alpha / r · B A``.
        dropout: Dropout before A, in supervised training only.
        target_modules: ``all-linear`` (all but the output layer), or names of layers.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


def attach_adapter(
    model: Any, lora: LoraSettings, adapter_path: str | None, base_name: str, task: str = "CAUSAL_LM"
) -> PeftModel:
    """Freeze a model and give it an adapter that trains, in fp32.

    Args:
        model: The base.
        lora: Rank, scale, dropout and layers.
        adapter_path: A PEFT folder to take the weights from; new ones when not given.
        base_name: What an exported adapter names as its base.
        task: What PEFT calls the kind of model; of some kinds a new output layer trains as well.

    Raises:
        UserError: When no layer matches, or the folder does not fit.
    """
    model.requires_grad_(False)
    try:
        adapted = get_peft_model(
            model, _config(lora, task), autocast_adapter_dtype=True
        )  # fp32: small steps do not move bf16
    except ValueError as error:
        raise UserError(f"lora.target_modules: {error}") from error
    if adapter_path is not None:
        _load_adapter_weights(adapted, adapter_path, lora)
    adapted.peft_config[TRAINED].base_model_name_or_path = base_name
    add_in_one_product(adapted, TRAINED)
    return cast(PeftModel, adapted)


def put_in_order(config: PeftConfig) -> None:
    """Give the names in a configuration an order: PEFT keeps them in sets, and a file would differ from process to process."""
    for name, value in vars(config).items():
        if isinstance(value, set):
            setattr(config, name, sorted(value))


def add_frozen_twin(adapted: PeftModel, name: str) -> dict[str, Tensor]:
    """Add a frozen adapter with the values that the trained one has now.

    Args:
        adapted: The model with the trained adapter.
        name: Name of the new adapter.

    Returns:
        Its tensors, by the names of the trained ones.
    """
    config = copy.deepcopy(adapted.peft_config[TRAINED])
    config.lora_dropout = 0.0
    trained = [key for key, value in adapted.named_parameters() if value.requires_grad and f".{TRAINED}." in key]
    flags = {key: value.requires_grad for key, value in adapted.named_parameters()}
    adapted.add_adapter(name, config)
    add_in_one_product(adapted, name)
    adapted.set_adapter(TRAINED)
    values = dict(adapted.named_parameters())
    for key, trains in flags.items():
        values[key].requires_grad_(trains)  # PEFT has set the flags anew, also of what the user froze
        if f".{TRAINED}." in key:
            twin = values[key.replace(f".{TRAINED}.", f".{name}.")]
            twin.requires_grad_(False)
            twin.data = values[key].detach().clone()
    return {key: values[key.replace(f".{TRAINED}.", f".{name}.")] for key in trained}


def add_adapter(adapted: PeftModel, name: str, lora: LoraSettings, folder: str | None) -> None:
    """Add an adapter beside the trained one, which stays the active one.

    Args:
        adapted: The model with the trained adapter.
        name: Name of the new adapter.
        lora: Rank, scale, dropout and layers.
        folder: A PEFT folder to take the weights from, which are then frozen; a new one trains.

    Raises:
        UserError: When the folder does not fit.
    """
    flags = {key: value.requires_grad for key, value in adapted.named_parameters()}
    adapted.add_adapter(name, _config(lora))
    add_in_one_product(adapted, name)
    if folder is not None:
        _load_adapter_weights(adapted, folder, lora, name)
    adapted.set_adapter(TRAINED)
    for key, value in adapted.named_parameters():
        value.requires_grad_(flags.get(key, folder is None))  # PEFT has set the flags anew, also of what the user froze


@contextlib.contextmanager
def active_adapters(layers: Sequence[BaseTunerLayer], active: list[str]) -> Iterator[None]:
    """Run with other adapters, by setting PEFT's private field.

    PEFT's own contexts walk all modules and flip ``requires_grad``: thirty times slower, and they undo whatever the
    user froze.
    """
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = active
    try:
        yield
    finally:
        for layer, names in zip(layers, before, strict=True):
            layer._active_adapter = names


def _config(lora: LoraSettings, task: str = "CAUSAL_LM") -> LoraConfig:
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,
    )


def refuse_pickled_adapter(folder: str) -> None:
    """PEFT would load a pickle where it finds no safetensors.

    Raises:
        UserError: The folder holds its weights as a pickle.
    """
    if Path(folder, "adapter_model.bin").exists() and not Path(folder, "adapter_model.safetensors").exists():
        raise UserError(
            f"{folder} holds its weights as a pickle (adapter_model.bin), which can run code when it is loaded, so it is "
            "refused: convert it where you trust it (load it in PEFT and save_pretrained)"
        )


def _load_adapter_weights(model: PeftModel, folder: str, lora: LoraSettings, name: str = TRAINED) -> None:
    refuse_pickled_adapter(folder)
    try:
        saved = PeftConfig.from_pretrained(folder)
        weights = load_peft_weights(folder, device="cpu")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"adapter_path {folder}: not a PEFT folder ({str(error).splitlines()[0]})") from error
    if (saved.r, saved.lora_alpha) != (lora.r, lora.alpha):
        raise UserError(
            f"adapter_path {folder} has r {saved.r}, alpha {saved.lora_alpha}; policy.init_args.lora says r {lora.r}, "
            f"alpha {lora.alpha}. Make them equal"
        )
    try:
        result = set_peft_model_state_dict(model, weights, adapter_name=name)
    except RuntimeError as error:  # sizes
        raise UserError(
            f"adapter_path {folder} was trained on {saved.base_model_name_or_path}, whose layers have other sizes than those "
            "of policy.init_args.model_name_or_path: give the same base"
        ) from error
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{name}." in key]  # not of other adapters
    if missing or result.unexpected_keys:
        raise UserError(
            f"adapter_path {folder} does not fit this base or these target_modules: "
            f"{(missing + list(result.unexpected_keys))[0]}"
        )
