"""The embedded default: a model and data that the package makes itself, so that it can be tried without any download.

Data lie at `embedded://conflict/…` (see `conflict_task` for what they are), the model at `embedded://tiny-llama`. Both
are the same on every call, in every process. Rows are made in memory; the model is written to a temporary folder, from
which the usual `from_pretrained` loads it like any other.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hbat_lightning.data import conflict_task
from hbat_lightning.errors import UserError

SCHEME = "embedded://"
INSTRUCTION = f"{SCHEME}conflict/instruction"
INSTRUCTION_VALIDATION = f"{SCHEME}conflict/instruction-validation"
PREFERENCE = f"{SCHEME}conflict/preference"
PREFERENCE_VALIDATION = f"{SCHEME}conflict/preference-validation"
FEEDBACK = f"{SCHEME}conflict/feedback"
FEEDBACK_VALIDATION = f"{SCHEME}conflict/feedback-validation"
TINY_LLAMA = f"{SCHEME}tiny-llama"

_ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    INSTRUCTION: lambda: conflict_task.instruction_rows()[0],
    INSTRUCTION_VALIDATION: lambda: conflict_task.instruction_rows()[1],
    PREFERENCE: lambda: conflict_task.preference_rows()[0],
    PREFERENCE_VALIDATION: lambda: conflict_task.preference_rows()[1],
    FEEDBACK: lambda: conflict_task.feedback_rows()[0],
    FEEDBACK_VALIDATION: lambda: conflict_task.feedback_rows()[1],
}
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
# The text of a prompt as it is: what a post asks for stands in it, so turns need no headings.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message.role == 'assistant' %} {{ message.content }}{{ eos_token }}{% else %} {{ message.content }}{% endif %}"
    "{% endfor %}"
)
_SEED = 7
_HIDDEN = 128  # every linear layer's sizes are multiples of 64, the block of 4-bit quantisation
_COPY_STRENGTH = 2.0


def is_embedded(address: str) -> bool:
    """Whether an address asks for something embedded (known or not) rather than for a file, a folder or a hub id."""
    return address.startswith(SCHEME)


def rows(address: str) -> list[dict[str, Any]]:
    """Rows of an embedded data set, fresh on every call.

    Args:
        address: One of the `embedded://conflict/…` addresses.

    Returns:
        `{"prompt", "completion"}` for instruction data, `{"prompt", "chosen", "rejected"}` for preference data, and
        `{"prompt", "completion", "label"}` for feedback.

    Raises:
        UserError: There is no such data set.
    """
    if address not in _ROWS:
        raise _unknown(address, "data", list(_ROWS))
    return [dict(row) for row in _ROWS[address]()]


@contextmanager
def materialise(address: str) -> Iterator[str]:
    """Write an embedded model and its tokenizer to a temporary folder that is removed at exit.

    Args:
        address: `embedded://tiny-llama`.

    Yields:
        The folder, for `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained`.

    Raises:
        UserError: There is no such model.
    """
    if address != TINY_LLAMA:
        raise _unknown(address, "model", [TINY_LLAMA])
    with tempfile.TemporaryDirectory(prefix="hbat-embedded-") as folder:
        tokenizer = _tokenizer()
        tokenizer.save_pretrained(folder)
        with torch.device("cpu"):  # whatever default device the caller works under
            model = _tiny_llama(tokenizer)
        model.config.save_pretrained(folder)
        # Not model.save_pretrained: it shows a progress bar, and what else it writes changes between releases.
        save_file(model.state_dict(), Path(folder, "model.safetensors"), metadata={"format": "pt"})
        yield folder


def _unknown(address: str, kind: str, known: list[str]) -> UserError:
    return UserError(f"{address}: no such embedded {kind}; known are {', '.join(known)}")


def _tokenizer() -> PreTrainedTokenizerFast:
    words = [*_SPECIAL.values(), *conflict_task.vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=_SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bos = _SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, words.index(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, chat_template=_CHAT_TEMPLATE, **_SPECIAL
    )


def _tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A two-layer Llama with random weights, arranged so that a frozen base can be taught by adapters in seconds.

    LoRA can learn the task on a plainly random base too, but needs two to three times the steps, most of them to find
    out how to copy a word from the post into the answer. A pretrained model knows how to copy. Here attention has that
    ability by construction: value and output projection together move what is attended to into the subspace that the
    head reads, and the head's row of a word is that word's embedding after the same move. What to attend to, and all
    the rest, is left to learn.
    """
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_HIDDEN,
        intermediate_size=2 * _HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights of its own from the global state
        model = LlamaForCausalLM(config).float()
    generator = torch.Generator().manual_seed(_SEED)
    identity = torch.eye(_HIDDEN, dtype=torch.float32)
    move = torch.randperm(_HIDDEN, generator=generator)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:  # the rest are the norms' ones
                parameter.copy_(_uniform(parameter.shape, parameter.shape[1] ** -0.5, generator))
        embedding = _uniform(model.model.embed_tokens.weight.shape, 1.0, generator)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding[:, move] * _HIDDEN**-0.5)
        for layer in model.model.layers:
            shuffle = identity[torch.randperm(_HIDDEN, generator=generator)]  # every head carries a part of every word
            layer.self_attn.v_proj.weight.copy_(shuffle)
            layer.self_attn.o_proj.weight.copy_(_COPY_STRENGTH * identity[move] @ shuffle.T)
    return model


def _uniform(shape: torch.Size, std: float, generator: torch.Generator) -> torch.Tensor:
    """Noise of one standard deviation; normal noise would need `log` and `cos`, whose last bit varies by processor."""
    return (torch.rand(shape, generator=generator, dtype=torch.float32) * 2 - 1) * (3**0.5 * std)
