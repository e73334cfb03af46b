"""What a run is made of, kept in its checkpoints: a run that goes on is compared with it, and says what differs.

A record has three parts. What makes a run the run that it is, and gives a position in the data its meaning, is refused when
it differs, unless the user has accepted that kind of change. Settings may change on purpose: those of the command line are
in force, and the difference is said. So is another version of a library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn, zeros
from torch.optim import Optimizer

from hbat_lightning.base_model import same_weights
from hbat_lightning.data.module import HybridDataModule
from hbat_lightning.data.provenance import Change, digest, tokenizer_identity
from hbat_lightning.errors import UserError
from hbat_lightning.privacy import without_secret_settings
from hbat_lightning.settings import flat, plain, settings_of
from hbat_lightning.switches import PhaseCallback

if TYPE_CHECKING:
    from hbat_lightning.alignment import AlignmentModule

LIBRARIES = ("hbat-lightning", "torch", "lightning", "transformers", "peft", "bitsandbytes")
FOREVER = "forever"
"""The kind of what cannot change in a run, whatever is accepted."""
BASE: Change = "base"

CHANGES: tuple[str, ...] = get_args(Change)


class Difference(NamedTuple):
    """One thing that differs between a checkpoint and the run that would go on from it."""

    kind: str
    name: str
    was: Any
    now: Any

    def __str__(self) -> str:
        """In words."""
        was, now = ("nothing" if value is None else value for value in (self.was, self.now))
        return f"{self.name}: was {was}, is {now}"


# ---- making a record --------------------------------------------------------------------------------------------------


def record_run(module: AlignmentModule, data: HybridDataModule) -> dict[str, Any]:
    """The record of a run, in plain types and without secrets; the policy must be built.

    Returns:
        ``identity``: by kind of change names with ``[value, in words]``; ``result``: what follows from it, likewise;
        ``settings`` and ``software``: values by name.
    """
    trainer = cast(Any, module.trainer)
    policy = module.policy.identity()
    base, fingerprint = policy.pop("base"), policy.pop("base_fingerprint")
    optimizer = sample_optimizer(module)
    identity = {
        FOREVER: {
            BASE: (fingerprint, f"{base} ({fingerprint})"),  # a folder that moves holds the same base
            **{name.replace("_", " "): value for name, value in policy.items()},
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "schedule class": type(module.schedule).__name__,
            "optimizer": type(optimizer).__name__,
        },
        "objectives": {name: type(objective).__name__ for name, objective in module.objectives.items()},
        "reward": {
            f"{name} {what}": pair for name, one in module.objectives.items() for what, pair in one.identity().items()
        },
        "schedule": {"schedule": module.schedule.describe()},
        "seed": {"seed": module.run_seed},
        "batch_size": {"batch_size × devices": data.batch_size * module.ranks.world},
        **_identity_of_data(data),
    }
    result = {
        "data": {f"{name} training rows": _count(part["training"]) for name, part in data.fingerprint().items()},
        "schedule": {"steps of the schedule": data.stream.fingerprint()["schedule"]},
    }
    record: dict[str, Any] = without_secret_settings(
        {
            "identity": _pairs(identity),
            "result": _pairs(result),
            "settings": _settings(module, data, optimizer),
            "software": {name: version(name) for name in LIBRARIES} | {"device": module.device.type},
        }
    )
    return record | {"settings": flat(record["settings"])}


def sample_optimizer(module: AlignmentModule) -> Optimizer:
    """An optimizer as the run's is made, on a parameter of no consequence."""
    return module.optimizer([{"params": [nn.Parameter(zeros(1))]}])


def _identity_of_data(data: HybridDataModule) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {"tokenizer": {}, "template": {}, "data": {}}
    for name, part in data.fingerprint().items():
        source, contents = data.source(name), part["contents"]
        found["tokenizer"] |= {f"tokenizer's {what}": value for what, value in part["tokenizer"].items()}
        found["template"][f"{name} template"] = _template(part["template"], part["template_digest"])
        # A file that moves is the same file: its digest counts, and its path is only shown.
        found["data"][f"{name} data"] = (_count(contents), f"{source.path}, {_count(contents)}")
        found["data"][f"{name} val_fraction"] = None if source.held_out else source.val_fraction
    return found


def _settings(module: AlignmentModule, data: HybridDataModule, optimizer: Optimizer) -> dict[str, Any]:
    from hbat_lightning.objectives.base import ObjectiveModule  # late: objectives are modules, which this serves

    trainer = cast(Any, module.trainer)
    objectives = {name: settings_of(one, ObjectiveModule) | {"lr": one.lr} for name, one in module.objectives.items()}
    callbacks = [one for one in trainer.callbacks if isinstance(one, PhaseCallback) and one.describe()]
    spec = module.policy.spec
    return {
        **{name: {key: value for key, value in one.items() if key != "class"} for name, one in objectives.items()},
        "optimizer": plain(optimizer.defaults),
        "optimizer_state": module.optimizer_state,
        "lr_schedule": settings_of(module.lr_schedule),
        "policy": {
            "lora": plain(module.policy.lora),
            "dtype": spec.dtype,
            "attn_implementation": spec.attn_implementation,
            "gradient_checkpointing": module.policy.gradient_checkpointing,
            "packing": module.policy.packing,
        },
        "data": {
            **{name: asdict(data.source(name)) for name in module.objectives},
            **{key: getattr(data, key) for key in ("max_length", "truncation", "supervise", "invalid_rows")},
        },
        "trainer": {
            "precision": str(trainer.precision),
            "gradient_clip_val": trainer.gradient_clip_val,
            "gradient_clip_algorithm": plain(trainer.gradient_clip_algorithm),
        },
        "callbacks": {type(one).__name__: settings_of(one) for one in callbacks},
    }


def _count(part: Mapping[str, Any]) -> str:
    return f"{part['rows']:,} rows ({part['digest']})"


def _template(name: str, wording: str) -> str:
    return f"{name} ({wording})"


def _pairs(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[Any]]]:
    """Every value with what is shown of it."""
    return {kind: {name: _pair(value) for name, value in named.items()} for kind, named in entries.items()}


def _pair(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value, value]


# ---- comparing --------------------------------------------------------------------------------------------------------


def go_on(checkpoint: Mapping[str, Any], module: AlignmentModule, data: HybridDataModule) -> Mapping[str, Any]:
    """Compare the run of a checkpoint with the one that goes on from it, and prepare the stream for its position.

    Args:
        checkpoint: As loaded from the file.
        module: The module; its policy must be built.
        data: Its data, read.

    Returns:
        The checkpoint's record.

    Raises:
        UserError: When it is another run, and the user has not accepted that; names every difference. When it is none of
            this package.
    """
    was = checkpoint.get("hbat", {}).get("run")
    if was is None:
        raise UserError(
            "this checkpoint does not say what its run was made of, as those of hbat fit do, so nothing can be compared: "
            "start a new run; from an adapter/ folder, policy.init_args.adapter_path takes its weights"
        )
    require_same_run(was, module.record, data.accept_changes)
    (position,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    window = position["fingerprint"]["accumulate_grad_batches"]
    if position["position"] % window:
        raise UserError(
            f"this checkpoint was saved after micro-batch {position['position'] % window} of a window of {window}, and holds "
            "no gradients of them: go on from one that was saved between windows, as WindowCheckpoint saves them all"
        )
    data.stream.follow(position, accepted=bool(data.accept_changes))
    return cast(Mapping[str, Any], was)


def warn_of_other_text(checkpoint: Mapping[str, Any], module: AlignmentModule, data: HybridDataModule) -> None:
    """Where a trained policy is evaluated on texts that are written or cut up otherwise than in training, say so."""
    was = checkpoint.get("hbat", {}).get("run")
    if was is None:
        return
    tokenizer = module.policy.tokenizer
    ids = {f"tokenizer's {what}": _pair(value) for what, value in tokenizer_identity(tokenizer).items()}
    named = [name for name in module.objectives if data.sources[name] is not None]
    templates = {name: data.encoder(name, tokenizer).template for name in named}
    now = {f"{name} template": _pair(_template(one.name, digest(one.wording))) for name, one in templates.items()}
    found = [
        Difference(kind, name, _shown(was["identity"][kind], name), shown)
        for kind, entries in (("tokenizer", ids), ("template", now))
        for name, (value, shown) in entries.items()
        if name in was["identity"][kind] and _value(was["identity"][kind], name) != value
    ]
    if found:
        rank_zero_warn(f"the policy was trained on other texts than it is evaluated on: {'; '.join(map(str, found))}")


def require_same_run(was: Mapping[str, Any], now: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """Refuse to go on as another run; say what differs where that is in order.

    Args:
        was: The record in the checkpoint.
        now: That of the run that would go on.
        accepted: Kinds of changes that the user accepts.

    Raises:
        UserError: When something else differs than what was accepted; names every difference.
    """
    unknown = sorted(set(accepted) - set(CHANGES))
    if unknown:
        raise UserError(f"accept_changes: {', '.join(unknown)} is no kind of change; there are {', '.join(CHANGES)}")
    identity = _differences_of_identity(was, now)
    settings = list(_differences(was["settings"], now["settings"], "settings"))
    refused = [one for one in identity if one.kind not in accepted]
    if refused:
        raise UserError(_refusal(refused, [one for one in settings if _may_explain(one)]))
    _say("accepted, so this is no longer the run that it was", identity)
    _say("settings differ from the checkpoint's; those given now are in force", settings)
    _say("another installation than the checkpoint's", list(_differences(was["software"], now["software"], "software")))


def _differences_of_identity(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    found: list[Difference] = []
    for part in ("identity", "result"):
        found = [
            Difference(_kind(kind, name), name, _shown(was[part][kind], name), _shown(now[part][kind], name))
            for kind in now[part]
            if kind in was[part]  # else an earlier version wrote it, which did not note that kind
            for name in _names(was[part][kind], now[part][kind])
            if not _same(name, _value(was[part][kind], name), _value(now[part][kind], name))
        ]
        # What is trained on follows from the identity, and from settings that often change nothing, such as max_length.
        if found:
            break
    return found


def _differences(was: Mapping[str, Any], now: Mapping[str, Any], kind: str) -> Iterable[Difference]:
    return (
        Difference(kind, name, was.get(name), now.get(name))
        for name in _names(was, now)
        if was.get(name) != now.get(name)
    )


def _names(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    return [*now, *(name for name in was if name not in now)]


def _kind(kind: str, name: str) -> str:
    """Of a difference; checkpoints keep the base among what cannot change, as version 0.1.0 had it."""
    return name if name == BASE else kind


def _same(name: str, was: Any, now: Any) -> bool:
    return same_weights(was, now) if name == BASE else bool(was == now)


def _value(entries: Mapping[str, Any], name: str) -> Any:
    return entries.get(name, [None, None])[0]


def _shown(entries: Mapping[str, Any], name: str) -> Any:
    return entries.get(name, [None, None])[1]


def _may_explain(setting: Difference) -> bool:
    """Whether a setting may be why the data are others; of a path the data's own entry tells."""
    return setting.name.startswith("data.") and not setting.name.endswith(".path")


def _refusal(refused: Sequence[Difference], settings: Sequence[Difference]) -> str:
    kinds = list(dict.fromkeys(one.kind for one in refused))
    shown = [*refused, *(settings if "data" in kinds else [])]
    remedy = "Restore these settings, or start a new run in another folder"
    if FOREVER not in kinds:
        remedy += f"; to go on all the same, as another run, add --accept_changes [{','.join(kinds)}]"
    return f"this checkpoint is of another run, {'; '.join(map(str, shown))}. {remedy}"


def _say(what: str, differences: Sequence[Difference]) -> None:
    if differences:
        rank_zero_info(f"{what}: {'; '.join(map(str, differences))}")
