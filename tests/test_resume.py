"""A run that was stopped and goes on ends with the bits of the run that was never stopped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from hbat_lightning import DPOModule, LoraSettings
from hbat_lightning.callbacks import ElasticWeightConsolidation, WindowCheckpoint
from hbat_lightning.importance import RandomImportance, RunningFisher
from hbat_lightning.schedules import Rounds
from tests.support import Run, same_bits

DROPOUT = LoraSettings(r=4, alpha=8, dropout=0.1)
WIDE = LoraSettings(r=64, alpha=8, dropout=0.1)  # tensors of fewer than 4096 elements keep fp32 states


def optimizer_bits(run: Run) -> dict[str, torch.Tensor]:
    optimizer = run.trainer.optimizers[0]
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    return {f"{n}.{key}": torch.as_tensor(value) for n, state in enumerate(states) for key, value in state.items()}


def all_bits(run: Run, ewc: ElasticWeightConsolidation) -> dict[str, torch.Tensor]:
    """Everything that the rest of a run depends on."""
    state = ewc.state_dict()
    held = {f"{o}.{name}": value for o, tensors in state["held_for"].items() for name, value in tensors.items()}
    snapshots = {
        f"{kind}.{name}": value.detach()
        for kind in ("phase_start", "initial")
        for name, value in (run.module.policy.snapshot(kind) or {}).items()
    }
    idle = run.module._optimizer_states.state_dict()
    moments = {
        f"idle.{o}.{n}.{key}": torch.as_tensor(value)
        for o, states in idle.items()
        for n, values in states.items()
        for key, value in values.items()
    }
    return run.weights | held | state["importance"] | snapshots | moments | optimizer_bits(run)


@pytest.mark.parametrize(
    ("optimizer_state", "settings", "importance", "optimizer"),
    [
        ("reset", {"lora": DROPOUT}, None, torch.optim.AdamW),
        ("shared", {"lora": DROPOUT}, RunningFisher, torch.optim.AdamW),
        ("per_objective", {"lora": DROPOUT, "gradient_checkpointing": True}, RandomImportance, torch.optim.AdamW),
        ("per_objective", {"lora": None}, None, torch.optim.AdamW),
        ("reset", {"lora": DROPOUT, "quantization": "nf4"}, None, torch.optim.AdamW),
        ("shared", {"lora": WIDE}, None, bnb.optim.AdamW8bit),
        ("per_objective", {"lora": WIDE}, None, bnb.optim.AdamW8bit),
    ],
    ids=["reset", "shared", "per_objective", "full", "nf4", "8-bit shared", "8-bit per_objective"],
)
def test_it_goes_on_bit_identical_from_the_middle_of_either_phase(
    optimizer_state: Any,
    settings: Any,
    importance: Any,
    optimizer: Any,
    make_policy: Any,
    make_hybrid: Any,
    make_data: Any,
    fit: Any,
    tmp_path: Path,
) -> None:
    """Stopped in an instruction phase and, after going on, in a preference phase of the next round."""

    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> tuple[Run, dict[str, torch.Tensor]]:
        ewc = ElasticWeightConsolidation(20.0, importance and importance())
        module = make_hybrid(
            make_policy(**settings),
            preference=DPOModule(beta=0.5, lr=2e-3),
            schedule=Rounds(2, 1, 1),
            optimizer=lambda parameters: optimizer(parameters, lr=1e-3),
            optimizer_state=optimizer_state,
        )
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        done = fit(
            module,
            ewc,
            checkpoint,
            data=make_data(37, 21),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            **trainer,
        )
        return done, all_bits(done, ewc)

    whole, truth = run("whole")
    last = tmp_path / "parts" / "last.ckpt"
    assert (torch.uint8 in {value.dtype for value in optimizer_bits(whole).values()}) == (
        optimizer is bnb.optim.AdamW8bit
    )
    lengths = [phase.windows for phase in whole.module.plan.phases]
    assert lengths == [4, 2, 4, 2]
    parts = []
    for stop in (4 + 2 + 2, 4 + 2 + 4 + 1):  # in the second round's phases, so that EWC has something to hold
        part, _ = run("parts", last if parts else None, max_steps=stop)
        assert part.trainer.global_step == stop
        parts.append(part)
    rest, end = run("parts", last)
    assert rest.trainer.global_step == whole.trainer.global_step == 12
    assert same_bits(truth, end)
    for name in ("train/instruction/loss", "train/preference/loss", "ewc/penalty", "lr"):
        pieces = [value for part in (*parts, rest) for value in part.log.column(name)]
        assert pieces == whole.log.column(name), name
    assert whole.log.column("val/preference/loss") == [
        value for part in (*parts, rest) for value in part.log.column("val/preference/loss")
    ]
