"""Samples at every switch against plain generation, and a run that goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from transformers import AutoModelForCausalLM

from hbat_lightning import DataSource, DPOModule, GenerationSettings, HybridDataModule, LoraSettings, SFTModule
from hbat_lightning.callbacks import SampleGenerations, WindowCheckpoint
from hbat_lightning.callbacks.samples import log_texts
from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError
from hbat_lightning.schedules import Interval, RandomMix
from tests.support import MemoryLogger, Run, same_bits

NOISY = LoraSettings(r=4, alpha=8, dropout=0.1)
SHORT = GenerationSettings(max_new_tokens=5)
DRAWN = GenerationSettings(max_new_tokens=5, temperature=1.0)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_rows_are_what_the_policy_writes_at_every_switch(
    make_hybrid: Any, make_policy: Any, fit: Any, base_folder: str, tmp_path: Path
) -> None:
    """The last rows against transformers' own generation from the merged model, one prompt at a time."""
    module = make_hybrid(make_policy(), schedule=Interval(2, 3, 2))
    run: Run = fit(module, SampleGenerations(2, SHORT))
    rows = rows_of(tmp_path)
    assert [(row["step"], row["phase"], row["objective"]) for row in rows] == [
        (step, phase, name)
        for step, phase in ((0, None), (3, 0), (5, 1), (8, 2), (10, 3))
        for name in ("instruction", "instruction", "preference", "preference")
    ]
    plain = AutoModelForCausalLM.from_pretrained(base_folder).eval()
    with torch.no_grad():
        for name, delta in merged(module).items():
            plain.get_parameter(name).add_(delta)
    tokenizer = module.policy.tokenizer
    for row, prompt in zip(rows[-4:], held_out(run, 2), strict=True):
        assert (row["prompt"], row["reference"]) == (prompt.text, prompt.completion)
        ids = plain.generate(torch.tensor([prompt.input_ids]), do_sample=False, max_new_tokens=5, pad_token_id=0)
        assert row["completion"] == tokenizer.decode(ids[0, len(prompt.input_ids) :], skip_special_tokens=True).strip()
    exact = [row["completion"] == row["reference"] for row in rows if row["objective"] == "instruction"]
    shares = [sum(exact[n : n + 2]) / 2 for n in range(0, len(exact), 2)]
    assert run.log.column("samples/instruction/exact_match") == shares


def merged(module: Any) -> dict[str, torch.Tensor]:
    """What the adapter adds to each weight of the base."""
    trained, scale = module.policy.trained_parameters(), 2.0
    found = {}
    for name, low in trained.items():
        if "lora_A" in name:
            high = trained[name.replace("lora_A", "lora_B")]
            weight = name.removeprefix("base_model.model.").split(".lora_A")[0] + ".weight"
            found[weight] = scale * high.detach() @ low.detach()
    return found


def held_out(run: Run, count: int) -> list[Any]:
    module = run.module
    return [
        prompt
        for name in ("instruction", "preference")
        for prompt in run.data.held_out_prompts(name, module.policy.tokenizer, module.run_seed, count)
    ]


def test_training_does_not_notice(make_policy: Any, make_hybrid: Any, fit: Any) -> None:
    def run(*callbacks: Any) -> Run:
        settings = {"lora": NOISY, "gradient_checkpointing": True}
        done: Run = fit(make_hybrid(make_policy(**settings), schedule=Interval(2, 2, 2)), *callbacks)
        return done

    plain, sampled = run(), run(SampleGenerations(3, DRAWN))
    assert same_bits(plain.weights, sampled.weights)
    assert plain.log.column("train/preference/loss") == sampled.log.column("train/preference/loss")


def test_a_run_that_goes_on_writes_no_row_twice(make_policy: Any, make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    def run(folder: str, **settings: Any) -> None:
        callbacks = [SampleGenerations(2, DRAWN), WindowCheckpoint(1, str(tmp_path / folder / "checkpoints"))]
        module = make_hybrid(make_policy(lora=NOISY), schedule=Interval(2, 3, 2))
        fit(module, *callbacks, enable_checkpointing=True, default_root_dir=tmp_path / folder, **settings)

    run("whole")
    truth = rows_of(tmp_path / "whole")
    run("parts", max_steps=6)
    with (tmp_path / "parts" / "samples.jsonl").open("a") as file:
        file.write(json.dumps(truth[-1]) + "\n")  # of steps that no checkpoint has reached
    run("parts", ckpt_path=tmp_path / "parts" / "checkpoints" / "last.ckpt")
    assert rows_of(tmp_path / "parts") == truth


def test_without_phases_rounds_are_sampled(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    module = make_hybrid(instruction=SFTModule(), preference=DPOModule(beta=0.5), schedule=RandomMix(rounds=2, steps=2))
    fit(module, SampleGenerations(1, SHORT))
    steps = sorted({row["step"] for row in rows_of(tmp_path)})
    assert steps == [0, 2, 4]


def test_without_prompts_it_is_refused(make_hybrid: Any, make_policy: Any, fit: Any) -> None:
    data = HybridDataModule(
        DataSource(embedded.INSTRUCTION, limit=24, val_fraction=0.0),
        DataSource(embedded.PREFERENCE, limit=12, val_fraction=0.0),
        batch_size=2,
    )
    with pytest.raises(UserError, match="there are none: give val_path"):
        fit(make_hybrid(), SampleGenerations(), data=data)
    with pytest.raises(ValueError, match="at least 1"):
        SampleGenerations(0)


def test_loggers_that_take_texts_get_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    row = {"step": 3, "phase": 0, "objective": "instruction", "prompt": "a\nb", "completion": "c", "reference": "d"}
    seen: list[tuple[Any, ...]] = []
    board, wandb = TensorBoardLogger.__new__(TensorBoardLogger), WandbLogger.__new__(WandbLogger)

    class Writer:
        def add_text(self, *arguments: Any) -> None:
            seen.append(arguments)

    monkeypatch.setattr(TensorBoardLogger, "experiment", Writer())
    monkeypatch.setattr(WandbLogger, "log_text", lambda self, *arguments, **more: seen.append((*arguments, more)))
    for logger in (board, wandb, MemoryLogger()):
        log_texts(logger, [row], 3)
    assert seen == [
        ("samples/instruction/0", "    a\n    b\n    \n    ---\n    \n    c\n    \n    ---\n    \n    d", 3),
        ("samples", list(row), [list(row.values())], {"step": 3}),
    ]
