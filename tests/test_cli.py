"""The command line: every name of the design, and the life of a run folder."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftConfig
from safetensors.torch import load_file

from hbat_lightning import DPOModule, HybridAlignmentModule, SFTModule
from hbat_lightning.cli import HbatCLI, main, make_cli
from hbat_lightning.schedules import Rounds

CONFIGS = Path(__file__).parents[1] / "configs"
POLICY = "--model.init_args.policy.init_args"


def config(name: str) -> list[str]:
    return ["--config", str(CONFIGS / f"{name}.yaml")]


def few_rows(*objectives: str, rows: int = 24) -> list[str]:
    """Little enough data for seconds: drawn from the training file, and short completions."""
    limits = [option for name in objectives for option in (f"--data.init_args.{name}.limit", str(rows))]
    fractions = [option for name in objectives for option in (f"--data.init_args.{name}.val_fraction", "0.25")]
    shorter = ["--data.init_args.max_length", "128", "--model.init_args.generation.max_new_tokens", "4"]
    return [*limits, *fractions, *shorter, "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]


def small_hybrid(folder: Path) -> list[str]:
    """Two rounds of 3 + 1 windows, with EWC."""
    sizes = ["--data.init_args.batch_size", "3", "--trainer.accumulate_grad_batches", "1"]
    rounds = ["--model.init_args.schedule.init_args.rounds", "2"]
    rounds += ["--model.init_args.schedule.init_args.instruction_epochs", "1", f"{POLICY}.lora.r", "4"]
    return [*config("hbat_dpo"), *few_rows("instruction", "preference"), *sizes, *rounds, *in_folder(folder)]


def in_folder(folder: Path) -> list[str]:
    return ["--trainer.default_root_dir", str(folder)]


def metrics(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def parsed(*args: str) -> HbatCLI:
    return make_cli(list(args), run=False)


# ---- configurations -----------------------------------------------------------------------------------------------


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    rows = few_rows("instruction", "preference", rows=40)
    main(["fit", *config("hbat_dpo"), *rows, "--trainer.fast_dev_run", "true", *in_folder(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_short_class_names() -> None:
    optimizer = ["--model.init_args.optimizer", "NAdam", "--model.init_args.optimizer.init_args.lr", "0.5"]
    cli = parsed(
        *["--model", "HybridAlignmentModule", "--model.init_args.policy", "Policy", "--data", "HybridDataModule"],
        *[f"{POLICY}.model_name_or_path", "embedded://tiny-llama", *optimizer],
        *["--model.init_args.instruction", "SFTModule", "--model.init_args.preference", "DPOModule"],
        *["--model.init_args.schedule", "Interval", "--model.init_args.lr_schedule", "Linear"],
        *["--data.init_args.instruction.path", "a.json", "--data.init_args.preference.path", "b.json"],
        *["--trainer.callbacks+=ElasticWeightConsolidation", "--trainer.callbacks.importance=DriftImportance"],
        *["--trainer.callbacks.weights=RawWeights", "--trainer.accelerator", "cpu"],
    )
    assert isinstance(cli.model, HybridAlignmentModule)
    assert type(cli.model.schedule).__name__ == "Interval"
    assert type(cli.model.lr_schedule).__name__ == "Linear"
    assert cli.model.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.5
    (ewc,) = [one for one in cli.trainer.callbacks if type(one).__name__ == "ElasticWeightConsolidation"]
    assert type(ewc.weights).__name__ == "RawWeights"


def test_overrides_of_the_named_keys() -> None:
    cli = parsed(
        *config("hbat_dpo"),
        *[f"{POLICY}.model_name_or_path", "some/model", f"{POLICY}.quantization", "int8"],
        *[f"{POLICY}.lora.r", "3", f"{POLICY}.lora.alpha", "7", f"{POLICY}.lora.dropout", "0.1"],
        *[f"{POLICY}.lora.target_modules", "[q_proj,v_proj]", f"{POLICY}.gradient_checkpointing", "true"],
        *["--model.init_args.preference.init_args.beta", "0.7"],
        *["--model.init_args.preference.init_args.reference", "base"],
        *["--model.init_args.schedule.init_args.rounds", "4"],
        *["--model.init_args.schedule.init_args.instruction_epochs", "2"],
        *["--model.init_args.optimizer.init_args.lr", "0.25", "--model.init_args.optimizer_state", "shared"],
        *["--data.init_args.instruction.path", "a.json", "--data.init_args.instruction.val_path", "v.json"],
        *["--data.init_args.preference.path", "b.json", "--data.init_args.preference.val_fraction", "0.2"],
        *["--data.init_args.max_length", "77", "--data.init_args.truncation", "prompt_left"],
        *["--data.init_args.batch_size", "5", "--trainer.accelerator", "cpu"],
    )
    model, data = cli.model, cli.datamodule
    assert isinstance(model, HybridAlignmentModule)
    assert isinstance(model.instruction, SFTModule)
    assert isinstance(model.preference, DPOModule)
    assert isinstance(model.schedule, Rounds)
    assert (model.policy.spec.name, model.policy.spec.quantization) == ("some/model", "int8")
    assert model.policy.lora is not None
    assert (model.policy.lora.r, model.policy.lora.alpha, model.policy.lora.dropout) == (3, 7, 0.1)
    assert model.policy.lora.target_modules == ["q_proj", "v_proj"]
    assert model.policy.gradient_checkpointing
    assert (model.preference.beta, model.preference.reference) == (0.7, "base")
    assert (model.schedule.rounds, model.schedule.epochs["instruction"]) == (4, 2)
    assert model.optimizer([torch.nn.Parameter(torch.zeros(1))]).defaults["lr"] == 0.25
    assert (data.source("instruction").path, data.source("instruction").val_path) == ("a.json", "v.json")
    assert (data.source("preference").path, data.source("preference").val_fraction) == ("b.json", 0.2)
    assert (data.max_length, data.truncation, data.batch_size) == (77, "prompt_left", 5)
    assert cli.trainer.max_epochs == 4, "max_epochs follows the rounds"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_names_the_small_commands(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([flag])
    assert stopped.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "hbat inspect" in said
    assert all(name in said for name in ("fit", "validate", "test", "predict"))


# ---- the life of a run --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the default configuration on few rows."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    main(["fit", *small_hybrid(folder)])
    return folder


def test_a_run_leaves_what_it_should(run: Path) -> None:
    columns = set(metrics(run)[0])
    assert columns >= {
        *("train/instruction/loss", "train/preference/loss", "train/preference/accuracy"),
        *("train/preference/chosen_reward", "train/preference/rejected_reward"),
        *("val/instruction/loss", "val/preference/loss", "val/preference/accuracy"),
        *("ewc/penalty", "ewc/effective_tensors", "phase/round", "phase/index", "step"),
    }
    phases = [json.loads(line) for line in (run / "switches.jsonl").read_text().splitlines()]
    assert [phase["objective"] for phase in phases] == ["instruction", "preference"] * 2
    assert json.loads((run / "run.json").read_text())["status"] == "finished"
    assert list((run / "checkpoints").glob("*.ckpt"))
    assert PeftConfig.from_pretrained(str(run / "adapter")).r == 4
    assert not (run / "lightning_logs").exists()


def test_the_saved_configuration_says_how_the_run_was_made(run: Path) -> None:
    saved = yaml.safe_load((run / "config.yaml").read_text())
    assert saved["model"]["init_args"]["schedule"]["init_args"]["rounds"] == 2
    assert saved["data"]["init_args"]["instruction"]["limit"] == 24
    assert (saved["overwrite"], saved["ckpt_path"]) == (False, None)


def test_evaluation_of_the_trained_model(run: Path, tmp_path: Path) -> None:
    """On a copy: validate, test and predict write into the run folder, but never over how it was made."""
    folder = copied(run, tmp_path)
    before = (folder / "config.yaml").read_bytes()
    log = (folder / "metrics.csv").read_bytes()
    last = metrics(folder)[-1]["val/instruction/loss"] or metrics(folder)[-2]["val/instruction/loss"]
    for command in ("validate", "test", "predict"):
        main([command, *small_hybrid(folder), "--ckpt_path", "last"])
    assert (folder / "config.yaml").read_bytes() == before
    assert (folder / "metrics.csv").read_bytes() == log, "evaluations have a file of their own"
    with (folder / "evaluation.csv").open(newline="") as file:
        new = list(csv.DictReader(file))
    assert {row["step"] for row in new} == {metrics(folder)[-1]["step"]}, "that of the checkpoint"
    assert "epoch" not in new[0], "Lightning would say 0 of every checkpoint"
    assert any(row.get("test/rouge_l") or row.get("test/exact_match") for row in new), new
    validated = next(row["val/instruction/loss"] for row in new if row["val/instruction/loss"])
    assert float(validated) == pytest.approx(float(last), rel=1e-6), "validate of the last checkpoint tells the same"
    predictions = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    assert len(predictions) == 6, "a quarter of 24 rows is held out"
    assert {"prompt", "completion", "reference", "tokens", "stopped"} <= set(predictions[0])


def test_a_finished_run_is_refused_and_replaced_on_demand(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(run, tmp_path)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        main(["fit", *small_hybrid(folder)])
    assert "finished run" in capsys.readouterr().err
    other = ["--model.init_args.optimizer_state", "shared", "--trainer.callbacks", "[]", "--trainer.max_steps", "2"]
    main(["fit", *small_hybrid(folder), *other, "--overwrite", "true"])
    assert (folder / "notes.txt").read_text() == "mine"
    assert "ewc/penalty" not in metrics(folder)[0], "columns of the old run"
    assert yaml.safe_load((folder / "config.yaml").read_text())["overwrite"] is False
    assert max(int(row["step"]) for row in metrics(folder)) < 3
    assert not (folder / "switches.jsonl").exists() or len((folder / "switches.jsonl").read_text().splitlines()) <= 1


@pytest.mark.parametrize("steps", [2, 9], ids=["inside a phase", "in the second round"])
def test_a_stopped_run_goes_on_to_the_same_end(run: Path, steps: int, tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    main(["fit", *small_hybrid(folder), "--trainer.max_steps", str(steps)])
    main(["fit", *small_hybrid(folder), "--ckpt_path", "last"])
    whole, resumed = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (run, folder))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert (folder / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert (folder / "switches.jsonl").read_bytes() == (run / "switches.jsonl").read_bytes()
    assert without_folder(folder) == without_folder(run)


def test_going_on_where_there_is_nothing_yet(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "fresh"
    main(["fit", *small_hybrid(folder), "--ckpt_path", "last"])
    assert f"no checkpoint in {folder} yet: starting from the beginning" in capsys.readouterr().out
    assert (folder / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


def test_a_rerun_from_the_saved_configuration(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = ["--config", str(run / "config.yaml")]
    with pytest.raises(SystemExit):
        main(["fit", *saved])
    assert "finished run" in capsys.readouterr().err
    main(["fit", *saved, *in_folder(tmp_path / "again")])
    assert (tmp_path / "again" / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


def test_a_refused_resume_leaves_the_configuration(run: Path, tmp_path: Path) -> None:
    """Other settings under which the data would come in another order; it is noticed when the checkpoint is read."""
    folder = copied(run, tmp_path)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(SystemExit):
        main(["fit", *small_hybrid(folder), "--data.init_args.batch_size", "2", "--ckpt_path", "last"])
    assert (folder / "config.yaml").read_bytes() == before
    assert (folder / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()


def test_a_finished_run_that_goes_on_changes_nothing(run: Path, tmp_path: Path) -> None:
    folder = copied(run, tmp_path)
    main(["fit", *small_hybrid(folder), "--ckpt_path", "last"])
    assert (folder / "metrics.csv").read_bytes() == (run / "metrics.csv").read_bytes()
    assert without_folder(folder) == without_folder(run)


def test_going_on_with_changes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "stopped"
    main(["fit", *small_hybrid(folder), "--trainer.max_steps", "1"])
    again = ["fit", *small_hybrid(folder), "--ckpt_path", "last", "--trainer.max_steps", "2"]
    main([*again, "--model.init_args.preference.init_args.beta", "0.3"])
    assert "preference.beta: was 0.1, is 0.3" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*again, "--seed_everything", "7"])
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("hbat: error: this checkpoint is of another run, seed: was 42, is 7. ")
    assert line.endswith("add --accept_changes [seed]")
    main([*again[:-1], "3", "--seed_everything", "7", "--accept_changes", "[seed]"])
    assert "no longer the run that it was: seed: was 42, is 7" in capsys.readouterr().out
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert (saved["seed_everything"], saved["accept_changes"]) == (7, [])
    main(["export", "--config", str(folder / "config.yaml"), *in_folder(folder), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        main([*again, "--accept_changes", "[weather]"])
    assert "accept_changes" in capsys.readouterr().err


def test_as_a_module_in_a_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hbat_lightning", "fit", *config("sft"), *few_rows("instruction")]
    options = ["--trainer.fast_dev_run", "true", *in_folder(tmp_path / "run")]
    done = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def copied(run: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(run, tmp_path / "copy", symlinks=True))


def without_folder(folder: Path) -> dict[str, Any]:
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    saved["trainer"].pop("default_root_dir")
    return dict(saved)
