"""Every file in ``configs/`` runs two optimizer steps as its header's command says, on a tiny model and rows of its formats."""

from __future__ import annotations

import csv
import inspect
import json
import math
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import pytest

from hbat_lightning import DataSource, DPOModule, KTOModule, objectives
from hbat_lightning.cli import HbatCLI, main, make_cli
from hbat_lightning.data import embedded
from hbat_lightning.hub import CONVERTED
from hbat_lightning.objectives.pairwise import PairwiseModule, ReferencePairwiseModule
from hbat_lightning.schedules import Rounds
from tests.published_rows import ROWS, small_data

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
RECIPES = [name for name in CONFIGS if name.startswith("configs/recipes/")]
LOSSES = [name for name in CONFIGS if name.startswith("configs/preference/")]
CPU = ["--trainer.accelerator", "cpu"]


def header(name: str) -> str:
    """The comment that a configuration begins with, without its marks."""
    lines = (ROOT / name).read_text().splitlines()
    count = next(place for place, line in enumerate(lines) if not line.startswith("#"))
    return "\n".join(line[1:].strip() for line in lines[:count])


def layers(name: str) -> list[str]:
    """The ``--config`` options of the first command in the header."""
    command = re.search(r"^hbat fit (.*)$", header(name), re.MULTILINE)
    assert command, f"{name} does not begin with its command"
    arguments = shlex.split(command[1])
    assert arguments[::2] == ["--config"] * (len(arguments) // 2), f"the first command of {name} has other options"
    return [argument if argument == "--config" else str(ROOT / argument) for argument in arguments]


@cache
def parsed(name: str) -> HbatCLI:
    """The configuration with its layers, by the real parser; without loading a model or data."""
    return make_cli([*layers(name), *CPU], run=False)


def sources(name: str) -> dict[str, DataSource]:
    """Its data, by objective."""
    return {objective: source for objective, source in parsed(name).datamodule.sources.items() if source}


def tiny_model() -> list[str]:
    return ["--model.init_args.policy.init_args.model_name_or_path", embedded.TINY_LLAMA]


# ---- the matrix -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_two_steps(name: str, tmp_path: Path) -> None:
    """All as it stands but model, data, device and folder; of several passes over the instructions one is made."""
    run = tmp_path / "run"
    options = [*layers(name), *tiny_model(), *small_data(sources(name), tmp_path), *CPU]
    if len(sources(name)) == 2 and isinstance(parsed(name).model.schedule, Rounds):
        options += ["--model.init_args.schedule.init_args.instruction_epochs", "1"]
    quiet = ["--trainer.enable_progress_bar", "false", "--trainer.default_root_dir", str(run)]
    main(["fit", *options, *quiet, "--trainer.max_steps", "2"])
    assert json.loads((run / "run.json").read_text())["steps"] == 2
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for objective in sources(name):
        columns = (f"train/{objective}/loss", f"gap/{objective}")  # a schedule by gaps sees both, and may train one
        losses = [float(row[column]) for row in rows for column in columns if row.get(column)]
        assert losses, f"no step of {objective}"
        assert all(map(math.isfinite, losses))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_command_uses_the_file_last(name: str) -> None:
    assert layers(name)[-1] == str(ROOT / name), "a layer is the last of its command"


@pytest.mark.parametrize("name", RECIPES)
def test_inspect_with_rows_of_ones_own(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["inspect", *layers(name), *tiny_model(), *small_data(sources(name), tmp_path)])
    told = capsys.readouterr().out
    for source in sources(name).values():
        assert str(source.format) in told


# ---- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_what_makes_them_so(name: str) -> None:
    model, settings = parsed(name).model, parsed(name).config
    schedule = model.schedule
    assert (schedule.rounds, schedule.epochs) == (10, {"instruction": 3, "preference": 1})
    assert model.policy.spec.quantization == "nf4"
    assert model.policy.gradient_checkpointing
    assert settings.trainer.precision == "bf16-mixed"
    assert parsed(name).datamodule.batch_size * settings.trainer.accumulate_grad_batches == 64
    assert settings.trainer.default_root_dir == f"runs/{Path(name).stem}"


@pytest.mark.parametrize("name", RECIPES)
def test_what_recipes_ask_the_hub_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their data settings as they stand, up to the hub's door: rows of the named format stand behind it."""
    load_dataset, by_path = datasets.load_dataset, {source.path: source for source in sources(name).values()}
    asked: list[tuple[str, str]] = []

    def answer(path: str, **options: Any) -> datasets.Dataset:
        inspect.signature(load_dataset).bind(path, **options)
        source = by_path[path]
        given = {"name": source.subset, "revision": source.revision, "data_files": source.data_files}
        assert {key: value for key, value in options.items() if key != "split"} == {
            key: value for key, value in given.items() if value is not None
        }
        asked.append((path, options["split"]))
        return datasets.Dataset.from_list([ROWS[str(source.format)](number) for number in range(20)])

    monkeypatch.setattr(datasets, "load_dataset", answer)
    monkeypatch.chdir(tmp_path)
    main(["inspect", *layers(name), *tiny_model()])
    expected = [
        (source.path, split)
        for source in by_path.values()
        for split in (source.split or "train", source.val_split)
        if split
    ]
    assert asked == expected


@pytest.mark.parametrize("name", RECIPES)
def test_splits_of_recipes_are_among_their_files(name: str) -> None:
    for source in sources(name).values():
        assert (source.revision == CONVERTED) == isinstance(source.data_files, dict)
        if isinstance(source.data_files, dict):
            wanted = {source.split or "train", *re.findall(r"^\w+", source.val_split or "")}
            assert wanted == set(source.data_files)


@pytest.mark.parametrize("name", RECIPES)
def test_headers_of_recipes(name: str) -> None:
    text = header(name)
    assert re.search(r"^Memory: about [\d.]+ GB with rows of [\d,]+ tokens", text, re.MULTILINE)
    assert re.search(r"^Time: about \d+ h on an? .*estimate", text, re.MULTILINE)
    assert "login" in text, "whether the model needs one"


# ---- preference losses ------------------------------------------------------------------------------------------------


def second_command(name: str) -> list[str]:
    """The arguments of the second command in the header."""
    commands = re.findall(r"^hbat fit (.*)$", header(name).replace("\\\n", " "), re.MULTILINE)
    return [str(ROOT / part) if part.endswith(".yaml") else part for part in shlex.split(commands[1])]


@pytest.mark.parametrize("name", LOSSES)
def test_alone_it_is_the_loss_of_the_layer(name: str, tmp_path: Path) -> None:
    """What the base configurations give to DPO must not reach a loss that has an argument of the same name."""
    alone = second_command(name)
    folder = alone.index("--trainer.default_root_dir") + 1
    assert alone[folder] == f"runs/{Path(name).stem}"
    assert parsed(name).config.trainer.default_root_dir == f"runs/hbat_{Path(name).stem}"
    objective = make_cli([*alone, *CPU], run=False).model
    assert type(objective) is type(parsed(name).model.preference)
    assert objective.describe() == parsed(name).model.preference.describe() == type(objective)().describe()
    alone[folder] = str(tmp_path / "run")
    small = ["--data.init_args.preference.limit", "24", "--data.init_args.preference.val_fraction", "0.25"]
    main(["fit", *alone, *small, *CPU, "--trainer.enable_progress_bar", "false", "--trainer.max_steps", "2"])
    assert json.loads((tmp_path / "run" / "run.json").read_text())["steps"] == 2


def test_every_preference_loss_but_dpo_has_a_layer() -> None:
    bases = {PairwiseModule, ReferencePairwiseModule}
    known = {one for one in vars(objectives).values() if isinstance(one, type) and issubclass(one, PairwiseModule)}
    layered = {type(parsed(name).model.preference) for name in LOSSES}
    assert layered == known - bases - {DPOModule} | {KTOModule}
