"""Every mistake of a user ends in one line, before weights are loaded, and leaves the run folder as it was."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from hbat_lightning.cli import main
from hbat_lightning.data import embedded

CONFIGS = Path(__file__).parents[1] / "configs"
Refused = Callable[..., str]

SFT = [{"instruction": f"say {n}", "output": f"it is {n}"} for n in range(12)]
PAIRS = [{"prompt": f"say {n}", "chosen": f"it is {n}", "rejected": f"it is not {n}"} for n in range(12)]


def write(path: Path, content: Any) -> Path:
    """A file of rows (JSON Lines by its name, else a JSON array), of text or of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        lines = "\n".join(json.dumps(row) for row in content)
        content = lines if path.suffix == ".jsonl" else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in folder.rglob("*")}


def changed(rows: list[dict[str, str]], place: int, **values: Any) -> list[dict[str, Any]]:
    return [row | values if number == place - 1 else row for number, row in enumerate(rows)]


def base_arguments(tmp_path: Path, config: str = "hbat_dpo.yaml") -> list[str]:
    arguments = ["--config", str(CONFIGS / config), "--trainer.default_root_dir", str(tmp_path / "run")]
    arguments += ["--data.init_args.instruction.limit", "40", "--data.init_args.preference.limit", "40"]
    return [*arguments, "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command in this process, and return the one line that it ends in."""
    monkeypatch.setattr("hbat_lightning.policy.load_model", lambda *_: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)  # nothing of the checkout may be met by a relative path

    def run(*arguments: str, command: str = "fit", config: str | None = "hbat_dpo.yaml") -> str:
        before = contents(tmp_path)
        with pytest.raises(SystemExit) as stopped:
            main([command, *(base_arguments(tmp_path, config) if config else []), *arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2
        assert error.startswith("hbat: error: ")
        assert len(error.splitlines()) == 1, error
        assert contents(tmp_path) == before, "the refused command wrote something"
        assert "NestedArg" not in error
        return error

    return run


# ---- data ---------------------------------------------------------------------------------------------------------

INSTRUCTION_FAULTS = {
    "empty file": ("rows.json", "", ["rows.json", "empty", "written or downloaded completely"]),
    "no rows": ("rows.json", "[]", ["rows.json", "no rows"]),
    "broken JSON, array": (
        "rows.json",
        '[{"instruction": "a", "output": "b"},\n {"instruction": }]',
        ["rows.json, row 2"],
    ),
    "broken JSON, lines": (
        "rows.jsonl",
        '{"instruction": "a", "output": "b"}\n{"instruction": "a"\n',
        ["rows.jsonl, row 2", "broken JSON", "Repair or remove the line"],
    ),
    "wrong columns": (
        "rows.json",
        [{"question": "a", "answer": "b"}],
        ["rows.json", "answer, question", "Rename them"],
    ),
    "empty completion": (
        "rows.jsonl",
        changed(SFT, 5, output=" "),
        ["rows.jsonl, row 5", "'output' is empty", "--data.init_args.invalid_rows drop"],
    ),
    "null": ("rows.json", changed(SFT, 3, instruction=None), ["rows.json, row 3", "'instruction' is null"]),
    "too long": (
        "rows.json",
        changed(SFT, 4, instruction="say " * 200),
        ["rows.json, row 4", "longer than max_length", "Raise max_length"],
    ),
    "not UTF-8": (
        "rows.jsonl",
        b'{"instruction": "\xe9", "output": "b"}',
        ["rows.jsonl", "not UTF-8", "Save the file as UTF-8"],
    ),
    "preference data": ("rows.json", PAIRS, ["rows.json", "this is preference data", "data.preference.path"]),
    "unknown kind": ("rows.xml", "<a/>", ["rows.xml", "kind of file is not known", ".jsonl"]),
    "fewer rows than rounds": (
        "rows.json",
        SFT[:2],
        ["rows.json", "1 usable", "2 rounds", "lower model.init_args.schedule"],
    ),
}


@pytest.mark.parametrize("case", INSTRUCTION_FAULTS)
def test_instruction_data(case: str, tmp_path: Path, refused: Refused) -> None:
    name, content, said = INSTRUCTION_FAULTS[case]
    path = write(tmp_path / name, content)
    line = refused("--data.init_args.instruction.path", str(path), "--data.init_args.max_length", "128")
    assert str(path) in line
    assert all(words in line for words in said), line


PREFERENCE_FAULTS = {
    "chosen equals rejected": (
        changed(PAIRS, 7, rejected="it is 6"),
        ["pairs.json, row 7", "are equal", "invalid_rows drop"],
    ),
    "empty completion": (changed(PAIRS, 2, chosen=""), ["pairs.json, row 2", "'chosen' is empty"]),
    "prompt too long": (
        changed(PAIRS, 9, prompt="say " * 200),
        ["pairs.json, row 9", "longer than max_length", "set truncation to drop"],
    ),
    "instruction data": (SFT, ["pairs.json", "this is instruction data", "data.instruction.path"]),
}


@pytest.mark.parametrize("case", PREFERENCE_FAULTS)
def test_preference_data(case: str, tmp_path: Path, refused: Refused) -> None:
    content, said = PREFERENCE_FAULTS[case]
    path = write(tmp_path / "pairs.json", content)
    line = refused("--data.init_args.preference.path", str(path), "--data.init_args.max_length", "128")
    assert all(words in line for words in said), line


@pytest.mark.parametrize("cut", ["prompt_left", "completion_right"])
def test_what_cannot_be_cut_to_size_is_not_dropped_as_invalid(cut: str, tmp_path: Path, refused: Refused) -> None:
    """How long a row may be is the truncation policy's matter, whatever becomes of invalid ones."""
    long = {"prompt_left": {"output": "it " * 200}, "completion_right": {"instruction": "say " * 200}}[cut]
    path = write(tmp_path / "rows.json", changed(SFT, 6, **long))
    options = ["--data.init_args.max_length", "128", "--data.init_args.truncation", cut]
    line = refused(*options, "--data.init_args.instruction.path", str(path), "--data.init_args.invalid_rows", "drop")
    assert "rows.json, row 6" in line


def test_a_missing_file_has_a_neighbour(tmp_path: Path, refused: Refused) -> None:
    write(tmp_path / "instructions.json", SFT)
    line = refused("--data.init_args.instruction.path", str(tmp_path / "instruction.json"))
    assert "there is no such file" in line
    assert f"Did you mean {tmp_path / 'instructions.json'}?" in line


def test_validation_files_are_checked_too(tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "held_out.json", changed(PAIRS, 2, rejected="it is 1"))
    assert "held_out.json, row 2" in refused("--data.init_args.preference.val_path", str(path))


def test_unknown_names(refused: Refused) -> None:
    line = refused("--data.init_args.instruction.format", "alpacca")
    assert "'alpacca'" in line
    assert "alpaca, prompt_completion" in line
    line = refused("--data.init_args.template", "vicuna")
    assert "'vicuna'" in line
    assert "chat, alpaca, tldr, plain" in line
    assert "embedded://conflict/instruction" in refused("--data.init_args.instruction.path", "embedded://nothing")


# ---- model and tokenizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/nowhere/model", "./model", "a/b/c"])
def test_a_model_that_is_not_there(name: str, refused: Refused) -> None:
    line = refused("--model.init_args.policy.init_args.model_name_or_path", name)
    assert f"{name}: no such folder" in line
    assert "model_name_or_path" in line


def test_a_hub_id_without_a_network_is_refused_at_once(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hbat_lightning.hub.unreachable", lambda: "hub.example")
    assert "hub.example" in refused("--model.init_args.policy.init_args.model_name_or_path", "models/mine")
    assert "hub.example" in refused("--data.init_args.instruction.path", "data/mine")


def test_a_tokenizer_without_eos(tmp_path: Path, refused: Refused) -> None:
    folder = tmp_path / "model"
    with embedded.materialise(embedded.TINY_LLAMA) as made:
        shutil.copytree(made, folder)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).exists():
            kept = {key: value for key, value in json.loads((folder / name).read_text()).items() if key != "eos_token"}
            (folder / name).write_text(json.dumps(kept))
    line = refused("--model.init_args.policy.init_args.model_name_or_path", str(folder))
    assert str(folder) in line
    assert "no eos token" in line
    assert "tokenizer_config.json" in line


# ---- configuration ------------------------------------------------------------------------------------------------

WRONG_SETTINGS = [
    ("--data.init_args.batch_size", "abc", ["data.init_args.batch_size", "'abc'", "int"]),
    ("--data.init_args.val_batch_size", "abc", ["data.init_args.val_batch_size", "'abc'", "int"]),
    ("--trainer.max_steps", "abc", ["trainer.max_steps", "'abc'"]),
    ("--data.init_args.truncation", "left", ["data.init_args.truncation", "'left'", "error, drop, prompt_left"]),
    ("--data.init_args.batchsize", "4", ["data.init_args.batchsize", "did you mean batch_size?"]),
    ("--data.init_args.instruction.pfad", "x", ["data.init_args.instruction.pfad", "DataSource takes path"]),
    ("--model.init_args.preference.init_args.betta", "1", ["preference.init_args.betta", "did you mean beta?"]),
    ("--model.init_args.policy.init_args.lora.r", "x", ["model.init_args.policy.init_args.lora.r is 'x'"]),
    ("--model.init_args.schedule", "Round", ["model.init_args.schedule", "'Round'"]),
    ("--model.init_args.optimizer", "AdamW", ["model.init_args.optimizer", "torch.optim.AdamW, bitsandbytes"]),
    ("--trainer.bogus", "1", ["--trainer.bogus", "hbat fit --help"]),
    ("--model.init_args.preference.init_args.beta", "-1", ["beta must be > 0"]),
    ("--model.init_args.schedule.init_args.rounds", "0", ["rounds must be at least 1"]),
    ("--data.init_args.batch_size", "0", ["batch_size must be at least 1"]),
    ("--trainer.max_epochs", "3", ["trainer.max_epochs 3", "2 rounds"]),
    ("--config", "nowhere.yaml", ["nowhere.yaml", "no such configuration file"]),
]


@pytest.mark.parametrize(("key", "value", "said"), WRONG_SETTINGS, ids=[f"{key} {v}" for key, v, _ in WRONG_SETTINGS])
def test_settings(key: str, value: str, said: list[str], refused: Refused) -> None:
    line = refused(key, value)
    assert all(words in line for words in said), line


WRONG_FILES = [
    ({"data": {"init_args": {"batchsize": 4}}}, ["data.init_args.batchsize", "batch_size"]),
    ({"data": {"init_args": {"batch_size": "abc"}}}, ["data.init_args.batch_size is 'abc'"]),
    ({"trainer": {"epochs": 3}}, ["trainer.epochs is no key"]),
    ({"modell": {"class_path": "SFTModule"}}, ["modell", "is no key"]),
    (
        {"model": {"init_args": {"optimizer": {"init_args": {"lrr": 1}}}}},
        ["optimizer.init_args.lrr", "did you mean lr?"],
    ),
    ("a: [1\nb: {", ["layer.yaml", "not a YAML file"]),
    ("just words", ["layer.yaml", "not a YAML file"]),
]


@pytest.mark.parametrize(("content", "said"), WRONG_FILES)
def test_configuration_files(content: Any, said: list[str], tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "layer.yaml", content if isinstance(content, str) else yaml.safe_dump(content))
    line = refused("--config", str(path))
    assert all(words in line for words in said), line
    assert len(line) < 500


def test_commands(refused: Refused) -> None:
    assert "--config configs/hbat_dpo.yaml" in refused(config=None)
    assert "fit" in refused(command="fitt", config=None)


# ---- run folders and checkpoints ----------------------------------------------------------------------------------


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """A folder that looks as if a run had ended in it."""
    for name in ("config.yaml", "metrics.csv", "switches.jsonl", "adapter/adapter_model.safetensors"):
        write(tmp_path / "run" / name, name)
    write(tmp_path / "run" / "run.json", '{"status": "finished"}')
    return tmp_path / "run"


def test_a_finished_run_stays(finished: Path, refused: Refused) -> None:
    line = refused()
    assert str(finished) in line
    assert "finished run" in line
    assert all(way in line for way in ("--ckpt_path last", "--trainer.default_root_dir", "--overwrite true"))


@pytest.mark.usefixtures("finished")
def test_overwrite_removes_nothing_before_all_is_checked(tmp_path: Path, refused: Refused) -> None:
    path = write(tmp_path / "rows.json", changed(SFT, 5, output=""))
    refused("--overwrite", "true", "--data.init_args.instruction.path", str(path))
    refused("--overwrite", "true", "--trainer.max_epochs", "11")


@pytest.mark.usefixtures("finished")
def test_a_checkpoint_from_elsewhere_is_no_leave_to_overwrite(tmp_path: Path, refused: Refused) -> None:
    import torch

    torch.save({}, tmp_path / "other.ckpt")
    assert "finished run" in refused("--ckpt_path", str(tmp_path / "other.ckpt"))


def test_checkpoints_that_are_none(tmp_path: Path, refused: Refused) -> None:
    line = refused("--ckpt_path", str(tmp_path / "step=3.ckpt"))
    assert "step=3.ckpt: no such checkpoint" in line
    assert "last" in line
    torn = write(tmp_path / "torn.ckpt", b"PK\x03\x04 and then the power failed")
    assert "torn.ckpt: not a whole checkpoint" in refused("--ckpt_path", str(torn))


@pytest.mark.parametrize("command", ["validate", "test", "predict"])
def test_nothing_to_evaluate(command: str, tmp_path: Path, refused: Refused) -> None:
    line = refused("--ckpt_path", "last", command=command)
    assert f"{tmp_path / 'run'} holds no whole checkpoint: run fit first" in line


# ---- the real command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data.init_args.instruction.path", "bad.jsonl"], "bad.jsonl, row 2: 'output' is empty"),
        (["--data.init_args.batch_size", "abc"], "data.init_args.batch_size is 'abc'"),
        (["--model.init_args.policy.init_args.model_name_or_path", "/nowhere"], "/nowhere: no such folder"),
    ],
)
def test_as_a_process(arguments: list[str], said: str, tmp_path: Path) -> None:
    """Warnings of other libraries may stand before it, but the line is the last, whole, and soon there."""
    write(tmp_path / "bad.jsonl", changed(SFT, 2, output=""))
    command = [sys.executable, "-m", "hbat_lightning", "fit", *base_arguments(tmp_path), *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("hbat: error: ")
    assert said in lines[-1]
    assert sum(line.startswith("hbat: error: ") for line in lines) == 1
    assert "Traceback" not in done.stderr
    assert "Loading weights" not in done.stderr
    assert not (tmp_path / "run").exists()
