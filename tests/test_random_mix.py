"""ALRIGHT: the objective of every step drawn anew, inside one phase."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from hbat_lightning import (
    DataSource,
    DPOModule,
    GenerationSettings,
    HybridDataModule,
    LoraSettings,
    PPOModule,
    SFTModule,
)
from hbat_lightning.callbacks import SwitchReport, WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.phases import BOTH
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Interval, RandomMix
from hbat_lightning.values import AdapterValue
from tests.support import Recorder, instruction_loss, largest_difference, pair_scores, preference_loss, put, same_bits
from tests.test_stream import rounds, rows_in, stream, windows


def drawn(seed: int, count: int, probability: float) -> list[str]:
    generator = random.Random(seed)
    return [PREFERENCE if generator.random() < probability else INSTRUCTION for _ in range(count)]


def mixed(make_hybrid: Any, schedule: Any, policy: Any = None, **settings: Any) -> Any:
    return make_hybrid(
        policy,
        schedule=schedule,
        instruction=SFTModule(),
        preference=settings.pop("preference", None) or DPOModule(beta=0.5),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=2e-3),
        **settings,
    )


@pytest.mark.parametrize("probability", [0.0, 0.25, 1.0])
def test_objectives_are_those_of_the_seed(probability: float) -> None:
    schedule = RandomMix(3, 40, probability, seed=7)
    plan = schedule.plan({INSTRUCTION: [5], PREFERENCE: [3]})
    parts = [part for phase in plan.phases for step in range(phase.windows) for part in phase.parts(step)]
    assert [part.objective for part in parts] == drawn(7, 120, probability)
    for objective in (INSTRUCTION, PREFERENCE):
        own = [part.window for part in parts if part.objective == objective]
        assert own == list(range(len(own)))  # every window of either data set in its turn
    if probability == 0.25:
        assert 0.15 < sum(part.objective == PREFERENCE for part in parts) / 120 < 0.35
        other = RandomMix(3, 40, probability, seed=8).plan({INSTRUCTION: [5], PREFERENCE: [3]})
        assert [p.order for p in other.phases] != [p.order for p in plan.phases]
    assert (plan.phase_count, plan.total_steps, len(plan.rounds)) == (1, 120, 3)
    assert [step for step in range(121) if plan.ended_at(step)] == [120]
    assert {phase.objective for phase in plan.phases} == {BOTH}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preference_probability must be in \[0, 1\], got 1.5"):
        RandomMix(preference_probability=1.5)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        RandomMix(steps=0)


def test_either_objective_meets_its_rows_in_the_order_of_any_other_schedule() -> None:
    def met(schedule: Any) -> dict[str, list[int]]:
        rows: dict[str, list[int]] = {INSTRUCTION: [], PREFERENCE: []}
        for window in windows(stream(schedule)):
            assert len({batch.objective for batch in window}) == 1
            rows[window[0].objective] += rows_in(window)
        return rows

    mix, turns = met(RandomMix(2, 15)), met(Interval(2, 15, 15))
    assert all(mix[name] == turns[name][: len(mix[name])] for name in mix)
    assert min(map(len, mix.values())) > 11  # past the end of the smaller data set


def test_going_on_from_any_position_yields_the_rest() -> None:
    def make(seed: int = 3) -> Any:
        return stream(RandomMix(2, 6, seed=seed))

    whole = [[(b.inputs["rows"].tolist(), *b[1:]) for b in batches] for batches in rounds(make())]
    for number, batches in enumerate(whole):
        for position in range(len(batches) + 1):
            source = make()
            source.load_state_dict(make().state_dict() | {"round": number, "position": position})
            assert [(b.inputs["rows"].tolist(), *b[1:]) for b in source] == batches[position:]
    with pytest.raises(UserError, match="schedule was"):
        make().load_state_dict(make(4).state_dict())


def test_every_step_is_the_gradient_of_the_drawn_objective_and_there_is_no_switch(
    make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    """One phase: one reference, from the start of the run, moments and rate that run through, figures every round."""
    recorder = Recorder()
    report = SwitchReport()
    module = mixed(make_hybrid, RandomMix(2, 6, seed=5), make_policy(double=True))
    run = fit(module, recorder, report, data=make_data(28, 16), gradient_clip_val=None, num_sanity_val_steps=-1)
    objectives = drawn(5, 12, 0.5)
    assert set(objectives) == {INSTRUCTION, PREFERENCE}
    model, trained = module.policy.model, module.policy.trained_parameters()
    module.policy.set_training(dropout=False)
    for step, window in enumerate(recorder.windows):
        assert {batch.objective for batch in window} == {objectives[step]}
        put(module, recorder.parameters[0])
        with torch.no_grad():
            reference = pair_scores(model, window) if objectives[step] == PREFERENCE else None
        put(module, recorder.parameters[step])
        if reference is None:
            loss = instruction_loss(model, window)
        else:
            loss = preference_loss(pair_scores(model, window), reference, beta=0.5)
        truth = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        assert largest_difference(recorder.gradients[step], truth) < 1e-12
    optimizer = run.trainer.optimizers[0]
    assert {int(optimizer.state[parameter]["step"]) for parameter in trained.values()} == {12}
    rows = [row for row in run.log.rows if "phase/index" in row]
    assert [{name.split("/")[1] for name in row if name.startswith("train/")} for row in rows] == [
        {objective} for objective in objectives
    ]
    assert run.log.column("lr")[0] == pytest.approx(2e-3)
    assert [row["step"] for row in run.log.rows if "val/preference/loss" in row] == [5, 11]
    assert len(report.path(run.trainer).read_text().splitlines()) == 1
    assert report.path(run.trainer).with_suffix(".png").exists()


def test_own_learning_rates_are_refused(make_hybrid: Any, fit: Any) -> None:
    with pytest.raises(UserError, match=r"model.init_args.instruction.init_args.lr: .* null"):
        fit(make_hybrid(schedule=RandomMix(1, 2)))


def test_a_run_goes_on_bit_identical(
    make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Any:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        module = mixed(make_hybrid, RandomMix(2, 6, seed=5), policy)
        return fit(
            module, checkpoint, data=make_data(37, 21), ckpt_path=ckpt_path, enable_checkpointing=True, **trainer
        )

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    parts = [run("parts", max_steps=4), run("parts", last, max_steps=9), run("parts", last)]
    assert same_bits(whole.weights, parts[-1].weights)
    assert same_bits(whole.module.policy.snapshot("phase_start"), parts[-1].module.policy.snapshot("phase_start"))
    for name in ("train/instruction/loss", "train/preference/loss", "lr", "val/preference/loss"):
        assert [value for part in parts for value in part.log.column(name)] == whole.log.column(name), name


def test_with_ppo_cycles_go_on_over_the_draws_and_a_run_goes_on_from_inside_one(
    make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path
) -> None:
    """Instruction steps fall between a cycle's windows: its first ratio is 1, and later ones tell how far the policy went."""

    def letters(prompt: str, completion: str) -> float:
        return len(set(completion)) / 10 + 0.01 * (len(prompt) % 7)

    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Any:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        ppo = PPOModule(
            FunctionReward(letters),
            value=AdapterValue(LoraSettings(r=4, alpha=8)),
            sampling=GenerationSettings(max_new_tokens=6, temperature=1.0),
            rollout_windows=2,
            passes=2,
        )
        data = HybridDataModule(
            DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.1),
            # four windows of prompts: cycles of two, passed through twice
            DataSource(embedded.PREFERENCE, limit=16, val_fraction=0.0),
            batch_size=2,
        )
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = mixed(make_hybrid, RandomMix(2, 12, seed=5), policy, preference=ppo)
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt_path} | trainer
        return fit(module, checkpoint, data=data, **settings)

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    draws = drawn(5, 24, 0.5)
    assert ["train/preference/loss" in row for row in whole.log.rows if "phase/index" in row] == [
        objective == PREFERENCE for objective in draws
    ]
    ratios = whole.log.column("train/preference/ratio")
    assert len(ratios) > 8
    assert [ratio == 1.0 for ratio in ratios] == [number % 4 == 0 for number in range(len(ratios))]
    stop = next(s for s in range(3, 10) if draws[:s].count(PREFERENCE) % 4 == 2 and draws[s] == INSTRUCTION)
    parts = [run("parts", max_steps=stop), run("parts", last, max_steps=13), run("parts", last)]
    assert same_bits(whole.weights, parts[-1].weights)
    for name in ("train/instruction/loss", "train/preference/loss", "train/preference/ratio"):
        assert [value for part in parts for value in part.log.column(name)] == whole.log.column(name) != [], name
