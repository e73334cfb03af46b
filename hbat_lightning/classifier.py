"""A sequence classifier with a single output in the place of a language model: a reward model of its own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hbat_lightning.adapters import LoraSettings, refuse_pickled_adapter
from hbat_lightning.base_model import BaseSpec, fingerprint, load_classifier
from hbat_lightning.errors import UserError
from hbat_lightning.model_card import CLASSIFIER, CLASSIFIER_ADAPTER, Weights
from hbat_lightning.policy import Policy

_DEFAULT_LORA = LoraSettings()


class ClassifierPolicy(Policy):
    """Any model that ``AutoModelForSequenceClassification`` loads, with one output; it trains fully or by LoRA, in fp32.

    From the files of a language model, or of another kind of encoder or decoder, transformers makes a classifier with a new
    output layer, which trains as well, whatever the layers of LoRA.

    Args:
        model_name_or_path: A folder, a hub id or an ``embedded://`` address.
        lora: Adapter settings; ``null`` trains every parameter.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant).
        revision: Hub revision.
        attn_implementation: Passed on to transformers.
        trust_remote_code: Run code that comes with the model.
    """

    task = "SEQ_CLS"

    def __init__(
        self,
        model_name_or_path: str,
        lora: LoraSettings | None = _DEFAULT_LORA,
        gradient_checkpointing: bool = False,
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__(
            model_name_or_path,
            lora=lora,
            gradient_checkpointing=gradient_checkpointing,
            dtype="float32",  # the output layer trains, and its input has to be of its type
            revision=revision,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
        )

    @property
    def weights(self) -> Weights:
        """See :attr:`Policy.weights`."""
        return CLASSIFIER if self.lora is None else CLASSIFIER_ADAPTER

    def build(self, device: torch.device) -> None:
        """See :meth:`Policy.build`."""
        if self.built:
            return
        model = load_classifier(self.spec, self.tokenizer, new_output=True)
        self.base_fingerprint = fingerprint(model)
        self.adopt(model)

    def classify(self, inputs: dict[str, Tensor]) -> Tensor:
        """The logit of every row, ``(B,)`` fp32.

        Args:
            inputs: ``input_ids`` and ``attention_mask``, each ``(B, T)``, padded on either side.
        """
        return logits_of(self._model, inputs)


def load_trained_classifier(spec: BaseSpec, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    """Load a classifier that has been trained: a whole one, or the PEFT folder of one, whose base is found by its name.

    Raises:
        UserError: See :func:`~hbat_lightning.base_model.load_classifier`; or the folder is of another kind of model.
    """
    if not Path(spec.name, "adapter_config.json").exists():
        return cast(nn.Module, load_classifier(spec, tokenizer))
    refuse_pickled_adapter(spec.name)
    saved = PeftConfig.from_pretrained(spec.name)
    if saved.task_type != ClassifierPolicy.task:
        raise UserError(
            f"{spec.name} is no adapter of a classifier: AdapterReward takes reward models on the policy's base"
        )
    base = replace(spec, name=cast(str, saved.base_model_name_or_path), revision=saved.revision, dtype="float32")
    return cast(nn.Module, PeftModel.from_pretrained(load_classifier(base, tokenizer, new_output=True), spec.name))


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """What a classifier with one output says of every row of a batch, ``(B,)`` fp32, whatever the padding.

    Decoders find a row's last token by comparing with their pad id, so that is what padding must be.
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    ids = ids.masked_fill(mask == 0, model.config.get_text_config().pad_token_id)
    return cast(Tensor, model(input_ids=ids, attention_mask=mask).logits)[:, 0].float()
