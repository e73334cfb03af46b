"""Log-probabilities of supervised tokens, with only those positions projected onto the vocabulary."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hbat_lightning.functional import (
    linear_log_probs,
    rows_per_chunk,
    sampling_entropy,
    selected_log_probs,
    truncation_log_mass,
)
from hbat_lightning.generation import GenerationSettings

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


class CausalScorer:
    """Scores batches under a causal language model; no logits of a whole batch are ever made.

    Only supervised positions go through the output layer, some rows at a time, and their logits are not kept for the
    backward pass (:func:`~hbat_lightning.functional.linear_log_probs`). A model that changes its logits behind the
    output layer (soft-capping, scaling) has to do so itself: there all supervised rows are projected at once.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._head = cast(nn.Module, cast(Any, model).get_output_embeddings())
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self._takes_positions = "position_ids" in inspect.signature(cast(nn.Module, inner).forward).parameters
        self._changes_logits: bool | None = None

    def __call__(self, inputs: dict[str, Tensor], with_correct: bool = False, temperature: float = 1.0) -> TokenScores:
        """Score the supervised tokens of a batch.

        Args:
            inputs: ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)``, padded on either side.
            with_correct: Also say for each token whether it is the most likely one.
            temperature: What the logits are divided by.
        """
        labels = inputs["labels"]
        row, column = predicting(labels)
        targets = labels[:, 1:][row, column]
        if self.changes_logits:
            with self._only_rows(row * labels.shape[1] + column, keep=len(row)):
                logits = self._run(self._arguments(inputs))[0] / temperature
            correct = logits.argmax(-1) == targets if with_correct else None
            return TokenScores(selected_log_probs(logits, targets), row, correct, labels.shape[0])
        log_probs, correct = self._project(self.hidden(inputs, row, column), targets, with_correct, temperature)
        return TokenScores(log_probs, row, correct, labels.shape[0])

    @torch.no_grad()
    def truncation_log_mass(self, inputs: dict[str, Tensor], settings: GenerationSettings) -> Tensor:
        """What top-k and top-p leave to sample from at each supervised token.

        Args:
            inputs: As for a call.
            settings: How completions were sampled.

        Returns:
            ``(N,)``, the logarithm of the share; 0 where nothing is cut off.
        """
        if settings.top_k == 0 and settings.top_p == 1:
            row, _ = predicting(inputs["labels"])
            return torch.zeros(len(row), device=row.device)
        return self._of_logits(inputs, truncation_log_mass, settings)

    @torch.no_grad()
    def entropy(self, inputs: dict[str, Tensor], settings: GenerationSettings) -> Tensor:
        """Entropy of what each supervised token was sampled from, ``(N,)`` in nats.

        Args:
            inputs: As for a call.
            settings: How completions were sampled.
        """
        return self._of_logits(inputs, sampling_entropy, settings)

    def _of_logits(
        self, inputs: dict[str, Tensor], figure: Callable[..., Tensor], settings: GenerationSettings
    ) -> Tensor:
        """``(N,)``: a figure of the logits ``(N, V)`` at the supervised tokens and of the settings, some rows at a time."""
        row, column = predicting(inputs["labels"])
        cut = (settings.temperature, settings.top_k, settings.top_p)
        if self.changes_logits:
            with self._only_rows(row * inputs["labels"].shape[1] + column, keep=len(row)):
                return figure(self._run(self._arguments(inputs))[0], *cut)
        hidden = self._split(self.hidden(inputs, row, column))
        return torch.cat([figure(self._head(rows), *cut) for rows in hidden])

    def hidden(self, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        """What the output layer sees at some positions.

        Args:
            inputs: ``input_ids`` and ``attention_mask``, each ``(B, T)``, padded on either side.
            row: ``(N,)`` rows of the positions.
            column: ``(N,)`` their columns.

        Returns:
            ``(N, H)``.
        """
        with self._only_rows(row * inputs["input_ids"].shape[1] + column, keep=0) as hidden:
            self._run(self._arguments(inputs))
        return hidden[0]

    def _arguments(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        if self._takes_positions:
            arguments["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        return arguments

    def _run(self, arguments: dict[str, Tensor]) -> Tensor:
        logits: Tensor = self._model(**arguments, use_cache=False).logits
        return logits

    # ---- from hidden states to log-probabilities ------------------------------------------------------------------

    def _project(
        self, hidden: Tensor, targets: Tensor, with_correct: bool, temperature: float
    ) -> tuple[Tensor, Tensor | None]:
        """``(N, H)`` and ``(N,)`` -> ``(N,)`` log-probabilities, and whether each target is the most likely token."""
        correct = None
        if with_correct:
            with torch.no_grad():
                parts = [self._head(rows).argmax(-1) for rows in self._split(hidden)]
                correct = torch.cat(parts) == targets
        if type(self._head) is nn.Linear:
            log_probs = linear_log_probs(hidden, self._head.weight, targets, self._head.bias, temperature=temperature)
            return log_probs, correct
        pairs = zip(self._split(hidden), self._split(targets), strict=True)
        parts = [checkpoint(self._head_log_probs, *pair, temperature, use_reentrant=False) for pair in pairs]
        return torch.cat(parts), correct

    def _head_log_probs(self, hidden: Tensor, targets: Tensor, temperature: float) -> Tensor:
        return selected_log_probs(self._head(hidden) / temperature, targets)

    def _split(self, rows: Tensor) -> tuple[Tensor, ...]:
        vocabulary = cast(Any, self._head).out_features
        return torch.split(rows, rows_per_chunk(vocabulary))

    # ---- what the model does around its output layer --------------------------------------------------------------

    @property
    def changes_logits(self) -> bool:
        """Whether the model's logits are not what its output layer gives.

        Found out once, by a pass of a single token in which the output layer's logits are exchanged for known ones that
        no capping or scaling leaves as they are.
        """
        if self._changes_logits is None:
            device = next(self._model.parameters()).device
            known = torch.linspace(-100.0, 100.0, cast(Any, self._head).out_features, device=device)
            handle = self._head.register_forward_hook(lambda _, args, output: known.expand_as(output).to(output.dtype))
            try:
                with torch.no_grad(), torch.random.fork_rng([device] if device.type == "cuda" else []):
                    logits = self._run({"input_ids": torch.zeros(1, 1, dtype=torch.long, device=device)})
            finally:
                handle.remove()
            self._changes_logits = not torch.equal(logits[0, 0].float(), known.to(logits.dtype).float())
        return self._changes_logits

    @contextlib.contextmanager
    def _only_rows(self, where: Tensor, keep: int) -> Iterator[list[Tensor]]:
        """Let only some positions through to the vocabulary.

        A hook takes ``(N, H)`` of the output layer's input ``(B, T, H)`` and hands on ``(1, keep, H)`` of them.

        Args:
            where: ``(N,)`` positions in ``B·T``.
            keep: How many of them the output layer shall see.

        Yields:
            A list that will hold the ``(N, H)`` rows.
        """
        seen: list[Tensor] = []

        def select(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen.append(args[0].flatten(0, 1)[where.to(args[0].device)])
            return (seen[0][:keep].unsqueeze(0), *args[1:])

        handle = self._head.register_forward_pre_hook(select)
        try:
            yield seen
        finally:
            handle.remove()


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, each ``(N,)``, of the positions before each supervised token of ``(B, T)`` labels, row by row."""
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return row, column
