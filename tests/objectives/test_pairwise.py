"""The losses on pairs in training: against formulas over full logits, however windows are cut, and their held-out figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hbat_lightning import (
    DPOModule,
    HingeModule,
    IPOModule,
    LoraSettings,
    ORPOModule,
    Policy,
    RobustDPOModule,
    RPOModule,
    RRHFModule,
    SimPOModule,
)
from hbat_lightning.callbacks import ElasticWeightConsolidation
from hbat_lightning.schedules import Interval
from hbat_lightning.training_data import MicroBatch
from tests.support import Recorder, largest_difference, pair_scores, put, rows_of

BETA = 0.5
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Scores ``(2, B)``, those of the reference, and answers' lengths -> losses ``(B,)``."""


def margin(scores: Tensor, reference: Tensor) -> Tensor:
    ratios = scores - reference
    return ratios[0] - ratios[1]


def odds(scores: Tensor, tokens: Tensor) -> Tensor:
    probability = (scores / tokens).exp()
    return (probability / (1 - probability)).log()


LOSSES: dict[str, tuple[Callable[..., Any], Formula]] = {
    "cdpo": (
        lambda **s: DPOModule(beta=BETA, label_smoothing=0.1, **s),
        lambda p, r, n: -0.9 * logsigmoid(BETA * margin(p, r)) - 0.1 * logsigmoid(-BETA * margin(p, r)),
    ),
    "robust": (
        lambda **s: RobustDPOModule(beta=BETA, label_smoothing=0.1, **s),
        lambda p, r, n: (-0.9 * logsigmoid(BETA * margin(p, r)) + 0.1 * logsigmoid(-BETA * margin(p, r))) / 0.8,
    ),
    "ipo": (
        lambda **s: IPOModule(beta=BETA, **s),
        lambda p, r, n: (margin(p, r) - 1 / (2 * BETA)) ** 2,
    ),
    "ipo per token": (
        lambda **s: IPOModule(beta=BETA, per_token=True, **s),
        lambda p, r, n: (margin(p / n, r / n) - 1 / (2 * BETA)) ** 2,
    ),
    "hinge": (
        lambda **s: HingeModule(beta=BETA, **s),
        lambda p, r, n: (1 - BETA * margin(p, r)).clamp(min=0),
    ),
    "rpo": (
        lambda **s: RPOModule(beta=BETA, alpha=0.7, **s),
        lambda p, r, n: -logsigmoid(BETA * margin(p, r)) - 0.7 * p[0] / n[0],
    ),
    "simpo": (
        lambda **s: SimPOModule(beta=2.0, gamma=0.3, **s),
        lambda p, r, n: -logsigmoid(2 * (p[0] / n[0] - p[1] / n[1]) - 0.3),
    ),
    "orpo": (
        lambda **s: ORPOModule(weight=0.4, **s),
        lambda p, r, n: -p[0] / n[0] - 0.4 * logsigmoid(odds(p, n)[0] - odds(p, n)[1]),
    ),
    "rrhf": (
        lambda **s: RRHFModule(rank_weight=0.8, length_penalty=0.5, **s),
        lambda p, r, n: 0.8 * ((p / n**0.5)[1] - (p / n**0.5)[0]).clamp(min=0) - p[0] / n[0],
    ),
}
REFERENCE_FREE = ("simpo", "orpo", "rrhf")
WITH_REFERENCE = [name for name in LOSSES if name not in REFERENCE_FREE]


def pair_tokens(window: list[MicroBatch]) -> Tensor:
    """``(2, pairs)``: how many tokens of the chosen and the rejected answers are learnt."""
    counts: tuple[list[int], list[int]] = ([], [])
    for batch in window:
        labels = [int((labels != -100).sum()) for _, labels in rows_of(batch)]
        half = len(labels) // 2
        for one, other in zip(labels[:half], labels[half:], strict=True):
            if one:
                counts[0].append(one)
                counts[1].append(other)
    return torch.tensor(counts, dtype=torch.float64)


@pytest.mark.parametrize("name", LOSSES)
def test_gradient_of_every_window_is_that_of_the_formula_however_it_is_cut(
    name: str, make_policy: Any, make_data: Any, fit: Any
) -> None:
    """Rows one by one through the full logits; 12 pairs in windows of 8 and 4, with slots that stay empty."""
    make, formula = LOSSES[name]
    ends = []
    for batch_size, accumulate in ((8, 1), (2, 4), (1, 8)):
        recorder = Recorder()
        module = make(policy=make_policy(double=True), lr=5e-3)
        data = make_data(preference=16, batch_size=batch_size)
        run = fit(module, recorder, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
        ends.append(run.weights)
        if batch_size == 2:
            continue  # its end says enough
        model, trained = module.policy.model, module.policy.trained_parameters()
        logged = run.log.column("train/preference/loss")
        assert len(recorder.windows) == 2
        for step, window in enumerate(recorder.windows):
            put(module, recorder.anchors[step])
            with torch.no_grad():
                reference = pair_scores(model, window)
            put(module, recorder.parameters[step])
            losses = formula(pair_scores(model, window), reference, pair_tokens(window))
            assert len(losses) == (8, 4)[step]
            truth = dict(zip(trained, torch.autograd.grad(losses.mean(), list(trained.values())), strict=True))
            assert largest_difference(recorder.gradients[step], truth) < 1e-11
            assert logged[step] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert all(largest_difference(ends[0], end) < 1e-11 for end in ends[1:])


@pytest.mark.parametrize(
    ("name", "at_reference"),
    [("robust", math.log(2)), ("ipo", 1 / (2 * BETA) ** 2), ("ipo per token", 1 / (2 * BETA) ** 2), ("hinge", 1.0)],
)
def test_first_step_of_every_phase_is_the_loss_at_the_reference(
    name: str, at_reference: float, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    policy = make_policy(lora=LoraSettings(r=4, alpha=8, dropout=0.1))
    run = fit(make_hybrid(policy, preference=LOSSES[name][0](lr=5e-3), schedule=Interval(2, 3, 3)))
    first = run.first_preference_rows()
    assert len(first) == 2
    for row in first:
        assert row["train/preference/loss"] == pytest.approx(at_reference, rel=1e-5)
        for reward in ("chosen_reward", "rejected_reward", "margin"):
            assert row[f"train/preference/{reward}"] == pytest.approx(0.0, abs=1e-5)
    losses = run.log.column("train/preference/loss")
    assert max(abs(loss - at_reference) for loss in losses) > 1e-3


def test_rpo_begins_at_ln_2_and_its_likelihood(make_hybrid: Any, fit: Any) -> None:
    run = fit(make_hybrid(preference=RPOModule(beta=0.3, alpha=0.5, lr=5e-3), schedule=Interval(2, 3, 3)))
    for row in run.first_preference_rows():
        nll = row["train/preference/nll"]
        assert nll > 0.1
        assert row["train/preference/loss"] == pytest.approx(math.log(2) + 0.5 * nll, abs=1e-5)


# ---- without a reference ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("name", REFERENCE_FREE)
def test_no_snapshot_and_no_second_pass(
    name: str, full: bool, make_policy: Any, make_hybrid: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a reference was asked for")

    monkeypatch.setattr(Policy, "score_reference", refuse)
    objective = LOSSES[name][0](lr=2e-3)
    policy = make_policy(lora=None) if full else make_policy()
    run = fit(make_hybrid(policy, preference=objective, schedule=Interval(1, 1, 2)), num_sanity_val_steps=-1)
    assert objective.references == ()
    assert run.module.policy.snapshot("phase_start") is run.module.policy.snapshot("initial") is None
    assert len(run.log.column("train/preference/loss")) == 2


@pytest.mark.parametrize("name", LOSSES)
def test_held_out_figures(name: str, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any) -> None:
    """The loss's formula over the held-out pairs; what has a reference is compared with the policy before all training."""
    make, formula = LOSSES[name]
    module = make_hybrid(make_policy(double=True), preference=make(lr=2e-2), schedule=Interval(1, 3, 3))
    data = make_data(12, 20, val_batch_size=2)
    results = fit(module, data=data).module.validation_results
    model = module.policy.model.eval()
    window = [MicroBatch(data.val_sets["preference"].collate(range(5)), "preference")]
    with torch.no_grad():
        scores, tokens = pair_scores(model, window), pair_tokens(window)
        with model.disable_adapter():
            initial = pair_scores(model, window)
    figures = {key.removeprefix("val/preference/"): value for key, value in results.items() if "preference" in key}
    assert figures["loss"] == pytest.approx(formula(scores, initial, tokens).mean().item(), rel=1e-6)
    assert figures["margin"] == pytest.approx(figures["chosen_reward"] - figures["rejected_reward"], rel=1e-5)
    rewards = {
        "ipo per token": BETA * (scores - initial) / tokens,
        "simpo": 2 * scores / tokens,
        "orpo": odds(scores, tokens),
        "rrhf": scores / tokens**0.5,
    }.get(name, BETA * (scores - initial))
    assert figures["chosen_reward"] == pytest.approx(rewards[0].mean().item(), rel=1e-5)
    assert figures["accuracy"] == pytest.approx((rewards[0] > rewards[1]).double().mean().item())
    if name in ("rpo", "orpo", "rrhf"):
        assert figures["nll"] == pytest.approx((-scores[0] / tokens[0]).mean().item(), rel=1e-6)
    assert abs((scores - initial).sum().item()) > 1.0  # it has moved


@pytest.mark.parametrize("name", WITH_REFERENCE)
def test_ties_before_training_count_half(name: str, make_policy: Any, make_data: Any, make_trainer: Any) -> None:
    results = make_trainer().validate(LOSSES[name][0](policy=make_policy()), make_data(), verbose=False)[0]
    assert results["val/preference/accuracy"] == 0.5


# ---- where they run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("settings", "trainer"),
    [
        ({"quantization": "nf4", "gradient_checkpointing": True}, {}),
        ({"lora": None}, {"precision": "bf16-mixed"}),
    ],
    ids=["nf4", "full bf16"],
)
def test_in_a_hybrid_with_ewc(
    name: str, settings: Any, trainer: Any, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    module = make_hybrid(make_policy(**settings), preference=LOSSES[name][0](lr=2e-3), schedule=Interval(2, 1, 2))
    recorder = Recorder()
    run = fit(module, recorder, ElasticWeightConsolidation(strength=1.0), data=make_data(12, 10), **trainer)
    assert run.trainer.global_step == 6
    assert all(map(math.isfinite, run.log.column("train/preference/loss")))
    assert max(run.log.column("ewc/pull_norm")) > 0
    names = set(module.policy.trained_parameters())
    for step, gradients in enumerate(recorder.gradients):
        assert set(gradients) == names
        assert all(bool(torch.isfinite(value).all()) for value in gradients.values())
        if step and name != "hinge":
            assert sum(bool(value.any()) for value in gradients.values()) >= 0.9 * len(names)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IPOModule(beta=0.0), "beta must be > 0"),
        (lambda: HingeModule(beta=-1.0), "beta must be > 0"),
        (lambda: RobustDPOModule(label_smoothing=0.5), r"label_smoothing must be in \[0, 0.5\)"),
        (lambda: RPOModule(alpha=-0.1), "alpha must not be negative"),
        (lambda: SimPOModule(beta=0.0), "beta must be > 0 and gamma not negative"),
        (lambda: SimPOModule(gamma=-0.5), "beta must be > 0 and gamma not negative"),
        (lambda: ORPOModule(weight=-1.0), "weight must not be negative"),
        (lambda: RRHFModule(rank_weight=-1.0), "must not be negative"),
        (lambda: RRHFModule(length_penalty=-1.0), "must not be negative"),
    ],
)
def test_impossible_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_defaults_are_those_of_the_papers() -> None:
    assert [RobustDPOModule().describe(), IPOModule().describe(), HingeModule().describe(), RPOModule().describe()] == [
        "robust DPO: beta 0.1, label noise 0.1, reference phase_start",
        "IPO: beta 0.1, of summed log-ratios, reference phase_start",
        "hinge (SLiC, RSO): beta 0.1, reference phase_start",
        "RPO: beta 0.1, weight of the likelihood 1, reference phase_start",
    ]
    assert [SimPOModule().describe(), ORPOModule().describe(), RRHFModule().describe()] == [
        "SimPO: beta 2, gamma 0.5",
        "ORPO: weight of the odds ratio 0.1",
        "RRHF: weight of the ranking 1, length penalty 1",
    ]
