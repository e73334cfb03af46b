"""Preference losses other than DPO through TRL and through this package: the same model and rows, loss and gradient.

IPO, robust, hinge, RPO and KTO are whole steps of TRL's trainers on rows that it has tokenised itself. Those of ORPO and
CPO (with which TRL does SimPO) are experimental there and tokenise otherwise, so they are given our ids.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from hbat_lightning import (
    DataSource,
    HingeModule,
    HybridDataModule,
    IPOModule,
    KTOModule,
    LoraSettings,
    ORPOModule,
    Policy,
    RobustDPOModule,
    RPOModule,
    SimPOModule,
)
from hbat_lightning.data import embedded
from tests.support import shake
from tests.test_against_trl import (
    BETA,
    ROWS,
    chat,
    our_rows,
    plain_model,
    preference_rows,
    settings,
    trained,
    trl,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def shaken_policy(base: str, folder: str) -> Policy:
    """The policy some way from the adapter that is its reference."""
    policy = Policy(base, lora=LoraSettings(r=4, alpha=8), adapter_path=folder)
    policy.build(torch.device("cpu"))
    policy.add_snapshots(["phase_start"])
    shake(policy.trained_parameters(), seed=1)
    policy.set_training(dropout=False)
    return policy


def require_same(objective: Any, policy: Policy, rows: Any, loss: Any, gradients: dict[str, Any]) -> dict[str, float]:
    """Compare a micro-batch with TRL's loss and gradients; the means of all quantities."""
    sums = objective.loss(policy, rows)
    means = {name: total / count for name, (total, count) in sums.items()}
    assert means["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    mine = policy.trained_parameters()
    assert set(mine) == set(gradients)
    for name, gradient in zip(mine, torch.autograd.grad(means["loss"], list(mine.values())), strict=True):
        assert torch.allclose(gradient, gradients[name], rtol=1e-3, atol=1e-6), name
        assert bool(gradient.any())
    return {name: mean.item() for name, mean in means.items()}


def gradients_of(loss: torch.Tensor, model: Any) -> dict[str, torch.Tensor]:
    parameters = trained(model)
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (lambda: RobustDPOModule(beta=BETA, label_smoothing=0.2), {"loss_type": ["robust"], "label_smoothing": 0.2}),
        (lambda: IPOModule(beta=BETA, per_token=True), {"loss_type": ["ipo"]}),
        (lambda: HingeModule(beta=BETA), {"loss_type": ["hinge"]}),
        # A mean over the batch's tokens there, over each pair's here: chosen answers of this task are equally long.
        (lambda: RPOModule(beta=BETA, alpha=0.6), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.6]}),
    ],
    ids=["robust", "ipo", "hinge", "rpo"],
)
def test_losses_of_the_dpo_trainer(
    make: Callable[[], Any],
    config: dict[str, Any],
    base_folder: str,
    adapter: str,
    tmp_path: Path,
) -> None:
    from datasets import Dataset

    trainer = trl.DPOTrainer(
        model=plain_model(base_folder, adapter),
        args=trl.DPOConfig(**settings(tmp_path, beta=BETA, **config)),
        train_dataset=Dataset.from_list(preference_rows()),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    shake(trained(trainer.model), seed=1)
    theirs = trainer.compute_loss(trainer.model, trainer.data_collator([trainer.train_dataset[n] for n in range(ROWS)]))
    policy = shaken_policy(base_folder, adapter)
    require_same(make(), policy, our_rows("dpo", adapter), theirs, gradients_of(theirs, trainer.model))


def test_kto(base_folder: str, adapter: str, tmp_path: Path) -> None:
    """The mismatches too: ids and masks, and the KL that they give."""
    from datasets import Dataset

    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.6}
    rows = embedded.rows(embedded.FEEDBACK)[:ROWS]
    trainer = trl.KTOTrainer(
        model=plain_model(base_folder, adapter),
        args=trl.KTOConfig(**settings(tmp_path, beta=BETA, **weights)),
        train_dataset=Dataset.from_list(
            [chat(r["prompt"], completion=r["completion"]) | {"label": r["label"]} for r in rows]
        ),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    shake(trained(trainer.model), seed=1)
    theirs = trainer.data_collator([trainer.train_dataset[n] for n in range(ROWS)])
    loss = trainer.compute_loss(trainer.model, theirs)

    data = HybridDataModule(preference=DataSource(embedded.FEEDBACK, limit=ROWS, val_fraction=0.0))
    data.expect({"preference": KTOModule()})
    data.load("preference", AutoTokenizer.from_pretrained(adapter), seed=0)
    ours = data.train_sets["preference"].collate(range(ROWS))
    assert ours["desirable"].tolist() == theirs["label"].bool().tolist()
    for part, prefix in ((slice(ROWS), ""), (slice(ROWS, None), "KL_")):
        mask, their_mask = ours["attention_mask"][part].bool(), theirs[f"{prefix}attention_mask"].bool()
        learnt = theirs[f"{prefix}completion_mask"].bool()
        assert torch.equal(ours["input_ids"][part][mask], theirs[f"{prefix}input_ids"][their_mask])
        assert torch.equal((ours["labels"][part] != -100)[mask], learnt[their_mask])

    policy = shaken_policy(base_folder, adapter)
    objective = KTOModule(beta=BETA, **weights)
    means = require_same(objective, policy, ours, loss, gradients_of(loss, trainer.model))
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    assert metrics["kl"] > 1e-3
    # A difference of sums of some forty nats each, in fp32: on another processor it rounds otherwise.
    assert means["kl"] == pytest.approx(metrics["kl"], abs=3e-5)
    assert means["chosen_reward"] == pytest.approx(metrics["rewards/chosen"], rel=1e-4)
    assert means["rejected_reward"] == pytest.approx(metrics["rewards/rejected"], rel=1e-4)


def as_pairs(rows: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our collation under the names of TRL's older one."""
    halves = {name: rows[name].chunk(2) for name in ("input_ids", "attention_mask", "labels")}
    sides = enumerate(("chosen", "rejected"))
    return {f"{side}_{name}": half[place] for place, side in sides for name, half in halves.items()}


def test_simpo(base_folder: str, adapter: str, tmp_path: Path) -> None:
    from datasets import Dataset
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    trainer = CPOTrainer(
        model=plain_model(base_folder, adapter),
        args=CPOConfig(**settings(tmp_path, beta=2.0, loss_type="simpo", simpo_gamma=0.7, cpo_alpha=0.0)),
        train_dataset=Dataset.from_list(embedded.rows(embedded.PREFERENCE)[:ROWS]),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    shake(trained(trainer.model), seed=1)
    rows = our_rows("dpo", adapter)
    theirs, metrics = trainer.get_batch_loss_metrics(trainer.model, as_pairs(rows))
    policy = shaken_policy(base_folder, adapter)
    objective = SimPOModule(beta=2.0, gamma=0.7)
    means = require_same(objective, policy, rows, theirs, gradients_of(theirs, trainer.model))
    for name, key in (("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("margin", "margins")):
        assert means[name] == pytest.approx(float(metrics[f"rewards/{key}"]), rel=1e-4)


def test_orpo(base_folder: str, adapter: str, tmp_path: Path) -> None:
    """TRL takes the likelihood over prompts too, so that term is taken from its scores of the answers."""
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = ORPOTrainer(
        model=plain_model(base_folder, adapter),
        args=ORPOConfig(**settings(tmp_path, beta=0.4)),
        train_dataset=Dataset.from_list(embedded.rows(embedded.PREFERENCE)[:ROWS]),
        processing_class=AutoTokenizer.from_pretrained(base_folder),
    )
    shake(trained(trainer.model), seed=1)
    rows = our_rows("dpo", adapter)
    chosen, rejected, *_ = trainer.concatenated_forward(trainer.model, as_pairs(rows))
    weighted, *_, log_odds_ratio = trainer.odds_ratio_loss(chosen, rejected)
    theirs = (-chosen - weighted).mean()
    policy = shaken_policy(base_folder, adapter)
    means = require_same(ORPOModule(weight=0.4), policy, rows, theirs, gradients_of(theirs, trainer.model))
    assert means["margin"] == pytest.approx(log_odds_ratio.item(), rel=1e-4)
