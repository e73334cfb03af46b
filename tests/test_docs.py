"""What ``docs/`` says is so: links lead somewhere, code runs, and the tables of logged columns are what is really logged."""

from __future__ import annotations

import ast
import csv
import re
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from hbat_lightning.cli import main
from tests.documents import DOCS, METHODS, ROOT, anchors, columns, commands_in, fences, links

MARKDOWN = [ROOT / "README.md", ROOT / "SECURITY.md", ROOT / "CHANGELOG.md", *DOCS]
ALONE = {"sft": "instruction", "dpo": "preference", "ppo": "preference", "reward": "preference"}
ONE_EPOCH = "--model.schedule.instruction_epochs 1 --model.schedule.rounds 1"
ONE_STEP = "--model.schedule.rounds 1 --model.schedule.steps 2"
TWO_STAGE = (
    "hbat fit --config configs/two_stage_dpo.yaml",
    "hbat fit --config configs/two_stage_dpo.yaml --trainer.callbacks+=ElasticWeightConsolidation",
    "hbat fit --config configs/hbat_ppo.yaml --config configs/two_stage_ppo.yaml",
)

# Of each page commands that together log every column of its table, and what makes them short; and the pages whose
# columns they log besides.
RUNS: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "sft": ({"hbat fit --config configs/sft.yaml": "--model.epochs 1"}, ()),
    "dpo": (
        {
            "hbat fit --config configs/dpo.yaml": "",
            "hbat fit --config configs/dpo.yaml --model RPOModule --model.alpha 1.0": "",
        },
        (),
    ),
    "reference_free": (
        {
            "hbat fit --config configs/dpo.yaml --model SimPOModule --model.beta 2.0 --model.gamma 0.5": "",
            "hbat fit --config configs/dpo.yaml --model ORPOModule --model.weight 0.1": "",
        },
        (),
    ),
    "kto": (
        {
            "hbat fit --config configs/dpo.yaml --model KTOModule "
            "--data.preference.path embedded://conflict/feedback": ""
        },
        (),
    ),
    "reward": ({"hbat fit --config configs/reward.yaml": ""}, ()),
    "ppo": ({"hbat fit --config configs/ppo.yaml": ""}, ()),
    "critic_free": (
        {
            "hbat fit --config configs/hbat_ppo.yaml --config configs/reinforcement/rloo.yaml": ONE_EPOCH,
            "hbat fit --config configs/hbat_ppo.yaml --config configs/reinforcement/grpo.yaml": ONE_EPOCH,
        },
        ("sft", "hbat"),
    ),
    "raft": (
        {"hbat fit --config configs/hbat_ppo.yaml --config configs/reinforcement/raft.yaml": ONE_EPOCH},
        ("sft", "hbat"),
    ),
    "dynamic_sampling": (
        {"hbat fit --config configs/hbat_ppo.yaml --config configs/reinforcement/esrl.yaml": ONE_EPOCH},
        ("sft", "hbat", "ppo"),
    ),
    "hbat": (
        {
            "hbat fit --config configs/hbat_dpo.yaml": ONE_EPOCH,
            "hbat fit --config configs/hbat_dpo.yaml --config configs/hbat_freeze.yaml": ONE_EPOCH,
        },
        ("sft", "dpo"),
    ),
    "two_stage": (dict.fromkeys(TWO_STAGE, ONE_EPOCH), ("sft", "dpo", "ppo", "hbat")),
    "schedules": (
        {
            "hbat fit --config configs/two_stage_dpo.yaml --config configs/alright.yaml": ONE_STEP,
            "hbat fit --config configs/two_stage_dpo.yaml --config configs/maxright.yaml": ONE_STEP,
            "hbat fit --config configs/two_stage_dpo.yaml --config configs/joint.yaml": "",
        },
        ("sft", "dpo", "hbat"),
    ),
}


def page(name: str) -> str:
    return (ROOT / "docs" / "methods" / f"{name}.md").read_text()


# ---- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MARKDOWN, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(path: Path) -> None:
    for link in links(path.read_text()):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path.name}: {link}"
        assert target.is_relative_to(ROOT), f"{path.name}: {link} leaves the repository"
        assert not anchor or anchor in anchors(target.read_text()), f"{path.name}: {link} has no such heading"


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in links(index.read_text())}
    assert set(DOCS) - {index} <= listed
    assert "docs/README.md" in links((ROOT / "README.md").read_text())


def test_pages_name_files_that_exist() -> None:
    for path in DOCS:
        text = path.read_text()
        for name in re.findall(
            r"`((?:hbat_lightning|configs|tests|callbacks|notebooks|benchmarks)/[\w/]*\.\w+)`", text
        ):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"


def test_every_defect_of_the_official_code_is_told_where_the_table_says() -> None:
    index = ROOT / "docs" / "methods" / "README.md"
    rows = re.findall(r"^\| (D\d+) \| [^|]+ \| \[\w+\]\((\w+\.md)#[\w-]+\) \|$", index.read_text(), re.MULTILINE)
    assert [number for number, _ in rows] == [f"D{number}" for number in range(1, 24)]
    untold = [row for row in rows if not re.search(rf"\b{row[0]}\b", (index.parent / row[1]).read_text())]
    assert untold == []
    used = {number for path in DOCS for number in re.findall(r"\bD\d+\b", path.read_text())}
    assert used == {number for number, _ in rows}, "a page has a number that the table has not"


@pytest.mark.parametrize(
    "path", [path for path in DOCS if fences("python", path.read_text())], ids=lambda path: path.stem
)
def test_python_of_the_pages_prints_what_it_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in fences("python", path.read_text()):
        exec(compile(code, path.name, "exec"), {"__name__": path.stem})
        expected = re.findall(r"^print\(.*\)  # (.+)$", code, re.MULTILINE)
        assert expected
        assert capsys.readouterr().out.splitlines() == expected


def said_by_the_code() -> str:
    """Every text in the code, a line each, with "…" for what is filled in."""
    texts = []
    for folder in ("hbat_lightning", "callbacks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values]
                    texts.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    texts.append(node.value)
    return "\n".join(" ".join(text.split()) for text in texts)


def test_messages_are_those_of_the_code() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    said = said_by_the_code()
    messages = [one for one in re.findall(r"^\| `([^`]+)`", page, re.MULTILINE) if len(one.split()) > 2]
    assert len(messages) > 20
    assert [message for message in messages if message.removeprefix("… ") not in said] == []


# ---- logged columns ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], frozenset[str]]:
    """Columns in which a command logs a value: at most 16 rows of each kind, so a step or two of each phase."""

    @cache
    def run(command: str, short: str) -> frozenset[str]:
        folder = tmp_path_factory.mktemp("run")
        arguments = [str(ROOT / one) if one.endswith(".yaml") else one for one in shlex.split(command)[2:]]
        alone = ALONE.get(Path(arguments[1]).stem)
        for objective in (alone,) if alone else ("instruction", "preference"):
            arguments += [f"--data.{objective}.limit", "16", f"--data.{objective}.val_fraction", "0.25"]
        quiet = f"--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.default_root_dir {folder}"
        main(["fit", *arguments, *shlex.split(f"{short} {quiet}")])
        with (folder / "metrics.csv").open(newline="") as file:
            return frozenset(name for row in csv.DictReader(file) for name, value in row.items() if value)

    return run


def test_every_method_has_its_runs() -> None:
    assert {path.stem for path in METHODS} - {"README"} == set(RUNS)


def test_columns_of_callbacks_are_those_that_are_logged(logged: Callable[[str, str], frozenset[str]]) -> None:
    """Of the page on watching a run; the GPU's column apart, and those of single layers, which depend on the model."""
    text = (ROOT / "docs" / "telemetry.md").read_text()
    (command,) = commands_in(text)
    found = logged(command, "--model.schedule.instruction_epochs 1 --model.schedule.rounds 2")
    own = {name for name in found if name.startswith(("conflict/", "samples/", "resources/"))}
    layers = {name for name in own if name.startswith("conflict/cosine/")}
    assert layers
    assert columns(text) - {"resources/peak_gib"} == own - layers


@pytest.mark.parametrize("name", RUNS)
def test_columns_are_those_that_are_logged(name: str, logged: Callable[[str, str], frozenset[str]]) -> None:
    runs, besides = RUNS[name]
    text = page(name)
    assert set(runs) <= set(commands_in(text)), "the page has the command"
    found: set[str] = set().union(*(logged(*one) for one in runs.items()))
    # the index explains them once for all: the change of the held-out figure of that name
    found -= {name for name in found if name.startswith("switch/") and name.replace("switch/", "val/") in found}
    common = columns((ROOT / "docs" / "methods" / "README.md").read_text())
    elsewhere = common.union(*(columns(page(other)) for other in besides))
    assert columns(text) - found == set(), "in the table, and not logged"
    assert found - columns(text) - elsewhere == set(), "logged, and in no table"
    assert common <= found, "every run has these"


def test_two_stages_log_what_their_page_promises(logged: Callable[[str, str], frozenset[str]]) -> None:
    """Which has no table of its own: the other pages' columns, each with the command that its sentence is about."""
    dpo, with_ewc, ppo = (logged(command, ONE_EPOCH) for command in TWO_STAGE)
    sft = columns(page("sft"))
    alone = logged("hbat fit --config configs/dpo.yaml", "")  # without what only DPO's relatives log
    assert sft | columns(page("dpo")) & alone <= dpo
    assert sft | columns(page("ppo")) <= ppo
    ewc = {name for name in columns(page("hbat")) if name.startswith("ewc/")}
    assert ewc
    assert with_ewc - dpo == ewc
