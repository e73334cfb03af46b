"""Generation on tensors without values: the prompt, and the step when the cache is as large as it will be."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from hbat_lightning.generation import GenerationSettings, LogProbRecorder, complete
from hbat_lightning.memory.allocation import AllocationTracker, Category
from hbat_lightning.policy import Policy

Generate = Callable[..., list[list[int]]]


class _EnoughSeenError(Exception):
    """Nothing that follows needs more memory."""


def generation_of(policy: Policy, tracker: AllocationTracker) -> Generate:
    """What takes the place of a policy's ``generate``: the same passes, but only those whose memory counts.

    Memory grows from step to step, by a token's keys and values. So after the prompt the cache leaps to its full length, and
    the last step follows. Of two completions or more every second one is a token short, so that batches are padded.

    Args:
        policy: The policy.
        tracker: Counts.
    """

    def generate(
        input_ids: Tensor,
        attention_mask: Tensor,
        settings: GenerationSettings,
        stop_token_id: int,
        pad_token_id: int,
        recorder: LogProbRecorder | None = None,
    ) -> list[list[int]]:
        count, length = input_ids.shape
        new = settings.max_new_tokens
        with (
            _leaping(cast(nn.Module, policy.model), count, length, new, tracker),
            contextlib.suppress(_EnoughSeenError),
        ):
            stop = max(1, stop_token_id)  # is not known without data
            complete(cast(nn.Module, policy.model), *_prompts(count, length), settings, stop, pad_token_id, recorder)
        tracker.cut()
        completions = [[1] * max(1, new - row % 2) for row in range(count)]
        if recorder is not None:
            recorder.log_probs = [torch.zeros(len(one)) for one in completions]
        return completions

    return generate


def _prompts(count: int, length: int) -> tuple[Tensor, Tensor]:
    """Ids and mask with values, so that what depends on the mask is decided by it; every second one is padded."""
    with unset_fake_temporarily():
        mask = torch.ones(count, length, dtype=torch.long)
        mask[1::2, 0] = 0
        return torch.ones_like(mask), mask


@contextlib.contextmanager
def _leaping(model: nn.Module, count: int, length: int, new: int, tracker: AllocationTracker) -> Iterator[None]:
    """Let the second pass be the last one, and stop before the third."""
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    passes = 0

    def before(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        nonlocal passes
        passes += 1
        if passes > min(2, new):
            raise _EnoughSeenError
        cache: Cache = kwargs["past_key_values"]
        if passes == 1:
            _watch(cache, tracker)
            return args, kwargs
        tracker.cut()
        _lengthen(cache, length + new - 2, tracker)
        return args, kwargs | {"attention_mask": _prompts(count, length + new - 1)[1]}

    handle = inner.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _watch(cache: Cache, tracker: AllocationTracker) -> None:
    """Have what a cache keeps counted as such."""
    itself = weakref.ref(cache)  # a cycle would outlive the generation

    def update(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        with tracker.category(Category.CACHE):
            keys, values = Cache.update(cast(Cache, itself()), *args, **kwargs)
            return keys, values

    cast(Any, cache).update = update


def _lengthen(cache: Cache, length: int, tracker: AllocationTracker) -> None:
    """Let every layer hold as many tokens as there are before the last pass, or as its window lets it."""
    with tracker.category(Category.CACHE):
        for layer in cache.layers:
            if not isinstance(layer, DynamicLayer):  # of a size that does not grow
                continue
            held = length
            if layer.is_sliding:
                held = min(length, cast(Any, layer).sliding_window - 1)
                cast(Any, layer).cumulative_length = length
            for name in ("keys", "values"):
                old = getattr(layer, name)
                setattr(layer, name, old.new_empty(*old.shape[:-2], held, old.shape[-1]))
