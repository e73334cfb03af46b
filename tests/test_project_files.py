"""What README, configurations and constraints say is so."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hbat_lightning.cli import main
from tests.documents import CONFIGS, LAYERS, README, ROOT, commands, fences


@pytest.fixture(scope="module")
def saved_config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ``config.yaml`` as a run folder holds it."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs" / "hbat_dpo.yaml"), "--print_config"])
    path = tmp_path_factory.mktemp("run") / "config.yaml"
    path.write_text(out.getvalue())
    return path


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_parses(
    command: str, saved_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    arguments = shlex.split(command)[1:]
    for place, argument in enumerate(arguments):
        if argument == "--config" and arguments[place + 1].startswith("runs/"):
            arguments[place + 1] = str(saved_config)
    if not {"--help", "--print_config"} & set(arguments):
        arguments.append("--print_config")
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code in (0, None), capsys.readouterr().err


def test_commands_were_found() -> None:
    found = list(commands())
    assert {command.split()[1] for command in found} >= {"fit", "validate", "test", "predict"}
    for name in CONFIGS:
        assert any(name in command for command in found), f"no command uses {name}"


def test_readme_lists_every_configuration() -> None:
    listed = re.findall(r"^\| `(configs/\S+)` \|", README, re.MULTILINE)
    assert sorted(listed) == CONFIGS
    layers = re.findall(r"^\| `(configs/\S+)` \| layer:", README, re.MULTILINE)
    assert set(layers) == LAYERS


def test_every_method_has_a_line_with_its_loss_and_command() -> None:
    """Of all configurations but those that say where and how something runs."""
    head, _, *rows = re.search(r"^\| method \|.*\n(?:\|.*\n)+", README, re.MULTILINE)[0].splitlines()  # type: ignore[index]
    assert head == "| method | in the Hbat paper | loss | command |"
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    assert all(len(row) == 4 and row[0] and row[2] and row[3].startswith("`hbat fit ") for row in cells), cells
    last = {re.findall(r"configs/\S+?\.yaml", row[3])[-1] for row in cells}
    own = r"configs/(?:preference/|reinforcement/)?[^/]+\.yaml"
    beside = {f"configs/{name}.yaml" for name in ("demo", "metrics", "telemetry")}
    assert {name for name in CONFIGS if re.fullmatch(own, name)} - beside <= last
    named = {row[1] for row in cells} - {""}
    paper = ["SFT", "RLHF", "DPO", "RLHF+pt", "SFT+ppo", "Hbat (DPO)", "Hbat (PPO)", "Hbat without EWC", "Hbat-Freeze"]
    assert named >= {*paper, "Hbat-Random", "original EWC", "Hbat + ESRL"}


def test_readme_names_files_and_targets_that_exist() -> None:
    for name in re.findall(r"`((?:hbat_lightning|configs|tests|callbacks)/[\w/]*\.\w+)`", README):
        assert (ROOT / name).is_file(), name
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"\bmake ([a-z]+)\b", "\n".join([*fences(""), *re.findall(r"`(make [a-z]+)`", README)])):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_readme_lists_every_data_format() -> None:
    from hbat_lightning.data.formats import FEEDBACK_FORMATS, INSTRUCTION_FORMATS, PREFERENCE_FORMATS

    listed = re.findall(r"^\| `(\w+)` \| (instruction|preference|feedback)\b[^|]* \|", README, re.MULTILINE)
    known = [(one.name, "instruction") for one in INSTRUCTION_FORMATS]
    known += [(one.name, "preference") for one in PREFERENCE_FORMATS]
    known += [(one.name, "feedback") for one in FEEDBACK_FORMATS]
    assert sorted(listed) == sorted(known)


def test_python_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in fences("python"):
        exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    told = capsys.readouterr().out
    assert "held-out figures, before → after each phase" in told
    assert "val/preference/accuracy" in told
    run = tmp_path / "runs" / "python"
    assert (run / "switches.jsonl").is_file()
    assert (run / "adapter" / "adapter_model.safetensors").is_file()


# ---- constraints.txt ---------------------------------------------------------------------------------------------------


def pins() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(set(lines))
    return dict(line.split("==") for line in lines)


def test_constraints_pin_every_direct_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    open_extras = {"wandb", "tensorboard"}  # loggers: they compute nothing
    wanted = [*project["dependencies"], *(line for name in extras.keys() - open_extras for line in extras[name])]
    pinned = pins()
    for requirement in map(Requirement, wanted):
        name = canonicalize_name(requirement.name)
        if name == project["name"]:
            continue
        assert name in pinned, f"constraints.txt does not pin {name}"
        assert pinned[name] in requirement.specifier, f"{name}=={pinned[name]} is not {requirement.specifier}"


def test_constraints_are_plain_pins_that_fit_every_build() -> None:
    for name, version in pins().items():
        assert name == canonicalize_name(name)
        assert re.fullmatch(r"[\w.]+", version), f"{name}=={version}: a local version fits one build only"


def test_hooks_run_the_pinned_formatter() -> None:
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert f"ruff-pre-commit\n    rev: v{pins()['ruff']}\n" in hooks


def test_security_names_files_that_exist_and_versions_that_are_pinned() -> None:
    text = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`((?:tests|benchmarks)/[\w/]*\.\w+)`", text)
    assert len(named) >= 4
    assert [name for name in named if not (ROOT / name).is_file()] == []
    rows = re.findall(r"^\| .*code execution.* \| (\w+) .*pinned ([\d.]+) \|$", text, re.MULTILINE)
    assert {name for name, _ in rows} == {"lightning", "torch", "pyarrow"}
    assert all(pins()[name] == version for name, version in rows)
    assert "weights_only=True" in text


def test_the_readme_has_no_figure_left_to_fill_in() -> None:
    readme = (ROOT / "README.md").read_text()
    assert not re.findall(r"\b(?:TIME|DEMO)_[A-Z]+\b|^[A-Z]+_[A-Z_]+$", readme, re.MULTILINE)
