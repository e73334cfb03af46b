"""The same model and rows through TRL and through this package. Golden values that need no TRL: functional/test_losses.py.

TRL would send telemetry when a trainer is made, unless it is told that there is no network: conftest.py does.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbat_lightning import DPOModule, Policy, SFTModule
from hbat_lightning.data import embedded
from hbat_lightning.functional import dpo_loss, sequence_log_probs, sft_loss, token_log_probs
from hbat_lightning.lr import Constant
from tests.support import Recorder, shake

trl = pytest.importorskip("trl", reason='TRL is not installed: pip install "hbat-lightning[oracles]"')
ROWS = 6
BETA = 0.3


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def chat(prompt: str, **answers: str) -> dict[str, Any]:
    turns = {name: [{"role": "assistant", "content": text}] for name, text in answers.items()}
    return {"prompt": [{"role": "user", "content": prompt}], **turns}


def instruction_rows() -> list[dict[str, Any]]:
    return [chat(row["prompt"], completion=row["completion"]) for row in embedded.rows(embedded.INSTRUCTION)[:ROWS]]


def preference_rows() -> list[dict[str, Any]]:
    rows = embedded.rows(embedded.PREFERENCE)[:ROWS]
    return [chat(row["prompt"], chosen=row["chosen"], rejected=row["rejected"]) for row in rows]


def trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "report_to": "none",
        "use_cpu": True,
        "per_device_train_batch_size": ROWS,
        "max_length": None,
        "gradient_checkpointing": False,
        "bf16": False,
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "max_steps": 1,
        "lr_scheduler_type": "constant",
        "learning_rate": 1e-2,
        "optim": "sgd",
        "max_grad_norm": 1e9,
        **more,
    }


def plain_model(base: str, adapter: str) -> PeftModel:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)


def trl_trainer(kind: str, base: str, adapter: str, folder: Path) -> Any:
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(base)
    if kind == "dpo":
        config: Any = trl.DPOConfig(**settings(folder, beta=BETA))
        rows, make = preference_rows(), trl.DPOTrainer
    else:
        config, rows, make = trl.SFTConfig(**settings(folder)), instruction_rows(), trl.SFTTrainer
    return make(
        model=plain_model(base, adapter), args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
    )


def our_rows(kind: str, adapter: str) -> dict[str, torch.Tensor]:
    from hbat_lightning import DataSource, HybridDataModule

    name = "preference" if kind == "dpo" else "instruction"
    source = DataSource(embedded.PREFERENCE if kind == "dpo" else embedded.INSTRUCTION, limit=ROWS, val_fraction=0.0)
    data = HybridDataModule(**{name: source})
    data.load(name, AutoTokenizer.from_pretrained(adapter), seed=0)
    return data.train_sets[name].collate(range(ROWS))


def test_log_probs_and_losses_of_plain_tensors() -> None:
    from trl.trainer.utils import selective_log_softmax

    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(3, 9, 31, generator=generator)
    labels = torch.randint(31, (3, 9), generator=generator)
    truth = selective_log_softmax(logits[:, :-1], labels[:, 1:])
    assert torch.allclose(token_log_probs(logits, labels), truth, rtol=1e-6, atol=1e-6)
    labels[:, :4] = -100
    assert torch.allclose(sequence_log_probs(logits, labels), truth[:, 3:].sum(-1), rtol=1e-6)
    hugging_face = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert sft_loss(logits, labels).item() == pytest.approx(hugging_face.item(), rel=1e-6)
    scores = torch.randn(4, 5, generator=generator)
    delta = (scores[0] - scores[2]) - (scores[1] - scores[3])
    assert torch.allclose(dpo_loss(*scores, beta=BETA)[0], -logsigmoid(BETA * delta))


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_ids_and_masks_are_those_of_trl(kind: str, base_folder: str, adapter: str, tmp_path: Path) -> None:
    trainer = trl_trainer(kind, base_folder, adapter, tmp_path)
    theirs = trainer.data_collator([trainer.train_dataset[n] for n in range(ROWS)])
    ours = our_rows(kind, adapter)
    assert torch.equal(ours["attention_mask"], theirs["attention_mask"])
    real = ours["attention_mask"].bool()
    assert torch.equal(ours["input_ids"][real], theirs["input_ids"][real])
    supervised = ours["labels"] != -100
    if kind == "dpo":
        assert torch.equal(supervised, theirs["completion_mask"].bool())
    else:
        assert torch.equal(ours["labels"], theirs["labels"])


def test_dpo_loss_and_rewards_are_those_of_trl(base_folder: str, adapter: str, tmp_path: Path) -> None:
    """Both go on from one adapter, which is the reference, after the same change of it."""
    trainer = trl_trainer("dpo", base_folder, adapter, tmp_path)
    shake(trained(trainer.model), seed=1)
    batch = trainer.data_collator([trainer.train_dataset[n] for n in range(ROWS)])
    theirs = trainer.compute_loss(trainer.model, batch)
    their_gradients = dict(
        zip(trained(trainer.model), torch.autograd.grad(theirs, trained(trainer.model).values()), strict=True)
    )

    from hbat_lightning import LoraSettings

    policy = Policy(base_folder, lora=LoraSettings(r=4, alpha=8), adapter_path=adapter)
    policy.build(torch.device("cpu"))
    policy.add_snapshots(["phase_start"])
    shake(policy.trained_parameters(), seed=1)
    policy.set_training(dropout=False)
    sums = DPOModule(beta=BETA).loss(policy, our_rows("dpo", adapter))
    ours = {name: (total / count) for name, (total, count) in sums.items()}
    assert ours["loss"].item() == pytest.approx(theirs.item(), rel=1e-5)
    assert abs(theirs.item() - 0.6931) > 1e-2
    metrics = {name: values[0] for name, values in trainer._metrics["train"].items()}
    for name, key in (("chosen_reward", "chosen"), ("rejected_reward", "rejected"), ("margin", "margins")):
        assert ours[name].item() == pytest.approx(metrics[f"rewards/{key}"], rel=1e-4, abs=1e-6)
    assert ours["accuracy"].item() == pytest.approx(metrics["rewards/accuracies"])
    mine = policy.trained_parameters()
    assert set(mine) == set(their_gradients)
    for name, gradient in zip(mine, torch.autograd.grad(ours["loss"], list(mine.values())), strict=True):
        assert torch.allclose(gradient, their_gradients[name], rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("kind", ["sft", "dpo"])
def test_one_training_step_is_that_of_trl(
    kind: str, base_folder: str, adapter: str, tmp_path: Path, fit: Any, make_policy: Any
) -> None:
    """Whole trainers, plain gradient descent: the loss, the gradient norm and the weights after the step."""
    from functools import partial

    from hbat_lightning import DataSource, HybridDataModule

    trainer = trl_trainer(kind, base_folder, adapter, tmp_path / "trl")
    trainer.train()
    log = trainer.state.log_history[0]

    common = {
        "policy": make_policy(base_folder, adapter_path=adapter),
        "optimizer": partial(torch.optim.SGD, lr=1e-2),
        "lr_schedule": Constant(),
    }
    module = DPOModule(beta=BETA, **common) if kind == "dpo" else SFTModule(**common)
    name = "preference" if kind == "dpo" else "instruction"
    source = DataSource(embedded.PREFERENCE if kind == "dpo" else embedded.INSTRUCTION, limit=ROWS, val_fraction=0.0)
    recorder = Recorder()
    run = fit(
        module,
        recorder,
        data=HybridDataModule(**{name: source}, batch_size=2),
        accumulate_grad_batches=3,
        gradient_clip_val=None,
    )
    assert run.trainer.global_step == 1
    assert run.log.column(f"train/{name}/loss")[0] == pytest.approx(log["loss"], rel=1e-4)
    norm = torch.stack([value.norm() for value in recorder.gradients[0].values()]).norm()
    assert norm.item() == pytest.approx(log["grad_norm"], rel=1e-4)
    theirs = trained(trainer.model)
    for key, value in run.weights.items():
        assert torch.allclose(value, theirs[key], rtol=1e-4, atol=1e-6), key
        assert not torch.equal(value, recorder.parameters[0][key])
