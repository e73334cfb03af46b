"""Where rewards of sampled completions come from: a trained reward model, a classifier, or a rule."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from hbat_lightning.adapters import LoraSettings
from hbat_lightning.base_model import BaseSpec, DType, fingerprint, load_tokenizer, same_weights
from hbat_lightning.classifier import load_trained_classifier, logits_of
from hbat_lightning.data.provenance import files_digest
from hbat_lightning.data.rollouts import Rollout, collate_rollouts
from hbat_lightning.data.sets import pad_left
from hbat_lightning.errors import UserError
from hbat_lightning.model_card import read_record
from hbat_lightning.policy import Policy
from hbat_lightning.scalars import ScalarAdapter, last_positions

HEAD_FILE = "reward_head.safetensors"
PAD = 0  # which id fills up does not matter, since masks go by length
_DEFAULT_LORA = LoraSettings()


class Reward(nn.Module):
    """Scores completions. Frozen: nothing here trains."""

    def build(self, policy: Policy, device: torch.device) -> None:
        """Load what it needs; the policy has its weights. Idempotent."""

    def identity(self) -> tuple[str, str]:
        """What tells this reward from others, to be asked after :meth:`build`: a run goes on with the same one only.

        Its class and the tensors that are part of it, unless a subclass knows better.

        Returns:
            What is compared, and the same in words, which may name a place.
        """
        name = f"{type(self).__module__}.{type(self).__qualname__}"
        said = f"{name} ({fingerprint(self)})" if any(True for _ in self.parameters()) else name
        return said, said

    @abstractmethod
    def score(self, policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
        """Rewards of some completions, ``(S,)`` fp32 on the CPU.

        Args:
            policy: The policy that sampled them, with its tokenizer.
            rollouts: S prompts and completions; what they hold beside is not looked at.
            device: Where models are.
        """


class FunctionReward(Reward):
    """A rule or a metric: a Python function of the texts.

    Args:
        function: Takes the prompt and the completion, both without special tokens, and gives a number. In a configuration
            its import path, such as ``my_package.my_module.my_function``.
    """

    def __init__(self, function: Callable[[str, str], float]) -> None:
        super().__init__()
        self.function = function

    def identity(self) -> tuple[str, str]:
        """See :meth:`Reward.identity`: the function's import path, or its class. What it computes is not looked at."""
        named = self.function if inspect.isroutine(self.function) else type(self.function)
        said = f"{named.__module__}.{named.__qualname__}"
        return said, said

    def score(self, policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
        """See :meth:`Reward.score`.

        Raises:
            UserError: When the function gives something else than a finite number.
        """
        values = []
        for prompt, completion in _texts(policy, rollouts):
            value = self.function(prompt, completion)
            if not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
                name = getattr(self.function, "__name__", type(self.function).__name__)
                raise UserError(f"reward function {name} gave {value!r} for the completion {completion[:60]!r}")
            values.append(float(value))
        return torch.tensor(values)


class AdapterReward(Reward):
    """A reward model of :class:`~hbat_lightning.objectives.reward.RewardModule` on the policy's own base.

    Args:
        path: The ``adapter/`` folder of its run.
        lora: The settings that it was trained with.
    """

    def __init__(self, path: str, lora: LoraSettings = _DEFAULT_LORA) -> None:
        super().__init__()
        self.path, self.lora = path, lora
        self.scalar = ScalarAdapter("reward", lora, path)
        self._digest = ""

    def build(self, policy: Policy, device: torch.device) -> None:
        """Add the adapter to the base.

        Raises:
            UserError: When the folder holds no reward model, or one of another base.
        """
        file = Path(self.path) / HEAD_FILE
        if not file.exists():
            raise UserError(f"{self.path} holds no {HEAD_FILE}: give the adapter/ folder of a run of RewardModule")
        self._require_base(policy)
        self.scalar.build(policy, device)
        head = cast(nn.Linear, self.scalar.head)
        head.load_state_dict(load_file(file))
        self.requires_grad_(False)
        self._digest = files_digest(sorted(Path(self.path).glob("*.safetensors")))

    def identity(self) -> tuple[str, str]:
        """See :meth:`Reward.identity`: adapter and head as they were when they were loaded, wherever they lie."""
        return self._digest, f"{self.path} ({self._digest})"

    def _require_base(self, policy: Policy) -> None:
        """Refuse an adapter of another base, or of the same one in another precision: its rewards would be other ones."""
        record = read_record(Path(self.path))
        saved = None if record is None else record["policy"]
        if saved is not None and not same_weights(saved["base_fingerprint"], policy.base_fingerprint):
            raise UserError(
                f"{self.path} was trained on {saved['base']} with quantization {saved['quantization']}, which are not the "
                f"weights of {policy.spec.name} with quantization {policy.spec.quantization}: train the reward model on "
                "the policy's base"
            )

    def score(self, policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
        """See :meth:`Reward.score`."""
        inputs = {name: value.to(device) for name, value in _inputs(rollouts).items()}
        values: Tensor = self.scalar(policy, inputs, *last_positions(inputs))
        return values.cpu()


class ClassifierReward(Reward):
    """Any sequence classifier with a single output, as a model of its own with its own tokenizer.

    Args:
        model_name_or_path: A folder or a hub id that ``AutoModelForSequenceClassification`` loads with one label, or the
            PEFT folder of such a model.
        dtype: Storage type.
        max_length: Longest text in tokens of its tokenizer; longer ones lose their beginning.
        revision: Hub revision.
        policy_tokens: Show it the policy's tokens as they are, special ones and stop token too, instead of the text: right
            for a result of :class:`~hbat_lightning.objectives.reward.ClassifierRewardModule` with the policy's tokenizer.
    """

    def __init__(
        self,
        model_name_or_path: str,
        dtype: DType = "auto",
        max_length: int = 1024,
        revision: str | None = None,
        policy_tokens: bool = False,
    ) -> None:
        super().__init__()
        self.model_name_or_path, self.dtype, self.revision = model_name_or_path, dtype, revision
        self.spec = BaseSpec(model_name_or_path, dtype=dtype, revision=revision)
        self.max_length, self.policy_tokens = max_length, policy_tokens
        self._built: list[nn.Module] = []  # in a list, so that checkpoints of a run do not hold it

    def build(self, policy: Policy, device: torch.device) -> None:
        """Load it.

        Raises:
            UserError: When there is none to load, it has more than one output, or its tokens are not the policy's.
        """
        if self._built:
            return
        self.tokenizer = load_tokenizer(self.spec)
        self.tokenizer.truncation_side = "left"
        if self.policy_tokens and self.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
            raise UserError(
                f"{self.spec.name} has another vocabulary than {policy.spec.name}: leave policy_tokens out, and it reads texts"
            )
        model = load_trained_classifier(self.spec, self.tokenizer)
        self._built.append(model.to(device).eval().requires_grad_(False))

    def identity(self) -> tuple[str, str]:
        """See :meth:`Reward.identity`: a digest of the classifier, wherever it lies."""
        found = fingerprint(self._built[0])
        return found, f"{self.model_name_or_path} ({found})"

    def score(self, policy: Policy, rollouts: Sequence[Rollout], device: torch.device) -> Tensor:
        """See :meth:`Reward.score`."""
        inputs = self._own_tokens(rollouts) if self.policy_tokens else self._texts(policy, rollouts)
        return logits_of(self._built[0], {name: value.to(device) for name, value in inputs.items()}).cpu()

    def _own_tokens(self, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        rows = [(one.prompt + one.completion)[-self.max_length :] for one in rollouts]
        return pad_left(rows, PAD)

    def _texts(self, policy: Policy, rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
        """The texts as the policy saw them but for special tokens, tokenised anew."""
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        texts = [policy.tokenizer.decode(one.prompt + one.completion, skip_special_tokens=True) for one in rollouts]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def _inputs(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Tensors of the texts alone."""
    return collate_rollouts([Rollout(one.prompt, one.completion) for one in rollouts], PAD)


def _texts(policy: Policy, rollouts: Sequence[Rollout]) -> list[tuple[str, str]]:
    decode = policy.tokenizer.decode
    return [
        (decode(one.prompt, skip_special_tokens=True).strip(), decode(one.completion, skip_special_tokens=True).strip())
        for one in rollouts
    ]
