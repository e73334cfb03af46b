"""Log-probabilities of supervised tokens, with only those positions projected onto the vocabulary."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
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
from hbat_lightning.packing import IGNORE, Layout, attending, pack, trial

__all__ = ["IGNORE", "CausalScorer", "Scorer", "TokenScores", "predicting"]


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

    Batches run without padding, and without dropout a prompt that several rows share runs once
    (:mod:`~hbat_lightning.packing`), where the model is found to give the same hidden states so.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        packing: Whether to try that; else batches run as they are.
    """

    def __init__(self, model: nn.Module, packing: bool = True) -> None:
        self._model = model
        self._head = cast(nn.Module, cast(Any, model).get_output_embeddings())
        inner = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
        self._config = inner.config.get_text_config()
        self._takes_positions = "position_ids" in inspect.signature(inner.forward).parameters
        self._changes_logits: bool | None = None
        self._packs: bool | None = None if packing else False

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
            logits = self._logits(inputs, row, column) / temperature
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
            return figure(self._logits(inputs, row, column), *cut)
        hidden = self._split(self.hidden(inputs, row, column))
        return torch.cat([figure(self._head(rows), *cut) for rows in hidden])

    def hidden(self, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        """What the output layer sees at some positions.

        Args:
            inputs: ``input_ids`` and ``attention_mask``, each ``(B, T)``, padded on either side; and perhaps ``labels``,
                where what comes before the first supervised token is a prompt that rows may share.
            row: ``(N,)`` rows of the positions.
            column: ``(N,)`` their columns.

        Returns:
            ``(N, H)``.
        """
        return self._hidden(inputs, row, column, self._lay_out(inputs))

    def _hidden(self, inputs: dict[str, Tensor], row: Tensor, column: Tensor, layout: Layout | None) -> Tensor:
        with self._only_rows(_places(inputs, row, column, layout), keep=0) as hidden:
            self._run_on(inputs, layout)
        return hidden[0]

    def _logits(self, inputs: dict[str, Tensor], row: Tensor, column: Tensor) -> Tensor:
        """The model's own logits ``(N, V)`` at some positions."""
        layout = self._lay_out(inputs)
        with self._only_rows(_places(inputs, row, column, layout), keep=len(row)):
            return self._run_on(inputs, layout)[0]

    def _lay_out(self, inputs: dict[str, Tensor]) -> Layout | None:
        """With dropout every row has noise of its own, so that none may share what another has computed."""
        return pack(inputs, share=not self._model.training) if self.packs else None

    def _run_on(self, inputs: dict[str, Tensor], layout: Layout | None) -> Tensor:
        if layout is None:
            arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
            if self._takes_positions:
                arguments["position_ids"] = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        else:
            arguments = {"input_ids": layout.input_ids, "position_ids": layout.position_ids}
        with attending(self._config, layout):
            return self._run(arguments)

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
        return torch.split(rows, rows_per_chunk(vocabulary, rows.device.type))

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

    @property
    def packs(self) -> bool:
        """Whether batches run packed: found out once, on three short rows, and said where they do not."""
        if self._packs is None:
            reason = self._why_padded()
            self._packs = not reason
            if reason:
                rank_zero_info(f"policy: batches run with their padding, and every row with its own prompt: {reason}")
        return self._packs

    @torch.no_grad()
    def _why_padded(self) -> str:
        """Why packed batches would not be the same; empty where they are.

        Every layer must attend by the pieces, and know of its sliding window if it has one, which three short rows are
        within; and hidden states must be those of the padded rows.
        """
        if not self._takes_positions:
            return "the model takes no positions"
        if self._config._attn_implementation != "sdpa":
            return f"attention is {self._config._attn_implementation}, which is not made for it (attn_implementation: sdpa is)"
        device = next(self._model.parameters()).device
        inputs = {name: value.to(device) for name, value in trial().items()}
        row, column = inputs["attention_mask"].nonzero(as_tuple=True)
        layout = pack(inputs, share=True)
        with self._evaluating(), torch.random.fork_rng([device] if device.type == "cuda" else []):
            packed = self._hidden(inputs, row, column, layout).float()
            padded = self._hidden(inputs, row, column, None).float()
        if len(layout.windows) != self._config.num_hidden_layers:
            return f"{len(layout.windows)} of {self._config.num_hidden_layers} layers attend through transformers' interface"
        if not layout.local <= {None, *layout.windows}:
            return "its attention is cut into chunks"
        # Asked in this way round, the answer is yes for tensors without values, as a memory plan has them.
        same = (packed - padded).abs().max() <= 0 or padded.abs().max() * self._tolerance > (
            packed - padded
        ).abs().max()
        return "" if same else "hidden states would differ"

    @property
    def _tolerance(self) -> float:
        """Relative difference that rounding may make."""
        device = next(self._model.parameters()).device.type
        types = {parameter.dtype for parameter in self._model.parameters() if parameter.is_floating_point()}
        coarse = torch.is_autocast_enabled(device) or types & {torch.bfloat16, torch.float16}
        return 16 * torch.finfo(torch.bfloat16).eps if coarse else 1e-3

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Without dropout; every module's own flag is put back, which need not be that of the whole."""
        flags = {module: module.training for module in self._model.modules()}
        self._model.eval()
        try:
            yield
        finally:
            for module, training in flags.items():
                module.training = training

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


def _places(inputs: dict[str, Tensor], row: Tensor, column: Tensor, layout: Layout | None) -> Tensor:
    """``(N,)`` where some tokens of a batch are among all that the model runs on."""
    return row * inputs["input_ids"].shape[1] + column if layout is None else layout.place[row, column]


def predicting(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column, each ``(N,)``, of the positions before each supervised token of ``(B, T)`` labels, row by row."""
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    return row, column
