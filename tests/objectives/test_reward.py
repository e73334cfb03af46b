"""Reward models in training: against plain transformers, however windows are cut; figures, resume, and what they export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification

from hbat_lightning import (
    ClassifierPolicy,
    ClassifierRewardModule,
    DataSource,
    HybridDataModule,
    LoraSettings,
    RewardModule,
)
from hbat_lightning.callbacks import ElasticWeightConsolidation, PolicyExport, WindowCheckpoint
from hbat_lightning.cli import main
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.functional import bradley_terry_loss, preference_calibration
from hbat_lightning.training_data import MicroBatch
from tests.support import Recorder, largest_difference, put, rows_of, same_bits

CPU = torch.device("cpu")
MARGINS = (0.0, 0.5, 2.0)
SETTINGS = [
    {"lora": LoraSettings(r=4, alpha=8, dropout=0.1)},
    {"lora": None},
    {"quantization": "nf4", "gradient_checkpointing": True},
]
IDS = ["lora", "full", "nf4 checkpointed"]


@pytest.fixture
def pairs(tmp_path: Path) -> Any:
    """A data module on rows of the embedded task, with or without margins."""

    def make(train: int = 12, held_out: int = 4, margins: bool = True, **settings: Any) -> HybridDataModule:
        rows = embedded.rows(embedded.PREFERENCE)[: train + held_out]
        if margins:
            rows = [row | {"margin": MARGINS[number % 3]} for number, row in enumerate(rows)]
        for name, part in (("train", rows[:train]), ("val", rows[train:])):
            (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
        source = DataSource(str(tmp_path / "train.jsonl"), val_path=str(tmp_path / "val.jsonl"))
        settings.setdefault("batch_size", 2)
        return HybridDataModule(preference=source, **settings)

    return make


class HeadRecorder(Callback):
    """Per optimizer step the head's weight that it starts from, and its gradient."""

    def __init__(self) -> None:
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self.weights.append(pl_module.head.weight.detach().clone())
        self.gradients.append(pl_module.head.weight.grad.clone())


def plain_rewards(model: Any, weight: Tensor, batch: MicroBatch) -> Tensor:
    """``(2, pairs)``, one row at a time and without padding, from what transformers gives as hidden states."""
    rows = [row for row in rows_of(batch) if (row[1] != -100).any()]
    states = [model(input_ids=ids[None], output_hidden_states=True).hidden_states[-1][0, -1] for ids, _ in rows]
    return (torch.stack(states) @ weight[0].to(states[0].dtype)).view(2, -1) if rows else torch.zeros(2, 0)


def plain_loss(model: Any, weight: Tensor, window: list[MicroBatch]) -> Tensor:
    rewards = torch.cat([plain_rewards(model, weight, batch) for batch in window], dim=1)
    margins = torch.cat([batch.inputs["margin"][(batch.inputs["index"] >= 0)] for batch in window])
    return -logsigmoid(rewards[0] - rewards[1] - margins).mean()


# ---- the loss -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (2, 4)])
def test_gradients_of_policy_and_head_are_those_of_the_formula(
    batch_size: int, accumulate: int, make_policy: Any, pairs: Any, fit: Any
) -> None:
    """Windows of 8 and 4 pairs with margins, whole and in parts."""
    recorder, head = Recorder(), HeadRecorder()
    module = RewardModule(policy=make_policy(double=True), lr=2e-2)
    data = pairs(batch_size=batch_size)
    run = fit(module, recorder, head, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
    model, trained = module.policy.model, module.policy.trained_parameters()
    logged = run.log.column("train/preference/loss")
    assert len(recorder.windows) == 2
    assert sum(float(batch.inputs["margin"].sum()) for window in recorder.windows for batch in window) == 10.0
    for step, window in enumerate(recorder.windows):
        put(module, recorder.parameters[step])
        weight = head.weights[step].double().requires_grad_()
        loss = plain_loss(model, weight, window)
        *found, of_head = torch.autograd.grad(loss, [*trained.values(), weight])
        assert largest_difference(recorder.gradients[step], dict(zip(trained, found, strict=True))) < 1e-6
        assert torch.allclose(head.gradients[step].double(), of_head, atol=1e-6)
        assert logged[step] == pytest.approx(loss.item(), rel=1e-5)
    assert any(float(value.abs().max()) > 1e-3 for value in recorder.gradients[1].values())  # the adapter has a say


@pytest.mark.parametrize("settings", SETTINGS, ids=IDS)
def test_it_begins_at_ln_2_and_everything_trains(settings: Any, make_policy: Any, pairs: Any, fit: Any) -> None:
    recorder = Recorder()
    module = RewardModule(policy=make_policy(**settings), lr=5e-3, epochs=3)
    run = fit(module, recorder, data=pairs(margins=False), accumulate_grad_batches=2, num_sanity_val_steps=-1)
    losses = run.log.column("train/preference/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert run.log.column("train/preference/accuracy")[0] == 0.5
    assert run.log.column("train/preference/confidence")[0] == 0.5
    assert losses[-1] < losses[0] - 0.05
    names = set(module.policy.trained_parameters()) - {"lm_head.weight"}  # the vocabulary has no say in rewards
    assert set(recorder.gradients[-1]) == names
    assert sum(bool(value.any()) for value in recorder.gradients[-1].values()) >= 0.9 * len(names)
    assert module.head.weight.dtype == torch.float32
    assert float(module.head.bias) == 0.0


def test_margins_of_the_data_are_asked_for(make_policy: Any, pairs: Any, make_trainer: Any) -> None:
    """A head that says 0 of everything misses each margin by all of it."""
    data = pairs(12, 6)
    results = make_trainer().validate(RewardModule(policy=make_policy()), data, verbose=False)[0]
    wanted = np.mean([np.log1p(np.exp(margin)) for margin in MARGINS])
    assert results["val/preference/loss"] == pytest.approx(wanted, abs=1e-6)


def test_padding_and_order_change_no_reward(make_policy: Any, pairs: Any) -> None:
    policy, module = make_policy(), RewardModule()
    policy.build(CPU)
    module.build(policy, CPU)
    torch.nn.init.normal_(module.head.weight)
    data = pairs()
    data.load("preference", policy.tokenizer, seed=0)
    inputs = data.train_sets["preference"].collate([0, 1, 2])
    rewards = module.rewards(policy, inputs)
    short = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    right = {name: torch.nn.functional.pad(value, (0, 5)) for name, value in short.items()}
    left = {name: torch.stack([row.roll(-int(n)) for row, n in zip(value, inputs["attention_mask"].sum(1), strict=True)])
            for name, value in short.items()}  # fmt: skip
    assert not bool(left["attention_mask"][inputs["attention_mask"].sum(1) < left["attention_mask"].shape[1], 0].any())
    assert float(rewards.std()) > 0.1
    for other in (right, left):
        assert torch.allclose(module.rewards(policy, other), rewards, atol=1e-5)
    flipped = {name: value.flip(0) for name, value in short.items()}
    assert torch.allclose(module.rewards(policy, flipped).flip(0), rewards, atol=1e-5)


def test_a_blank_micro_batch_counts_for_nothing(make_policy: Any, pairs: Any) -> None:
    policy, module, data = make_policy(), RewardModule(), pairs()
    policy.build(CPU)
    module.build(policy, CPU)
    data.load("preference", policy.tokenizer, seed=0)
    sums = module.loss(policy, data.train_sets["preference"].blank())
    sums["loss"][0].backward()
    assert all(float(total) == float(count) == 0.0 for total, count in sums.values())
    assert not bool(module.head.weight.grad.any())


# ---- figures ------------------------------------------------------------------------------------------------------------


def test_calibration() -> None:
    chosen, rejected = np.array([3.0, -1.0, 0.5, 0.0]), np.array([1.0, 1.0, 0.5, 40.0])
    p = np.exp(chosen) / (np.exp(chosen) + np.exp(rejected))
    confidence, brier = preference_calibration(torch.tensor(chosen), torch.tensor(rejected))
    assert np.allclose(confidence, np.maximum(p, 1 - p))
    assert np.allclose(brier, (1 - p) ** 2)
    margins = np.array([0.0, 1.0, 2.0, 3.0])
    losses = bradley_terry_loss(*map(torch.tensor, (chosen, rejected, margins)))
    assert np.allclose(losses, np.log1p(np.exp(rejected - chosen + margins)))


def test_held_out_figures(make_policy: Any, pairs: Any, fit: Any) -> None:
    """Over 5 pairs, in micro-batches of 2, 2 and 1."""
    module, data = RewardModule(policy=make_policy(), lr=2e-2), pairs(12, 5, val_batch_size=2)
    results = fit(module, data=data, accumulate_grad_batches=2).module.validation_results
    batch = MicroBatch(data.val_sets["preference"].collate(range(5)), "preference")
    with torch.no_grad():
        rewards = plain_rewards(module.policy.model.eval(), module.head.weight, batch).double().numpy()
    chosen, rejected = rewards
    p = 1 / (1 + np.exp(rejected - chosen))
    truth = {
        "loss": np.log1p(np.exp(rejected - chosen + np.array([MARGINS[n % 3] for n in range(12, 17)]))),
        "accuracy": chosen > rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        "confidence": np.maximum(p, 1 - p),
        "brier": (1 - p) ** 2,
    }
    assert results.keys() == {f"val/preference/{name}" for name in truth}
    for name, value in truth.items():
        assert results[f"val/preference/{name}"] == pytest.approx(value.mean(), rel=1e-4, abs=1e-6), name
    assert np.abs(chosen - rejected).max() > 0.1


# ---- a run --------------------------------------------------------------------------------------------------------------


def bits(run: Any) -> dict[str, Tensor]:
    optimizer = run.trainer.optimizers[0]
    states = [optimizer.state[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    moments = {f"{n}.{key}": torch.as_tensor(value) for n, state in enumerate(states) for key, value in state.items()}
    own = {name: value.detach().clone() for name, value in run.module.named_parameters() if "head" in name}
    return run.weights | own | moments


@pytest.mark.parametrize("settings", [*SETTINGS, {"classifier": True}], ids=[*IDS, "classifier"])
def test_it_goes_on_bit_identical(
    settings: Any, make_policy: Any, base_folder: str, pairs: Any, fit: Any, tmp_path: Path
) -> None:
    def module() -> Any:
        if settings.get("classifier"):
            return ClassifierRewardModule(policy=ClassifierPolicy(base_folder), lr=1e-2, epochs=2)
        return RewardModule(policy=make_policy(**settings), lr=1e-2, epochs=2)

    def run(folder: str, ckpt_path: Any = None, **trainer: Any) -> Any:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        return fit(
            module(),
            WindowCheckpoint(1, str(tmp_path / folder)),
            data=pairs(),
            ckpt_path=ckpt_path,
            enable_checkpointing=True,
            accumulate_grad_batches=2,
            **trainer,
        )

    whole = run("whole")
    part = run("part", max_steps=4)
    rest = run("part", tmp_path / "part" / "last.ckpt")
    assert rest.trainer.global_step == whole.trainer.global_step == 6
    assert same_bits(bits(whole), bits(rest))
    name = "train/preference/loss"
    assert part.log.column(name) + rest.log.column(name) == whole.log.column(name)


def test_in_a_hybrid_it_trains_in_its_own_phases(make_hybrid: Any, pairs: Any, fit: Any, tmp_path: Path) -> None:
    class Heads(Callback):
        seen: dict[int, list[Tensor]] = {}  # noqa: RUF012

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: MicroBatch, i: int) -> None:
            self.seen.setdefault(batch.phase, []).append(pl_module.preference.head.weight.detach().clone())

    data = pairs(8, 4, margins=False)
    data.sources["instruction"] = DataSource(embedded.INSTRUCTION, limit=12, val_fraction=0.25)
    heads = Heads()
    module = make_hybrid(preference=RewardModule(lr=5e-3))
    run = fit(module, heads, PolicyExport(), ElasticWeightConsolidation(1.0), data=data, accumulate_grad_batches=1)
    assert run.log.column("train/preference/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(heads.seen) == 4
    assert torch.equal(heads.seen[2][0], heads.seen[2][-1])
    assert not torch.equal(heads.seen[3][0], heads.seen[3][-1])
    assert (tmp_path / "adapter" / "reward_head.safetensors").exists()


def test_hbat_export_says_where_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(Path(__file__).parents[2] / "configs" / "reward.yaml")
    with pytest.raises(SystemExit):
        main(["export", "--config", config, "--output", str(tmp_path / "out"), "--trainer.accelerator", "cpu"])
    assert "a reward model is whole in the run's adapter/ or model/ folder" in capsys.readouterr().err


def test_it_completes_nothing(make_policy: Any, pairs: Any, make_trainer: Any) -> None:
    with pytest.raises(UserError, match="a reward model does not complete prompts: hbat validate"):
        make_trainer().test(RewardModule(policy=make_policy()), pairs(), verbose=False)


# ---- sequence classifiers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LoraSettings(r=4, alpha=8), None], ids=["lora", "full"])
def test_a_classifier_trains_and_its_result_is_one_of_transformers(
    lora: Any, base_folder: str, pairs: Any, fit: Any, tmp_path: Path
) -> None:
    policy = ClassifierPolicy(base_folder, lora=lora)
    recorder, module = Recorder(), ClassifierRewardModule(policy=policy, lr=5e-3, epochs=3)
    run = fit(module, recorder, PolicyExport(), data=pairs(12, 6, margins=False), accumulate_grad_batches=2)
    losses = run.log.column("train/preference/loss")
    assert losses[-1] < losses[0] - 0.05
    assert set(recorder.gradients[-1]) == set(policy.trained_parameters())
    assert any("score" in name for name in policy.trained_parameters())
    if lora is None:
        fresh = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model")
    else:
        from peft import PeftModel

        base = AutoModelForSequenceClassification.from_pretrained(base_folder, num_labels=1)
        fresh = PeftModel.from_pretrained(base, tmp_path / "adapter")
    rows = rows_of(MicroBatch(run.data.val_sets["preference"].collate(range(6)), "preference"))
    with torch.no_grad():
        alone = torch.stack([fresh.eval()(input_ids=ids[None]).logits[0, 0] for ids, _ in rows]).view(2, -1)
    truth = {
        "loss": -logsigmoid(alone[0] - alone[1]).mean(),
        "chosen_reward": alone[0].mean(),
        "accuracy": (alone[0] > alone[1]).double().mean(),
    }
    for name, value in truth.items():
        assert module.validation_results[f"val/preference/{name}"] == pytest.approx(value.item(), rel=1e-4, abs=1e-5)
    card = (tmp_path / ("model" if lora is None else "adapter") / "README.md").read_text()
    assert "AutoModelForSequenceClassification" in card
    assert "text-classification" in card
