"""What of a policy goes into a Lightning checkpoint, and which checkpoints a policy accepts."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from hbat_lightning.adapters import TRAINED
from hbat_lightning.base_model import same_weights
from hbat_lightning.errors import UserError
from hbat_lightning.policy import Policy

PREFIX = "policy."  # the attribute of the module that holds the policy


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """What trains in a module beside its policy, by name."""
    named = module.named_parameters()
    return {name: value for name, value in named if value.requires_grad and not name.startswith(PREFIX)}


def trained_state(state: dict[str, Any], policy: Policy | None, own: Iterable[str]) -> dict[str, Any]:
    """The part of a module's state dict that a checkpoint holds: what trains, and snapshots of it.

    Args:
        state: All of it.
        policy: The policy; ``None`` inside a hybrid.
        own: Names of what trains beside the policy.
    """
    if policy is None or not policy.built:
        return {}
    keep = {PREFIX + name for name in policy.checkpoint_names()} | set(own)
    return {name: value for name, value in state.items() if name in keep}


def adopt_state(
    checkpoint: dict[str, Any], policy: Policy, training: bool, own: Mapping[str, Tensor], other_base: bool = False
) -> None:
    """Check that a checkpoint fits the policy, before Lightning copies its tensors.

    Args:
        checkpoint: As loaded from the file; what evaluation has no use for, such as snapshots, is taken out of it.
        policy: A built policy.
        training: Whether training goes on from here, so that snapshots must be there.
        own: What trains in the module beside the policy, by name.
        other_base: Whether the base may be another one, if what trains fits it.

    Raises:
        UserError: When base, quantisation, rank or tensors differ; says which.
    """
    if "hbat" not in checkpoint:
        raise UserError("this checkpoint was not written by hbat_lightning: no policy is described in it")
    require_identity(checkpoint["hbat"]["policy"], policy, "the checkpoint", other_base)
    state = checkpoint["state_dict"]
    want = {PREFIX + name for name in policy.checkpoint_names()} | set(own)
    if not training:
        kept = {name: value for name, value in state.items() if name in want or _is_trained_policy(name)}
        checkpoint["state_dict"] = state = kept
    missing, surplus = sorted(want - set(state)), sorted(set(state) - want)
    if missing or surplus:
        example = (missing or surplus)[0].removeprefix(PREFIX)
        raise UserError(
            f"the checkpoint's tensors do not match the policy's: {len(missing)} missing, {len(surplus)} too many, "
            f"for example {example}. Check lora.target_modules, the preference reference and the callbacks of the run"
        )
    tensors = {PREFIX + name: value for name, value in policy.named_parameters()} | dict(own)
    for name, value in state.items():
        here = tensors[name]
        if here.shape != value.shape:
            raise UserError(
                f"{name.removeprefix(PREFIX)} has shape {tuple(value.shape)} in the checkpoint, {tuple(here.shape)} here"
            )


def require_identity(saved: dict[str, Any], policy: Policy, what: str, other_base: bool = False) -> None:
    """Check that trained tensors were trained on this base and with this adapter.

    Args:
        saved: The :meth:`Policy.identity` of the policy that they were part of.
        policy: A built policy.
        what: What holds the tensors, for the message.
        other_base: Whether the base may be another one.

    Raises:
        UserError: When they were not; says what differs.
    """
    mine = policy.identity()
    # The name of a base may change when its folder moves; its weights may not.
    differing = [key for key in mine if key not in ("base", "base_fingerprint") and mine[key] != saved.get(key)]
    if not other_base and not same_weights(mine["base_fingerprint"], saved["base_fingerprint"]):
        differing.append("base_fingerprint")
    if differing:
        named = [f"{key.replace('_', ' ')} {saved.get(key)!r} there, {mine[key]!r} here" for key in differing]
        raise UserError(
            f"{what} belongs to another policy (base {saved['base']}, here {mine['base']}): "
            + "; ".join(named)
            + ". Give the run's own model settings, or start a new run"
        )


def _is_trained_policy(name: str) -> bool:
    """Whether a tensor is of the policy itself: no snapshot, no other adapter, and of no objective's own."""
    if not name.startswith(f"{PREFIX}model."):
        return False
    adapter = re.search(r"\.lora_\w+\.(\w+)\.", name)
    return adapter is None or adapter[1] == TRAINED
