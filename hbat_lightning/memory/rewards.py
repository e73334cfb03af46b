"""Rewards from their settings alone: as many bytes and passes as the real ones, and no files read but a config.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import singledispatch
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForSequenceClassification
from transformers.initialization import no_init_weights

from hbat_lightning.base_model import BaseSpec, load_config
from hbat_lightning.classifier import logits_of
from hbat_lightning.data.rollouts import Rollout
from hbat_lightning.errors import UserError
from hbat_lightning.memory.architecture import storage_dtype
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import AdapterReward, ClassifierReward, FunctionReward, Reward
from hbat_lightning.scalars import ScalarAdapter


@singledispatch
def planned(reward: Reward) -> Reward:
    """What stands for a reward in a plan.

    Raises:
        UserError: It is of a kind that is not known here.
    """
    raise UserError(
        f"{type(reward).__name__} is a reward of your own, whose memory cannot be planned: plan with FunctionReward in its "
        "place, and add what it takes"
    )


class _Rule(Reward):
    """Costs no tensors worth counting."""

    def score(self, policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
        """See :meth:`Reward.score`."""
        return torch.zeros(len(rollouts))


class _Adapter(AdapterReward):
    """An adapter of the configured size, frozen, without its file."""

    def __init__(self, reward: AdapterReward) -> None:
        super().__init__(reward.path, reward.scalar.lora)
        self.scalar = ScalarAdapter("reward", reward.scalar.lora)

    def build(self, policy: Policy, device: torch.device) -> None:
        """See :meth:`Reward.build`."""
        self.scalar.build(policy, device)
        for parameter in self.scalar.parameters_of(policy):
            parameter.requires_grad_(False)


class _Classifier(ClassifierReward):
    """A classifier of its configuration. Its texts are as long as the policy's, in tokens of either."""

    def build(self, policy: Policy, device: torch.device) -> None:
        """See :meth:`Reward.build`."""
        if not self._built:
            self._built.append(_classifier(self.spec).eval().requires_grad_(False))

    def score(self, policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
        """See :meth:`Reward.score`."""
        longest = max(len(one.prompt) + len(one.completion) for one in rollouts)
        with unset_fake_temporarily():
            mask = torch.ones(len(rollouts), min(self.max_length, longest), dtype=torch.long)
            mask[1::2, 0] = 0
            inputs = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
        return logits_of(self._built[0], inputs).cpu()


@planned.register
def _(reward: FunctionReward) -> Reward:
    return _Rule()


@planned.register
def _(reward: AdapterReward) -> Reward:
    return _Adapter(reward)


@planned.register
def _(reward: ClassifierReward) -> Reward:
    spec = reward.spec
    return _Classifier(spec.name, spec.dtype, reward.max_length, spec.revision, reward.policy_tokens)


def own_weights(reward: Reward) -> list[Tensor]:
    """Tensors of a model of its own, once it is built."""
    models = reward._built if isinstance(reward, ClassifierReward) else []
    return [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]


def _classifier(spec: BaseSpec) -> nn.Module:
    """The model that :func:`~hbat_lightning.classifier.load_trained_classifier` loads."""
    if not Path(spec.name, "adapter_config.json").exists():
        return _from_config(spec)
    saved = PeftConfig.from_pretrained(spec.name)
    base = replace(spec, name=cast(str, saved.base_model_name_or_path), revision=saved.revision, dtype="float32")
    saved.inference_mode = True
    return cast(nn.Module, get_peft_model(cast(Any, _from_config(base)), saved))


def _from_config(spec: BaseSpec) -> nn.Module:
    with unset_fake_temporarily():
        config: Any = load_config(spec)
    config.num_labels = 1
    text = config.get_text_config()
    text.pad_token_id = 0 if text.pad_token_id is None else text.pad_token_id
    with no_init_weights():
        return cast(
            nn.Module, AutoModelForSequenceClassification.from_config(config, dtype=storage_dtype(spec, config))
        )
