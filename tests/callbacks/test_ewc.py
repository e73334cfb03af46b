"""EWC inside real runs, against the written penalty, the official formula and loops by hand."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from hbat_lightning import LoraSettings
from hbat_lightning.callbacks import ElasticWeightConsolidation
from hbat_lightning.errors import UserError
from hbat_lightning.importance import (
    DriftImportance,
    ExactFisher,
    Importance,
    ImportanceWeights,
    LiteralWeights,
    ProportionalWeights,
    RandomImportance,
    RawWeights,
    RunningFisher,
    UniformImportance,
)
from hbat_lightning.lr import Constant
from hbat_lightning.schedules import Interval, Rounds
from tests.support import (
    Recorder,
    Run,
    Tensors,
    instruction_loss,
    largest_difference,
    pair_scores,
    preference_loss,
    put,
    same_bits,
    weights,
)


class GivenFactors(ImportanceWeights):
    """Factors that depend on nothing: numbers from a seed, in fp64."""

    def weights(self, importance: Any, strength: float) -> Tensors:
        generator = torch.Generator().manual_seed(3)
        return {
            name: strength * torch.rand(value.shape, generator=generator, dtype=torch.float64) + 0.1
            for name, value in importance.items()
        }


def run_with(ewc: ElasticWeightConsolidation, module: Any, fit: Any, **settings: Any) -> tuple[Run, Recorder, Recorder]:
    """A run, with what the gradients were before and after the callback."""
    before, after = Recorder(), Recorder()
    run = fit(module, before, ewc, after, **settings)
    return run, before, after


def added(before: Recorder, after: Recorder, step: int) -> Tensors:
    return {name: after.gradients[step][name] - value for name, value in before.gradients[step].items()}


def gradient_of(
    penalty: Callable[[Tensors, Tensors], torch.Tensor], at: Tensors, anchor: Tensors
) -> tuple[float, Tensors]:
    """Value and autograd gradient of a penalty."""
    leaves = {name: value.clone().requires_grad_() for name, value in at.items()}
    loss = penalty(leaves, anchor)
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    return loss.item(), dict(zip(leaves, gradients, strict=True))


def quadratic(factors: Tensors, parameters: Tensors, anchor: Tensors) -> torch.Tensor:
    """The penalty as it is written: a sum over parameters of c (θ - θ*)²."""
    terms = [(factors[name] * (value - anchor[name]) ** 2).sum() for name, value in parameters.items()]
    return torch.stack(terms).sum()


def drift_until(
    recorder: Recorder, phase: int, step_reduce: Callable[[torch.Tensor], torch.Tensor], decay: float
) -> Tensors:
    """Importance at the start of a phase: what the other objective's phases moved, by the recorded phase starts."""
    starts = recorder.phase_starts
    total: Tensors = {}
    for earlier in range(phase - 1, -1, -2):  # of the other objective, the latest first
        for name, value in starts[earlier].items():
            moved = step_reduce((starts[earlier + 1][name] - value) ** 2)
            age = (phase - 1 - earlier) // 2
            total[name] = total.get(name, torch.zeros_like(moved)) + decay**age * moved
    return total


# ---- the penalty ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_element", [False, True])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_gradient_is_autograd_of_the_written_penalty(
    per_element: bool, full: bool, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    """In fp64, at every step of four phases: nothing in the first phase, exactly nothing at every anchor."""
    ewc = ElasticWeightConsolidation(3.0, DriftImportance(per_element=per_element), GivenFactors())
    policy = make_policy(double=True, **({"lora": None} if full else {}))
    run, before, after = run_with(ewc, make_hybrid(policy, schedule=Interval(2, 3, 2)), fit)

    shapes = {name: value if per_element else value.mean() for name, value in run.weights.items()}
    penalty = partial(quadratic, GivenFactors().weights(shapes, 3.0))
    logged = run.log.column("ewc/penalty")
    pulled = 0
    for step, phase in enumerate(before.phases):
        pull = added(before, after, step)
        at_anchor = same_bits(before.parameters[step], before.anchors[step])
        if phase == 0 or at_anchor:
            assert all(bool((value == 0).all()) for value in pull.values())
            assert logged[step] == 0.0
            continue
        value, truth = gradient_of(penalty, before.parameters[step], before.anchors[step])
        largest = max(float(gradient.abs().max()) for gradient in truth.values())
        assert largest_difference(pull, truth) < 1e-14 * max(1.0, 100 * largest)
        assert logged[step] == pytest.approx(value, rel=1e-6)
        assert run.log.column("ewc/pull_norm")[step] == pytest.approx(_norm(truth), rel=1e-6)
        pulled += 1
    assert pulled == (2 - 1) + (3 - 1) + (2 - 1)  # all but the first step of the phases after the first
    assert run.log.column("ewc/task_gradient_norm") == pytest.approx(
        [_norm(gradients) for gradients in before.gradients], rel=1e-6
    )


def _norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


@pytest.mark.parametrize("kappa", [300.0, 1e10])
def test_literal_weights_are_the_official_formula(kappa: float, make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """H:ewc 32 and H:sft 221-254 at ddc29f4, written out: per tensor and in total, over three rounds."""
    lam, most = 3.0, 7.0
    ewc = ElasticWeightConsolidation(lam, DriftImportance(), LiteralWeights(kappa=kappa, max_weight=most))
    run, before, after = run_with(ewc, make_hybrid(make_policy(double=True), schedule=Interval(3, 3, 3)), fit)
    starts = before.phase_starts
    names = list(run.weights)
    fisher = {"instruction": dict.fromkeys(names, 0.0), "preference": dict.fromkeys(names, 0.0)}
    factors: Tensors = {}
    spread = []
    for step, phase in enumerate(before.phases):
        if phase == 0:
            continue
        if phase != before.phases[step - 1]:  # a new phase: renew importance, then softmax over all tensors
            mine = fisher["instruction" if phase % 2 == 0 else "preference"]
            for name in names:
                mine[name] += float(torch.mean(((starts[phase][name] - starts[phase - 1][name]) * kappa) ** 2))
            top = max(mine.values())
            total = sum(math.exp(value - top) for value in mine.values())
            factors = {name: torch.tensor(math.exp(mine[name] - top) / total) for name in names}
            spread.append(max(float(share) for share in factors.values()))

        def official(parameters: Tensors, anchor: Tensors, factors: Tensors = factors) -> torch.Tensor:
            loss = torch.zeros((), dtype=torch.float64)
            for name, p in parameters.items():
                loss = loss + torch.sum(((p - anchor[name]) * lam) ** 2) * most * factors[name]
            return loss

        value, truth = gradient_of(official, before.parameters[step], before.anchors[step])
        pull = added(before, after, step)
        for name in names:
            assert torch.allclose(pull[name], truth[name], rtol=1e-6, atol=1e-13), (step, name)
        assert run.log.column("ewc/penalty")[step] == pytest.approx(value, rel=1e-5, abs=1e-30)
    # At a small kappa many tensors share the weight; the official one always makes it a single tensor.
    assert all(share > 0.999 for share in spread) if kappa == 1e10 else all(share < 0.9 for share in spread)


@pytest.mark.parametrize(
    ("importance", "rule", "tau"),
    [
        (DriftImportance(), ProportionalWeights(), 1.0),
        (DriftImportance(decay=0.5), ProportionalWeights(tau=3.0), 3.0),
        (DriftImportance(per_element=True), ProportionalWeights(tau=2.0), 2.0),
        (DriftImportance(decay=0.0), RawWeights(), None),
    ],
    ids=["proportional", "decay and tau", "per element", "raw"],
)
def test_drift_is_summed_over_the_other_objectives_phases(
    importance: Any, rule: Any, tau: float | None, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    ewc = ElasticWeightConsolidation(40.0, importance, rule)
    _, before, after = run_with(ewc, make_hybrid(make_policy(double=True), schedule=Interval(3, 2, 3)), fit)
    reduce = (lambda value: value) if importance.per_element else torch.mean
    for step, phase in enumerate(before.phases):
        if phase == 0:
            continue
        held = drift_until(before, phase, reduce, importance.decay)
        if tau is None:
            factors = {name: 40.0 * value for name, value in held.items()}
        else:
            powers = {name: value ** (1 / tau) for name, value in held.items()}
            mean = sum(float(value.sum()) for value in powers.values()) / sum(v.numel() for v in powers.values())
            factors = {name: 40.0 * value / mean for name, value in powers.items()}
        _, truth = gradient_of(partial(quadratic, factors), before.parameters[step], before.anchors[step])
        pull = added(before, after, step)
        for name in truth:
            assert torch.allclose(pull[name], truth[name], rtol=1e-5, atol=1e-13), (step, name)


@pytest.mark.parametrize("kind", ["running", "exact"])
def test_fisher_is_a_mean_of_squared_gradients(kind: str, make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """Running: over steps, n g² before any pull. Exact: over rows, at the end of the phase, by autograd row by row."""
    importance: Importance = RunningFisher(decay=0.5) if kind == "running" else ExactFisher(samples=4, decay=0.5)
    ewc = ElasticWeightConsolidation(1.0, importance, RawWeights())
    module = make_hybrid(make_policy(double=True), schedule=Interval(2, 3, 2))
    run, before, after = run_with(ewc, module, fit)
    starts = before.phase_starts
    held: dict[int, Tensors] = {0: {}, 1: {}}  # by the parity of the phase that they hold in
    for phase in range(1, 4):
        make = _running_fisher if kind == "running" else partial(_exact_fisher, run, samples=4)
        new = make(before, phase - 1)
        mine = held[phase % 2]
        held[phase % 2] = {name: 0.5 * mine[name] + value if mine else value for name, value in new.items()}
        for step in [step for step, number in enumerate(before.phases) if number == phase]:
            pull = added(before, after, step)
            for name, value in pull.items():
                truth = 2 * held[phase % 2][name] * (before.parameters[step][name] - starts[phase][name])
                assert torch.allclose(value, truth, rtol=1e-4, atol=1e-13), (phase, name)


def _running_fisher(recorder: Recorder, phase: int) -> Tensors:
    steps = [step for step, number in enumerate(recorder.phases) if number == phase]
    sums: Tensors = {}
    for step in steps:
        window = recorder.windows[step]
        units = 0  # supervised tokens, or pairs
        for batch in window:
            labels = batch.inputs["labels"][:, 1:]
            supervised = int((labels != -100).sum())
            pairs = int((labels != -100).any(-1).sum()) // 2
            units += supervised if batch.objective == "instruction" else pairs
        for name, gradient in recorder.gradients[step].items():
            sums[name] = sums.get(name, torch.zeros_like(gradient)) + units * gradient**2
    return {name: value / len(steps) for name, value in sums.items()}


def _exact_fisher(run: Run, recorder: Recorder, phase: int, samples: int) -> Tensors:
    """Of the first rows of the objective's only shard, at the parameters with which the next phase starts."""
    module, stream = run.module, run.data.stream
    objective = "instruction" if phase % 2 == 0 else "preference"
    trained = module.policy.trained_parameters()
    module.policy.set_training(dropout=False)
    sums = {name: torch.zeros_like(value) for name, value in trained.items()}
    from hbat_lightning.training_data import MicroBatch

    for row in stream.shards[objective][0][:samples]:
        window = [MicroBatch(run.data.train_sets[objective].collate([row]), objective)]
        if objective == "instruction":
            put(module, recorder.phase_starts[phase + 1])
            tokens = int((window[0].inputs["labels"][:, 1:] != -100).sum())
            loss = tokens * instruction_loss(module.policy.model, window)  # the row's log-likelihood, not its mean
        else:
            put(module, recorder.phase_starts[phase])
            with torch.no_grad():
                reference = pair_scores(module.policy.model, window)
            put(module, recorder.phase_starts[phase + 1])
            loss = preference_loss(pair_scores(module.policy.model, window), reference, beta=0.5)
        for name, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            sums[name] += gradient**2
    return {name: value / samples for name, value in sums.items()}


def test_exact_fisher_leaves_training_as_it_is(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """Its own passes over rows must not touch dropout, modes, gradients or generators: with weights of 0 nothing changes."""

    class Nothing(ImportanceWeights):
        def weights(self, importance: Any, strength: float) -> Tensors:
            return {name: 0 * value for name, value in importance.items()}

    ends = []
    for callbacks in ([], [ElasticWeightConsolidation(1.0, ExactFisher(samples=3), Nothing())]):
        policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1), gradient_checkpointing=True)
        ends.append(fit(make_hybrid(policy, schedule=Interval(2, 2, 2)), *callbacks).weights)
    assert same_bits(*ends)


# ---- what it must leave alone --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["reset", "shared"])
@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_strength_0_is_bit_identical_to_no_callback(
    full: bool, state: Any, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    ends = []
    importances: list[Importance] = [DriftImportance(), ExactFisher(2), RunningFisher()]
    for importance in (None, *importances):
        settings = {"lora": None if full else LoraSettings(r=4, alpha=8, dropout=0.1)}
        callbacks = [] if importance is None else [ElasticWeightConsolidation(0.0, importance)]
        module = make_hybrid(make_policy(**settings), schedule=Rounds(2, 2, 2), optimizer_state=state)
        run = fit(module, *callbacks)
        ends.append((run.weights, run.log.column("train/preference/loss")))
        assert not run.log.column("ewc/penalty")
        assert not any(callback.state_dict()["held_for"] for callback in callbacks)  # and nothing is spent on it
    for end, losses in ends[1:]:
        assert same_bits(ends[0][0], end)
        assert ends[0][1] == losses


def test_a_positive_strength_pulls_the_run_back(make_hybrid: Any, fit: Any) -> None:
    """What the last phase moves is the less the stronger the pull: the sign of the gradient."""
    moved = []
    for strength in (0.0, 1.0, 100.0):
        ewc = ElasticWeightConsolidation(strength, UniformImportance())
        run, before, _ = run_with(ewc, make_hybrid(schedule=Interval(1, 4, 12)), fit)
        start = before.phase_starts[1]
        moved.append(_norm({name: value - start[name] for name, value in run.weights.items()}))
    assert moved[0] > 1.01 * moved[1] > 1.02 * moved[2]


def test_frozen_and_quantised_tensors_are_never_tracked(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """An adapter on a 4-bit base, half of it frozen by the user after it was made."""
    policy = make_policy(quantization="nf4")
    policy.build(torch.device("cpu"))
    for name, parameter in policy.named_parameters():
        if "layers.0" in name and "lora_A" in name:
            parameter.requires_grad_(False)
    trained = set(policy.trained_parameters())
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    assert len(trained) == 2 * 7 + 7
    ewc = ElasticWeightConsolidation(10.0, DriftImportance(), ProportionalWeights())
    run = fit(make_hybrid(policy, schedule=Interval(2, 2, 2)), ewc)
    assert [row["train/preference/loss"] for row in run.first_preference_rows()] == pytest.approx([math.log(2)] * 2)
    state = ewc.state_dict()["held_for"]
    assert state.keys() == {"instruction", "preference"}
    assert all(tensors.keys() == trained for tensors in state.values())
    assert set(policy.snapshot("phase_start") or {}) == trained
    for name, value in before.items():
        moved = not torch.equal(value, dict(policy.named_parameters())[name])
        assert moved == (name.removeprefix("model.") in trained), name
    assert all(p.grad is None for p in policy.parameters() if not p.requires_grad)
    assert run.log.column("ewc/penalty")[-1] > 0


def test_pull_is_added_after_accumulation_and_before_clipping(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """Plain gradient descent by hand: θ ← θ - η clip(g + 2c(θ - θ*)), once per window of four micro-batches."""
    rate, clip, factor = 0.05, 0.2, 6.0
    ewc = ElasticWeightConsolidation(factor, UniformImportance())
    module = make_hybrid(
        make_policy(double=True),
        schedule=Interval(2, 4, 4),
        optimizer=partial(torch.optim.SGD, lr=rate),
        lr_schedule=Constant(),
    )
    for objective in (module.instruction, module.preference):
        objective.lr = None
    run, before, after = run_with(ewc, module, fit, accumulate_grad_batches=4, gradient_clip_val=clip)
    assert len(after.gradients) == run.trainer.global_step == 16
    clipped = 0
    for step in range(16):
        now, anchor = before.parameters[step], before.anchors[step]
        pull = {name: 2 * factor * (value - anchor[name]) for name, value in now.items()}
        if before.phases[step] == 0:
            pull = {name: 0 * value for name, value in pull.items()}
        total = {name: before.gradients[step][name] + pull[name] for name in now}
        norm = _norm(total)
        clipped += norm > clip
        shrunk = {name: value * min(1.0, clip / (norm + 1e-6)) for name, value in total.items()}
        after_step = before.parameters[step + 1] if step < 15 else run.weights
        expected = {name: value - rate * shrunk[name] for name, value in now.items()}
        assert largest_difference(after_step, expected) < 1e-9
    assert clipped > 8


# ---- warnings, refusals, figures -------------------------------------------------------------------------------------------


def test_saturated_weights_are_warned_of(make_hybrid: Any, fit: Any) -> None:
    ewc = ElasticWeightConsolidation(1.0, weights=LiteralWeights())
    with pytest.warns(
        UserWarning, match=r"EWC, phase 1 \(preference\): the weights are saturated, 1\.00 of 28 tensors"
    ):
        run = fit(make_hybrid(schedule=Interval(1, 2, 2)), ewc)
    assert run.log.column("ewc/effective_tensors") == pytest.approx([0.0, 0.0, 1.0, 1.0], abs=1e-6)


def test_phases_of_one_step_are_warned_of(make_hybrid: Any, fit: Any) -> None:
    with pytest.warns(UserWarning, match=r"EWC, phase 1 \(preference\): a phase of one optimizer step"):
        fit(make_hybrid(schedule=Interval(1, 2, 1)), ElasticWeightConsolidation())


def test_a_healthy_run_is_not_warned_of(make_hybrid: Any, fit: Any, recwarn: pytest.WarningsRecorder) -> None:
    run = fit(make_hybrid(schedule=Interval(2, 2, 2)), ElasticWeightConsolidation())
    assert not [str(w.message) for w in recwarn if str(w.message).startswith("EWC")]
    assert all(1.5 < value <= 28 for value in run.log.column("ewc/effective_tensors")[2:])


def test_effective_number_counts_tensors_also_for_factors_per_element(make_hybrid: Any, fit: Any) -> None:
    """exp of the entropy of each tensor's share of the factors' sum."""
    ewc = ElasticWeightConsolidation(1.0, DriftImportance(per_element=True), ProportionalWeights())
    run, before, _ = run_with(ewc, make_hybrid(schedule=Interval(1, 2, 2)), fit)
    mass = [float(value.double().sum()) for value in drift_until(before, 1, lambda value: value, 1.0).values()]
    shares = [value / sum(mass) for value in mass if value > 0]
    truth = math.exp(-sum(share * math.log(share) for share in shares))
    assert run.log.column("ewc/effective_tensors")[-1] == pytest.approx(truth, rel=1e-4)


def test_a_phase_that_moved_nothing_leaves_the_next_one_free(make_hybrid: Any, fit: Any) -> None:
    module = make_hybrid(schedule=Interval(1, 2, 2))
    module.instruction.lr = 1e-30  # 0 would mean the optimizer's own rate
    ewc = ElasticWeightConsolidation(1.0, weights=ProportionalWeights())
    _, before, after = run_with(ewc, module, fit)
    assert all(same_bits(one, other) for one, other in zip(before.gradients, after.gradients, strict=True))


def test_other_modules_and_negative_strengths_are_refused(make_trainer: Any) -> None:
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(ValueError, match="strength must not be negative, got -1"):
        ElasticWeightConsolidation(-1.0)
    with pytest.raises(UserError, match="needs a module of hbat_lightning, not BoringModel"):
        make_trainer(callbacks=[ElasticWeightConsolidation()], max_epochs=1).fit(BoringModel())


# ---- state ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [DriftImportance, partial(DriftImportance, per_element=True), RunningFisher, partial(RandomImportance, 5)],
    ids=["drift", "per element", "running", "random"],
)
def test_state_survives_a_file_read_with_weights_only(make: Any, make_hybrid: Any, fit: Any) -> None:
    """Loaded into a fresh callback it is the same, and so are the factors: the next run pulls with the same strength."""

    class State(Callback):
        """Takes the state in the middle of the last phase."""

        def __init__(self, ewc: ElasticWeightConsolidation) -> None:
            self.ewc, self.file = ewc, io.BytesIO()

        def on_before_zero_grad(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            self.file = io.BytesIO()
            torch.save(self.ewc.state_dict(), self.file)

    ewc = ElasticWeightConsolidation(2.0, make(), ProportionalWeights())
    taken = State(ewc)
    fit(make_hybrid(schedule=Interval(2, 2, 2)), ewc, taken)
    loaded = torch.load(io.BytesIO(taken.file.getvalue()), weights_only=True)
    other = ElasticWeightConsolidation(2.0, make(), ProportionalWeights())
    other.load_state_dict(loaded)
    again = other.state_dict()
    assert again["objective"] == loaded["objective"] == "preference"
    for objective, tensors in loaded["held_for"].items():
        assert same_bits(again["held_for"][objective], tensors)
    assert again["held_for"].keys() == loaded["held_for"].keys() == {"instruction", "preference"}
    assert same_bits(again["importance"], loaded["importance"])


def test_anchor_is_the_policys_snapshot_and_no_second_copy(make_hybrid: Any, fit: Any) -> None:
    ewc = ElasticWeightConsolidation()
    recorder = Recorder()
    run = fit(make_hybrid(schedule=Interval(2, 2, 2)), ewc, recorder)
    assert same_bits(run.module.policy.snapshot("phase_start"), recorder.anchors[-1])
    assert not same_bits(recorder.anchors[-1], weights(run.module))
    held = [value for tensors in ewc.state_dict()["held_for"].values() for value in tensors.values()]
    assert all(value.dim() == 0 for value in held)
