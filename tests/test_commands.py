"""Every ``hbat …`` of README, docs and configurations is carried out: two steps of it, on a tiny model and few rows.
Options that stand there without a command are understood behind one.

The first command of a configuration's header is carried out in ``test_configs.py``; of the one for four devices,
``test_several_processes.py`` has the like with two.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForSequenceClassification

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
    command: str,
    place: Path,
    tmp_path: Path,
    judge: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
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
        told = capsys.readouterr().out
        if "--help" in arguments:
            assert "--model" in told
        else:
            assert "policy" in yaml.safe_load(told)["model"]["init_args"]
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
        plan = ["--model.policy.model_name_or_path", embedded.TINY_LLAMA]
        others = {"inspect": [], "plan": plan, "export": [], "compare": []}
        capsys.readouterr()
        main([*arguments, *others.get(verb, CPU)])
        EFFECTS[verb](arguments, capsys.readouterr().out)


# ---- what commands leave, in the folder in which they are given -----------------------------------------------------


def _written(told: str) -> Path:
    """The folder or file that a command says it has written."""
    return Path(next(line for line in told.splitlines() if line.startswith(("written: ", "report: "))).split(": ")[1])


def _compared(arguments: list[str], told: str) -> None:
    names = [Path(part).name for part in arguments[1:3]]
    folder = Path(arguments[arguments.index("--output") + 1])
    assert _written(told) == folder
    for name in ("comparison.md", "comparison.html", "comparison.csv"):
        assert all(name_of_run in (folder / name).read_text() for name_of_run in names)


def _exported(arguments: list[str], told: str) -> None:
    """The weights are those of the run: of the adapter to the bit, of the merged model by its logits."""
    output = _written(told)
    assert output == Path(arguments[arguments.index("--output") + 1])
    trained = load_file("runs/mine/adapter/adapter_model.safetensors")
    if "merged" not in arguments:
        exported = load_file(output / "adapter_model.safetensors")
        assert exported.keys() == trained.keys()
        assert all(torch.equal(exported[name], trained[name]) for name in trained)
        return
    with embedded.materialise(embedded.TINY_LLAMA) as folder:
        base = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.arange(40, 60)[None]
    beside = PeftModel.from_pretrained(base, "runs/mine/adapter")(ids).logits
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(output)(ids).logits, beside, rtol=1e-4, atol=1e-4)


def _inspected(arguments: list[str], told: str) -> None:
    """Every row of both files is counted."""
    found = {one["objective"]: one for one in json.loads(_written(told).read_text())["sources"]}
    assert found.keys() == {"instruction", "preference"}
    for one in found.values():
        assert [file["found"] for file in one["files"]] == [40]
        assert sum(part["rows"] for part in one["parts"].values()) == 40


def _planned(arguments: list[str], told: str) -> None:
    """A tiny model fits, and the answer names the budget."""
    budget = arguments[arguments.index("--budget") + 1].removesuffix("GB")
    assert json.loads(_written(told).read_text())
    assert any(budget in line and "fits" in line for line in told.splitlines())


def _run_folder(arguments: list[str]) -> Path:
    """Where the configuration that a command names was written, and where the command writes too."""
    config = yaml.safe_load(Path(arguments[arguments.index("--config") + 1]).read_text())
    return Path(config["trainer"]["default_root_dir"])


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _last(path: Path, filled: str) -> dict[str, str]:
    """The last row of a table that has a value there."""
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get(filled)][-1]


def _predicted(arguments: list[str], told: str) -> None:
    """There are completions, where it is said that they are."""
    path = _run_folder(arguments) / "predictions.jsonl"
    rows = _rows(path)
    assert str(path) in told
    assert rows
    assert all({"prompt", "completion"} <= row.keys() for row in rows)


def _tested(arguments: list[str], told: str) -> None:
    """The figures are the means of the rows: of ROUGE, or of the metric that is there in its place."""
    run = _run_folder(arguments)
    given = {"BARTScore": "bartscore_f", "JudgeWinRate": "judge_win_rate", "RewardScore": "reward_win_rate"}
    asked = (score for metric, score in given.items() if any(metric in part for part in arguments))
    name = next(asked, "rougeL")
    values = [row["scores"][name] for row in _rows(run / "tested.jsonl")]
    figure = float(_last(run / "evaluation.csv", f"test/{name}")[f"test/{name}"])
    assert figure == pytest.approx(sum(values) / len(values), rel=1e-4)


def _validated(arguments: list[str], told: str) -> None:
    """The figures are the means of the held-out rows."""
    run = _run_folder(arguments)
    figures = json.loads((run / "validated.json").read_text())["figures"]
    for name in ("val/instruction/loss", "val/preference/loss"):
        figure, parts = float(_last(run / "evaluation.csv", name)[name]), figures[name]
        assert figure == pytest.approx(sum(parts["sums"]) / sum(parts["counts"]), rel=1e-4)


EFFECTS = {
    "compare": _compared,
    "export": _exported,
    "inspect": _inspected,
    "plan": _planned,
    "predict": _predicted,
    "test": _tested,
    "validate": _validated,
}


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
