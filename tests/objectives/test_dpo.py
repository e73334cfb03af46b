"""DPO in training: the first step after a reference is taken, the references themselves, and held-out pairs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hbat_lightning import DPOModule, IPOModule, LoraSettings, SFTModule
from hbat_lightning.callbacks import PolicyExport
from hbat_lightning.schedules import Interval
from tests.support import Run

DROPOUT = LoraSettings(r=4, alpha=8, dropout=0.1)


def require_fresh_reference(run: Run, phases: int) -> None:
    rows = run.first_preference_rows()
    assert len(rows) == phases
    for row in rows:
        assert row["train/preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["train/preference/chosen_reward"] == pytest.approx(0.0, abs=1e-6)
        assert row["train/preference/rejected_reward"] == pytest.approx(0.0, abs=1e-6)
    later = [row["train/preference/loss"] for row in run.log.rows if "train/preference/loss" in row and row not in rows]
    assert max(abs(loss - math.log(2)) for loss in later) > 1e-4


@pytest.mark.parametrize(
    ("beta", "settings"),
    [
        (0.05, {"lora": DROPOUT}),
        (5.0, {"lora": DROPOUT}),
        (0.5, {"lora": None}),
        (0.5, {"lora": DROPOUT, "quantization": "nf4"}),
        (0.5, {"lora": DROPOUT, "gradient_checkpointing": True}),
        (0.5, {"lora": None, "gradient_checkpointing": True}),
        (0.5, {"lora": DROPOUT, "quantization": "nf4", "gradient_checkpointing": True}),
        (0.5, {"lora": DROPOUT, "dtype": "bfloat16"}),
    ],
    ids=["beta .05", "beta 5", "full", "nf4", "checkpointed", "full checkpointed", "nf4 checkpointed", "bf16 base"],
)
def test_first_step_of_every_phase_is_ln_2(
    beta: float, settings: Any, make_policy: Any, make_hybrid: Any, fit: Any
) -> None:
    preference = DPOModule(beta=beta, lr=5e-3)
    module = make_hybrid(make_policy(**settings), preference=preference, schedule=Interval(2, 3, 3))
    require_fresh_reference(fit(module), phases=2)


def test_first_step_is_ln_2_in_mixed_precision(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    module = make_hybrid(make_policy(lora=DROPOUT), schedule=Interval(2, 3, 3), preference=DPOModule(beta=1.0, lr=5e-3))
    require_fresh_reference(fit(module, precision="bf16-mixed"), phases=2)


def test_label_smoothing_starts_at_ln_2_too(make_hybrid: Any, fit: Any) -> None:
    preference = DPOModule(beta=0.5, label_smoothing=0.2, lr=5e-3)
    require_fresh_reference(fit(make_hybrid(preference=preference, schedule=Interval(2, 3, 3))), phases=2)


@pytest.mark.parametrize("reference", ["phase_start", "initial", "base"])
@pytest.mark.parametrize("kind", ["fresh adapter", "given adapter", "full"])
def test_every_reference_is_what_it_says(reference: Any, kind: str, make_policy: Any, fit: Any, tmp_path: Any) -> None:
    """Alone, with a policy as it comes, only the bare base under a trained adapter is another model."""
    settings: dict[str, Any] = {"lora": None} if kind == "full" else {}
    if kind == "given adapter":
        fit(SFTModule(make_policy(), lr=5e-3), PolicyExport(), default_root_dir=tmp_path)
        settings = {"adapter_path": str(tmp_path / "adapter")}
    module = DPOModule(beta=0.5, reference=reference, lr=5e-3, policy=make_policy(**settings))
    run = fit(module, accumulate_grad_batches=1)
    if kind == "given adapter" and reference == "base":
        assert abs(run.log.column("train/preference/loss")[0] - math.log(2)) > 1e-3
    else:
        require_fresh_reference(run, phases=1)


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
@pytest.mark.parametrize("reference", ["initial", "base"])
def test_a_fixed_reference_stays_while_the_policy_moves(
    reference: Any, full: bool, make_policy: Any, make_hybrid: Any, make_data: Any, fit: Any, base_folder: str
) -> None:
    """In a hybrid it is the model before the first instruction phase, loaded here by plain transformers."""
    from transformers import AutoModelForCausalLM

    policy = make_policy(lora=None) if full else make_policy()
    module = make_hybrid(policy, preference=DPOModule(beta=0.5, reference=reference), schedule=Interval(2, 3, 2))
    run = fit(module)
    assert all(abs(row["train/preference/loss"] - math.log(2)) > 1e-3 for row in run.first_preference_rows())

    batch = run.data.train_sets["preference"].collate([0, 1, 2])
    plain = AutoModelForCausalLM.from_pretrained(base_folder)
    with torch.no_grad():
        log_probs = plain(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1].log_softmax(-1)
    targets = batch["labels"][:, 1:]
    truth = log_probs.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(targets < 0, 0).sum(-1)
    got = module.policy.score_reference(batch, reference).row_sums()
    assert torch.allclose(got, truth, rtol=1e-5)


def test_held_out_pairs_are_compared_with_the_initial_policy_in_every_round(
    make_hybrid: Any, make_data: Any, fit: Any
) -> None:
    """Their loss starts at ln 2 and lies on one scale: a validation in between does not renew what is compared with."""
    data = make_data()
    run = fit(make_hybrid(schedule=Interval(2, 2, 2)), data=data, num_sanity_val_steps=-1)
    before = run.module.validation_results["val/preference/loss"]
    again = run.trainer.validate(run.module, data, verbose=False)[0]
    assert again["val/preference/loss"] == pytest.approx(before, rel=1e-6)
    assert abs(before - math.log(2)) > 1e-4
    fresh = make_hybrid()
    first = fit(fresh, data=make_data(), max_steps=0).trainer.validate(fresh, make_data(), verbose=False)[0]
    assert first["val/preference/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["val/preference/margin"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(("beta", "smoothing"), [(0.0, 0.0), (-0.1, 0.0), (0.1, 0.5), (0.1, -0.1)])
def test_impossible_settings_are_refused(beta: float, smoothing: float) -> None:
    with pytest.raises(ValueError, match="beta must be > 0 and label_smoothing in"):
        DPOModule(beta=beta, label_smoothing=smoothing)


def test_training_without_dropout_and_with_checkpointed_layers(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    """Dropout must be off in a preference phase, while layers still recompute: their flag is the training mode."""
    module = make_hybrid(make_policy(lora=DROPOUT, gradient_checkpointing=True), schedule=Interval(1, 1, 1))
    fit(module)
    from transformers.modeling_layers import GradientCheckpointingLayer

    modules = list(module.policy.model.modules())
    assert not any(part.training for part in modules if isinstance(part, torch.nn.Dropout))
    layers = [part for part in modules if isinstance(part, GradientCheckpointingLayer)]
    assert layers
    assert all(layer.training for layer in layers)


def test_a_second_fit_of_the_same_module_takes_a_new_reference(make_policy: Any, fit: Any) -> None:
    module = DPOModule(beta=0.5, lr=5e-3, policy=make_policy(), epochs=2)
    for _ in range(2):
        require_fresh_reference(fit(module), phases=1)


def test_accuracies_compare_where_losses_do_not() -> None:
    """Of another beta, or loss, only the question which answer is the likelier one is the same."""
    one, other, ipo = DPOModule(beta=0.1), DPOModule(beta=0.3), IPOModule(beta=0.1)
    assert one.held_out_scale("loss") != other.held_out_scale("loss")
    assert one.held_out_scale("margin") != ipo.held_out_scale("margin")
    assert len({module.held_out_scale("accuracy") for module in (one, other, ipo)}) == 1
    assert IPOModule(per_token=True).held_out_scale("accuracy") != one.held_out_scale("accuracy")
