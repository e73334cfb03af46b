"""The policy: one base model, the parameters that train, and frozen snapshots of them as references."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.modeling_layers import GradientCheckpointingLayer

from hbat_lightning.base_model import BaseSpec, DType, Quantization, fingerprint, load_model, load_tokenizer
from hbat_lightning.errors import UserError
from hbat_lightning.functional import selected_log_probs

Reference = Literal["phase_start", "initial", "base"]

TRAINED = "default"  # PEFT's own name of the first adapter; an exported folder has no name in its keys
IGNORE = -100


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on the linear layers.

    Attributes:
        r: Rank.
        alpha: Scale; the update is ``alpha / r · B A``.
        dropout: Dropout before A, in instruction phases only.
        target_modules: ``all-linear`` (all but the output layer), or names of layers.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass(frozen=True)
class GenerationSettings:
    """How completions are sampled.

    Attributes:
        max_new_tokens: Upper bound of a completion's length.
        temperature: 0 is greedy.
        top_p: Nucleus, with a temperature above 0.
        top_k: Candidates per step, with a temperature above 0; 0 is all.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0


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
        dtype: Storage type of the base; ``auto`` is the type of the files, bfloat16 beside quantised layers, and
            float32 in a full fine-tune.
        revision: Hub revision.
        attn_implementation: Passed on to transformers.
        trust_remote_code: Run code that comes with the model.
    """

    def __init__(
        self,
        model_name_or_path: str,
        quantization: Quantization = "none",
        lora: LoraSettings | None = _DEFAULT_LORA,
        adapter_path: str | None = None,
        gradient_checkpointing: bool = False,
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
            if dtype == "auto":
                dtype = "float32"  # an update of relative size 1e-5 is lost in bfloat16 weights
        self.spec = BaseSpec(model_name_or_path, quantization, dtype, revision, attn_implementation, trust_remote_code)
        self.lora = lora
        self.adapter_path = adapter_path
        self.gradient_checkpointing = gradient_checkpointing
        self.model: nn.Module | None = None
        self.frozen_copies = nn.ModuleDict()
        self.base_fingerprint = ""
        self._snapshots: dict[str, dict[str, Tensor]] = {}
        self._adapter_layers: list[BaseTunerLayer] = []
        self._layer_dropouts: dict[nn.Module, dict[str, float]] = {}
        self._takes_positions = False
        self._size = 0

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
        self._size = _element_count(model)
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters
        if self.lora is None:
            self.model = model
            model.requires_grad_(True)
        else:
            self.model = self._attach_adapter(model, self.lora)
            self._adapter_layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
            self._size += sum(parameter.numel() for parameter in self.trained_parameters().values())
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})

    def add_snapshots(self, references: Iterable[Reference]) -> None:
        """Take the frozen snapshots that these references need, of the policy as it is now; none twice."""
        for reference in sorted(set(references)):
            self._add_snapshot(reference)

    def _attach_adapter(self, model: Any, lora: LoraSettings) -> nn.Module:
        model.requires_grad_(False)
        config = LoraConfig(
            r=lora.r,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=lora.target_modules,
            task_type="CAUSAL_LM",
        )
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"lora.target_modules: {error}") from error
        if self.adapter_path is not None:
            _load_adapter_weights(adapted, self.adapter_path, lora)
        adapted.peft_config[TRAINED].base_model_name_or_path = self.spec.name
        for parameter in self._named_trained(adapted).values():
            parameter.data = parameter.data.float()  # steps of 1e-5 do not move a bfloat16 adapter
        return cast(nn.Module, adapted)

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
            values = dict(frozen.named_parameters())
            self._snapshots[name] = {key: values[key] for key in trained}
            return
        adapted = cast(PeftModel, self._model)
        config = copy.deepcopy(adapted.peft_config[TRAINED])
        config.lora_dropout = 0.0
        flags = {key: value.requires_grad for key, value in adapted.named_parameters()}
        adapted.add_adapter(name, config)
        adapted.set_adapter(TRAINED)
        values = dict(adapted.named_parameters())
        for key, trains in flags.items():
            values[key].requires_grad_(trains)  # PEFT has set the flags anew, also of what the user froze
            if f".{TRAINED}." in key:
                twin = values[key.replace(f".{TRAINED}.", f".{name}.")]
                twin.requires_grad_(False)
                twin.data = values[key].detach().clone()
        self._snapshots[name] = {key: values[key.replace(f".{TRAINED}.", f".{name}.")] for key in trained}

    @property
    def _model(self) -> nn.Module:
        if self.model is None:
            raise RuntimeError("the policy has no weights yet: call build() first")
        return self.model

    # ---- what trains, and its snapshots ---------------------------------------------------------------------------

    @staticmethod
    def _named_trained(model: nn.Module) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def trained_parameters(self) -> dict[str, nn.Parameter]:
        """Parameters that train, by their name in the model: all, or the adapter's."""
        return self._named_trained(self._model)

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
        return names

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
        """Lines for the start of a run: what trains, in what precision, and what the references cost."""
        trained = self.trained_parameters().values()
        count, total = sum(p.numel() for p in trained), self._size
        kind = "full fine-tune" if self.lora is None else f"LoRA r {self.lora.r}"
        lines = [f"policy: {self.spec.name}, {kind}, {count:,} of {total:,} parameters train"]
        if self.spec.quantization != "none":
            lines.append(f"policy: {self.quantised_layers()} linear layers are {self.spec.quantization}")
        for name, tensors in self._snapshots.items():
            size = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**20
            form = "a frozen copy of the whole model" if self.lora is None else "a frozen adapter"
            lines.append(f"reference: {name} is {form}, {size:,.1f} MiB")
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

    @contextlib.contextmanager
    def _adapters(self, active: list[str]) -> Iterator[None]:
        """Run with other adapters, by setting PEFT's private field.

        PEFT's own contexts walk all modules and flip ``requires_grad``: thirty times slower, and they undo whatever the
        user froze.
        """
        before = [layer._active_adapter for layer in self._adapter_layers]
        for layer in self._adapter_layers:
            layer._active_adapter = active
        try:
            yield
        finally:
            for layer, names in zip(self._adapter_layers, before, strict=True):
                layer._active_adapter = names

    # ---- log-probabilities ----------------------------------------------------------------------------------------

    def score(self, inputs: dict[str, Tensor], with_correct: bool = False) -> TokenScores:
        """Log-probabilities of the supervised tokens under the policy.

        Args:
            inputs: ``input_ids``, ``attention_mask`` and ``labels``, each ``(B, T)``, padded on either side.
            with_correct: Also say for each token whether it is the most likely one.
        """
        return self._score(self._model, inputs, with_correct)

    @torch.no_grad()
    def score_reference(self, inputs: dict[str, Tensor], reference: Reference) -> TokenScores:
        """The same under a reference, without a graph and without dropout."""
        name = self._snapshot_name(reference)
        if self.lora is None:
            return self._score(self.frozen_copies[cast(str, name)], inputs, with_correct=False)
        with self._adapters([] if name is None else [name]):
            return self._score(self._model, inputs, with_correct=False)

    def _score(self, model: nn.Module, inputs: dict[str, Tensor], with_correct: bool) -> TokenScores:
        labels, mask = inputs["labels"], inputs["attention_mask"]
        targets = labels[:, 1:]
        row, column = (targets != IGNORE).nonzero(as_tuple=True)
        arguments = {"input_ids": inputs["input_ids"], "attention_mask": mask, "use_cache": False}
        if self._takes_positions:
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        with _only_rows(_output_layer(model), row * labels.shape[1] + column):
            logits = model(**arguments).logits[0]
        chosen = targets[row, column]
        correct = logits.argmax(-1) == chosen if with_correct else None
        return TokenScores(selected_log_probs(logits, chosen), row, correct, labels.shape[0])

    # ---- generation and export ------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        settings: GenerationSettings,
        stop_token_id: int,
        pad_token_id: int,
    ) -> list[list[int]]:
        """Complete left-padded prompts.

        Args:
            input_ids: ``(B, T)``, padded on the left.
            attention_mask: ``(B, T)``.
            settings: Sampling.
            stop_token_id: Ends a completion.
            pad_token_id: Fills up ended ones.

        Returns:
            B lists of token ids, each with its stop token if it stopped, without padding.
        """
        sampling = {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k}
        config = GenerationConfig(
            max_new_tokens=settings.max_new_tokens,
            do_sample=settings.temperature > 0,
            eos_token_id=stop_token_id,
            pad_token_id=pad_token_id,
            use_cache=True,
            **(sampling if settings.temperature > 0 else {}),
        )
        modes = [(module, module.training) for module in self._model.modules()]
        self._model.eval()  # a checkpointed layer in training mode drops the key-value cache and garbles the text
        try:
            out = cast(Any, self._model).generate(
                input_ids=input_ids, attention_mask=attention_mask, generation_config=config
            )
        finally:
            for module, training in modes:
                module.training = training
        return [_until_stop(ids, stop_token_id) for ids in out[:, input_ids.shape[1] :].tolist()]

    def export(self, folder: str | os.PathLike[str]) -> None:
        """Write what was trained where plain peft (LoRA) or transformers (full fine-tune) can load it, and the tokenizer."""
        model = cast(Any, self._model)
        if self.lora is None:
            model.save_pretrained(folder)
        else:
            # Asked to decide by itself, PEFT would look the base up on the hub.
            model.save_pretrained(folder, selected_adapters=[TRAINED], save_embedding_layers=False)
        self.tokenizer.save_pretrained(folder)


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


def _until_stop(ids: list[int], stop: int) -> list[int]:
    return ids[: ids.index(stop) + 1] if stop in ids else ids


def _element_count(model: nn.Module) -> int:
    """Number of weights; a 4-bit tensor stores two in a byte."""
    return sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())


def _load_adapter_weights(model: PeftModel, folder: str, lora: LoraSettings) -> None:
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    try:
        saved = PeftConfig.from_pretrained(folder)
        weights = load_peft_weights(folder, device="cpu")
    except (OSError, ValueError) as error:
        raise UserError(f"adapter_path {folder}: not a PEFT folder ({str(error).splitlines()[0]})") from error
    if (saved.r, saved.lora_alpha) != (lora.r, lora.alpha):
        raise UserError(
            f"adapter_path {folder} has r {saved.r}, alpha {saved.lora_alpha}; policy.init_args.lora says r {lora.r}, "
            f"alpha {lora.alpha}. Make them equal"
        )
    result = set_peft_model_state_dict(model, weights)
    missing = [name for name in result.missing_keys if ".lora_" in name]
    if missing or result.unexpected_keys:
        raise UserError(
            f"adapter_path {folder} does not fit this base or these target_modules: "
            f"{(missing + list(result.unexpected_keys))[0]}"
        )
