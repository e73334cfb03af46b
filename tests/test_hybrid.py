"""Alternation end to end: what trains, how windows are weighted, and that a hybrid is its two objectives and no more."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from hbat_lightning import DPOModule, LoraSettings, Policy, SFTModule
from hbat_lightning.callbacks import ElasticWeightConsolidation, PolicyExport
from hbat_lightning.importance import ExactFisher, ProportionalWeights, RunningFisher
from hbat_lightning.lr import Linear
from hbat_lightning.schedules import Interval, Rounds
from tests.support import (
    Recorder,
    instruction_loss,
    largest_difference,
    pair_scores,
    preference_loss,
    put,
    same_bits,
)


def test_every_trained_tensor_moves_and_no_other(make_hybrid: Any, make_data: Any, make_trainer: Any) -> None:
    module, data = make_hybrid(), make_data()
    trainer = make_trainer()
    module.policy.build(torch.device("cpu"))
    module.policy.add_snapshots(["phase_start"])
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    trainer.fit(module, data)
    names = {f"model.{name}" for name in module.policy.trained_parameters()}
    snapshots = {name for name in before if ".phase_start." in name}
    for name, parameter in module.policy.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in names or name in snapshots), name
    assert trainer.global_step == module.plan.total_steps


# ---- windows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "accumulate", "full"), [(8, 1, False), (2, 4, False), (1, 8, False), (8, 1, True), (1, 8, True)]
)
def test_window_gradient_is_that_of_the_mean_over_its_tokens_or_pairs(
    batch_size: int, accumulate: int, full: bool, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    """Every window of a run, ragged last ones included, against rows taken one by one through the full logits."""
    recorder = Recorder()
    settings = {"lora": None} if full else {}
    module = make_hybrid(make_policy(double=True, **settings), schedule=Rounds(1, 1, 1))
    data = make_data(
        instruction=28, preference=16, batch_size=batch_size
    )  # 21 and 12 rows: windows of 8, 8, 5 and 8, 4
    run = fit(module, recorder, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)

    model, trained = module.policy.model, module.policy.trained_parameters()
    module.policy.set_training(dropout=False)
    sizes = []
    logged = iter(run.log.column("train/instruction/loss") + run.log.column("train/preference/loss"))
    for step, window in enumerate(recorder.windows):
        put(module, recorder.parameters[step])
        if window[0].objective == "instruction":
            loss = instruction_loss(model, window)
        else:
            put(module, recorder.anchors[step])
            with torch.no_grad():
                reference = pair_scores(model, window)
            put(module, recorder.parameters[step])
            loss = preference_loss(pair_scores(model, window), reference, beta=0.5)
        truth = dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))
        assert largest_difference(recorder.gradients[step], truth) < 1e-12
        assert next(logged) == pytest.approx(loss.item(), rel=1e-6)
        sizes.append(len([index for batch in window for index in batch.inputs["index"].tolist() if index >= 0]))
    assert sizes == [8, 8, 5, 8, 4]


def importances() -> dict[str, Any]:
    return {"drift": None, "running": RunningFisher(), "exact": ExactFisher(samples=2)}


@pytest.mark.parametrize("importance", ["drift", "running", "exact"])
def test_a_run_does_not_depend_on_how_windows_are_split(
    importance: str, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    """Two rounds with clipping, EWC and optimizer reset: the same weights to rounding for 1 x 8, 2 x 4, 4 x 2 and 8 x 1."""
    ends, pulls = [], []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4), (1, 8))[:: 1 if importance == "drift" else 3]:
        ewc = ElasticWeightConsolidation(50.0, importances()[importance], ProportionalWeights(tau=2.0))
        module = make_hybrid(make_policy(double=True), schedule=Rounds(2, 2, 2), optimizer=torch.optim.Adam)
        run = fit(
            module,
            ewc,
            data=make_data(56, 40, batch_size=batch_size),
            accumulate_grad_batches=accumulate,
            gradient_clip_val=0.3,
        )
        ends.append(run.weights)
        pulls.append(run.log.column("ewc/pull_norm"))
    assert max(pulls[0]) > 1e-3  # EWC did something
    for end, pull in zip(ends[1:], pulls[1:], strict=True):
        assert largest_difference(ends[0], end) < 1e-12
        assert pull == pytest.approx(pulls[0], rel=1e-5, abs=1e-9)


def test_no_window_holds_two_objectives(make_hybrid: Any, make_data: Any, fit: Any) -> None:
    recorder = Recorder()
    run = fit(make_hybrid(schedule=Rounds(3, 2, 1)), recorder, data=make_data(50, 20))
    for number, window in enumerate(recorder.windows):
        assert len(window) == 3
        assert {(batch.objective, batch.phase, batch.round) for batch in window} == {
            (window[0].objective, recorder.phases[number], recorder.phases[number] // 2)
        }
        assert [batch.last for batch in window] == [False, False, True]
    assert sorted(set(recorder.phases)) == list(range(6))
    assert run.trainer.global_step == run.module.plan.total_steps == len(recorder.windows)


# ---- a hybrid of one round is its two objectives, one after the other ----------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full", "shared lr"])
def test_one_round_ends_bit_identical_to_sft_alone_and_then_dpo_alone(
    kind: str, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, tmp_path: Any
) -> None:
    """With dropout, two passes each, warm-up and clipping; the two runs alone lay out their Trainer epochs otherwise."""
    lora = None if kind == "full" else LoraSettings(r=4, alpha=8, dropout=0.1)
    rates = {} if kind == "shared lr" else {"lr": 3e-3}
    schedule = {"lr_schedule": Linear(warmup=0.3)}
    whole = fit(
        make_hybrid(
            make_policy(lora=lora),
            instruction=SFTModule(**rates),
            preference=DPOModule(beta=0.5),
            schedule=Rounds(1, 2, 2),
            **schedule,
        )
    )
    first = fit(
        SFTModule(make_policy(lora=lora), epochs=2, **rates, **schedule), PolicyExport(), default_root_dir=tmp_path
    )
    if lora is None:
        policy = Policy(str(tmp_path / "model"), lora=None)
    else:
        policy = make_policy(lora=lora, adapter_path=str(tmp_path / "adapter"))
    second = fit(DPOModule(beta=0.5, policy=policy, epochs=2, **schedule))

    assert first.trainer.current_epoch == second.trainer.current_epoch == 2
    assert whole.trainer.current_epoch == 1
    assert whole.trainer.global_step == first.trainer.global_step + second.trainer.global_step
    assert same_bits(whole.weights, second.weights)
    assert not same_bits(first.weights, second.weights)
    alone = first.log.column("train/instruction/loss") + second.log.column("train/preference/loss")
    together = whole.log.column("train/instruction/loss") + whole.log.column("train/preference/loss")
    assert alone == together
    assert first.log.column("lr") + second.log.column("lr") == whole.log.column("lr")


# ---- rounds, limits and precision --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("instruction", "preference", "schedule"),
    [
        (41, 14, Rounds(3, 2, 1)),  # rows do not divide by rounds: shards of 10, 10, 11 and 3, 3, 4
        (24, 12, Interval(3, 4, 2)),
        (24, 12, Interval(2, 1, 7)),
    ],
    ids=["uneven shards", "interval", "interval past the data"],
)
def test_all_steps_run_and_every_switch_is_validated(
    instruction: int, preference: int, schedule: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    recorder = Recorder()
    run = fit(make_hybrid(schedule=schedule), recorder, data=make_data(instruction, preference, batch_size=1))
    plan = run.module.plan
    assert run.trainer.global_step == sum(phase.windows for phase in plan.phases) == len(recorder.windows)
    ends, step = [], 0
    for phase in plan.phases:
        step += phase.windows
        ends.append(step - 1)  # Lightning logs a validation under the step before it
    for name in (
        "val/instruction/loss",
        "val/instruction/exact_match",
        "val/preference/loss",
        "val/preference/accuracy",
    ):
        assert [row["step"] for row in run.log.rows if name in row] == ends
    rounds = [row["phase/round"] for row in run.log.rows if "phase/round" in row]
    assert rounds == [float(phase.round) for phase in plan.phases for _ in range(phase.windows)]


@pytest.mark.parametrize("growing", [True, False])
def test_rounds_of_other_lengths_run_whole(
    growing: bool, make_hybrid: Any, make_data: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shards whose sizes differ much: Lightning freezes a round's length unless it is asked anew for every epoch."""

    def cut(data: Any, objective: str, shards: int, seed: int) -> list[tuple[int, ...]]:
        cuts = {"instruction": [0, 2, 8, 18], "preference": [0, 1, 4, 9]}[objective]
        parts = [tuple(range(begin, end)) for begin, end in pairwise(cuts)]
        return parts if growing else parts[::-1]

    monkeypatch.setattr("hbat_lightning.stream.make_shards", cut)
    recorder = Recorder()
    run = fit(make_hybrid(schedule=Rounds(3, 2, 1)), recorder, accumulate_grad_batches=1)
    lengths = [2, 1, 6, 2, 10, 3]  # ceil(rows / 2), twice for instructions
    if not growing:
        lengths = [10, 3, 6, 2, 2, 1]
    assert recorder.phases == [phase for phase, length in enumerate(lengths) for _ in range(length)]
    ends = [sum(lengths[: n + 1]) - 1 for n in range(6)]
    assert [row["step"] for row in run.log.rows if "val/preference/loss" in row] == ends


def test_max_steps_ends_a_run_in_the_middle_of_a_phase(make_hybrid: Any, fit: Any) -> None:
    recorder = Recorder()
    run = fit(make_hybrid(schedule=Interval(2, 3, 3)), recorder, max_steps=5)
    assert run.trainer.global_step == 5
    assert recorder.phases == [0, 0, 0, 1, 1]


def test_validation_falls_also_where_the_interval_says(make_hybrid: Any, fit: Any) -> None:
    run = fit(make_hybrid(schedule=Interval(2, 5, 3)), val_check_interval=6)  # 3 micro-batches a window: every 2 steps
    steps = [int(row["step"]) + 1 for row in run.log.rows if "val/preference/loss" in row]
    assert steps == [2, 4, 5, 6, 8, 10, 12, 13, 14, 16]


def test_validation_is_a_mean_over_tokens_and_pairs_and_not_over_batches(
    make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    figures = []
    for size in (1, 4, 9):
        data = make_data(36, 36, val_batch_size=size)  # 9 held-out rows each
        run = fit(make_hybrid(make_policy(double=True)), data=data, max_steps=5, val_check_interval=3)
        names = ("val/instruction/loss", "val/preference/loss", "val/preference/margin")
        figures.append(run.log.table(*names))
    assert len(figures[0]) > 3
    for other in figures[1:]:
        assert torch.allclose(torch.tensor(figures[0]), torch.tensor(other), rtol=1e-6, atol=1e-7)

    module, sets = run.module, run.data.val_sets
    model = module.policy.model.eval()
    trainer_loss = run.trainer.validate(module, run.data, verbose=False)[0]
    from hbat_lightning.training_data import MicroBatch

    with torch.no_grad():
        window = [MicroBatch(sets["instruction"].collate(range(9)), "instruction")]
        assert trainer_loss["val/instruction/loss"] == pytest.approx(instruction_loss(model, window).item(), rel=1e-6)
        window = [MicroBatch(sets["preference"].collate(range(9)), "preference")]
        scores = pair_scores(model, window)
        with model.disable_adapter():
            initial = pair_scores(model, window)
        truth = preference_loss(scores, initial, 0.5).item()
        assert trainer_loss["val/preference/loss"] == pytest.approx(truth, rel=1e-6)
        assert abs(truth - math.log(2)) > 1e-4
        won = ((scores - initial)[0] > (scores - initial)[1]).double().mean().item()
        assert trainer_loss["val/preference/accuracy"] == pytest.approx(won)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_mixed_precision_leaves_every_tensor_a_gradient_after_the_reference_pass(
    full: bool, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    """Autocast keeps the copies of weights that it has cast; those of a pass without a graph would cut the gradient off."""
    recorder = Recorder()
    policy = make_policy(lora=None) if full else make_policy()
    run = fit(make_hybrid(policy, schedule=Interval(1, 1, 3)), recorder, precision="bf16-mixed")
    names = set(run.module.policy.trained_parameters())
    for step, gradients in enumerate(recorder.gradients):
        assert set(gradients) == names
        if step > 1:
            assert all(bool(torch.isfinite(value).all()) for value in gradients.values())
            norms = {name: float(value.norm()) for name, value in gradients.items()}
            assert sum(norm > 0 for norm in norms.values()) >= 0.9 * len(norms)
    assert all(p.dtype == torch.float32 for p in run.module.policy.trained_parameters().values())


def test_a_row_of_the_log_holds_the_objective_that_trained_in_it_and_no_other(make_hybrid: Any, fit: Any) -> None:
    """Lightning alone would repeat the last instruction loss in every preference step of the round."""
    run = fit(make_hybrid(schedule=Interval(2, 2, 2)))
    rows = [row for row in run.log.rows if "phase/index" in row]
    named = [{name.split("/")[1] for name in row if name.startswith("train/")} for row in rows]
    assert named == 2 * [{"instruction"}, {"instruction"}, {"preference"}, {"preference"}]


def test_learning_rates_are_those_of_each_objectives_phases(make_hybrid: Any, fit: Any) -> None:
    module = make_hybrid(
        schedule=Interval(2, 4, 2),
        instruction=SFTModule(lr=4e-3),
        preference=DPOModule(),  # no rate of its own: the optimizer's
        lr_schedule=Linear(),
    )
    run = fit(module)
    instruction = [4e-3 * (1 - step / 4) for step in range(4)]
    preference = [1e-4 * (1 - step / 2) for step in range(2)]
    assert run.log.column("lr") == pytest.approx(2 * (instruction + preference), rel=1e-6)


def test_same_seed_same_bits_and_another_seed_other_ones(make_hybrid: Any, make_policy: Any, fit: Any) -> None:
    def end(seed: int, noise: int) -> dict[str, torch.Tensor]:
        torch.rand(noise)  # what happened before in the process must not matter
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
        return fit(make_hybrid(policy, seed=seed), max_steps=3).weights

    one = end(5, 0)
    assert same_bits(one, end(5, 17))
    assert not same_bits(one, end(6, 0))


def test_objectives_in_the_wrong_slot_are_refused(make_policy: Any, make_hybrid: Any) -> None:
    with pytest.raises(ValueError, match=r"preference: SFTModule trains on instruction data"):
        make_hybrid(make_policy(), preference=SFTModule())
