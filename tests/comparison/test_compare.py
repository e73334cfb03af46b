"""Two tiny runs side by side: figures against the files that they are from, and a page that asks for nothing."""

from __future__ import annotations

import csv
import json
import re
import warnings
from html.parser import HTMLParser
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from hbat_lightning.cli import main
from hbat_lightning.comparison.runs import Run, read_runs
from hbat_lightning.comparison.table import compare
from hbat_lightning.metrics import paired_bootstrap
from tests.test_cli import CONFIGS, small_hybrid

SCRIPT = "<script>alert('x')</script> & \"quoted\" <b>"


class Page(HTMLParser):
    """Tags, and text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "tags are not closed in order"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def of(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        return [own for name, own in self.tags if name == tag and attributes.items() <= own.items()]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, the second without EWC, and their comparison."""
    root = tmp_path_factory.mktemp("compared")
    telemetry = ["--config", str(CONFIGS / "telemetry.yaml")]
    telemetry += ["--data.instruction.limit", "48", "--data.preference.limit", "48"]  # 12 of each are held out
    for name, more in (("first", telemetry), ("second", ["--trainer.callbacks.strength", "0", *telemetry])):
        main(["fit", *small_hybrid(root / name), *more])
        main(["predict", "--config", str(root / name / "config.yaml"), "--ckpt_path", "last"])
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The ``compute`` method")  # of a metric that was never updated
        for name, more in (("first", []), ("second", ["--model.generation.max_new_tokens", "2"])):
            for command in ("validate", "test"):
                main([command, "--config", str(root / name / "config.yaml"), "--ckpt_path", "last", *more])
    # As the data, or a policy, may have it; and an answer that only one of the runs has.
    rows = [json.loads(line) for line in (root / "second" / "predictions.jsonl").read_text().splitlines()]
    rows[0]["completion"] = SCRIPT
    (root / "second" / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    main(["compare", str(root / "first"), str(root / "second"), "--output", str(root / "out")])
    return root


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def table(compared: Path) -> list[dict[str, str]]:
    with (compared / "out" / "comparison.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def cells(compared: Path) -> dict[tuple[str, str], dict[str, str]]:
    others = ("other's phases", "hbat validate", "hbat test")
    rows = [row for row in table(compared) if not any(name in row["group"] for name in others)]
    return {(row["figure"], row["run"]): row for row in rows}


@pytest.mark.parametrize("run", ["first", "second"])
def test_figures_are_those_of_the_files(compared: Path, run: str) -> None:
    found, switches = cells(compared), lines(compared / run / "switches.jsonl")
    for name, value in switches[-1]["after"].items():
        assert float(found[name, run]["value"]) == value
    with (compared / run / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    steps = max(int(row["step"]) for row in metrics) + 1
    assert float(found["optimizer steps", run]["value"]) == steps == switches[-1]["step"]
    last = [row["train/preference/loss"] for row in metrics if row["train/preference/loss"]][-1]
    assert float(found["train/preference/loss, last", run]["value"]) == float(last)
    cosines = [row["all"]["plain_cosine"] for row in lines(compared / run / "conflict.jsonl")]
    assert float(found["plain_cosine, mean", run]["value"]) == pytest.approx(mean(cosines))
    answers = lines(compared / run / "predictions.jsonl")
    lengths = [row["tokens"] for row in answers]
    assert float(found["length", run]["value"]) == pytest.approx(mean(lengths))
    assert float(found["length", run]["low"]) <= mean(lengths) <= float(found["length", run]["high"])
    assert int(found["length", run]["rows"]) == len(answers)


def test_forgetting_is_what_the_others_phases_changed(compared: Path) -> None:
    rows = [row for row in table(compared) if "other's phases" in row["group"] and row["run"] == "first"]
    found = {row["figure"]: float(row["value"]) for row in rows}
    switches = lines(compared / "first" / "switches.jsonl")
    for name, trained in (("val/instruction/loss", "preference"), ("val/preference/accuracy", "instruction")):
        changes = [row["after"][name] - row["before"][name] for row in switches if row["objective"] == trained]
        assert found[name] == pytest.approx(mean(changes))


def test_differences_are_paired_by_prompt_on_what_both_have_answered(compared: Path) -> None:
    one, other = (lines(compared / run / "predictions.jsonl") for run in ("first", "second"))
    assert [row["prompt"] for row in one[:-1]] == [row["prompt"] for row in other]
    expected = paired_bootstrap([row["tokens"] for row in other], [row["tokens"] for row in one[:-1]])
    found = cells(compared)["length", "second"]
    names = ("difference", "difference_low", "difference_high", "difference_rows")
    assert [float(found[name]) for name in names] == pytest.approx(list(expected))
    assert cells(compared)["length", "first"]["difference"] == ""
    text = (compared / "out" / "comparison.md").read_text()
    assert f"| length | {mean(row['tokens'] for row in one):.3f} [" in text.replace(
        "| length | 4 [", "| length | 4.000 ["
    )
    assert "| second − first |" in text


def test_held_out_figures_have_intervals_paired_row_by_row(compared: Path) -> None:
    kept = [json.loads((compared / run / "held_out.json").read_text())["figures"] for run in ("first", "second")]
    for name in ("val/instruction/loss", "val/preference/margin"):
        one, other = (figures[name] for figures in kept)
        assert one["counts"] == other["counts"]
        found = cells(compared)[name, "second"]
        assert float(found["value"]) == pytest.approx(sum(other["sums"]) / sum(other["counts"]))
        expected = paired_bootstrap(other["sums"], one["sums"], counts=one["counts"])
        names = ("difference", "difference_low", "difference_high", "difference_rows")
        assert [float(found[name]) for name in names] == pytest.approx(list(expected))
        assert float(found["difference"]) == pytest.approx(
            float(found["value"]) - float(cells(compared)[name, "first"]["value"])
        )


def test_what_trained_both_objectives_at_once_forgot_nothing_at_a_switch() -> None:
    def phase(objective: str, change: float) -> dict[str, Any]:
        return {"objective": objective, "step": 4, "steps": 4, "change": {"val/instruction/loss": change}}

    run = Run("run", switches=[phase("both", -1.0), phase("instruction", -2.0), phase("preference", 0.5)])
    assert run.forgetting("val/instruction/loss", "instruction") == [(4, 0.5)]
    names = [(one.group, one.name) for one in compare([Run("joint", switches=[phase("both", -1.0) | {"after": {}}])])]
    assert not [name for group, name in names if "other's phases" in group]


def test_few_answers_have_no_interval(compared: Path, tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        rows = (compared / run / "predictions.jsonl").read_text().splitlines(keepends=True)[:9]
        (tmp_path / run / "predictions.jsonl").write_text("".join(rows))
    runs = read_runs([tmp_path / "first", tmp_path / "second"])
    (length,) = (figure for figure in compare(runs) if figure.name == "length")
    assert length.cells[1].value == mean(answer.tokens for answer in runs[1].answers.values())
    assert [cell.spread for cell in length.cells] == [None, None]
    assert length.cells[1].lead is None


def test_no_interval_of_other_rows_or_of_few(compared: Path, tmp_path: Path) -> None:
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        for name in ("switches.jsonl", "held_out.json"):
            (tmp_path / run / name).write_text((compared / run / name).read_text())
    path = tmp_path / "second" / "held_out.json"
    kept = json.loads(path.read_text())
    kept["figures"]["val/instruction/loss"]["rows"] = "others"
    kept["figures"]["val/preference/margin"]["scale"] += ", beta 0.3"
    for part in ("sums", "counts"):
        kept["figures"]["val/preference/loss"][part] = kept["figures"]["val/preference/loss"][part][:9]
    path.write_text(json.dumps(kept))
    figures = {
        (one.group, one.name): one.cells[1] for one in compare(read_runs([tmp_path / "first", tmp_path / "second"]))
    }
    other, few = (figures["held out, at the end", f"val/{name}/loss"] for name in ("instruction", "preference"))
    for one in (other, figures["held out, at the end", "val/preference/margin"]):
        assert one.spread is not None
        assert one.lead is None
    assert figures["held out, at the end", "val/preference/accuracy"].lead is not None
    assert few.spread is None
    assert few.lead is None
    kept["step"] -= 1  # of an earlier switch
    path.write_text(json.dumps(kept))
    runs = read_runs([tmp_path / "second"])
    assert runs[0].rows == {}


@pytest.mark.parametrize("group", ["hbat test, mean over answers", "hbat validate"])
def test_evaluations_have_intervals_paired_row_by_row(compared: Path, group: str) -> None:
    """The figures are those that evaluation.csv has from the metrics themselves; rows are those of the files beside it."""
    found = {(row["figure"], row["run"]): row for row in table(compared) if row["group"] == group}
    logged = [evaluation(compared / run) for run in ("first", "second")]
    prefix = "test/" if "test" in group else ""
    names = sorted({name for name, _ in found})
    assert {"length", "rougeL"} <= set(names) or {"val/instruction/loss", "val/preference/accuracy"} <= set(names)
    for name in names:
        one, other, counts = rows_of(compared, group, name)
        values = [float(found[name, run]["value"]) for run in ("first", "second")]
        assert values == pytest.approx([own[prefix + name] for own in logged], rel=1e-5)
        ends = ("difference", "difference_low", "difference_high", "difference_rows")
        expected = paired_bootstrap(other, one, counts=counts)
        assert [float(found[name, "second"][end]) for end in ends] == pytest.approx(list(expected))
        assert float(found[name, "second"]["difference"]) == pytest.approx(values[1] - values[0], abs=1e-6)
    assert any(float(found[name, "second"]["difference"]) for name in names), "both runs are the same"


def evaluation(folder: Path) -> dict[str, float]:
    with (folder / "evaluation.csv").open(newline="") as file:
        return {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}


def rows_of(compared: Path, group: str, name: str) -> tuple[list[float], list[float], list[float] | None]:
    if "test" in group:
        one, other = ([row["scores"][name] for row in lines(compared / run / "tested.jsonl")] for run in RUNS)
        return one, other, None
    one, other = (json.loads((compared / run / "validated.json").read_text())["figures"][name] for run in RUNS)
    assert one["counts"] == other["counts"]
    return one["sums"], other["sums"], one["counts"]


RUNS = ("first", "second")


def test_figures_of_test_without_rows_stand_alone(compared: Path) -> None:
    groups = {(row["group"], row["figure"]) for row in table(compared) if row["group"].startswith("hbat test")}
    assert ("hbat test", "distinct1") in groups
    assert not [
        name for group, name in groups if group == "hbat test" and ("hbat test, mean over answers", name) in groups
    ]
    runs = read_runs([compared / "first"])
    (rouge,) = (one for one in compare([*runs, Run("untested")]) if one.name == "rouge1" and "test" in one.group)
    assert rouge.cells[1].value is None


def test_unlike_measures_and_rows_are_not_compared(compared: Path, tmp_path: Path) -> None:
    """A score whose scale differs, and answers whose references do; both say so in the table."""
    for run in RUNS:
        (tmp_path / run).mkdir()
        rows = lines(compared / run / "tested.jsonl")
        for number, row in enumerate(rows):
            row["scores"] |= {"reward": float(number), "judge_win_rate": number % 2}
            row["scales"] |= {"reward": f"reward of {run}", "judge_win_rate": "one judge"}
        (tmp_path / run / "tested.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["compare", *(str(tmp_path / run) for run in RUNS), "--output", str(tmp_path / "out")])
    found = {row["figure"]: row for row in table(tmp_path) if row["run"] == "second"}
    assert found["reward"]["low"]
    assert (found["reward"]["difference"], found["reward"]["not_compared"]) == ("", "other measure")
    assert (found["judge_win_rate"]["difference"], found["judge_win_rate"]["not_compared"]) == ("0.0", "")
    assert "| other measure |" in (tmp_path / "out" / "comparison.md").read_text()
    assert '<td class="">other measure</td>' in (tmp_path / "out" / "comparison.html").read_text()
    rows = [
        {name: value for name, value in row.items() if name != "scales"}
        for row in lines(tmp_path / "second" / "tested.jsonl")
    ]
    (tmp_path / "second" / "tested.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whys = {one.name: one.cells[1].why for one in compare(read_runs([tmp_path / run for run in RUNS]))}
    assert (whys["judge_win_rate"], whys["rougeL"]) == ("unknown measure", "")
    rows[0]["reference"] += " and more"
    (tmp_path / "second" / "tested.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (figure,) = (one for one in compare(read_runs([tmp_path / run for run in RUNS])) if one.name == "judge_win_rate")
    assert (figure.cells[1].lead, figure.cells[1].why) == (None, "other rows")


def test_interference_is_of_one_loss_and_of_whole_phases() -> None:
    def row(objective: str, ends: bool, value: float) -> dict[str, Any]:
        return {"objective": objective, "ends": ends, "step": 4, "all": {"interference": value}, "layers": {}}

    rows = [row("preference", True, 3.0), row("preference", False, 50.0), row("preference", True, 5.0)]
    found = {
        one.name: one.cells[0].value for one in compare([Run("a", conflict=[*rows, row("instruction", True, -1.0)])])
    }
    assert found["interference with instruction, mean over phases"] == 4.0
    assert found["interference with preference, mean over phases"] == -1.0


def test_counts_are_shown_as_such_and_empty_answers_as_nothing(compared: Path, tmp_path: Path) -> None:
    for run, completion in (("first", "some words"), ("second", "")):
        (tmp_path / run).mkdir()
        row = lines(compared / run / "predictions.jsonl")[1] | {"completion": completion}
        (tmp_path / run / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "first" / "switches.jsonl").write_text(
        (compared / "first" / "switches.jsonl").read_text().splitlines(keepends=True)[0]
    )
    main(["compare", *(str(tmp_path / run) for run in RUNS), "--output", str(tmp_path / "out")])
    assert "| phases | 1 | 0 |" in (tmp_path / "out" / "comparison.md").read_text()
    card = (tmp_path / "out" / "comparison.html").read_text().split('<section id="answers">')[1].split("</section>")[0]
    assert "(nothing)" in card
    assert "<del>" not in card


def test_the_page_asks_for_nothing_and_shows_text_as_text(compared: Path) -> None:
    text = (compared / "out" / "comparison.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", text.replace("// One switch", "")), (
        "the page names an address"
    )
    page = Page(text)
    assert page.open == []
    assert len(page.of("script")) == 1
    assert not {"src", "href"} & {key for name, own in page.tags if name != "a" for key in own}
    assert all(str(own["href"]).startswith("#") for own in page.of("a"))
    policy = page.of("meta", **{"http-equiv": "Content-Security-Policy"})
    assert str(policy[0]["content"]).startswith("default-src 'none'")
    shown = "".join(page.text)
    assert "<script>alert" in shown
    assert "&amp;" not in shown


def test_every_section_has_its_pictures(compared: Path) -> None:
    page = Page((compared / "out" / "comparison.html").read_text())
    sections = [str(own["id"]) for own in page.of("section")]
    assert [str(own["href"])[1:] for own in page.of("a")] == sections
    wanted = (
        "figures settings training held-out forgetting drift importance pull conflict layers pareto answers samples"
    )
    assert sections == wanted.split()
    titles = [str(own["aria-label"]) for own in page.of("svg")]
    for name in (
        "train/instruction/loss",
        "train/preference/loss",
        "val/preference/accuracy",
        "Drift per layer",
        "cosines",
    ):
        assert [title for title in titles if title.startswith(name)] == [f"{name}, first", f"{name}, second"]
    assert [title for title in titles if "ewc/penalty" in title] == ["ewc/penalty, first"]  # the second has none
    phases = lines(compared / "first" / "switches.jsonl")
    shaded = [own for own in page.of("rect") if str(own["class"]).startswith("phase")]
    charts = sum(
        title.split(",")[0].split("/")[0] in ("train", "val", "ewc", "cosines", "change of val") for title in titles
    )
    assert len(shaded) == charts * len(phases)
    assert len(page.of("select")) == 2


def test_curves_break_off_where_the_other_objective_trains(compared: Path) -> None:
    text = (compared / "out" / "comparison.html").read_text()
    chart = text.split('aria-label="train/instruction/loss, first"')[1].split("</svg>")[0]
    (path,) = re.findall(r'class="line instruction" d="([^"]+)"', chart)
    spans = [row for row in lines(compared / "first" / "switches.jsonl") if row["objective"] == "instruction"]
    pieces = path.split("M")[1:]
    assert [len(piece.split("L")) for piece in pieces] == [row["steps"] for row in spans]


def test_protected_layers_are_in_the_report(compared: Path) -> None:
    rows = lines(compared / "first" / "switches.jsonl")
    assert "importance" not in rows[0]  # no other objective had trained
    assert rows[1]["importance"] == pytest.approx(
        {name: value**2 for name, value in rows[0]["drift"].items()}, rel=1e-4
    )
    assert all("importance" not in row for row in lines(compared / "second" / "switches.jsonl"))


def test_a_run_without_answers_hides_nobody_elses(compared: Path, tmp_path: Path) -> None:
    (tmp_path / "third").mkdir()
    (tmp_path / "third" / "metrics.csv").write_text("step,train/instruction/loss\n0,1.5\n")
    folders = [str(tmp_path / "third"), str(compared / "first"), str(compared / "second")]
    main(["compare", *folders, "--output", str(tmp_path / "out"), "--answers", "2"])
    text = (tmp_path / "out" / "comparison.html").read_text()
    assert len(re.findall('<div class="answers">', text.split('<section id="answers">')[1].split("</section>")[0])) == 2


# ---- what is not there ---------------------------------------------------------------------------------------------------


def test_a_run_alone_and_a_folder_that_holds_none(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["compare", str(compared / "first"), "--output", str(tmp_path / "alone")])
    assert "settings" not in [
        own["id"] for own in Page((tmp_path / "alone" / "comparison.html").read_text()).of("section")
    ]
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main(["compare", str(compared / "first"), str(tmp_path)])
    assert left.value.code == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_run_that_has_only_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a killed run may leave it: no switch yet, and a torn last line."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,train/instruction/loss\n0,1.5\n1,1.25\n2,1.")
    main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--output", str(tmp_path / "out")])
    assert "| train/instruction/loss, last | 1.250 | 1.250 |" in capsys.readouterr().out
    (tmp_path / "b" / "switches.jsonl").write_text('{"step": \n')
    with pytest.raises(SystemExit):
        main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *["--output", str(tmp_path / "out")]])
    assert "cannot be understood" in capsys.readouterr().err


def test_figures_that_are_not_finite_are_shown_as_such(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.csv").write_text("step,train/instruction/loss\n0,1.5\n1,inf\n2,nan\n")
    change = {"val/instruction/loss": float("nan")}
    row = {
        "step": 3,
        "steps": 3,
        "objective": "preference",
        "round": 0,
        "before": {},
        "after": change,
        "change": change,
    }
    row |= {"drift": {"layers.0.a": float("nan"), "layers.1.a": 0.5}}
    (tmp_path / "run" / "switches.jsonl").write_text(json.dumps(row) + "\n")
    main(["compare", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert "| train/instruction/loss, last | nan |" in capsys.readouterr().out
    page = (tmp_path / "out" / "comparison.html").read_text()
    coordinates = re.findall(r'(?:d|x|y|cx|cy|width|height|fill-opacity)="([^"]*)"', page)
    assert not [one for one in coordinates if "nan" in one or "inf" in one]


def test_runs_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [tmp_path / name for name in ("one/run", "two/deep/run", "other")]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text("step,train/instruction/loss\n0,1.5\n")
    main(["compare", *map(str, folders), "--output", str(tmp_path / "out")])
    assert "|  | one/run | two/deep/run | other |" in capsys.readouterr().out, (
        "by no more of their folders than it takes"
    )
