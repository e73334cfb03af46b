"""What ``validate``, ``test`` and ``predict`` do: score held-out rows; complete prompts, and score the completions."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info

from hbat_lightning.completions import Completed
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.sets import PromptBatch, pad_id
from hbat_lightning.generation import GenerationSettings, completed
from hbat_lightning.metrics import CompletionMetric, Surroundings, standard_metrics
from hbat_lightning.objective import Objective
from hbat_lightning.policy import Policy
from hbat_lightning.ranks import Ranks
from hbat_lightning.sums import Parts, apart, in_turn, means_of
from hbat_lightning.training_data import MicroBatch


class EvaluatingModule(LightningModule):
    """Scores held-out rows by its objectives, and completes held-out prompts with its policy.

    Args:
        generation: How prompts are completed.
        metrics: What is said of completions; ROUGE, exact match, length and variety when not given.

    Raises:
        ValueError: Two metrics give figures of the same name.
    """

    policy: Policy

    def __init__(self, generation: GenerationSettings, metrics: Sequence[CompletionMetric] | None) -> None:
        super().__init__()
        self.generation = generation
        # No modules of this one: what they score with is no part of the run.
        self.completion_metrics = list(standard_metrics() if metrics is None else metrics)
        _require_distinct_names(self.completion_metrics)
        self.validation_results: dict[str, float] = {}
        self.validation_parts: dict[str, Parts] = {}
        self._prepared: dict[str, str] = {}
        self._held_out: dict[str, list[Parts]] = {}

    @property
    @abstractmethod
    def objectives(self) -> Mapping[str, Objective]:
        """The objectives by name, in the order in which they are validated."""

    @property
    @abstractmethod
    def data(self) -> HybridDataModule:
        """The run's data."""

    @property
    @abstractmethod
    def ranks(self) -> Ranks:
        """The processes that share the prompts."""

    # ---- held-out rows --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def show_held_out_rows(self, device: torch.device, began: bool) -> None:
        """Let objectives see the held-out rows under the initial policy: no checkpoint has been restored yet.

        Once per set of rows. Other rows, that come when the policy has trained already, are scored by what still stands
        for the initial one: the bare base of a new adapter.

        Args:
            device: Where the policy is.
            began: Whether it has trained already.
        """
        score = self.policy.score_initial if began else self.policy.score

        self.policy.to(device)
        self.policy.eval()
        for loader in self.data.val_dataloader():
            if self._prepared.get(loader.objective) == loader.digest:
                continue
            batches = (self.transfer_batch_to_device(batch, device, 0).inputs for batch in loader if batch.inputs)
            with self.trainer.precision_plugin.forward_context():
                self.objectives[loader.objective].prepare_evaluation(score, batches)
            self._prepared[loader.objective] = loader.digest

    def on_validation_epoch_start(self) -> None:
        """Start new sums."""
        self._held_out = {}

    def validation_step(self, batch: MicroBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Score one objective's held-out rows; a process that has run out of them has none."""
        with self.ranks.together():
            if batch.inputs:
                sums = self.objectives[batch.objective].evaluate(self.policy, batch.inputs)
                self._held_out.setdefault(batch.objective, []).append(apart(sums))

    def on_validation_epoch_end(self) -> None:
        """Log the means over all held-out rows of both objectives."""
        self.validation_parts = in_turn(self.ranks.gather(self._held_out))
        self.validation_results = {
            f"val/{objective}/{name}": value
            for objective, parts in self.validation_parts.items()
            for name, value in means_of(parts).items()
        }
        self.log_dict(self.validation_results, batch_size=1)

    def held_out_rows(self) -> dict[str, dict[str, Any]]:
        """What the figures of the last validation are means of, row by row, with what they depend on beside the policy."""
        figures = {}
        for slot, parts in self.validation_parts.items():
            objective, data, policy = self.objectives[slot], self.data, self.policy
            together = f", {data.val_batch_size} at a time" if data.kinds[slot].together else ""
            start = f", from {policy.base_fingerprint} {policy.adapter_path or ''}" if objective.references else ""
            for name, values in parts.items():
                sums, counts = zip(*values, strict=True) if values else ((), ())
                figures[f"val/{slot}/{name}"] = {
                    "rows": data.val_sets[slot].digest + together,
                    "scale": objective.held_out_scale(name) + start,
                    "sums": sums,
                    "counts": counts,
                }
        return figures

    # ---- completions ----------------------------------------------------------------------------------------------

    def test_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:  # type: ignore[override]
        """Complete held-out prompts and compare with the data's answers: rows of all processes, for callbacks."""
        answers = self._complete_all(batch)
        for metric in self.completion_metrics:
            metric.update(answers, scored=True)
        return [answer.row() for answer in answers]

    def on_test_epoch_end(self) -> None:
        """Log what the metrics say of all completions."""
        for metric in self.completion_metrics:
            self.log_dict({f"test/{name}": value for name, value in metric.compute().items()}, batch_size=1)
            metric.reset()
        self._tell()

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Complete prompts: this process's share, and gather the others'."""
        return [answer.row() for answer in self._complete_all(batch)]

    def on_predict_epoch_end(self) -> None:
        """Say what scoring did."""
        self._tell()

    def _tell(self) -> None:
        for note in (note for metric in self.completion_metrics for note in metric.notes()):
            rank_zero_info(note)

    def _complete_all(self, batch: PromptBatch) -> list[Completed]:
        """Completions with their scores, of all processes; each scores its own."""
        with self.ranks.together():
            own = self.complete(batch) if batch.prompts else []
            surroundings = Surroundings(self.policy, self.device, Path(self.trainer.default_root_dir), self.ranks.rank)
            for metric in self.completion_metrics:
                metric.build(surroundings)
                metric.annotate(own)
        return [answer for answers in self.ranks.gather(own) for answer in answers]

    def complete(self, batch: PromptBatch) -> list[Completed]:
        """Completions of a batch of prompts; see :func:`~hbat_lightning.generation.completed`."""
        tokenizer = self.policy.tokenizer
        stop = self.data.encoder(self.data.prompt_source, tokenizer).stop_token_id
        completions = self.policy.generate(
            batch.input_ids, batch.attention_mask, self.generation, stop, pad_id(tokenizer)
        )
        return completed(batch, completions, tokenizer, stop)


def _require_distinct_names(metrics: Sequence[CompletionMetric]) -> None:
    counts = Counter(name for metric in metrics for name in metric.names)
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"metrics: more than one of them gives {', '.join(repeated)}, and a run has one figure of a name; leave one out, "
            "and run hbat test once more with it"
        )
