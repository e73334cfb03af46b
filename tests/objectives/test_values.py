"""A value function that is a model of its own: what it says, what of it trains and is kept, and how a run goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hbat_lightning import ClassifierPolicy, DataSource, GenerationSettings, HybridDataModule, LoraSettings, PPOModule
from hbat_lightning.callbacks import WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.policy import Policy
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.schedules import Interval
from hbat_lightning.scoring import predicting
from hbat_lightning.values import ModelValue
from tests.objectives.test_rollouts import letters, scripted
from tests.support import Run, largest_difference, same_bits

SAMPLING = GenerationSettings(max_new_tokens=6, temperature=1.0)
LORA = LoraSettings(r=4, alpha=8, dropout=0.1)
FORMS: dict[str, dict[str, Any]] = {
    "full": {"lora": None},
    "LoRA": {"lora": LORA},
    "QLoRA": {"lora": LORA, "quantization": "nf4", "gradient_checkpointing": True},
}


def ppo(name: str = embedded.TINY_LLAMA, **settings: Any) -> PPOModule:
    value = ModelValue(Policy(name, **settings))
    return PPOModule(FunctionReward(letters), value=value, sampling=SAMPLING, rollout_windows=2, passes=2, lr=5e-3)


@pytest.fixture
def train(make_hybrid: Any, make_policy: Any, fit: Any) -> Any:
    def run(objective: PPOModule, *callbacks: Any, policy: Any = None, **trainer: Any) -> Run:
        data = HybridDataModule(
            DataSource(embedded.INSTRUCTION, limit=16, val_fraction=0.1),
            DataSource(embedded.PREFERENCE, limit=16, val_fraction=0.1),
            batch_size=2,
        )
        policy = policy or make_policy(lora=LORA)
        module = make_hybrid(policy, preference=objective, schedule=Interval(2, 2, 6))
        done: Run = fit(module, *callbacks, data=data, accumulate_grad_batches=2, **trainer)
        return done

    return run


@pytest.mark.parametrize("form", FORMS)
def test_a_run_goes_on_bit_identical_and_its_checkpoint_holds_what_trains(
    form: str, train: Any, make_policy: Any, tmp_path: Path
) -> None:
    """From inside a cycle of rollouts; the policy's form is the value function's, so a full fine-tune runs PPO too."""

    def run(folder: str, ckpt_path: Path | None = None, **trainer: Any) -> Run:
        torch.rand(7 if ckpt_path else 3)  # another process would have another random state
        checkpoint = WindowCheckpoint(1, str(tmp_path / folder))
        settings = {"enable_checkpointing": True, "ckpt_path": ckpt_path} | trainer
        done: Run = train(ppo(**FORMS[form]), checkpoint, policy=make_policy(**FORMS[form]), **settings)
        return done

    whole, last = run("whole"), tmp_path / "parts" / "last.ckpt"
    parts = [run("parts", max_steps=5), run("parts", last, max_steps=11), run("parts", last)]
    assert parts[-1].trainer.global_step == whole.trainer.global_step == 16
    assert same_bits(whole.weights, parts[-1].weights)
    own = [dict(run.module.preference.value.named_parameters()) for run in (whole, parts[-1])]
    trained = {name for name, value in own[0].items() if value.requires_grad}
    assert all(torch.equal(own[0][name], own[1][name]) for name in trained)
    for name in ("loss", "ratio", "value_loss"):
        pieces = [value for part in parts for value in part.log.column(f"train/preference/{name}")]
        assert pieces == whole.log.column(f"train/preference/{name}") != [], name
    assert {row["train/preference/ratio"] for row in whole.first_preference_rows()} == {1.0}

    rows, value = whole.data.train_sets["preference"], whole.module.preference.value
    inputs = rows.collate(sorted(rows.at_hand)[:2])
    whole.module.train()  # as Lightning leaves it: values have no dropout all the same
    with torch.no_grad():
        one, other = (value(whole.module.policy, inputs, *predicting(inputs["labels"])) for _ in range(2))
    assert torch.equal(one, other)

    state = torch.load(last, weights_only=True)["state_dict"]
    kept = {name.removeprefix("preference.value.") for name in state if name.startswith("preference.")}
    assert kept == trained
    assert all(".lora_" in name or name.startswith("head.") for name in kept) == (form != "full")


def test_it_says_what_its_model_and_head_say_and_trains_in_preference_phases_only(train: Any, base_folder: str) -> None:
    """Every parameter of a second model: values after a run, and what has moved, from plain transformers' hidden states."""
    before = AutoModelForCausalLM.from_pretrained(base_folder)
    alone = train(ppo(lora=None), max_steps=2)  # instructions only
    value = alone.module.preference.value
    assert all(torch.equal(p, dict(before.named_parameters())[n]) for n, p in value.model.model.named_parameters())
    assert not value.head.weight.any()

    run = train(ppo(lora=None))
    value, policy = run.module.preference.value, run.module.policy
    inputs = run.data.train_sets["preference"].collate(sorted(run.data.train_sets["preference"].at_hand)[:3])
    row, column = predicting(inputs["labels"])
    with torch.no_grad():
        found = value(policy, inputs, row, column)
        before.load_state_dict(value.model.model.state_dict())
        truth = []
        for number, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"].bool(), strict=True)):
            hidden = before(ids[mask].unsqueeze(0), output_hidden_states=True).hidden_states[-1][0]
            truth.append((hidden @ value.head.weight.T + value.head.bias)[column[row == number], 0])
    assert float(found.std()) > 1e-3
    assert torch.allclose(found, torch.cat(truth), atol=1e-5)
    assert all(".value." not in name for name in policy.trained_parameters())


def test_what_does_not_fit_is_refused(train: Any, make_policy: Any, base_folder: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"value.model: a ClassifierPolicy has no hidden state for each token"):
        ModelValue(ClassifierPolicy(embedded.TINY_LLAMA))
    words = shutil.copytree(base_folder, tmp_path / "words")
    text = (words / "tokenizer.json").read_text()
    (words / "tokenizer.json").write_text(text.replace('"kettle"', '"teapot"'))
    assert (words / "tokenizer.json").read_text() != text
    with pytest.raises(UserError, match=r"words has another vocabulary than embedded://tiny-llama: give a model of"):
        train(ppo(str(words), lora=None))


def test_a_checkpoint_of_another_value_model_is_refused(train: Any, base_folder: str, tmp_path: Path) -> None:
    checkpoint = WindowCheckpoint(1, str(tmp_path / "run"))
    train(ppo(lora=LORA), checkpoint, enable_checkpointing=True, max_steps=3)
    other = shutil.copytree(base_folder, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 0.5
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        UserError, match=r"the checkpoint's value function belongs to another policy .*base fingerprint"
    ):
        train(ppo(str(other), lora=LORA), ckpt_path=tmp_path / "run" / "last.ckpt")


def test_what_it_learns_from_a_window_does_not_depend_on_the_window_s_split(make_policy: Any, fit: Any) -> None:
    found = []
    for batch_size, accumulate in ((8, 1), (3, 3), (1, 8)):
        value = ModelValue(make_policy(double=True, lora=None))
        objective = PPOModule(
            FunctionReward(letters),
            value=value,
            sampling=SAMPLING,
            passes=2,
            policy=make_policy(double=True),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        )
        scripted(objective.policy)
        data = HybridDataModule(
            preference=DataSource(embedded.PREFERENCE, limit=7, val_fraction=0.0), batch_size=batch_size
        )
        fit(objective, data=data, accumulate_grad_batches=accumulate, gradient_clip_val=None)
        found.append({name: p.detach().clone() for name, p in value.named_parameters()})
    fresh = make_policy(double=True, lora=None)
    fresh.build(torch.device("cpu"))
    start = {f"model.{name}": p for name, p in fresh.named_parameters()}
    moved = [name for name, p in start.items() if float((found[0][name] - p).abs().max()) > 1e-6]
    assert len(moved) > 10  # in the second pass: in the first its head maps everything to 0
    for other in found[1:]:
        assert largest_difference(other, found[0]) < 1e-6
