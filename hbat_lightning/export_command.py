"""``hbat export``: writes what a run has trained, as an adapter or merged into a base."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser
from safetensors import SafetensorError
from transformers import PreTrainedModel

from hbat_lightning import merging
from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.base_model import DType
from hbat_lightning.callbacks import PolicyExport
from hbat_lightning.checkpoint_state import adopt_state, require_identity
from hbat_lightning.cli import HbatCLI, add_accept_changes, make_cli
from hbat_lightning.data.sets import pad_id
from hbat_lightning.errors import UserError
from hbat_lightning.files import share_weights
from hbat_lightning.generation import decoding
from hbat_lightning.model_card import ADAPTER, MODEL, RECORD, Training, describe_method, read_record, write_card
from hbat_lightning.objectives import BradleyTerryModule
from hbat_lightning.policy import Policy
from hbat_lightning.run_folder import find_checkpoint

Form = Literal["adapter", "merged"]
Base = Literal["original", "dequantized"]


class ExportCLI(HbatCLI):
    """Parses what ``fit`` parses, so that any configuration and override of it will do."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add our own options, and those of ``fit``, which a saved ``config.yaml`` holds; here one of them means the output."""
        parser.add_method_arguments(Trainer, "fit", skip=set(self.subcommands()["fit"]))
        add_accept_changes(parser)
        add: Any = parser.add_argument
        add("--overwrite", type=bool, default=False, help="Replace an earlier export in the output folder.")
        add("--output", type=str | None, default=None, help="Folder to write; new or empty.")
        add("--form", type=Form, default="adapter", help="A PEFT folder, or a model with the adapter merged in.")
        add(
            "--base",
            type=Base | None,
            default=None,
            help="What to merge into: the files' weights, or the trained-on ones.",
        )
        add("--dtype", type=DType, default="auto", help="Type of the merged weights; auto is that of the base.")
        add(
            "--prompts",
            type=int,
            default=8,
            help="Held-out prompts to compare logits on before merged weights are written.",
        )


def run_export(args: list[str]) -> None:
    """Export; say what was exported, how far it is from the trained policy, and where it is.

    Args:
        args: Command-line arguments behind ``export``.

    Raises:
        UserError: There is nothing to export, no place for it, or the settings do not fit what there is.
    """
    about = "Write what a run has trained: a PEFT adapter, or a whole model with the adapter merged into its base."
    cli = make_cli(args, run=False, cli=ExportCLI, prog="hbat export", description=about, epilog=None)
    # A saved configuration may name the checkpoint that training went on from; it is not what the run has come to.
    asked = any(arg.partition("=")[0] == "--ckpt_path" for arg in args)
    export = _Export(cli)
    export.check()
    source = export.find(cli.config.ckpt_path if asked else None)
    export.restore(source)
    print(f"exporting {source}, step {export.training.step:,}")
    try:
        _FORMS[cli.config.form](export)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{export.output}: cannot be written ({error}); make room, or give another --output") from error
    print(f"written: {export.output}\n" + "\n".join(f"  {path.name}" for path in sorted(export.output.iterdir())))


class _Export:
    """One export: its settings, the policy in hand, and what is known of its training.

    Args:
        cli: The parsed command.
    """

    training: Training

    def __init__(self, cli: HbatCLI) -> None:
        self.config, self.data, self.run_folder = cli.config, cli.datamodule, cli.run_folder
        self.module, self.trainer = cast(AlignmentModule, cli.model), cli.trainer
        self.device: torch.device = cast(Any, cli.trainer.strategy).root_device
        self.output = Path(cli.config.output or "")
        self.method = describe_method(self.module, cast(Any, cli.trainer).callbacks)

    # ---- before anything is read ----------------------------------------------------------------------------------

    def check(self) -> None:
        """Refuse what cannot be honoured.

        Raises:
            UserError: Says which option, and what to give instead.
        """
        self.module.require_policy()
        config, policy = self.config, self.module.policy
        merges = config.form == "merged"
        quantised_otherwise = policy.lora is not None and merging.spec_of_files(policy.spec) != policy.spec
        refusals = [
            (
                isinstance(self.module, BradleyTerryModule),
                "hbat export writes language models; a reward model is whole in the run's adapter/ or model/ folder",
            ),
            (config.output is None, "give --output FOLDER"),
            (config.prompts < 0, f"--prompts is {config.prompts}; give 0 or more"),
            (
                not merges and policy.lora is None,
                "a full fine-tune has no adapter: give --form merged, which writes the model",
            ),
            (
                not merges and config.base is not None,
                "--base is for merged weights: give --form merged, or leave it out",
            ),
            (not merges and config.dtype != "auto", "--dtype is for merged weights: adapters are written in float32"),
            (
                merges and quantised_otherwise and config.base is None,
                "the base was held in another precision than its files: give --base original to merge into the files' "
                "weights, or --base dequantized to merge into the values that the adapter was trained against",
            ),
        ]
        for refused, message in refusals:
            if refused:
                raise UserError(message)
        self._require_free()

    def _require_free(self) -> None:
        folder = self.output
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder}: is a file; give another --output")
        if not folder.exists() or not any(folder.iterdir()):
            return
        if read_record(folder) is None:
            raise UserError(f"{folder}: is not empty, and no earlier export; give another --output")
        if not self.config.overwrite:
            raise UserError(f"{folder}: holds an export; give another --output, or replace it with --overwrite true")

    def clear(self) -> None:
        """Remove an earlier export's files, and nothing else that lies beside them."""
        for name in (read_record(self.output) or {}).get("files", []):
            (self.output / Path(name).name).unlink(missing_ok=True)
        self.output.mkdir(parents=True, exist_ok=True)

    # ---- the trained policy ---------------------------------------------------------------------------------------

    def find(self, wanted: str | None) -> Path:
        """What is exported: the checkpoint that was asked for, the run's newest, or else what the run has finished with.

        Args:
            wanted: What ``--ckpt_path`` says, if it was given.

        Raises:
            UserError: There is none.
        """
        checkpoint = find_checkpoint(self.run_folder, str(wanted or "last"))
        if checkpoint is not None:
            return checkpoint
        result = PolicyExport.folder(self.trainer, self.module)
        if wanted is None and read_record(result) is not None:
            return result
        result_missing = "" if wanted else f" and no {result.name}/ with an {RECORD}"
        raise UserError(
            f"{self.run_folder} holds no whole checkpoint{result_missing}: run fit first, or give --ckpt_path FILE or the "
            "run's --trainer.default_root_dir"
        )

    def restore(self, source: Path) -> None:
        """Build the policy as it was trained, with the weights of a checkpoint or of a run's result."""
        origin, step = self._from_checkpoint(source) if source.is_file() else self._from_result(source)
        self.module.policy.to(self.device).eval()
        self.training = Training(origin, step, self.run_folder, self.method)

    def _from_checkpoint(self, path: Path) -> tuple[dict[str, Any], int]:
        try:
            # Mapped, not read: the optimizer's state is twice the size of what trains, and not wanted.
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError) as error:
            raise UserError(f"{path}: not a checkpoint of a run ({str(error).splitlines()[0]})") from error
        policy = self.module.policy
        policy.adapter_path = None  # what the run began with; the checkpoint holds what became of it
        policy.build(self.device)
        adopt_state(checkpoint, policy, training=False, own={})
        self.module.load_state_dict(checkpoint["state_dict"], strict=False)
        unknown = {"data": {}, "seed": self.module.run_seed}  # checkpoints of earlier versions do not say
        origin = {name: checkpoint["hbat"].get(name, unknown.get(name)) for name in ("policy", "data", "seed")}
        return origin, int(checkpoint["global_step"])

    def _from_result(self, folder: Path) -> tuple[dict[str, Any], int]:
        record, policy = cast(dict[str, Any], read_record(folder)), self.module.policy
        if policy.lora is None:
            policy.spec = replace(policy.spec, name=str(folder), revision=None)
            policy.build(self.device)
        else:
            policy.adapter_path = str(folder)
            policy.build(self.device)
            require_identity(record["policy"], policy, f"{folder}")
        return {name: record[name] for name in ("policy", "data", "seed")}, int(record["step"])

    # ---- the base that is merged into -----------------------------------------------------------------------------

    def choose_base(self) -> str:
        """Bring the adapter onto the base that was asked for, and say in words which that is."""
        policy = self.module.policy
        if policy.lora is None:
            return "a full fine-tune, so every weight is a trained one and there is nothing to merge"
        if merging.spec_of_files(policy.spec) == policy.spec:
            return "merged into the base, which was not quantised: original and dequantized are the same weights"
        del policy  # or it would not be given up
        return _BASES[self.config.base](self)

    def to_original(self) -> str:
        """Put the files' weights in the place of those held in training, which are given up first."""
        trained = {name: value.detach().cpu() for name, value in self.module.policy.trained_parameters().items()}
        spec, lora = self.module.policy.spec, self.module.policy.lora
        fresh = Policy(spec.name, lora=lora)
        fresh.spec = merging.spec_of_files(spec)
        self.module.policy = fresh
        gc.collect()  # models hold themselves in cycles
        torch.cuda.empty_cache()
        merging.transplant(trained, fresh, self.device)
        return "merged into the original base, as in its files"

    def to_dequantised(self) -> str:
        """Unpack what is quantised."""
        merging.dequantise(self.module.policy)
        return "merged into the dequantised base, the values that the adapter was trained against"

    # ---- logits ---------------------------------------------------------------------------------------------------

    def prompts(self) -> list[list[int]]:
        """Ids of the first held-out prompts, as ``hbat predict`` would complete them."""
        if not self.config.prompts:
            return []
        self.data.expect(self.module.objectives)
        try:
            prompts = self.data.load_prompts(self.module.policy.tokenizer, self.module.run_seed, compared=False)
        except UserError as error:
            raise UserError(f"{error}; --prompts 0 writes without comparing logits") from error
        return [prompt.input_ids for prompt in prompts[: self.config.prompts]]

    def policy_logits(self, prompts: list[list[int]]) -> list[torch.Tensor]:
        """Logits of the policy as it was trained, in the run's own precision."""
        with self.trainer.precision_plugin.forward_context():
            return merging.prompt_logits(cast(Any, self.module.policy.model), prompts, self.device)


def _write_adapter(export: _Export) -> None:
    export.clear()
    export.module.policy.export(export.output)
    share_weights(export.output)
    write_card(export.output, ADAPTER, export.training)


def _write_merged(export: _Export) -> None:
    """Merge, compare, and only then write."""
    prompts = export.prompts()
    trained = export.policy_logits(prompts)  # first, so that the policy's memory is free for the merged model
    base = export.choose_base()
    dtype = None if export.config.dtype == "auto" else getattr(torch, export.config.dtype)
    model = merging.merge(export.module.policy, dtype).eval()
    notes = [f"Weights: {base}; {str(model.dtype).removeprefix('torch.')}"]
    if prompts:
        difference = merging.compare(trained, merging.prompt_logits(model, prompts, export.device))
        notes.append(f"Logits, against the trained policy: {difference}")
    print("\n".join(notes))
    export.clear()
    _save(model, export)
    write_card(export.output, MODEL, export.training, notes)


def _save(model: PreTrainedModel, export: _Export) -> None:
    """Write model, tokenizer, and how to decode: plain ``generate`` shall stop where ``hbat predict`` does."""
    tokenizer = export.module.policy.tokenizer
    stop = export.data.encoder(export.data.prompt_source, tokenizer).stop_token_id
    model.generation_config = decoding(export.module.generation, stop, pad_id(tokenizer))
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    model.save_pretrained(export.output, max_shard_size="5GB")
    tokenizer.save_pretrained(export.output)
    share_weights(export.output)


_FORMS: dict[Form, Callable[[_Export], None]] = {"adapter": _write_adapter, "merged": _write_merged}
_BASES: dict[Base, Callable[[_Export], str]] = {"original": _Export.to_original, "dequantized": _Export.to_dequantised}
