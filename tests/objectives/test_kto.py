"""KTO in training: mismatches, the reference point, units, held-out figures, and what is refused."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hbat_lightning import DataSource, DPOModule, HybridDataModule, KTOModule, LoraSettings, Policy
from hbat_lightning.callbacks import ElasticWeightConsolidation, WindowCheckpoint
from hbat_lightning.cli import main
from hbat_lightning.data import embedded
from hbat_lightning.errors import DataError, UserError
from hbat_lightning.importance import ExactFisher
from hbat_lightning.schedules import Interval
from hbat_lightning.training_data import MicroBatch
from tests.support import Recorder, largest_difference, negative_log_likelihood, put, rows_of

BETA, GOOD, BAD = 0.5, 1.2, 0.7


def feedback(rows: int = 16, instruction: int | None = None, **settings: Any) -> HybridDataModule:
    settings.setdefault("batch_size", 2)
    sources = {"preference": DataSource(embedded.FEEDBACK, limit=rows, val_fraction=0.25)}
    if instruction:
        sources["instruction"] = DataSource(embedded.INSTRUCTION, limit=instruction, val_fraction=0.25)
    return HybridDataModule(**sources, **settings)


def scores(model: Any, batch: MicroBatch) -> Tensor:
    """``(2, B)``: of each answer, and of its mismatch; one by one through the full logits. Blank rows are left out."""
    rows = rows_of(batch)
    half = len(rows) // 2
    real = [n for n in range(half) if (rows[n][1] != -100).any()]
    sums = [torch.stack([-negative_log_likelihood(model, *rows[n + part]) for n in real]) for part in (0, half) if real]
    return torch.stack(sums) if real else torch.zeros(2, 0)


def written_loss(policy: Tensor, reference: Tensor, desirable: Tensor) -> Tensor:
    ratios = policy - reference
    point = ratios[1].mean().detach().clamp(min=0)
    good = GOOD * (1 - torch.sigmoid(BETA * (ratios[0] - point)))
    bad = BAD * (1 - torch.sigmoid(BETA * (point - ratios[0])))
    return torch.where(desirable, good, bad)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (4, 2), (2, 4)])
def test_gradient_of_every_window_is_that_of_the_formula(
    batch_size: int, accumulate: int, make_policy: Any, fit: Any
) -> None:
    """Windows of 8 and 5 rows: a mean over the window's rows, of losses with a reference point per micro-batch."""
    recorder = Recorder()
    module = KTOModule(BETA, GOOD, BAD, policy=make_policy(double=True), lr=2e-2)
    data = feedback(17, batch_size=batch_size)
    run = fit(module, recorder, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
    model, trained = module.policy.model, module.policy.trained_parameters()
    logged, sizes = run.log.column("train/preference/loss"), []
    for step, window in enumerate(recorder.windows):
        put(module, recorder.anchors[step])
        with torch.no_grad():
            reference = [scores(model, batch) for batch in window]
        put(module, recorder.parameters[step])
        losses = torch.cat(
            [
                written_loss(scores(model, batch), anchor, batch.inputs["desirable"])
                for batch, anchor in zip(window, reference, strict=True)
            ]
        )
        sizes.append(len(losses))
        truth = dict(zip(trained, torch.autograd.grad(losses.mean(), list(trained.values())), strict=True))
        assert largest_difference(recorder.gradients[step], truth) < 1e-11
        assert logged[step] == pytest.approx(losses.mean().item(), rel=1e-6)
    assert sizes == [8, 5]
    assert max(run.log.column("train/preference/kl")) > 0  # the mismatches had a say


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": None}, {"quantization": "nf4", "gradient_checkpointing": True}, {"dtype": "bfloat16"}],
    ids=["lora", "full", "nf4 checkpointed", "bf16 base"],
)
def test_first_step_of_every_phase_is_half_the_weight(
    settings: Any, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    settings = {"lora": LoraSettings(r=4, alpha=8, dropout=0.1)} | settings
    module = make_hybrid(make_policy(**settings), preference=KTOModule(lr=5e-3), schedule=Interval(2, 3, 3))
    run = fit(module, data=feedback(24, 24))
    first = run.first_preference_rows()
    assert len(first) == 2
    for row in first:
        assert row["train/preference/loss"] == pytest.approx(0.5, abs=1e-6)
        assert row["train/preference/kl"] == pytest.approx(0.0, abs=1e-5)
        assert row["train/preference/accuracy"] == 0.5
        assert row["train/preference/margin"] == pytest.approx(0.0, abs=1e-5)
    assert max(abs(loss - 0.5) for loss in run.log.column("train/preference/loss")) > 1e-3


def test_held_out_figures(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """Against the initial policy, not the reference, with a reference point for every micro-batch of 2, 2 and 1 rows."""
    objective = KTOModule(BETA, GOOD, BAD, lr=2e-2)
    module = make_hybrid(make_policy(double=True), preference=objective, schedule=Interval(1, 3, 5))
    data = feedback(20, 12, val_batch_size=2)
    figures = fit(module, data=data).module.validation_results
    figures = {name: value for name, value in figures.items() if "preference" in name}
    model = module.policy.model.eval()
    losses, rewards, leads, kl = [], [], [], []
    (loader,) = (loader for loader in data.val_dataloader() if loader.objective == "preference")
    for batch in loader:
        with torch.no_grad():
            now = scores(model, batch)
            with model.disable_adapter():
                then = scores(model, batch)
        desirable = batch.inputs["desirable"]
        point = (now - then)[1].mean().clamp(min=0)
        losses.append(written_loss(now, then, desirable))
        rewards.append(BETA * (now - then)[0])
        leads.append(torch.where(desirable, 1.0, -1.0) * (rewards[-1] - BETA * point))
        kl.append(point.expand(len(desirable)))
    verdicts = torch.tensor([good for _, good in data.val_sets["preference"].rows])
    assert 0 < int(verdicts.sum()) < len(verdicts) == 5
    reward, lead = torch.cat(rewards), torch.cat(leads)
    truth = {
        "loss": torch.cat(losses).mean(),
        "chosen_reward": reward[verdicts].mean(),
        "rejected_reward": reward[~verdicts].mean(),
        "margin": lead.mean(),
        "accuracy": (lead > 0).double().mean(),
        "kl": torch.cat(kl).mean(),
    }
    assert figures.keys() == {f"val/preference/{name}" for name in truth}
    for name, value in truth.items():
        assert figures[f"val/preference/{name}"] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name


def test_other_held_out_batches_have_their_own_mismatches(make_policy: Any, make_trainer: Any) -> None:
    """Before training nothing has moved, whatever the size; with scores of other mismatches there would be a distance."""
    module, trainer = KTOModule(policy=make_policy()), make_trainer()
    for size in (5, 2, 3):
        results = trainer.validate(module, feedback(20, val_batch_size=size), verbose=False)[0]
        assert results["val/preference/kl"] == pytest.approx(0.0, abs=1e-5)
        assert results["val/preference/loss"] == pytest.approx(0.5, abs=1e-5)
        assert results["val/preference/accuracy"] == 0.5


def test_mixed_precision_leaves_every_tensor_a_gradient(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    recorder = Recorder()
    module = make_hybrid(make_policy(lora=None), preference=KTOModule(lr=2e-3), schedule=Interval(1, 1, 3))
    fit(module, recorder, data=feedback(24, 12), precision="bf16-mixed")
    names = set(module.policy.trained_parameters())
    for gradients in recorder.gradients[1:]:
        assert set(gradients) == names
        assert sum(bool(value.any()) for value in gradients.values()) >= 0.9 * len(names)


@pytest.mark.parametrize("importance", [None, ExactFisher(samples=2)], ids=["drift", "exact Fisher"])
def test_in_a_hybrid_with_ewc(importance: Any, make_hybrid: Any, fit: Any) -> None:
    module = make_hybrid(preference=KTOModule(lr=2e-3), schedule=Interval(2, 2, 2))
    run = fit(module, ElasticWeightConsolidation(5.0, importance), data=feedback(24, 24))
    assert run.trainer.global_step == 8
    assert all(map(math.isfinite, run.log.column("train/preference/loss")))
    assert max(run.log.column("ewc/pull_norm")) > 0


def test_a_blank_micro_batch_counts_for_nothing(make_policy: Any) -> None:
    policy = make_policy()
    policy.build(torch.device("cpu"))
    policy.add_snapshots(["phase_start"])
    data = feedback(8)
    data.expect({"preference": KTOModule()})
    data.load("preference", policy.tokenizer, seed=0)
    sums = KTOModule().loss(policy, data.train_sets["preference"].blank())
    sums["loss"][0].backward()
    assert all(float(total) == float(count) == 0.0 for total, count in sums.values())
    assert all(p.grad is None or not p.grad.any() for p in policy.trained_parameters().values())


# ---- data ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [{"batch_size": 1}, {"batch_size": 4, "val_batch_size": 1}])
def test_micro_batches_of_one_row_are_refused(sizes: Any, make_policy: Any, fit: Any) -> None:
    with pytest.raises(UserError, match=r"batch_size and val_batch_size must be at least 2: .*accumulate_grad_batches"):
        fit(KTOModule(policy=make_policy()), data=feedback(**sizes))


def test_a_single_row_is_refused(make_policy: Any, fit: Any) -> None:
    data = HybridDataModule(preference=DataSource(embedded.FEEDBACK, limit=4, val_fraction=0.2))
    with pytest.raises(DataError, match=r"a single row of feedback, training or held out, .*val_fraction 0"):
        fit(KTOModule(policy=make_policy()), data=data)


def test_pairs_are_refused_with_what_to_do(make_policy: Any, make_data: Any, fit: Any) -> None:
    with pytest.raises(DataError, match=r"this is preference data .* given as feedback data.*DPOModule"):
        fit(KTOModule(policy=make_policy()), data=make_data())


def test_feedback_for_a_loss_on_pairs_is_refused_with_what_to_do(make_policy: Any, fit: Any) -> None:
    with pytest.raises(DataError, match=r"unpaired feedback .* Train KTOModule"):
        fit(DPOModule(policy=make_policy()), data=feedback())


def test_one_data_module_serves_one_objective_after_another(make_policy: Any, fit: Any, make_data: Any) -> None:
    """Rows that were encoded for another kind are not used: here the same source is of the wrong kind."""
    data = make_data()
    fit(DPOModule(policy=make_policy()), data=data, max_steps=1)
    with pytest.raises(DataError, match="given as feedback data"):
        fit(KTOModule(policy=make_policy()), data=data)


def test_a_run_goes_on_exactly(make_policy: Any, fit: Any, tmp_path: Path) -> None:
    def module() -> KTOModule:
        return KTOModule(BETA, policy=make_policy(), lr=5e-3, epochs=2)

    whole = fit(module(), data=feedback(30))
    saves = WindowCheckpoint(dirpath=tmp_path, every_n_train_steps=3)
    fit(module(), saves, data=feedback(30), max_steps=3, enable_checkpointing=True)
    second = fit(module(), data=feedback(30), ckpt_path=tmp_path / "last.ckpt")
    assert second.trainer.global_step == whole.trainer.global_step > 3
    assert all(torch.equal(value, second.weights[name]) for name, value in whole.weights.items())


def test_real_feedback_is_inspected_and_encoded(real_data: Path, tmp_path: Path, capsys: Any) -> None:
    path = str(real_data / "kto_en_demo.json")
    options = [
        "--model",
        "KTOModule",
        "--model.policy.model_name_or_path",
        embedded.TINY_LLAMA,
        "--data.batch_size",
        "2",
    ]
    options += [
        "--data.preference.path",
        path,
        "--data.max_length",
        "4096",
        "--trainer.default_root_dir",
        str(tmp_path),
    ]
    main(["inspect", *options])
    told = capsys.readouterr().out
    assert "300 as messages_feedback" in told
    assert "rows without a token to learn: 0" in told
    data = HybridDataModule(preference=DataSource(path, val_fraction=0.0), max_length=4096)
    data.expect({"preference": KTOModule()})
    data.load("preference", Policy(embedded.TINY_LLAMA).tokenizer, seed=0)
    rows = data.train_sets["preference"]
    assert len(rows) == 300
    assert 0 < sum(good for _, good in rows.rows) < 300
