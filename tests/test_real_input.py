"""Two rounds on real text through the real command: a small Llama with the Llama-2 tokenizer."""

from __future__ import annotations

import csv
import gzip
import json
import math
import shutil
from itertools import islice
from pathlib import Path
from typing import cast

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, LlamaTokenizer

from hbat_lightning import DataSource, HybridDataModule, Policy
from hbat_lightning.cli import main

ROOT = Path(__file__).parents[1]
ROWS = 64
INSTRUCTIONS = "alpaca_en_demo.json"
FP32 = ("--model.init_args.policy.init_args.dtype", "float32")  # bf16 takes minutes on processors without units for it
PAIRS = {"hh": "hh_rlhf_harmless_base_test.jsonl.gz", "sharegpt": "dpo_en_demo.json"}


@pytest.fixture(scope="module")
def small_llama(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> str:
    """A folder with random weights and the Llama-2 tokenizer, which adds bos and has no pad token."""
    folder = tmp_path_factory.mktemp("llama")
    shutil.copy(real_data / "llama2_tokenizer.model", folder / "tokenizer.model")
    tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    assert tokenizer.pad_token_id is None
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.1,  # with the usual 0.02 the frozen random head hardly tells words apart
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def fit(folder: Path, base: str, instructions: Path, pairs: Path, max_length: int, *more: str) -> list[dict[str, str]]:
    """Run ``hbat fit`` for two rounds; the rows of its ``metrics.csv``."""
    settings = {
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.accumulate_grad_batches": 2,
        "data.init_args.instruction.path": instructions,
        "data.init_args.instruction.limit": ROWS,
        "data.init_args.preference.path": pairs,
        "data.init_args.preference.limit": ROWS,
        "data.init_args.invalid_rows": "drop",
        "data.init_args.truncation": "drop",
        "data.init_args.max_length": max_length,
        "model.init_args.policy.init_args.model_name_or_path": base,
        "model.init_args.schedule.init_args.rounds": 2,
        "model.init_args.schedule.init_args.instruction_epochs": 2,
        "model.init_args.instruction.init_args.lr": 1e-2,
        "model.init_args.preference.init_args.lr": 2e-3,
        "trainer.callbacks.strength": 0.01,
    }
    arguments = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    main(["fit", "--config", str(ROOT / "configs" / "hbat_dpo.yaml"), *arguments, *more])
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: list[dict[str, str]], name: str, phase: int) -> list[float]:
    """A column's values in one phase."""
    return [float(row[name]) for row in rows if row["phase/index"] == str(float(phase)) and row[name]]


@pytest.mark.parametrize(
    ("pairs", "quantization"), [("hh", "none"), ("hh", "nf4"), ("sharegpt", "none"), ("sharegpt", "nf4")]
)
def test_two_rounds(pairs: str, quantization: str, small_llama: str, real_data: Path, tmp_path: Path) -> None:
    more = () if quantization == "none" else ("--config", str(ROOT / "configs" / "policy" / "qlora.yaml"), *FP32)
    max_length = 384 if pairs == "hh" else 768  # the answers of the ShareGPT pairs are long
    rows = fit(tmp_path, small_llama, real_data / INSTRUCTIONS, real_data / PAIRS[pairs], max_length, *more)
    for phase in (1, 3):
        losses = column(rows, "train/preference/loss", phase)
        assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
        assert min(losses) < math.log(2)
        assert column(rows, "train/preference/chosen_reward", phase)[0] == 0.0
    first = column(rows, "train/instruction/loss", 0)
    assert first[0] == pytest.approx(math.log(32000), abs=1.0)  # a random model knows nothing
    assert first[-1] < first[0] - 0.5
    for phase in (1, 2, 3):
        pulls = column(rows, "ewc/pull_norm", phase)
        assert pulls[0] == 0.0  # at the anchor
        assert all(pull > 0 for pull in pulls[1:])
    assert all(pull == 0.0 for pull in column(rows, "ewc/pull_norm", 0))
    switches = [json.loads(line) for line in (tmp_path / "switches.jsonl").read_text().splitlines()]
    assert [row["objective"] for row in switches] == ["instruction", "preference"] * 2
    assert switches[0]["change"]["val/instruction/loss"] < -0.5
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def run(config: str, folder: Path, settings: dict[str, object]) -> list[dict[str, str]]:
    """Run ``hbat fit`` on HH-RLHF rows with the base in 4 bits; the rows of its ``metrics.csv``."""
    common: dict[str, object] = {
        "trainer.default_root_dir": folder,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "data.init_args.invalid_rows": "drop",
        "data.init_args.truncation": "drop",
        "data.init_args.max_length": 256,
    }
    arguments = [part for key, value in (common | settings).items() for part in (f"--{key}", str(value))]
    layers = (config, "policy/qlora.yaml")
    main(["fit", *(part for name in layers for part in ("--config", str(ROOT / "configs" / name))), *arguments, *FP32])
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def held_out_pairs(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some HH-RLHF pairs that nothing trains on."""
    file = tmp_path_factory.mktemp("pairs") / "held_out.jsonl"
    with gzip.open(real_data / PAIRS["hh"], "rt") as lines:
        file.write_text("".join(islice(lines, ROWS, ROWS + 40)))
    return file


@pytest.fixture(scope="module")
def reward_model(
    small_llama: str, real_data: Path, held_out_pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, str]]]:
    """The folder of a run of RewardModule on HH-RLHF pairs, and what it logged."""
    folder = tmp_path_factory.mktemp("reward")
    rows = run(
        "reward.yaml",
        folder,
        {
            "trainer.accumulate_grad_batches": 2,
            "data.init_args.preference.path": real_data / PAIRS["hh"],
            "data.init_args.preference.limit": 32,
            "data.init_args.preference.val_path": held_out_pairs,
            "model.init_args.policy.init_args.model_name_or_path": small_llama,
            "model.init_args.epochs": 4,
            "model.init_args.lr": 5e-3,
        },
    )
    return folder, rows


def test_a_reward_model(
    reward_model: tuple[Path, list[dict[str, str]]], small_llama: str, held_out_pairs: Path
) -> None:
    """HH-RLHF pairs, in 4 bits: from ln 2 down on what it trains on, and the figures of held-out pairs from its files."""
    folder, rows = reward_model
    losses = [float(row["train/preference/loss"]) for row in rows if row["train/preference/loss"]]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert sum(losses[-3:]) / 3 < 0.6
    margins = margins_by_hand(folder / "adapter", small_llama, held_out_pairs)
    likely = torch.sigmoid(margins)
    expected = {
        "accuracy": (margins > 0).double().mean(),
        "loss": -likely.log().mean(),
        "margin": margins.mean(),
        "confidence": torch.maximum(likely, 1 - likely).mean(),
        "brier": (1 - likely).square().mean(),
    }
    assert len(margins) % 2 == 1  # so that accuracy cannot be a half, the same from either side
    assert float(margins.std()) > 0.1  # the model tells answers apart
    held_out = next(row for row in reversed(rows) if row["val/preference/loss"])
    found = {name: float(held_out[f"val/preference/{name}"]) for name in expected}
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-4)


def margins_by_hand(adapter: Path, base: str, pairs: Path) -> torch.Tensor:
    """From the run's files by plain PEFT: reward of the chosen less that of the rejected answer, each alone and unpadded."""
    policy = Policy(base, quantization="nf4", dtype="float32")
    policy.build(torch.device("cpu"))
    model = cast(PeftModel, policy.model).eval()
    model.load_adapter(str(adapter), "trained")
    model.set_adapter("trained")
    head = load_file(adapter / "reward_head.safetensors")
    data = HybridDataModule(
        preference=DataSource(str(pairs), val_fraction=0.0), truncation="drop", invalid_rows="drop", max_length=256
    )
    data.load("preference", policy.tokenizer, seed=1)
    rows = data.train_sets["preference"]
    batch = rows.collate(range(len(rows)))
    rewards = []
    for ids, keep in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
        with torch.no_grad():
            states = model(input_ids=ids[keep].unsqueeze(0), output_hidden_states=True).hidden_states[-1]
        rewards.append(states[0, -1] @ head["weight"][0] + head["bias"][0])
    chosen, rejected = torch.stack(rewards).double().chunk(2)
    return chosen - rejected


def test_hbat_with_ppo_against_that_reward_model(
    reward_model: tuple[Path, list[dict[str, str]]], small_llama: str, real_data: Path, tmp_path: Path
) -> None:
    """Four adapters on one 4-bit base: SFT on Alpaca, then a few updates of PPO on HH-RLHF prompts, twice."""
    folder, _ = reward_model
    rows = run(
        "hbat_ppo.yaml",
        tmp_path,
        {
            "trainer.accumulate_grad_batches": 2,
            "trainer.callbacks.strength": 0.01,
            "data.init_args.instruction.path": real_data / INSTRUCTIONS,
            "data.init_args.instruction.limit": 32,
            "data.init_args.preference.path": real_data / PAIRS["hh"],
            "data.init_args.preference.limit": 40,
            "model.init_args.policy.init_args.model_name_or_path": small_llama,
            "model.init_args.schedule.init_args.rounds": 2,
            "model.init_args.schedule.init_args.instruction_epochs": 1,
            "model.init_args.instruction.init_args.lr": 1e-2,
            "model.init_args.preference.init_args.lr": 5e-3,
            "model.init_args.preference.init_args.rollout_windows": 1,
            "model.init_args.preference.init_args.sampling.max_new_tokens": 12,
            "model.preference.reward": "AdapterReward",
            "model.preference.reward.path": folder / "adapter",
        },
    )
    for phase in (1, 3):
        ratios, divergences = (column(rows, f"train/preference/{name}", phase) for name in ("ratio", "kl"))
        assert (ratios[0], divergences[0]) == (1.0, 0.0)  # sampled by the policy that trains, which is the reference
        assert len(ratios) >= 4
        assert max(abs(ratio - 1) for ratio in ratios) > 1e-4  # and on the second pass it has moved
        assert divergences[-1] != 0.0
        rewards = column(rows, "train/preference/reward", phase)
        assert len(set(rewards)) > 1  # the model tells completions apart
        assert all(math.isfinite(value) for value in column(rows, "train/preference/value_loss", phase))
    assert column(rows, "ewc/pull_norm", 3)[0] == 0.0
    assert all(pull > 0 for pull in column(rows, "ewc/pull_norm", 3)[1:])
    state = torch.load(next((tmp_path / "checkpoints").glob("step=*.ckpt")), weights_only=True)["state_dict"]
    adapters = {name.split(".lora_A.")[1].split(".")[0] for name in state if ".lora_A." in name}
    assert adapters == {"default", "phase_start", "value"}  # the reward's is frozen, and lies in its own folder
    assert not any("base_layer" in name for name in state)
