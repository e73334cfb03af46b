"""Both objectives in every window: the weighted loss, whose micro-batches take turns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from hbat_lightning import DataSource, DPOModule, GenerationSettings, HybridDataModule, LoraSettings, SFTModule
from hbat_lightning.callbacks import SwitchReport, WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.objectives.ppo import PPOModule
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Joint, Schedule
from hbat_lightning.training_data import MicroBatch
from hbat_lightning.values import AdapterValue
from tests.support import (
    Recorder,
    Run,
    instruction_loss,
    largest_difference,
    pair_scores,
    preference_loss,
    put,
    same_bits,
)
from tests.test_stream import rounds, rows_in, stream, windows


def of(window: list[MicroBatch], objective: str) -> list[MicroBatch]:
    return [batch for batch in window if batch.objective == objective]


# ---- windows ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [2, 3, 4, 7])
def test_micro_batches_take_turns_and_carry_the_weighted_sum_of_means(accumulate: int) -> None:
    source = stream(Joint(0.3, 0.6, epochs=2), accumulate=accumulate)
    passes: dict[str, list[int]] = {INSTRUCTION: [], PREFERENCE: []}
    for number, window in enumerate(windows(source)):
        turns = [(INSTRUCTION, PREFERENCE)[slot % 2] for slot in range(accumulate)]
        assert [batch.objective for batch in window] == turns
        assert [batch.last for batch in window] == [False] * (accumulate - 1) + [True]
        assert {(batch.phase, batch.step) for batch in window} == {(0, number)}
        assert len({batch.seed for batch in window}) == accumulate
        for objective, weight in ((INSTRUCTION, 0.3), (PREFERENCE, 0.6)):
            sums = [
                (b.scale, sum(row + 1.0 for row in b.inputs["rows"].tolist() if row >= 0))
                for b in of(window, objective)
            ]
            assert sum(scale * value for scale, value in sums) / accumulate == pytest.approx(weight)
            passes[objective] += rows_in(of(window, objective))
    assert sorted(passes[PREFERENCE]) == sorted(2 * list(range(11)))
    seen = passes[INSTRUCTION]
    assert len(set(seen[:17])) == min(17, len(seen))  # cycled: no row twice before all have come once
    assert passes[PREFERENCE][:11] != passes[PREFERENCE][11:]


def test_going_on_from_any_position_yields_the_rest() -> None:
    def make() -> Any:
        return stream(Joint(epochs=2), accumulate=3)

    for number, batches in enumerate(rounds(make())):
        truth = [(b.inputs["rows"].tolist(), *b[1:]) for b in batches]
        for position in range(len(batches) + 1):
            source = make()
            source.load_state_dict(make().state_dict() | {"round": number, "position": position})
            assert [(b.inputs["rows"].tolist(), *b[1:]) for b in source] == truth[position:]


def test_what_cannot_be_is_refused(make_hybrid: Any, fit: Any) -> None:
    with pytest.raises(UserError, match=r"set trainer.accumulate_grad_batches to at least 2"):
        fit(make_hybrid(schedule=Joint()), accumulate_grad_batches=1)
    with pytest.raises(UserError, match=r"model.init_args.instruction.init_args.lr: .* null"):
        fit(make_hybrid(schedule=Joint()))
    with pytest.raises(ValueError, match=r"weights must be above 0, got 0.0 and 1.0"):
        Joint(0.0)
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        Joint(epochs=0)


# ---- training -----------------------------------------------------------------------------------------------------------


def joined(make_hybrid: Any, policy: Any, schedule: Schedule, preference: Any = None, instruction: Any = None) -> Any:
    return make_hybrid(
        policy,
        schedule=schedule,
        instruction=instruction or SFTModule(),
        preference=preference or DPOModule(beta=0.5),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.1),
    )


@pytest.mark.parametrize(("batch_size", "accumulate", "full"), [(4, 2, False), (1, 8, False), (2, 3, True)])
def test_gradient_is_that_of_the_written_loss(
    batch_size: int, accumulate: int, full: bool, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    """fp64, rows one by one: w_i times the mean over the window's tokens plus w_p times the mean over its pairs."""
    recorder, report = Recorder(), SwitchReport()
    policy = make_policy(double=True, **({"lora": None} if full else {}))
    module = joined(make_hybrid, policy, Joint(0.3, 1.7))
    data = make_data(28, 14, batch_size=batch_size)  # 21 rows and 10 pairs, so that last windows are ragged
    run = fit(
        module,
        recorder,
        report,
        data=data,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=None,
        num_sanity_val_steps=-1,
    )
    model, trained = module.policy.model, module.policy.trained_parameters()
    module.policy.set_training(dropout=False)
    figures = run.log.table("train/instruction/loss", "train/preference/loss", "train/preference/accuracy")
    for step, window in enumerate(recorder.windows):
        pairs = of(window, PREFERENCE)
        put(module, recorder.parameters[0])
        with torch.no_grad():
            reference = pair_scores(model, pairs)
        put(module, recorder.parameters[step])
        first = instruction_loss(model, of(window, INSTRUCTION))
        second = preference_loss(pair_scores(model, pairs), reference, beta=0.5)
        loss = 0.3 * first + 1.7 * second
        truth = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        assert largest_difference(recorder.gradients[step], truth) < 1e-12
        assert figures[step][:2] == pytest.approx((first.item(), second.item()), rel=1e-6)
    assert float(run.trainer.callback_metrics["loss"]) == pytest.approx(loss.item(), rel=1e-6)
    assert (
        run.trainer.global_step == len(figures) == len(recorder.windows) == -(-10 // (batch_size * (accumulate // 2)))
    )
    assert [row["step"] for row in run.log.rows if "val/preference/loss" in row] == [run.trainer.global_step - 1]
    (row,) = report.path(run.trainer).read_text().splitlines()
    assert '"objective": "both"' in row


def test_either_objective_has_its_own_dropout_in_one_window(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    recorder = Recorder()
    policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.5))
    run = fit(joined(make_hybrid, policy, Joint()), recorder, accumulate_grad_batches=4)
    step, pairs = 1, of(recorder.windows[1], PREFERENCE)  # at the first step the adapter says nothing yet
    policy.set_training(dropout=False)
    with torch.no_grad():
        put(run.module, recorder.parameters[0])
        reference = pair_scores(policy.model, pairs)
        put(run.module, recorder.parameters[step])
        preference = preference_loss(pair_scores(policy.model, pairs), reference, beta=0.5).item()
        instruction = instruction_loss(policy.model, of(recorder.windows[step], INSTRUCTION)).item()
    assert abs(preference - math.log(2)) > 1e-3
    assert run.log.column("train/preference/loss")[step] == pytest.approx(preference, abs=1e-5)
    assert abs(run.log.column("train/instruction/loss")[step] - instruction) > 1e-4


# ---- rollouts -----------------------------------------------------------------------------------------------------------


def letters(prompt: str, completion: str) -> float:
    return len(set(completion)) / 10 + 0.01 * (len(prompt) % 7)


def ppo(**settings: Any) -> PPOModule:
    sampling = GenerationSettings(max_new_tokens=6, temperature=1.0)
    return PPOModule(
        FunctionReward(letters), sampling=sampling, value=AdapterValue(LoraSettings(r=4, alpha=8)), **settings
    )


def prompts(batch_size: int = 2) -> HybridDataModule:
    return HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.1),
        DataSource(embedded.PREFERENCE, limit=16, val_fraction=0.1),
        batch_size=batch_size,
    )


def test_with_ppo_the_gradient_is_the_weighted_sum_of_those_of_either_alone(
    make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    """At the first step, where all three runs have the same policy, and with it the same rollouts."""
    alone = []
    for module in (SFTModule(make_policy()), ppo(policy=make_policy())):
        recorder = Recorder()
        fit(module, recorder, data=prompts(), accumulate_grad_batches=1, max_steps=1)
        alone.append(recorder.gradients[0])
    recorder = Recorder()
    module = joined(make_hybrid, make_policy(), Joint(0.3, 0.6), ppo())
    run = fit(module, recorder, data=prompts(), accumulate_grad_batches=2, max_steps=1)
    truth = {name: 0.3 * value + 0.6 * alone[1][name] for name, value in alone[0].items()}
    assert largest_difference(recorder.gradients[0], truth) < 1e-6
    assert max(float(value.abs().max()) for value in alone[1].values()) > 1e-4
    assert run.log.column("train/preference/ratio") == [1.0]


@pytest.mark.parametrize("kind", ["dpo", "ppo"])
def test_a_run_goes_on_bit_identical(
    kind: str, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    """With PPO also from inside a cycle of rollouts."""

    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Run:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        preference = ppo(passes=2, rollout_windows=2) if kind == "ppo" else DPOModule(beta=0.5)
        module = joined(make_hybrid, policy, Joint(0.3, 0.6, epochs=2), preference)
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        data = prompts() if kind == "ppo" else make_data(24, 16)
        done: Run = fit(
            module,
            checkpoint,
            data=data,
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            accumulate_grad_batches=3,
            **trainer,
        )
        return done

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    steps = whole.trainer.global_step
    parts = [run("parts", max_steps=3), run("parts", last, max_steps=steps // 2 + 2), run("parts", last)]
    assert parts[-1].trainer.global_step == steps > 8
    assert same_bits(whole.weights, parts[-1].weights)
    assert same_bits(whole.module.policy.snapshot("phase_start"), parts[-1].module.policy.snapshot("phase_start"))
    for name in ("train/instruction/loss", "train/preference/loss", "lr", "val/instruction/loss"):
        assert [value for part in parts for value in part.log.column(name)] == whole.log.column(name), name
