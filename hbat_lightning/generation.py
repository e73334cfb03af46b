"""Completing prompts: the settings, and transformers' generation kept to them alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from hbat_lightning.completions import Completed

if TYPE_CHECKING:
    from hbat_lightning.data.sets import PromptBatch


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are sampled.

    Attributes:
        max_new_tokens: Upper bound of a completion's length.
        temperature: 0 is greedy.
        top_p: Nucleus, with a temperature above 0.
        top_k: Candidates per step, with a temperature above 0; 0 is all.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


def decoding(settings: GenerationSettings, stop_token_id: int, pad_token_id: int) -> GenerationConfig:
    """The settings in transformers' terms, but for the bound on the length."""
    sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
    return GenerationConfig(
        do_sample=settings.temperature > 0,
        eos_token_id=stop_token_id,
        pad_token_id=pad_token_id,
        use_cache=True,
        **(sampling if settings.temperature > 0 else {}),
    )


class LogProbRecorder(LogitsProcessor):  # type: ignore[misc]
    """Notes the log-probability of every sampled token, by the very logits that it was drawn from.

    They are the sampler's: of its cached passes over left-padded prompts, in its precision, tempered, and before top-k and
    top-p. Scoring the same text in one pass gives other sums.

    Attributes:
        log_probs: Of every completion, ``(n,)`` fp32 on the CPU; there after :func:`complete`.

    Args:
        temperature: What completions are sampled at.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.log_probs: list[Tensor] = []
        self._steps: list[Tensor] = []
        self._logits: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Transformers calls it before a token is drawn: the one before is known now. Changes nothing.

        Args:
            input_ids: ``(B, T)`` so far.
            scores: ``(B, V)`` logits of the next token.
        """
        if self._logits is not None:
            self._note(input_ids[:, -1])
        self._logits = scores
        return scores

    def finish(self, sampled: Tensor, completions: Sequence[Sequence[int]]) -> None:
        """Note the last token, and cut what was drawn behind stop tokens.

        Args:
            sampled: ``(B, n)`` all that was sampled.
            completions: The same without what follows a stop token.
        """
        self._note(sampled[:, -1])
        rows = torch.stack(self._steps, 1).cpu()
        self.log_probs = [row[: len(own)].clone() for row, own in zip(rows, completions, strict=True)]
        self._steps, self._logits = [], None

    def _note(self, tokens: Tensor) -> None:
        logits = cast(Tensor, self._logits).float() / self.temperature
        own = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        self._steps.append(own - logits.logsumexp(-1))


@torch.no_grad()
def complete(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    settings: GenerationSettings,
    stop_token_id: int,
    pad_token_id: int,
    recorder: LogProbRecorder | None = None,
) -> list[list[int]]:
    """Complete left-padded prompts, in evaluation mode.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        input_ids: ``(B, T)``, padded on the left.
        attention_mask: ``(B, T)``.
        settings: Sampling.
        stop_token_id: Ends a completion.
        pad_token_id: Fills up ended ones.
        recorder: Is to know the log-probabilities of what is sampled.

    Returns:
        B lists of token ids, each with its stop token if it stopped, without padding.
    """
    config = decoding(settings, stop_token_id, pad_token_id)
    config.max_new_tokens = settings.max_new_tokens
    listening = {} if recorder is None else {"logits_processor": LogitsProcessorList([recorder])}
    with _evaluating(model), _plain_generation_config(model):
        out = cast(Any, model).generate(
            input_ids=input_ids, attention_mask=attention_mask, generation_config=config, **listening
        )
    sampled = out[:, input_ids.shape[1] :]
    completions = [_until_stop(ids, stop_token_id) for ids in sampled.tolist()]
    if recorder is not None:
        recorder.finish(sampled, completions)
    return completions


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode: a checkpointed layer in training mode drops the key-value cache and garbles the text."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _plain_generation_config(model: nn.Module) -> Iterator[None]:
    """Keep transformers from filling in what the base's files say, a penalty for example."""
    models: list[Any] = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    before, plain = models[0].generation_config, GenerationConfig()
    for one in models:
        one.generation_config = plain
    try:
        yield
    finally:
        for one in models:
            one.generation_config = before


def _until_stop(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def completed(
    batch: PromptBatch, completions: Sequence[Sequence[int]], tokenizer: Any, stop_token_id: int
) -> list[Completed]:
    """Completions of a batch of prompts, with their texts.

    Args:
        batch: The prompts, with the data's answers.
        completions: What :func:`complete` gave for them.
        tokenizer: The policy's.
        stop_token_id: What ends a completion.
    """
    prompts = [ids[keep].tolist() for ids, keep in zip(batch.input_ids, batch.attention_mask.bool(), strict=True)]
    return [
        Completed(
            prompt=prompt,
            completion=tokenizer.decode(ids, skip_special_tokens=True).strip(),
            reference=reference.strip(),
            tokens=len(ids),
            stopped=bool(ids) and ids[-1] == stop_token_id,
            prompt_ids=prompt_ids,
            completion_ids=list(ids),
        )
        for prompt, reference, prompt_ids, ids in zip(
            batch.prompts, batch.completions, prompts, completions, strict=True
        )
    ]
