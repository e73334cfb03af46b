"""An optimizer's step on tensors without values."""

from __future__ import annotations

import torch
from bitsandbytes.optim.optimizer import Optimizer8bit
from torch._subclasses.fake_tensor import unset_fake_temporarily


def optimizer_step(optimizer: torch.optim.Optimizer, gpu: bool) -> None:
    """Step, with the temporaries that the step has on this device.

    Args:
        optimizer: The run's optimizer; its parameters have gradients.
        gpu: On GPUs torch's optimizers go through all tensors at once (``foreach``), with temporaries for all of them.
    """
    if isinstance(optimizer, Optimizer8bit):
        _make_states(optimizer)
        return
    for group in optimizer.param_groups:
        if group.get("foreach", True) is None and not group.get("fused"):
            group["foreach"] = gpu
    optimizer.step()


def _make_states(optimizer: Optimizer8bit) -> None:
    """Make the states that bitsandbytes would; its kernels update in place and need nothing more."""
    if not optimizer.name2qmap:
        with unset_fake_temporarily():  # tables of 256 values, computed from values
            optimizer.fill_qmap()
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter.grad is not None and not optimizer.state[parameter]:
                optimizer.init_state(group, parameter, number, place)
