"""What several tests share: whole runs kept in memory, recorders, and oracles that use none of the package's formulas."""

from __future__ import annotations

import types
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, logsigmoid
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hbat_lightning import Policy
from hbat_lightning.training_data import MicroBatch

Tensors = dict[str, Tensor]


class MemoryLogger(Logger):
    """Keeps what is logged."""

    name = "memory"
    version = 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append({**metrics, "step": -1 if step is None else step})

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing is kept of them."""

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]

    def table(self, *names: str) -> list[tuple[float, ...]]:
        return [tuple(row[name] for name in names) for row in self.rows if all(name in row for name in names)]


@dataclass
class Run:
    """A finished fit."""

    module: Any
    data: Any
    trainer: Trainer
    log: MemoryLogger

    @property
    def weights(self) -> Tensors:
        return weights(self.module)

    def first_preference_rows(self) -> list[dict[str, float]]:
        """What was logged in the first step of every preference phase."""
        rows, seen = [], set()
        for row in self.log.rows:
            if "train/preference/loss" in row and row["phase/index"] not in seen:
                seen.add(row["phase/index"])
                rows.append(row)
        return rows


class DoublePolicy(Policy):
    """A policy in fp64, with norms that do not round to fp32 in between, so that sums agree to the last digits."""

    def build(self, device: torch.device) -> None:
        fresh = not self.built
        super().build(device)
        if fresh:
            self.double()
            for module in self.modules():
                if isinstance(module, LlamaRMSNorm):
                    module.forward = types.MethodType(_exact_norm, module)  # type: ignore[method-assign]

    def add_snapshots(self, references: Iterable[Any]) -> list[str]:
        lines = super().add_snapshots(references)
        self.double()
        return lines


def _exact_norm(norm: Any, hidden: Tensor) -> Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + norm.variance_epsilon)


class Recorder(Callback):
    """Gradients just before each optimizer step as this callback finds them, and parameters at each phase start.

    Attributes:
        gradients: Per optimizer step the gradients by name.
        parameters: Per optimizer step the parameters that the step starts from.
        anchors: Per optimizer step the parameters at the start of its phase.
        phases: Per optimizer step the phase's number.
        windows: Per optimizer step its micro-batches.
    """

    def __init__(self) -> None:
        self.gradients: list[Tensors] = []
        self.parameters: list[Tensors] = []
        self.anchors: list[Tensors] = []
        self.phases: list[int] = []
        self.windows: list[list[MicroBatch]] = []
        self._window: list[MicroBatch] = []
        self._anchor: Tensors = {}
        self._phase: int | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: MicroBatch, batch_idx: int) -> None:
        if batch.phase != self._phase:
            self._phase, self._anchor = batch.phase, weights(pl_module)
        self._window.append(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        trained = pl_module.policy.trained_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in trained.items() if p.grad is not None})
        self.parameters.append(weights(pl_module))
        self.anchors.append(self._anchor)
        self.phases.append(int(self._phase or 0))
        self.windows.append(self._window)
        self._window = []

    @property
    def phase_starts(self) -> dict[int, Tensors]:
        """Parameters at the start of every phase."""
        return dict(zip(self.phases, self.anchors, strict=True))


def weights(module: Any) -> Tensors:
    """A copy of what trains."""
    return {name: p.detach().clone() for name, p in module.policy.trained_parameters().items()}


@torch.no_grad()
def shake(parameters: dict[str, Any], seed: int = 0) -> None:
    """Move parameters at random."""
    generator = torch.Generator().manual_seed(seed)
    for name in sorted(parameters):
        parameters[name].add_(0.05 * torch.randn(parameters[name].shape, generator=generator))


def largest_difference(one: Tensors, other: Tensors) -> float:
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def same_bits(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def put(module: Any, values: Tensors) -> None:
    """Overwrite what trains."""
    with torch.no_grad():
        for name, parameter in module.policy.trained_parameters().items():
            parameter.copy_(values[name])


# ---- oracles: one row at a time, without padding, all logits, torch's own cross entropy --------------------------------


def rows_of(batch: MicroBatch) -> list[tuple[Tensor, Tensor]]:
    """Ids and labels of every row, unpadded."""
    mask = batch.inputs["attention_mask"].bool()
    return [
        (ids[keep], labels[keep])
        for ids, labels, keep in zip(batch.inputs["input_ids"], batch.inputs["labels"], mask, strict=True)
    ]


def negative_log_likelihood(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Sum over a row's supervised tokens, from the full logits."""
    logits = model(input_ids=ids.unsqueeze(0)).logits[0, :-1]
    return cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")


def instruction_loss(model: nn.Module, window: list[MicroBatch]) -> Tensor:
    """Mean over all supervised tokens of a window."""
    rows = [row for batch in window for row in rows_of(batch) if (row[1] != -100).any()]
    tokens = sum(int((labels[1:] != -100).sum()) for _, labels in rows)
    return torch.stack([negative_log_likelihood(model, *row) for row in rows]).sum() / tokens


def pair_scores(model: nn.Module, window: list[MicroBatch]) -> Tensor:
    """``(2, pairs)``: summed log-probabilities of the chosen and the rejected answers of a window."""
    chosen, rejected = [], []
    for batch in window:
        rows = rows_of(batch)
        half = len(rows) // 2
        for one, other in zip(rows[:half], rows[half:], strict=True):
            if (one[1] != -100).any():
                chosen.append(-negative_log_likelihood(model, *one))
                rejected.append(-negative_log_likelihood(model, *other))
    return torch.stack([torch.stack(chosen), torch.stack(rejected)])


def preference_loss(scores: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Mean over pairs of the DPO loss."""
    ratios = scores - reference
    return -logsigmoid(beta * (ratios[0] - ratios[1])).mean()
