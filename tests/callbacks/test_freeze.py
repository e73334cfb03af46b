"""Freezing inside real runs: what is frozen by a loop by hand, and that it does not move by one bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from hbat_lightning import LoraSettings
from hbat_lightning.adapters import TRAINED
from hbat_lightning.callbacks import ElasticWeightConsolidation, ImportanceFreeze, WindowCheckpoint
from hbat_lightning.errors import UserError
from hbat_lightning.importance import DriftImportance, RunningFisher
from hbat_lightning.schedules import Interval, RandomMix, Rounds
from tests.support import Recorder, Run, Tensors, same_bits


class Unfreezer(Callback):
    """Chooses the adapter anew before every micro-batch, as PEFT does it: all of its tensors want gradients then."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.policy.lora is not None:
            pl_module.policy.model.set_adapter(TRAINED)


class Moments(Callback):
    """First moments after every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[Tensors] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch.last:
            state = trainer.optimizers[0].state
            trained = pl_module.policy.trained_parameters()
            self.steps.append({name: state[p]["exp_avg"].clone() for name, p in trained.items() if p in state})


def top(recorder: Recorder, phase: int, fraction: float) -> set[str]:
    """What the other objective's phases before this one moved most, by the recorded phase starts."""
    starts = recorder.phase_starts
    moved = {
        name: sum(
            float((starts[earlier + 1][name] - starts[earlier][name]).square().mean())
            for earlier in range(phase - 1, -1, -2)
        )
        for name in starts[0]
    }
    ranked = sorted(moved, key=lambda name: -moved[name])
    return set(ranked[: round(fraction * len(ranked))]) if phase else set()


def decayed(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.5)


@pytest.mark.parametrize("kind", ["lora", "full", "dropout and checkpointing"])
@pytest.mark.parametrize("state", ["reset", "shared"])
def test_the_top_fifth_stands_still_and_all_else_moves(
    kind: str, state: Any, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    """With weight decay, moments from earlier phases, and gradients asked for anew: not one bit of one tensor."""
    settings: dict[str, Any] = {"full": {"lora": None}, "lora": {}}.get(
        kind, {"lora": LoraSettings(r=4, alpha=8, dropout=0.1), "gradient_checkpointing": True}
    )
    recorder, moments = Recorder(), Moments()
    module = make_hybrid(make_policy(**settings), schedule=Interval(2, 3, 3), optimizer=decayed, optimizer_state=state)
    run: Run = fit(module, Unfreezer(), ImportanceFreeze(), recorder, moments)
    ends = [*recorder.parameters[1:], run.weights]
    for step, phase in enumerate(recorder.phases):
        frozen = top(recorder, phase, 0.2)
        assert len(frozen) == (0 if phase == 0 else round(0.2 * len(run.weights)))
        assert recorder.gradients[step].keys() == run.weights.keys() - frozen
        for name, value in recorder.parameters[step].items():
            assert torch.equal(ends[step][name], value) == (name in frozen), (phase, name)
            if name in frozen and state == "shared":
                assert torch.equal(moments.steps[step][name], moments.steps[3 * phase - 1][name])
            if name in frozen and state == "reset":
                assert name not in moments.steps[step]
    thawed = [top(recorder, phase, 0.2) for phase in range(4)]
    assert thawed[1] - thawed[2]  # what stood still moves again
    assert run.log.column("freeze/tensors") == [float(len(thawed[phase])) for phase in recorder.phases]


def test_gradients_of_frozen_tensors_count_for_importance_and_not_for_clipping(make_hybrid: Any, fit: Any) -> None:
    """Running Fisher sees all tensors, else what is frozen once would look unimportant; the norm is of what moves."""
    freeze, seen = ImportanceFreeze(0.5, RunningFisher()), []

    class Norm(Callback):
        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            grads = [p.grad for p in pl_module.policy.trained_parameters().values() if p.grad is not None]
            seen.append(float(torch.stack([g.norm() for g in grads]).norm()) if grads else 0.0)

    recorder = Recorder()
    run = fit(make_hybrid(schedule=Interval(2, 3, 3)), freeze, Norm(), recorder, gradient_clip_val=1e-3)
    norms = [norm for norm in seen if norm > 0]  # a validation takes gradients away
    assert norms == pytest.approx([1e-3] * 8, rel=1e-3)
    assert all(
        len(gradients) == (28 if phase == 0 else 14)
        for gradients, phase in zip(recorder.gradients, recorder.phases, strict=True)
    )
    assert {name.removeprefix("sum.") for name in freeze.importance.state_dict() if name != "steps"} == set(run.weights)


def test_what_has_not_moved_is_not_frozen(make_hybrid: Any, fit: Any) -> None:
    module, freeze = make_hybrid(schedule=Interval(1, 2, 2)), ImportanceFreeze()
    module.instruction.lr = 1e-30  # 0 would mean the optimizer's own rate
    run = fit(module, freeze)
    assert freeze.frozen == ()
    assert run.log.column("freeze/tensors") == [0.0] * 4


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.2, 20])
def test_shares_that_are_none_are_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction must be between 0 and 1"):
        ImportanceFreeze(fraction)


@pytest.mark.parametrize("make", [ImportanceFreeze, ElasticWeightConsolidation])
def test_one_phase_of_both_objectives_is_refused(make: Any, make_hybrid: Any, fit: Any) -> None:
    with pytest.raises(
        UserError, match=f"{make.__name__} protects what the other .* leave it out of trainer.callbacks"
    ):
        fit(make_hybrid(schedule=RandomMix(1, 2)), make())


@pytest.mark.parametrize("importance", [DriftImportance, RunningFisher])
def test_a_run_goes_on_bit_identical(
    importance: Any, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> tuple[Run, ImportanceFreeze]:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        freeze = ImportanceFreeze(0.3, importance())
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = make_hybrid(policy, schedule=Rounds(2, 2, 2), optimizer=decayed, optimizer_state="shared")
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        done = fit(
            module,
            freeze,
            checkpoint,
            data=make_data(37, 21),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            **trainer,
        )
        return done, freeze

    (whole, truth), last = run("whole"), tmp_path / "parts" / "last.ckpt"
    parts = [run("parts", max_steps=10), run("parts", last, max_steps=15), run("parts", last)]
    assert same_bits(whole.weights, parts[-1][0].weights)
    assert parts[-1][1].frozen == truth.frozen != ()
    assert parts[0][1].frozen != parts[1][1].frozen
    for objective, held in truth.state_dict()["held_for"].items():
        assert same_bits(held, parts[-1][1].state_dict()["held_for"][objective])
    for name in ("train/instruction/loss", "train/preference/loss", "freeze/tensors"):
        assert [value for part, _ in parts for value in part.log.column(name)] == whole.log.column(name), name
