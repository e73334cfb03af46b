"""Rows of switches.jsonl against what was validated and what moved; the files that other callbacks write."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hbat_lightning import GenerationSettings, SFTModule
from hbat_lightning.callbacks import (
    ElasticWeightConsolidation,
    PolicyExport,
    PredictionWriter,
    SwitchReport,
    WindowCheckpoint,
)
from hbat_lightning.cli import main
from hbat_lightning.schedules import Interval
from tests.support import Recorder
from tests.test_cli import config, few_rows, in_folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "switches.jsonl").read_text().splitlines()]


def test_a_row_per_phase_with_figures_before_and_after(
    make_hybrid: Any, fit: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorder, ewc = Recorder(), ElasticWeightConsolidation(5.0)
    run = fit(make_hybrid(schedule=Interval(2, 3, 2)), recorder, ewc, SwitchReport(), num_sanity_val_steps=-1)
    rows = rows_of(tmp_path)
    found = [(row["phase"], row["round"], row["objective"], row["step"], row["steps"]) for row in rows]
    assert found == [
        (0, 0, "instruction", 3, 3),
        (1, 0, "preference", 5, 2),
        (2, 1, "instruction", 8, 3),
        (3, 1, "preference", 10, 2),
    ]
    names = ("val/instruction/loss", "val/instruction/exact_match", "val/preference/loss", "val/preference/accuracy")
    logged = run.log.table(*names)
    assert len(logged) == 4  # the sanity check is not logged
    for n, row in enumerate(rows):
        assert [row["after"][name] for name in names] == pytest.approx(logged[n], rel=1e-6)
        if n:
            assert row["before"] == rows[n - 1]["after"]
        for name in names:
            assert row["change"][name] == row["after"][name] - row["before"][name]
    assert rows[0]["before"]["val/preference/loss"] == pytest.approx(0.693147, abs=1e-6)  # before anything moved
    starts = recorder.phase_starts | {4: run.weights}
    for n, row in enumerate(rows):
        for name, value in row["drift"].items():
            moved = (starts[n + 1][name] - starts[n][name]).double().square().mean().sqrt()
            assert value == pytest.approx(moved.item(), rel=1e-4, abs=1e-12)
        assert row["drift"].keys() == run.weights.keys()
    penalty = dict(run.log.table("step", "ewc/penalty"))
    assert [row["ewc"]["ewc/penalty"] for row in rows] == pytest.approx([penalty[step] for step in (2, 4, 7, 9)])
    assert run.log.column("switch/instruction/loss") == [row["change"]["val/instruction/loss"] for row in rows]
    assert (tmp_path / "switches.png").stat().st_size > 10_000
    table = capsys.readouterr().out
    assert f"{rows[1]['before']['val/instruction/loss']:.3f} → {rows[1]['after']['val/instruction/loss']:.3f}" in table


def test_a_run_that_goes_on_keeps_rows_and_writes_none_twice(make_hybrid: Any, fit: Any, tmp_path: Path) -> None:
    def run(**settings: Any) -> None:
        callbacks = [SwitchReport(), WindowCheckpoint(1, str(tmp_path / "checkpoints"))]
        fit(
            make_hybrid(schedule=Interval(2, 3, 2)),
            *callbacks,
            enable_checkpointing=True,
            num_sanity_val_steps=-1,
            **settings,
        )

    run(default_root_dir=tmp_path / "whole")
    truth = rows_of(tmp_path / "whole")
    for path in (tmp_path / "checkpoints").iterdir():
        path.unlink()
    run(max_steps=4)
    # What a killed run may leave behind: a row of a step that no checkpoint has reached.
    with (tmp_path / "switches.jsonl").open("a") as file:
        file.write(json.dumps(truth[1]) + "\n")
    run(ckpt_path=tmp_path / "checkpoints" / "last.ckpt")
    assert rows_of(tmp_path) == truth


def test_without_drift_no_snapshot_is_asked_for(make_policy: Any, fit: Any, tmp_path: Path) -> None:
    module = SFTModule(make_policy(), lr=1e-3)
    fit(module, SwitchReport(drift=False))
    assert module.policy.snapshot() is None
    assert rows_of(tmp_path)[0]["drift"] == {}


@pytest.mark.parametrize("full", [False, True], ids=["adapter", "model"])
def test_what_was_trained_is_exported_for_other_libraries(
    full: bool, make_policy: Any, make_hybrid: Any, fit: Any, batches: Any, base_folder: str, tmp_path: Path
) -> None:
    policy = make_policy(lora=None) if full else make_policy()
    run = fit(make_hybrid(policy, schedule=Interval(1, 2, 2)), PolicyExport())
    if full:
        plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    else:
        plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), tmp_path / "adapter")
    run.module.policy.eval()
    ids = batches[0]["input_ids"]
    with torch.no_grad():
        assert torch.equal(plain.eval()(ids).logits, run.module.policy.model(ids).logits)
    assert [path.name for path in tmp_path.iterdir()] == ["model" if full else "adapter"]


def test_predictions_are_a_row_per_prompt(make_policy: Any, make_data: Any, make_trainer: Any, tmp_path: Path) -> None:
    module = SFTModule(make_policy(), generation=GenerationSettings(max_new_tokens=5))
    data = make_data(val_batch_size=4)
    for _ in range(2):  # a second time replaces the first
        make_trainer(callbacks=[PredictionWriter()]).predict(module, data)
    rows = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 6
    tokenizer = module.policy.tokenizer
    for row, prompt in zip(rows, data.load_prompts(tokenizer, module.run_seed, compared=False), strict=True):
        assert row["reference"] == prompt.completion.strip()
        assert row["prompt"] == prompt.text
        assert 1 <= row["tokens"] <= 5
        assert row["stopped"] or row["tokens"] == 5


@pytest.mark.parametrize(
    ("layers", "sources"),
    [
        (["hbat_dpo"], ("instruction", "preference")),
        (["hbat_dpo", "preference/simpo"], ("instruction", "preference")),
        (["hbat_ppo"], ("instruction", "preference")),
        (["reward"], ("preference",)),
    ],
)
def test_held_out_rows_are_kept_apart_however_they_are_batched(
    layers: list[str], sources: tuple[str, ...], tmp_path: Path
) -> None:
    kept = []
    for size in (1, 4):
        folder = tmp_path / f"by-{size}"
        sizes = ["--data.batch_size", "4", "--data.val_batch_size", str(size)]
        main(
            [
                "fit",
                *(part for layer in layers for part in config(layer)),
                *few_rows(*sources),
                *sizes,
                *in_folder(folder),
            ]
        )
        kept.append(json.loads((folder / "held_out.json").read_text())["figures"])
        after = rows_of(folder)[-1]["after"]
        for figure, own in kept[-1].items():
            assert math.fsum(own["sums"]) / math.fsum(own["counts"]) == pytest.approx(after[figure])
    assert kept[0].keys() == kept[1].keys()
    for figure, own in kept[1].items():
        assert len(own["counts"]) > 4
        assert own["counts"] == kept[0][figure]["counts"]
        assert own["sums"] == pytest.approx(kept[0][figure]["sums"], rel=1e-3, abs=1e-4), figure
