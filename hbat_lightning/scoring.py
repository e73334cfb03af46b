"""Log-probabilities of supervised tokens, with only those positions projected onto the vocabulary."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn

from hbat_lightning.functional import selected_log_probs

IGNORE = -100


@dataclass(frozen=True)
class TokenScores:
    """What the policy says of the supervised tokens of a batch.

    Attributes:
        log_probs: ``(N,)`` fp32, one per supervised token, row by row.
        row: ``(N,)`` the row of the batch each belongs to.
        correct: ``(N,)`` whether the token is the most likely one; only where it was asked for.
        rows: Rows of the batch, B.
    """

    log_probs: Tensor
    row: Tensor
    correct: Tensor | None
    rows: int

    def row_sums(self, values: Tensor | None = None) -> Tensor:
        """Sum per row: ``(N,)`` -> ``(B,)``. Of the log-probabilities unless other values are given."""
        values = self.log_probs if values is None else values
        return values.new_zeros(self.rows).index_add(0, self.row, values)


Scorer = Callable[[dict[str, Tensor]], TokenScores]
"""Scores a batch: the policy, or something that stands for one."""


def score_tokens(
    model: nn.Module, inputs: dict[str, Tensor], takes_positions: bool, with_correct: bool = False
) -> TokenScores:
    """Score the supervised tokens of a batch.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        inputs: ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)``, padded on either side.
        takes_positions: Whether the model's forward pass has ``position_ids``.
        with_correct: Also say for each token whether it is the most likely one.
    """
    labels, mask = inputs["labels"], inputs["attention_mask"]
    targets = labels[:, 1:]
    row, column = (targets != IGNORE).nonzero(as_tuple=True)
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": mask, "use_cache": False}
    if takes_positions:
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    with _only_rows(_output_layer(model), row * labels.shape[1] + column):
        logits = model(**arguments).logits[0]
    chosen = targets[row, column]
    correct = logits.argmax(-1) == chosen if with_correct else None
    return TokenScores(selected_log_probs(logits, chosen), row, correct, labels.shape[0])


def _output_layer(model: nn.Module) -> nn.Module:
    return cast(nn.Module, cast(Any, model).get_output_embeddings())


@contextlib.contextmanager
def _only_rows(output_layer: nn.Module, index: Tensor) -> Iterator[None]:
    """Let only some positions through to the vocabulary.

    The hook replaces the output layer's input ``(B, T, H)`` by ``(1, N, H)``. So every model's own treatment of its
    logits (soft-capping, scaling) still applies, and no tensor of size B·T·V is ever made.

    Args:
        output_layer: The model's output embeddings.
        index: ``(N,)`` positions in ``B·T``.
    """

    def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[index].unsqueeze(0), *args[1:])

    handle = output_layer.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()
