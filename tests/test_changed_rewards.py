"""A run that learns from rewards goes on with the same reward only, unless the user says so."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from hbat_lightning import DataSource, GenerationSettings, HybridDataModule, LoraSettings, REINFORCEModule
from hbat_lightning.callbacks import WindowCheckpoint
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.rewards import HEAD_FILE, AdapterReward, ClassifierReward, FunctionReward, Reward


def short(prompt: str, completion: str) -> float:
    return -float(len(completion))


def long(prompt: str, completion: str) -> float:
    return float(len(completion))


def adapter_folder(folder: Path, make_policy: Any) -> Path:
    """As a run of RewardModule leaves it, with a head of its own."""
    policy = make_policy()
    policy.build(torch.device("cpu"))
    policy.export(folder)
    save_file({"weight": torch.full((1, 128), 0.1), "bias": torch.zeros(1)}, folder / HEAD_FILE)
    return folder


def classifier_folder(folder: Path, base_folder: str) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(base_folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), num_labels=1, pad_token_id=0, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def change(file: Path, name: str) -> None:
    tensors = load_file(file)
    tensors[name] = tensors[name] + 0.25
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["adapter", "head", "classifier", "function"])
def test_another_reward_is_refused_by_name_and_can_be_accepted(
    kind: str, make_policy: Any, base_folder: str, fit: Any, tmp_path: Path
) -> None:
    folder, moved = tmp_path / "reward", tmp_path / "moved"
    if kind == "classifier":
        classifier_folder(folder, base_folder)
    elif kind != "function":
        adapter_folder(folder, make_policy)

    def reward(place: Path, function: Any = short) -> Reward:
        if kind == "function":
            return FunctionReward(function)
        return (
            ClassifierReward(str(place))
            if kind == "classifier"
            else AdapterReward(str(place), LoraSettings(r=4, alpha=8))
        )

    def run(reward: Reward, steps: int, ckpt: bool = True, accepted: tuple[Any, ...] = ()) -> int:
        sampling = GenerationSettings(max_new_tokens=3, temperature=1.0)
        module = REINFORCEModule(reward, policy=make_policy(), sampling=sampling, generation=sampling, lr=1e-3)
        source = DataSource(embedded.PREFERENCE, limit=12, val_fraction=0.0)
        data = HybridDataModule(preference=source, batch_size=2, accept_changes=accepted)
        last = tmp_path / "run" / "last.ckpt" if ckpt else None
        done = fit(
            module,
            WindowCheckpoint(1, str(tmp_path / "run")),
            data=data,
            ckpt_path=last,
            enable_checkpointing=True,
            accumulate_grad_batches=1,
            max_steps=steps,
        )
        return int(done.trainer.global_step)

    assert run(reward(folder), 1, ckpt=False) == 1
    if kind != "function":
        shutil.copytree(folder, moved)
        assert run(reward(moved), 2) == 2, "a folder that moves holds the same reward"
        file, name = {
            "adapter": ("adapter_model.safetensors", "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"),
            "head": (HEAD_FILE, "bias"),
            "classifier": ("model.safetensors", "score.weight"),
        }[kind]
        change(folder / file, name)
        was, now = rf"{moved} \(\w+\)", rf"{folder} \(\w+\)"
    else:
        was, now = "tests.test_changed_rewards.short", "tests.test_changed_rewards.long"
    line = rf"another run, preference reward: was {was}, is {now}\. .*--accept_changes \[reward\]"
    with pytest.raises(UserError, match=line):
        run(reward(folder, long), 3)
    with pytest.raises(UserError, match="preference reward"):
        run(reward(folder, long), 3, accepted=("data", "objectives", "seed"))
    assert run(reward(folder, long), 3, accepted=("reward",)) == 3
    assert run(reward(folder, long), 4) == 4, "what has been accepted is not asked again"


def test_a_reward_of_ones_own_is_told_by_its_class_and_its_tensors() -> None:
    class Mine(Reward):
        def score(self, *_: Any) -> torch.Tensor:
            return torch.zeros(1)

    class Weighed(Mine):
        def __init__(self, weight: float) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([weight]))

    assert Mine().identity() == Mine().identity() != Weighed(1.0).identity()
    assert Weighed(1.0).identity() == Weighed(1.0).identity() != Weighed(2.0).identity()
