"""Metrics of completions that ask a model: the policy's reference, a reward, or a sequence-to-sequence model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import AutoModelForSeq2SeqLM

from hbat_lightning.base_model import BaseSpec, DType, fingerprint, load_model, load_tokenizer
from hbat_lightning.completions import Completed
from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.errors import UserError
from hbat_lightning.functional import selected_log_probs
from hbat_lightning.metrics.base import MeanScore, Surroundings
from hbat_lightning.metrics.opponents import Opponents, verdict
from hbat_lightning.rewards import Reward
from hbat_lightning.scoring import CausalScorer

PAD = 0  # masks go by length
INITIAL = "kl_reference"  # name of the adapter of ReferenceKL


class ReferenceKL(MeanScore):
    r"""How far the policy has gone from a reference: mean over completions of :math:`\log\pi(y|x) - \log\pi^{ref}(y|x)`.

    Summed over a completion's tokens, in nats. Of completions sampled at temperature 1 it is an unbiased estimate of the
    divergence KL(π‖π^ref) (k1); of greedy ones, the default of ``test``, it is their log-ratio, and mostly larger. The
    figure is ``kl_base`` or ``kl_initial``.

    Args:
        reference: ``base``, the model without the adapter; or ``initial``, what the run began with: the adapter of
            ``adapter_path``, such as one that SFT has trained, and where there was none the base again. Beside a full
            fine-tune the base is a second model, which takes as much memory once more.
        kwargs: torchmetrics' own.
    """

    def __init__(self, reference: Literal["base", "initial"] = "base", **kwargs: Any) -> None:
        super().__init__([f"kl_{reference}"], **kwargs)
        self.reference = reference
        self._adapters: list[str] = []  # none: the bare base
        self._base: CausalScorer | None = None
        self._place: Surroundings | None = None

    def build(self, surroundings: Surroundings) -> None:
        """See :meth:`CompletionMetric.build`; loads the reference's adapter, or beside a full fine-tune the base."""
        policy = surroundings.policy
        if policy.lora is None and self._base is None:
            base = load_model(policy.spec, surroundings.device).requires_grad_(False).eval()
            self._base = CausalScorer(base.to(surroundings.device), policy.packing)
        self._place = surroundings
        if policy.lora is not None and self.reference == "initial" and policy.adapter_path is not None:
            policy.add_adapter(INITIAL, policy.lora, policy.adapter_path)
            self._adapters = [INITIAL]

    @torch.no_grad()
    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`."""
        if not answers:
            return []
        place = _built(self._place)
        place.policy.eval()
        rollouts = [Rollout(answer.prompt_ids, answer.completion_ids) for answer in answers]
        inputs = {name: value.to(place.device) for name, value in collate_rollouts(rollouts, PAD).items()}
        reference = self._base(inputs) if self._base else place.policy.score_adapters(inputs, self._adapters)
        ratios = (place.policy.score(inputs).row_sums() - reference.row_sums()).tolist()
        return [{self.names[0]: value} for value in ratios]

    def scale(self, name: str) -> str:
        """The reference's weights."""
        policy = _built(self._place).policy
        adapter = f", {policy.adapter_path}" if self._adapters else ""
        return f"{policy.base_fingerprint}{adapter}"


class RewardScore(MeanScore):
    """What a reward thinks of the completions, and how often it prefers them: the reward-model win rate.

    ``reward`` is the completions' mean, ``opponent_reward`` that of the answers they are compared with, and ``reward_win_rate``
    the share of prompts where the completion has the higher one; ties count half.

    Args:
        reward: Scores completions; any of :mod:`hbat_lightning.rewards`.
        against: A ``predictions.jsonl`` to compare with; the data's answers when not given. To a reward that reads the policy's
            tokens these are shown as the tokenizer writes the text by itself, with the stop token behind.
        kwargs: torchmetrics' own.
    """

    with_intervals = ("reward_win_rate",)

    def __init__(self, reward: Reward, against: str | None = None, **kwargs: Any) -> None:
        super().__init__(["reward", "opponent_reward", "reward_win_rate"], **kwargs)
        self._reward = [reward]  # in a list: its weights are no part of the metric
        self.against = against
        self._opponents = Opponents(against)
        self._place: Surroundings | None = None

    def build(self, surroundings: Surroundings) -> None:
        """Load the reward."""
        self._place = surroundings
        self._reward[0].build(surroundings.policy, surroundings.device)

    @torch.no_grad()
    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`."""
        others = self._opponents.of(answers)
        found = [
            {"reward": value} for value in self._rewards([(one.prompt_ids, one.completion_ids) for one in answers])
        ]
        theirs = [
            (one.prompt_ids, self._ids(text)) for one, text in zip(answers, others, strict=True) if text is not None
        ]
        compared = [scores for scores, text in zip(found, others, strict=True) if text is not None]
        for scores, value in zip(compared, self._rewards(theirs), strict=True):
            scores |= {"opponent_reward": value, "reward_win_rate": verdict(scores["reward"] - value)}
        return found

    def scale(self, name: str) -> str:
        """The reward; where answers are compared, their opponents too."""
        own = self._reward[0].identity()[0]
        return own if name == "reward" else f"{own}, against {self._opponents.identity()}"

    def _rewards(self, texts: Sequence[tuple[list[int], list[int]]]) -> list[float]:
        place = _built(self._place)
        if not texts:
            return []
        place.policy.eval()
        values: list[float] = (
            self._reward[0].score(place.policy, [Rollout(*text) for text in texts], place.device).tolist()
        )
        return values

    def _ids(self, text: str) -> list[int]:
        tokenizer = _built(self._place).policy.tokenizer
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*ids, int(cast(Any, tokenizer.eos_token_id))]


class BARTScore(MeanScore):
    r"""BARTScore (Yuan et al. 2021): how likely a sequence-to-sequence model finds one text after another.

    :math:`\frac1m\sum_t\log p(y_t \mid y_{<t}, x)` over the m tokens of y, its special ones too, as the authors' code has it:
    ``bartscore_faithfulness`` from prompt to completion, ``bartscore_precision`` from the data's answer to the completion,
    ``bartscore_recall`` from the completion to the answer, and ``bartscore_f``, the mean of these two. 0 is certain; values of
    different models do not compare. The authors' own checkpoint is ``facebook/bart-large-cnn``, further trained on ParaBank2.

    Args:
        model_name_or_path: A folder, or a hub id, that ``AutoModelForSeq2SeqLM`` loads.
        dtype: Storage type.
        revision: Hub revision.
        max_length: Tokens of either text, and never more than the model has positions; longer ones lose their end.
        batch_size: Texts at a time.
        kwargs: torchmetrics' own.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dtype: DType = "auto",
        revision: str | None = None,
        max_length: int = 1024,
        batch_size: int = 8,
        **kwargs: Any,
    ) -> None:
        names = [f"bartscore_{name}" for name in ("faithfulness", "precision", "recall", "f")]
        super().__init__(names, **kwargs)
        self.model_name_or_path, self.revision = model_name_or_path, revision
        self.max_length, self.batch_size = max_length, batch_size
        self._spec = BaseSpec(model_name_or_path, dtype=dtype, revision=revision)
        self._loaded: list[nn.Module] = []

    def build(self, surroundings: Surroundings) -> None:
        """Load the model."""
        self.load(surroundings.device)

    def load(self, device: torch.device) -> None:
        """Load the model. Idempotent.

        Raises:
            UserError: There is none of that kind to load.
        """
        if self._loaded:
            return
        self._tokenizer = load_tokenizer(self._spec)
        try:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                self.model_name_or_path, revision=self.revision, dtype=self._spec.dtype, use_safetensors=True
            )
        except (OSError, ValueError) as error:
            said = str(error).strip().splitlines()[0]
            raise UserError(
                f"{self.model_name_or_path}: BARTScore found no sequence-to-sequence model to load ({said}); give a folder "
                "with safetensors, or a hub id"
            ) from error
        self._loaded.append(model.to(device).eval().requires_grad_(False))
        self._fingerprint = fingerprint(model)
        positions = model.config.to_dict().get("max_position_embeddings")  # T5 and its kin have none
        self._longest = min(self.max_length, positions or self.max_length)

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`; without a reference only the faithfulness."""
        found = [
            {"bartscore_faithfulness": value}
            for value in self.log_likelihoods([one.prompt for one in answers], [one.completion for one in answers])
        ]
        compared = [(scores, one) for scores, one in zip(found, answers, strict=True) if one.reference.strip()]
        references, completions = [one.reference for _, one in compared], [one.completion for _, one in compared]
        precisions, recalls = (
            self.log_likelihoods(*pair) for pair in ((references, completions), (completions, references))
        )
        for (scores, _), precision, recall in zip(compared, precisions, recalls, strict=True):
            scores |= {"bartscore_precision": precision, "bartscore_recall": recall}
            scores["bartscore_f"] = (precision + recall) / 2
        return found

    def scale(self, name: str) -> str:
        """The model, and how much of a text it reads."""
        return f"{self._fingerprint}, {self._longest} tokens"

    @torch.no_grad()
    def log_likelihoods(self, sources: Sequence[str], targets: Sequence[str]) -> list[float]:
        """Mean log-probability per token of each target after its source."""
        values: list[float] = []
        for begin in range(0, len(sources), self.batch_size):
            own = slice(begin, begin + self.batch_size)
            source, target = self._encode(sources[own]), self._encode(targets[own])
            mask = target["attention_mask"].bool()
            labels = target["input_ids"].masked_fill(~mask, -100)
            logits: Tensor = self._loaded[0](**source, labels=labels).logits
            log_probs = selected_log_probs(logits[mask].float(), target["input_ids"][mask])
            row = mask.nonzero()[:, 0]
            sums = log_probs.new_zeros(len(mask)).index_add(0, row, log_probs)
            values += (sums / mask.sum(-1).clamp(min=1)).tolist()
        return values

    def _encode(self, texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._longest, return_tensors="pt"
        )
        device = next(self._loaded[0].parameters()).device
        return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


class PreferenceAccuracy(Metric):
    """Share of pairs whose chosen answer has the higher reward; ties count half.

    Args:
        tolerance: Up to which difference two rewards are a tie.
        kwargs: torchmetrics' own.
    """

    full_state_update = False
    won: Tensor
    pairs: Tensor

    def __init__(self, tolerance: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tolerance = tolerance
        self.add_state("won", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("pairs", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, chosen: Tensor, rejected: Tensor) -> None:
        """Add pairs.

        Args:
            chosen: ``(B,)`` rewards of the chosen answers.
            rejected: ``(B,)`` those of the rejected ones.
        """
        lead = (chosen - rejected).double()
        ties = lead.abs() <= self.tolerance
        self.won += ((lead > 0) & ~ties).sum() + 0.5 * ties.sum()
        self.pairs += lead.numel()

    def compute(self) -> Tensor:
        """The share; NaN of no pairs."""
        return self.won / self.pairs


def _built(place: Surroundings | None) -> Surroundings:
    if place is None:
        raise RuntimeError("call build() first")
    return place
