"""From a trained policy to a plain model: the adapter's update added into the base weights, and what that changes.

Two bases can take the update. The *original* one is what the model's files hold. A *dequantised* one has the values that a
quantised base really had in training, the ones that the adapter was trained against. The sums are made in fp32 and rounded
once, to the type that is written; a layer at a time, in place, so that there never is a second copy of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hbat_lightning.adapters import TRAINED
from hbat_lightning.base_model import BaseSpec
from hbat_lightning.errors import UserError
from hbat_lightning.policy import Policy


@dataclass(frozen=True)
class LogitDifference:
    """How far one model's logits are from another's.

    Attributes:
        largest: Largest absolute difference of a logit.
        mean: Mean absolute difference over all positions and the whole vocabulary.
        agreeing: At how many positions both have the same most likely token.
        positions: At how many positions they were compared.
        prompts: In how many prompts.
    """

    largest: float
    mean: float
    agreeing: int
    positions: int
    prompts: int

    def __str__(self) -> str:
        """A phrase for people."""
        return (
            f"largest {self.largest:.3g}, mean {self.mean:.3g}, over {self.positions:,} positions of {self.prompts} "
            f"held-out prompts; the most likely token is the same at {self.agreeing:,} of them"
        )


@torch.no_grad()
def prompt_logits(model: nn.Module, prompts: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Logits at every position of some prompts, each run by itself, so that no padding has a part in them.

    Args:
        model: A causal language model of transformers, or a PEFT model around one, in evaluation mode.
        prompts: Token ids.
        device: Where the model is.

    Returns:
        Per prompt ``(T, V)``, on the CPU and in the type that the model computes them in.
    """
    logits = []
    for ids in tqdm(prompts, desc="logits", unit="prompt", leave=False, disable=None):
        inputs = torch.tensor([ids], device=device)
        out = model(input_ids=inputs, attention_mask=torch.ones_like(inputs), use_cache=False)
        logits.append(out.logits[0].cpu())
    return logits


def compare(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> LogitDifference:
    """Compare the logits of two models on the same prompts.

    Args:
        ours: Per prompt ``(T, V)``, at least one.
        theirs: The same of the other model.
    """
    largest, total, count, agreeing, positions = 0.0, 0.0, 0, 0, 0
    for one, other in zip(ours, theirs, strict=True):
        difference = (one.float() - other.float()).abs()
        largest = max(largest, float(difference.max()))
        total += float(difference.double().sum())
        count += difference.numel()
        agreeing += int((one.argmax(-1) == other.argmax(-1)).sum())
        positions += len(one)
    return LogitDifference(largest, total / count, agreeing, positions, len(ours))


# ---- the base that takes the update -----------------------------------------------------------------------------------


def spec_of_files(spec: BaseSpec) -> BaseSpec:
    """The same base as its files hold it."""
    return replace(spec, quantization="none", dtype="auto")


def transplant(trained: dict[str, Tensor], policy: Policy, device: torch.device) -> None:
    """Build a policy and give it another one's adapter.

    Args:
        trained: The :meth:`Policy.trained_parameters` of the other one.
        policy: A policy that has not been built yet, with the same adapter settings.
        device: Where it goes.

    Raises:
        UserError: When the adapter has no place on this base.
    """
    policy.build(device)
    differing = sorted(policy.trained_parameters().keys() ^ trained.keys())
    if differing:
        raise UserError(
            f"{policy.spec.name}: the adapter has no place on the base in its files: {differing[0]} differs"
        )
    policy.model.load_state_dict(trained, strict=False)  # type: ignore[union-attr]
    policy.to(device).eval()


def dequantise(policy: Policy) -> None:
    """Turn the quantised layers of a policy into plain ones with the values that they really had, in place.

    In 4 bits these are the weights of its forward pass to the last bit. In 8 bits that pass rounds its inputs, too, which
    no weights can reproduce.

    Raises:
        UserError: When the architecture stores its layers the other way round (GPT-2).
    """
    model = _base_of(policy)
    if policy.spec.quantization == "none":
        return
    if any(isinstance(layer, nn.Linear) and _was_transposed(layer) for layer in model.modules()):
        raise UserError(
            f"{policy.spec.name}: its layers are Conv1D, which quantisation has transposed for good; give --base original"
        )
    model.dequantize()  # of transformers: by bitsandbytes' own dequantize_4bit, or int8_vectorwise_dequant


def _was_transposed(layer: nn.Linear) -> bool:
    """Transformers leaves the class that a quantised layer took the place of."""
    return issubclass(vars(layer).get("source_cls", nn.Linear), Conv1D)


def _base_of(policy: Policy) -> PreTrainedModel:
    model: Any = policy.model
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@torch.no_grad()
def merge(policy: Policy, dtype: torch.dtype | None = None) -> PreTrainedModel:
    r"""Add the adapter into the weights below it, :math:`W + \frac{\alpha}{r} B A`, and take it off.

    Args:
        policy: A built policy without quantised layers. It is used up.
        dtype: Type of all weights afterwards; each keeps its own when not given.

    Returns:
        A plain model of transformers; of a full fine-tune its own, in that type.

    Raises:
        UserError: When a sum does not fit into the type.
    """
    model = _base_of(policy)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in tqdm(layers.items(), desc="merging", unit="layer", leave=False, disable=None):
        base = layer.get_base_layer()
        weight = base.weight
        merged = weight.float() + cast(Any, layer).get_delta_weight(TRAINED).float()
        # A parameter of its own: where the output layer shares its weight with the embedding, only one of them was adapted.
        base.weight = nn.Parameter(merged.to(dtype or weight.dtype), requires_grad=False)
        if not bool(torch.isfinite(base.weight).all()):
            raise UserError(
                f"{name}: a merged weight does not fit into {base.weight.dtype}; give --dtype bfloat16 or float32"
            )
    if isinstance(policy.model, PeftModel):
        policy.model.unload()
        _say_what_is_tied(model)
    if dtype is not None:
        # Parameters only: a cast of the whole model would also round the frequencies of rotary embeddings.
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


def _say_what_is_tied(model: PreTrainedModel) -> None:
    """Have the configuration say so where output layer and embedding have become two."""
    output, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if output is not None and output.weight is not embedding.weight:
        model.config.tie_word_embeddings = False
