"""The policy: one base model, the parameters that train, and frozen snapshots of them as references."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from hbat_lightning.adapters import (
    TRAINED,
    LoraSettings,
    active_adapters,
    add_adapter,
    add_frozen_twin,
    attach_adapter,
    put_in_order,
)
from hbat_lightning.base_model import (
    BaseSpec,
    DType,
    Quantization,
    fingerprint,
    full_precision_parts,
    load_model,
    load_tokenizer,
)
from hbat_lightning.errors import UserError
from hbat_lightning.generation import GenerationSettings, LogProbRecorder, complete
from hbat_lightning.model_card import ADAPTER, MODEL, Weights
from hbat_lightning.packing import attending_again
from hbat_lightning.scoring import CausalScorer, TokenScores

Reference = Literal["phase_start", "initial", "base"]


_DEFAULT_LORA = LoraSettings()


class Policy(nn.Module):
    """A causal language model that trains: fully, by LoRA, or by LoRA on a quantised base (QLoRA).

    The object is light until :meth:`build` is called, so that configurations can be parsed and data checked before any
    weight is read. References are frozen snapshots of what trains: with LoRA further adapters on the same base, in a
    full fine-tune a frozen copy of the model.

    Args:
        model_name_or_path: A folder, a hub id or an ``embedded://`` address.
        quantization: ``none``, ``nf4`` (4-bit with double quantisation) or ``int8``.
        lora: Adapter settings; ``null`` trains every parameter.
        adapter_path: A PEFT folder to go on from; its rank and layers must be those of ``lora``.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant).
        packing: Run batches without padding, and a prompt that several rows share once (both answers of a pair do), where
            the model is found to give the same hidden states so; ``false`` runs them as they are.
        dtype: Storage type of the base; ``auto`` is the type of the files, bfloat16 beside quantised layers, and
            float32 in a full fine-tune.
        revision: Hub revision.
        attn_implementation: Passed on to transformers.
        trust_remote_code: Run code that comes with the model.
    """

    task = "CAUSAL_LM"  # as PEFT calls the kind of model

    def __init__(
        self,
        model_name_or_path: str,
        quantization: Quantization = "none",
        lora: LoraSettings | None = _DEFAULT_LORA,
        adapter_path: str | None = None,
        gradient_checkpointing: bool = False,
        packing: bool = True,
        dtype: DType = "auto",
        revision: str | None = None,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        if lora is None:
            if quantization != "none":
                raise UserError(
                    f"{quantization} weights cannot be trained: give policy.init_args.lora, or quantization none"
                )
            if adapter_path is not None:
                raise UserError("adapter_path needs policy.init_args.lora: a full fine-tune has no adapter")
            if dtype not in ("auto", "float32"):
                raise UserError(
                    f"a full fine-tune in {dtype} would lose its small steps: leave policy.init_args.dtype out"
                )
            dtype = "float32"
        self.spec = BaseSpec(model_name_or_path, quantization, dtype, revision, attn_implementation, trust_remote_code)
        self.lora = lora
        self.adapter_path = adapter_path
        self.gradient_checkpointing = gradient_checkpointing
        self.packing = packing
        self.model: nn.Module | None = None
        self.frozen_copies = nn.ModuleDict()
        self.base_fingerprint = ""
        self._snapshots: dict[str, dict[str, Tensor]] = {}
        self._adapter_layers: list[BaseTunerLayer] = []
        self._layer_dropouts: dict[nn.Module, dict[str, float]] = {}
        self._frozen_scorers: dict[str, CausalScorer] = {}
        self._further: list[str] = []
        self._parameters_of: dict[str, dict[str, nn.Parameter]] = {}
        self._size = 0
        self._kept: dict[str, tuple[torch.dtype, int]] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer, loaded at first use."""
        return load_tokenizer(self.spec)

    @property
    def built(self) -> bool:
        """Whether the weights are in memory."""
        return self.model is not None

    # ---- building -------------------------------------------------------------------------------------------------

    def build(self, device: torch.device) -> None:
        """Load the weights and attach the adapter. Idempotent.

        Args:
            device: Where quantised weights go.

        Raises:
            UserError: When the model cannot be built as asked for.
        """
        if self.built:
            return
        model = load_model(self.spec, device)
        self.base_fingerprint = fingerprint(model)
        if self.spec.quantization != "none":
            self._kept = full_precision_parts(model)
        self.adopt(model)

    def adopt(self, model: PreTrainedModel) -> None:
        """Make a loaded base one's own: attach the adapter, or let every parameter train."""
        self._parameters_of = {}
        self._size = _element_count(model)
        if self.lora is None:
            self.model = model
            model.requires_grad_(True)
        else:
            self.model = attach_adapter(model, self.lora, self.adapter_path, self.spec.name, self.task)
            self._adapter_layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
            self._size += sum(parameter.numel() for parameter in self.trained_parameters().values())
        if self.gradient_checkpointing:
            settings = {"use_reentrant": False, "context_fn": self._recomputation}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)

    def _recomputation(self) -> tuple[Any, Any]:
        """Contexts of a checkpointed layer's two passes: the second, in the backward pass, runs as the first one did.

        With the same adapters, that is, and the same attention.
        """
        active = list(self._adapter_layers[0]._active_adapter) if self._adapter_layers else []
        return contextlib.nullcontext(), self._as_before(active, attending_again())

    @contextlib.contextmanager
    def _as_before(self, active: list[str], attention: contextlib.AbstractContextManager[None]) -> Iterator[None]:
        with active_adapters(self._adapter_layers, active), attention:
            yield

    def add_snapshots(self, references: Iterable[Reference]) -> list[str]:
        """Take the frozen snapshots that these references need, of the policy as it is now; none twice.

        Returns:
            A line for each new one that says what it costs.
        """
        before = set(self._snapshots)
        for reference in sorted(set(references)):
            self._add_snapshot(reference)
        form = "a frozen copy of the whole model" if self.lora is None else "a frozen adapter"
        sizes = {
            name: sum(t.numel() * t.element_size() for t in tensors.values())
            for name, tensors in self._snapshots.items()
        }
        return [
            f"snapshot: {name} is {form}, {size / 2**20:,.1f} MiB" for name, size in sizes.items() if name not in before
        ]

    def add_adapter(self, name: str, lora: LoraSettings, folder: str | None = None) -> None:
        """Put a further adapter on the base, for something else than the policy: a value function, a reward. Idempotent.

        Args:
            name: Its name.
            lora: Rank, scale, dropout and layers.
            folder: A PEFT folder to take the weights from, which then stay as they are; a new one trains.

        Raises:
            UserError: In a full fine-tune, which has no base to put it on; or where the folder does not fit.
        """
        if self.lora is None:
            raise UserError(
                f"a full fine-tune has no frozen base that the {name} could share: give policy.init_args.lora, or a model of "
                "its own: hbat_lightning.values.ModelValue for a value function, ClassifierReward for a reward"
            )
        if name not in self._further:
            add_adapter(cast(PeftModel, self._model), name, lora, folder)
            self._further.append(name)
            self._parameters_of.pop(name, None)

    def _snapshot_name(self, reference: Reference) -> str | None:
        """Which snapshot serves a reference; ``None`` where the bare base does."""
        if reference == "phase_start":
            return "phase_start"
        if self.lora is None:
            return "initial"  # the base is what the run began with, and it has been trained since
        return "initial" if reference == "initial" and self.adapter_path is not None else None

    def _add_snapshot(self, reference: Reference) -> None:
        name = self._snapshot_name(reference)
        if name is None or name in self._snapshots:
            return
        trained = self.trained_parameters()
        if self.lora is None:
            frozen = copy.deepcopy(self._model).requires_grad_(False).eval()
            self.frozen_copies[name] = frozen
            self._frozen_scorers[name] = CausalScorer(frozen, self.packing)
            values = dict(frozen.named_parameters())
            self._snapshots[name] = {key: values[key] for key in trained}
            return
        self._snapshots[name] = add_frozen_twin(cast(PeftModel, self._model), name)

    @property
    def _model(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("the policy has no weights yet: call build() first")
        return self.model

    @property
    def hidden_size(self) -> int:
        """Width of the hidden states that the output layer sees."""
        return int(cast(Any, self._model).get_output_embeddings().in_features)

    # ---- what trains, and its snapshots ---------------------------------------------------------------------------

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train as the policy, by their name in the model: all, or the adapter's."""
        return self._trained(TRAINED)

    def _trained(self, adapter: str) -> dict[str, nn.Parameter]:
        """Found once: every step asks, and a walk through all modules of a large model takes milliseconds."""
        if adapter not in self._parameters_of:
            self._parameters_of[adapter] = {
                name: parameter
                for name, parameter in self._model.named_parameters()
                if self.lora is None or f".{adapter}." in name
            }
        return {name: parameter for name, parameter in self._parameters_of[adapter].items() if parameter.requires_grad}

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """Parameters of a further adapter that train, by their name in the model."""
        return self._trained(name)

    def snapshot(self, name: str = "phase_start") -> dict[str, Tensor] | None:
        """A snapshot's tensors under the names of :meth:`trained_parameters`; ``None`` if it was not asked for."""
        return self._snapshots.get(name)

    @torch.no_grad()
    def take_snapshot(self, name: str = "phase_start") -> None:
        """Copy what trains into a snapshot. Does nothing when the snapshot was not asked for."""
        if name in self._snapshots:
            targets = list(self._snapshots[name].values())
            torch._foreach_copy_(targets, [p.detach() for p in self.trained_parameters().values()])

    def checkpoint_names(self) -> set[str]:
        """Names in this module's state dict that a checkpoint must hold: what trains, and the snapshots."""
        names = {f"model.{name}" for name in self.trained_parameters()}
        for snapshot, tensors in self._snapshots.items():
            if self.lora is None:
                names |= {f"frozen_copies.{snapshot}.{name}" for name in tensors}
            else:
                names |= {f"model.{name.replace(f'.{TRAINED}.', f'.{snapshot}.')}" for name in tensors}
        return names | {f"model.{name}" for further in self._further for name in self.adapter_parameters(further)}

    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this policy only fits on, in plain types."""
        return {
            "base": self.spec.name,
            "base_fingerprint": self.base_fingerprint,
            "quantization": self.spec.quantization,
            "lora_r": None if self.lora is None else self.lora.r,
            "lora_alpha": None if self.lora is None else self.lora.alpha,
        }

    def describe(self) -> list[str]:
        """Lines for the start of a run: what trains, and in what precision the base is."""
        trained = self.trained_parameters().values()
        count, total = sum(p.numel() for p in trained), self._size
        kind = "full fine-tune" if self.lora is None else f"LoRA r {self.lora.r}"
        lines = [f"policy: {self.spec.name}, {kind}, {count:,} of {total:,} parameters train"]
        if self.spec.quantization != "none":
            lines.append(f"policy: {self.quantised_layers()} linear layers are {self.spec.quantization}")
            kept = [
                f"{name} ({str(dtype).removeprefix('torch.')}, {size / 2**20:,.1f} MiB)"
                for name, (dtype, size) in self._kept.items()
            ]
            lines.append(f"policy: kept in full precision: {', '.join(kept)}")
        return lines

    def quantised_layers(self) -> int:
        """How many linear layers are quantised."""
        import bitsandbytes as bnb

        return sum(isinstance(m, bnb.nn.Linear4bit | bnb.nn.Linear8bitLt) for m in self._model.modules())

    # ---- modes ----------------------------------------------------------------------------------------------------

    def set_training(self, dropout: bool) -> None:
        """Training mode with dropout, or without it.

        Args:
            dropout: ``False`` is needed where two passes over the same rows are compared, as in DPO.
        """
        self._model.train(dropout)
        if self.gradient_checkpointing:
            for layer in self._model.modules():
                if isinstance(layer, GradientCheckpointingLayer):
                    self._keep_checkpointing(layer, dropout)

    def _keep_checkpointing(self, layer: nn.Module, dropout: bool) -> None:
        """Transformers only checkpoints layers whose own flag says training, so that flag stays up.

        A layer that also applies dropout by that flag, with a rate kept as a plain number (OPT does), gets the rate 0.
        """
        layer.training = True
        rates = {name: value for name, value in vars(layer).items() if "dropout" in name and isinstance(value, float)}
        own = self._layer_dropouts.setdefault(layer, rates)
        for name, rate in own.items():
            setattr(layer, name, rate if dropout else 0.0)

    # ---- log-probabilities ----------------------------------------------------------------------------------------

    @cached_property
    def _scorer(self) -> CausalScorer:
        return CausalScorer(self._model, self.packing)

    def score(self, inputs: dict[str, Tensor], with_correct: bool = False, temperature: float = 1.0) -> TokenScores:
        """Log-probabilities of the supervised tokens under the policy.

        Args:
            inputs: ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)``, padded on either side.
            with_correct: Also say for each token whether it is the most likely one.
            temperature: What the logits are divided by.
        """
        return self._scorer(inputs, with_correct, temperature)

    def hidden(self, inputs: dict[str, Tensor], row: Tensor, column: Tensor, adapter: str = TRAINED) -> Tensor:
        """Hidden states before the output layer, under the policy's adapter or a further one; see :class:`CausalScorer`."""
        with active_adapters(self._adapter_layers, [adapter]):
            return self._scorer.hidden(inputs, row, column)

    def truncation_log_mass(self, inputs: dict[str, Tensor], settings: GenerationSettings) -> Tensor:
        """What top-k and top-p leave of the policy to sample from; see :meth:`CausalScorer.truncation_log_mass`."""
        return self._scorer.truncation_log_mass(inputs, settings)

    def entropy(self, inputs: dict[str, Tensor], settings: GenerationSettings) -> Tensor:
        """How uncertain the policy was of each supervised token; see :meth:`CausalScorer.entropy`."""
        return self._scorer.entropy(inputs, settings)

    @torch.no_grad()
    def score_reference(self, inputs: dict[str, Tensor], reference: Reference, temperature: float = 1.0) -> TokenScores:
        """The same under a reference, without a graph and without dropout."""
        name = self._snapshot_name(reference)
        if self.lora is None:
            return self._frozen_scorers[cast(str, name)](inputs, temperature=temperature)
        return self.score_adapters(inputs, [] if name is None else [name], temperature)

    def score_adapters(
        self, inputs: dict[str, Tensor], adapters: Sequence[str], temperature: float = 1.0
    ) -> TokenScores:
        """The same under other adapters than the policy's; under none, the bare base."""
        with active_adapters(self._adapter_layers, list(adapters)):
            return self._scorer(inputs, temperature=temperature)

    def score_initial(self, inputs: dict[str, Tensor]) -> TokenScores:
        """The same under the policy that the run began with.

        Raises:
            UserError: When nothing stands for it any more.
        """
        name = self._snapshot_name("initial")
        if name is not None and name not in self._snapshots:
            raise UserError(
                "other held-out pairs than those of the training run need the policy it began with, which is not in memory: "
                "validate in a new process, with the run's checkpoint as ckpt_path"
            )
        return self.score_reference(inputs, "initial")

    # ---- generation and export ------------------------------------------------------------------------------------

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        settings: GenerationSettings,
        stop_token_id: int,
        pad_token_id: int,
        recorder: LogProbRecorder | None = None,
    ) -> list[list[int]]:
        """Complete left-padded prompts; see :func:`~hbat_lightning.generation.complete`."""
        return complete(self._model, input_ids, attention_mask, settings, stop_token_id, pad_token_id, recorder)

    @property
    def weights(self) -> Weights:
        """What kind of weights an export of it holds."""
        return MODEL if self.lora is None else ADAPTER

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write what was trained where plain peft (LoRA) or transformers (full fine-tune) can load it, and the tokenizer."""
        model = cast(Any, self._model)
        if self.lora is None:
            model.save_pretrained(folder)
        else:
            put_in_order(model.peft_config[TRAINED])
            # Asked to decide by itself, PEFT would look the base up on the hub.
            model.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False)
        self.tokenizer.save_pretrained(folder)


def _element_count(model: nn.Module) -> int:
    """Number of weights; a 4-bit tensor stores two in a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
