"""Every ``hbat …`` of README, docs and configurations is carried out: two steps of it, on a tiny model and few rows.
Options that stand there without a command are understood behind one.

The first command of a configuration's header is carried out in ``test_configs.py``; of the one for four devices,
``test_several_processes.py`` has the like with two.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForSequenceClassification

from hbat_lightning.cli import HbatCLI, main, make_cli
from hbat_lightning.data import embedded
from tests.documents import CONFIGS, ROOT, commands, options
from tests.published_rows import ROWS, small_data
from tests.test_configs import layers
from tests.tiny_models import Chat, byte_tokenizer, save_bart, serving

CPU = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FILES = {"SFT.json": "alpaca", "PAIRS.json": "preference", "PAIRS.jsonl": "preference"}
INPUTS = ("sft", "reward", "mine", "hbat_dpo", "two_stage_dpo")


def _elsewhere(command: str) -> bool:
    """Whether another test carries it out."""
    parts = [part for part in shlex.split(command)[2:] if part != "--config"]
    return "--trainer.devices" in parts or parts in FIRST


FIRST = [[Path(part).relative_to(ROOT).as_posix() for part in layers(name) if part != "--config"] for name in CONFIGS]
COMMANDS = [command for command in sorted(set(commands())) if not _elsewhere(command)]


def _short(arguments: list[str], folder: Path, steps: int = 2) -> list[str]:
    """A fit of few rows, on the embedded model where it names none that is there."""
    if "--ckpt_path" in arguments:  # goes on with a run whose own configuration has few rows already
        return [*arguments, *CPU, "--trainer.max_steps", str(steps), "--trainer.default_root_dir", "runs/mine"]
    sources = make_cli([*arguments[1:], *CPU], run=False).datamodule.sources
    return [*arguments, *small_data(sources, folder), *CPU, "--trainer.max_steps", str(steps)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs, files and models that commands name."""
    folder = tmp_path_factory.mktemp("commands")
    for name, format_name in FILES.items():
        rows = [ROWS[format_name](number) for number in range(40)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / name).write_text(lines if name.endswith("l") else json.dumps(rows))
    save_bart(folder / "bart")
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=259, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_labels=1, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder / "classifier")
    byte_tokenizer().save_pretrained(folder / "classifier")
    for name, config_name in (
        ("sft", "sft"),
        ("reward", "reward"),
        ("mine", "hbat_dpo"),
        ("two_stage_dpo", "two_stage_dpo"),
    ):
        arguments = ["fit", "--config", str(ROOT / "configs" / f"{config_name}.yaml")]
        main([*_short(arguments, folder), "--trainer.default_root_dir", str(folder / "runs" / name)])
    shutil.copytree(folder / "runs" / "mine", folder / "runs" / "hbat_dpo")
    return folder


@pytest.fixture
def judge() -> Iterator[str]:
    """Address of a model that judges."""
    with serving(Chat()) as address:
        yield address


def _filled(arguments: list[str], judge: str) -> list[str]:
    """Names of files, models and addresses in the place of the words that stand for them."""
    models = {
        "--model.metrics.model_name_or_path": "bart",
        "--model.metrics.reward.model_name_or_path": "classifier",
        "--model.preference.reward.model_name_or_path": "classifier",
        "--model.policy.model_name_or_path": embedded.TINY_LLAMA,
    }
    filled = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "PATH":
            argument = models[before]
        filled.append(
            {"PATH_OR_HUB_ID": embedded.TINY_LLAMA, "http://localhost:8000/v1": judge}.get(argument, argument)
        )
    return filled


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_carried_out(
    command: str, place: Path, tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("configs", *FILES, "bart", "classifier"):
        (tmp_path / name).symlink_to(ROOT / name if name == "configs" else place / name)
    arguments = _filled(shlex.split(command)[1:], judge)
    named = [
        part
        for before, part in zip(["", *arguments], arguments, strict=False)
        if before != "--trainer.default_root_dir"
    ]
    for name in INPUTS:
        if any(part.startswith(f"runs/{name}") for part in named):
            shutil.copytree(place / "runs" / name, tmp_path / "runs" / name)
    monkeypatch.chdir(tmp_path)
    verb = arguments[0]
    if {"--help", "--print_config"} & set(arguments):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code in (0, None)
    elif verb == "fit":
        if "/recipes/" in command:
            arguments += ["--model.init_args.policy.init_args.model_name_or_path", embedded.TINY_LLAMA]
        steps = 3 if "--ckpt_path" in arguments else 2
        given = {path: path.read_text() for path in tmp_path.glob("runs/*/run.json")}
        main(_short(arguments, tmp_path, steps))
        (run,) = [path for path in tmp_path.glob("runs/*/run.json") if path.read_text() != given.get(path)]
        assert json.loads(run.read_text())["steps"] == steps
        assert (run.parent / "metrics.csv").is_file()
    else:
        others = {
            "inspect": [],
            "plan": ["--model.policy.model_name_or_path", embedded.TINY_LLAMA],
            "export": [],
            "compare": [],
        }
        main([*arguments, *others.get(verb, CPU)])


# ---- options without a command --------------------------------------------------------------------------------------

# Not of fit: the command whose help has them.
OF_ANOTHER_COMMAND = {"--budget": "plan", "--base dequantized": "export", "--dtype": "export", "--prompts": "export"}
OF_ANOTHER_PROGRAM = {
    "--signal=USR1@300": "SLURM's sbatch",
    "--apply_chat_template": "lm-eval",
    "--disable_prompt_loss": "the code of ORPO's authors",
}
OF_FIT = sorted(options() - OF_ANOTHER_COMMAND.keys() - OF_ANOTHER_PROGRAM.keys())


class Built(HbatCLI):
    """A command up to where it would begin."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _settings(more: list[str], folder: Path) -> dict[str, Any]:
    """Of a fit with further options, from which everything has been built."""
    quiet = ["--trainer.logger", "false", "--trainer.default_root_dir", str(folder)]
    arguments = ["fit", "--config", "configs/hbat_dpo.yaml", *CPU, *quiet, *more]
    settings: dict[str, Any] = make_cli(arguments, cli=Built).config["fit"].as_dict()
    return {key: value for key, value in settings.items() if key != "config"}  # names of files, not what they say


@pytest.mark.parametrize("option", [option for option in OF_FIT if " " in option])
def test_every_option_changes_what_is_run(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert _settings(shlex.split(option), tmp_path) != _settings([], tmp_path)


@pytest.mark.parametrize("option", [option for option in OF_FIT if " " not in option])
def test_every_key_is_one(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one setting, or of all below it."""
    monkeypatch.chdir(ROOT)
    found: Any = _settings([], tmp_path)
    for key in option.removeprefix("--").split("."):
        found = found.get("init_args", found)
        assert key in found
        found = found[key]


@pytest.mark.parametrize("option", OF_ANOTHER_COMMAND)
def test_options_of_other_commands_are_in_their_help(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([OF_ANOTHER_COMMAND[option], "--help"])
    told = capsys.readouterr().out
    assert all(part in told for part in option.split())


def test_options_that_are_left_out_are_still_there() -> None:
    assert OF_ANOTHER_COMMAND.keys() | OF_ANOTHER_PROGRAM.keys() <= options()
