"""MAXRIGHT: the objective with the larger weighted gap trains, by losses that are recomputed here."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from hbat_lightning import (
    DataSource,
    DPOModule,
    GenerationSettings,
    HybridDataModule,
    LoraSettings,
    PPOModule,
    SFTModule,
)
from hbat_lightning.callbacks import WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.objectives.critic_free import REINFORCEModule
from hbat_lightning.phases import Part, Progress
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Interval, MaxGap
from hbat_lightning.stream import WindowStream
from hbat_lightning.training_data import MicroBatch
from hbat_lightning.values import AdapterValue
from tests.support import Recorder, Run, instruction_loss, pair_scores, preference_loss, put, same_bits

SCHEDULE = {"preference_weight": 0.85, "instruction_best": 1.5, "preference_best": 0.1, "refresh": 3}


def by_gaps(make_hybrid: Any, policy: Any, schedule: MaxGap, **settings: Any) -> Any:
    defaults: dict[str, Any] = {"instruction": SFTModule(), "preference": DPOModule(beta=0.5)}
    optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=4e-3)  # noqa: E731
    return make_hybrid(policy, schedule=schedule, optimizer=optimizer, **(defaults | settings))


def test_choices_follow_the_gaps_as_they_were_last_seen() -> None:
    """By hand: instruction weighs 1/4 above 1, preference 3/4 above 0; both are measured at steps 0 and 3."""
    plan = MaxGap(2, 3, 0.75, instruction_best=1.0, refresh=3).plan({INSTRUCTION: [2], PREFERENCE: [2]})
    asked: list[tuple[Part, ...]] = []
    measured = {0: (9.0, 1.0), 3: (1.0, 0.5)}
    trained = [4.6, 3.9, 0.9, 0.8, 0.3, 0.0]
    found = []
    for step in range(6):
        parts: list[Part] = []

        def measure(part: Part, step: int = step, parts: list[Part] = parts) -> Progress:
            parts.append(part)
            return Progress(measured[step][part.objective == PREFERENCE])

        plan.choose(step, measure)
        phase, inside = plan.at(step)
        (part,) = phase.parts(inside - phase.offset)
        plan.report(part.objective, Progress(trained[step]))
        found.append((part.objective, part.window))
        asked.append(tuple(parts))
    # gaps: 2 | .75 ; .9 | .75 ; .725 | .75 ; 0 | .375 ; 0 | .6 ; 0 | .225
    assert found == [
        (INSTRUCTION, 0),
        (INSTRUCTION, 1),
        (PREFERENCE, 0),
        (PREFERENCE, 1),
        (PREFERENCE, 2),
        (PREFERENCE, 3),
    ]
    assert asked == [
        (Part(INSTRUCTION, 0, 0), Part(PREFERENCE, 0, 0)),
        (),
        (),
        (Part(INSTRUCTION, 0, 2), Part(PREFERENCE, 0, 1)),
        (),
        (),
    ]


def test_in_a_run_every_choice_is_that_of_recomputed_losses(
    make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    """fp64: on the window that either would train on next, rows one by one, with the reference of the run's start."""
    recorder = Recorder()
    module = by_gaps(make_hybrid, make_policy(double=True), MaxGap(2, 9, **SCHEDULE))
    run = fit(module, recorder, data=make_data(28, 16))
    twin = WindowStream(Interval(1, 18, 18), run.data.train_sets, 2, 3, module.run_seed)
    batches = list(twin)
    own = {name: [b for b in batches if b.objective == name] for name in (INSTRUCTION, PREFERENCE)}
    model = module.policy.model
    module.policy.set_training(dropout=False)

    @torch.no_grad()
    def loss(window: list[MicroBatch], step: int) -> float:
        if window[0].objective == INSTRUCTION:
            put(module, recorder.parameters[step])
            return instruction_loss(model, window).item()
        put(module, recorder.parameters[0])
        reference = pair_scores(model, window)
        put(module, recorder.parameters[step])
        return preference_loss(pair_scores(model, window), reference, beta=0.5).item()

    seen, losses, chosen = {INSTRUCTION: 0, PREFERENCE: 0}, {INSTRUCTION: 0.0, PREFERENCE: 0.0}, []
    gaps = run.log.table("gap/instruction", "gap/preference")
    for step in range(18):
        coming = {name: own[name][3 * seen[name] : 3 * seen[name] + 3] for name in own}
        if step % 3 == 0:
            losses = {name: loss(coming[name], step) for name in own}
        best = {INSTRUCTION: 0.15 * (losses[INSTRUCTION] - 1.5), PREFERENCE: 0.85 * (losses[PREFERENCE] - 0.1)}
        name = max(best, key=lambda one: best[one])
        assert {batch.objective for batch in recorder.windows[step]} == {name}
        trained, expected = recorder.windows[step], coming[name]
        assert all(torch.equal(a.inputs["index"], b.inputs["index"]) for a, b in zip(trained, expected, strict=True))
        losses[name] = loss(coming[name], step)
        seen[name] += 1
        chosen.append(name)
        assert gaps[step] == pytest.approx(
            (0.15 * (losses[INSTRUCTION] - 1.5), 0.85 * (losses[PREFERENCE] - 0.1)), rel=1e-6
        )
    assert min(seen.values()) >= 3
    assert len(list(itertools.groupby(chosen))) >= 3  # it went to and fro
    assert run.module.plan.phase_count == 1


def test_a_run_goes_on_bit_identical(
    make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Path
) -> None:
    """With dropout, stopped between measurements and at one, and in either round."""

    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Run:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = by_gaps(make_hybrid, policy, MaxGap(2, 9, **SCHEDULE))
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        done: Run = fit(
            module, checkpoint, data=make_data(37, 21), ckpt_path=ckpt_path, enable_checkpointing=True, **trainer
        )
        return done

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    parts = [run("parts", max_steps=stop, ckpt_path=last if stop > 2 else None) for stop in (2, 6, 13)]
    parts.append(run("parts", last))
    assert same_bits(whole.weights, parts[-1].weights)
    assert whole.module.plan.state_dict() == parts[-1].module.plan.state_dict()
    names = (
        "train/instruction/loss",
        "train/preference/loss",
        "gap/instruction",
        "gap/preference",
        "val/preference/loss",
    )
    for name in names:
        assert [value for part in parts for value in part.log.column(name)] == whole.log.column(name), name
    assert len(set(whole.module.plan.state_dict()["chosen"])) == 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"preference_weight must be in \[0, 1\], got -0.1"):
        MaxGap(preference_weight=-0.1)
    with pytest.raises(ValueError, match="refresh must be at least 1, got 0"):
        MaxGap(refresh=0)


# ---- rollouts -----------------------------------------------------------------------------------------------------------


def test_the_gap_of_a_reward_is_what_it_lacks() -> None:
    assert Progress(0.25, rising=True).gap(1.0) == 0.75
    assert Progress(0.25).gap(1.0) == -0.75
    schedule = MaxGap(1, 4, 0.5, instruction_best=1.0, preference_best=2.0)
    plan = schedule.plan({INSTRUCTION: [2], PREFERENCE: [2]})
    plan.choose(0, lambda part: Progress(1.5, rising=part.objective == PREFERENCE))
    assert plan.figures == {"gap/instruction": 0.25, "gap/preference": 0.25}
    plan.report(PREFERENCE, Progress(-1.0, rising=True))
    assert plan.figures["gap/preference"] == 1.5


def prompts() -> HybridDataModule:
    return HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.1),
        DataSource(embedded.PREFERENCE, limit=16, val_fraction=0.0),
        batch_size=2,
    )


SAMPLING = GenerationSettings(max_new_tokens=6, temperature=1.0)


def test_on_rollouts_the_gap_is_that_of_rewards_and_measured_ones_are_sampled_anew(
    make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    """Every reward that is given is seen here: those of a measurement, and those of a window whose turn it is."""
    given: list[float] = []
    steps: list[list[float]] = []

    def reward(prompt: str, completion: str) -> float:
        given.append(len(set(completion)) / 10 + 0.01 * (len(prompt) % 7))
        return given[-1]

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: MicroBatch, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                steps.append(given.copy())
                given.clear()

        def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
            given.clear()

        def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
            given.clear()

    objective = REINFORCEModule(FunctionReward(reward), sampling=SAMPLING)
    schedule = MaxGap(2, 9, 0.9, instruction_best=1.0, preference_best=1.4, refresh=3)
    module = by_gaps(make_hybrid, make_policy(), schedule, preference=objective)
    run = fit(module, Watch(), data=prompts(), accumulate_grad_batches=2)
    rows = [row for row in run.log.rows if "gap/preference" in row]
    chosen = [PREFERENCE if "train/preference/loss" in row else INSTRUCTION for row in rows]
    assert len(rows) == len(steps) == 18
    assert set(chosen) == {INSTRUCTION, PREFERENCE}
    gaps: dict[str, float] = {}
    refreshed = Counter(chosen[::3])
    assert refreshed[INSTRUCTION] > 0  # then what was sampled to measure is not trained on
    for step, (row, name, seen) in enumerate(zip(rows, chosen, steps, strict=True)):
        assert len(seen) == (4 if step % 3 == 0 or name == PREFERENCE else 0)  # four prompts in a window
        if step % 3 == 0:
            gaps = {INSTRUCTION: row["gap/instruction"], PREFERENCE: 0.9 * (1.4 - sum(seen) / 4)}
            if name == INSTRUCTION:
                assert row["gap/preference"] == pytest.approx(gaps[PREFERENCE], abs=1e-6)
        else:
            assert name == max(gaps, key=lambda one: gaps[one])
        if name == PREFERENCE:
            assert row["train/preference/ratio"] == 1.0
            assert row["train/preference/reward"] == pytest.approx(sum(seen) / 4, rel=1e-6)
            assert row["gap/preference"] == pytest.approx(0.9 * (1.4 - row["train/preference/reward"]), abs=1e-6)
        gaps = {one: row[f"gap/{one}"] for one in gaps}


def test_a_run_on_rollouts_goes_on_bit_identical(make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    """Stopped inside a cycle, and where a cycle had only been measured."""

    def letters(prompt: str, completion: str) -> float:
        return len(set(completion)) / 10 + 0.01 * (len(prompt) % 7)

    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Run:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        value = AdapterValue(LoraSettings(r=4, alpha=8))
        objective = PPOModule(FunctionReward(letters), value=value, sampling=SAMPLING, rollout_windows=2, passes=2)
        schedule = MaxGap(2, 9, 0.9, instruction_best=1.0, preference_best=1.4, refresh=3)
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        module = by_gaps(make_hybrid, policy, schedule, preference=objective)
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        settings = {"accumulate_grad_batches": 2, "enable_checkpointing": True, "ckpt_path": ckpt_path} | trainer
        done: Run = fit(module, checkpoint, data=prompts(), **settings)
        return done

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    chosen = whole.module.plan.state_dict()["chosen"]
    assert len(set(chosen)) == 2
    inside = next(step for step in range(2, 18) if chosen[:step].count(PREFERENCE) % 4 in (1, 2, 3))
    parts = [run("parts", max_steps=stop, ckpt_path=last if stop > 1 else None) for stop in (1, inside, 10)]
    parts.append(run("parts", last))
    assert same_bits(whole.weights, parts[-1].weights)
    for name in ("train/instruction/loss", "train/preference/loss", "train/preference/ratio", "gap/preference"):
        assert [value for part in parts for value in part.log.column(name)] == whole.log.column(name) != [], name


def test_a_reward_without_a_best_is_refused() -> None:
    """At 0 a reward would lack nothing, and nothing but instructions would ever train."""
    plan = MaxGap(1, 3).plan({INSTRUCTION: [2], PREFERENCE: [2]})
    with pytest.raises(UserError, match="preference_best to the reward that training on it alone reaches"):
        plan.choose(0, lambda part: Progress(0.5, rising=part.objective == PREFERENCE))
    plan = MaxGap(1, 3).plan({INSTRUCTION: [2], PREFERENCE: [2]})
    plan.choose(0, lambda part: Progress(0.5 if part.objective == PREFERENCE else 0.4))
    assert plan.figures == {"gap/instruction": 0.2, "gap/preference": 0.25}
