"""Differences of texts, and pictures whose every coordinate can be told beforehand."""

from __future__ import annotations

import re

import pytest

from hbat_lightning.comparison.charts import Frame, Line, Spot, frame_of, heat_map, line_chart, scatter
from hbat_lightning.comparison.differences import marked
from hbat_lightning.comparison.page import comparison_page
from hbat_lightning.comparison.pareto import spots_of
from hbat_lightning.comparison.runs import Run, Span
from hbat_lightning.comparison.table import compare
from hbat_lightning.completions import Completed


def test_words_that_differ_are_marked() -> None:
    assert marked("anna bought a lamp", "anna bought the lamp") == "anna bought <del>the</del><ins>a</ins> lamp"
    assert marked("a <b> & c", "a") == "a<ins> &lt;b&gt; &amp; c</ins>"
    assert marked("a", "a <b>") == "a<del> &lt;b&gt;</del>"
    assert marked("<same>", "<same>") == "&lt;same&gt;"
    assert marked("", "gone") == "<del>gone</del>"


@pytest.mark.parametrize(
    ("text", "other"), [("x y z", "z y"), ("", ""), ("über, uns!", "über uns"), ("a  b\nc", "a b c")]
)
def test_what_is_marked_holds_both_texts(text: str, other: str) -> None:
    shown = marked(text, other)
    assert re.sub(r"<del>.*?</del>|</?ins>", "", shown, flags=re.DOTALL) == text
    assert re.sub(r"<ins>.*?</ins>|</?del>", "", shown, flags=re.DOTALL) == other


def test_points_are_where_the_axes_say() -> None:
    frame = Frame((0.0, 10.0), (0.0, 1.0))
    chart = line_chart("t", frame, [Line("l", [(0.0, 0.0), (5.0, 0.5), (10.0, 1.0)], "instruction", dots=True)])
    dots = [tuple(map(float, pair)) for pair in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', chart)]
    assert dots == [(46.0, 170.0), (198.0, 90.0), (350.0, 10.0)]


def test_many_points_become_means_of_stretches() -> None:
    points = [(float(n), float(n % 2)) for n in range(3000)]
    chart = line_chart("t", frame_of([points], 3000), [Line("l", points, "instruction")])
    (path,) = re.findall(r'class="line instruction" d="([^"]+)"', chart)
    assert len(path.split("L")) == 300
    assert len({piece.split()[1] for piece in path[1:].split("L")}) == 1  # every mean is a half


def test_a_curve_is_not_drawn_through_a_phase_without_values() -> None:
    """A short one too; but on into the next phase where that has values, as EWC's pull has in every phase."""
    spans = [Span(0, 3, "instruction"), Span(3, 4, "preference"), Span(4, 6, "instruction"), Span(6, 8, "preference")]

    def lengths(*steps: float) -> list[int]:
        points = [(step, 1.0) for step in steps]
        chart = line_chart("t", frame_of([points], 8), [Line("l", points, "instruction")], spans)
        (path,) = re.findall(r'class="line instruction" d="([^"]+)"', chart)
        return [len(piece.split("L")) for piece in path.split("M")[1:]]

    assert lengths(1, 2, 3, 5, 6) == [3, 2]
    assert lengths(4, 7, 8) == [1, 2]
    assert lengths(1, 2, 3, 4, 5, 6, 7, 8) == [8]


def test_logarithms_only_where_values_allow_for_it() -> None:
    assert frame_of([[(0, 0.01), (1, 10.0)]], 1, log=True).log
    assert not frame_of([[(0, 0.0), (1, 10.0)]], 1, log=True).log
    assert not frame_of([[(0, 1.0), (1, 2.0)]], 1, log=True).log
    assert frame_of([], 0).y[0] < frame_of([], 0).y[1]


def test_the_front_joins_those_that_no_other_beats() -> None:
    spots = [
        Spot(name, "run0", (x,) * 3, (y,) * 3)
        for name, x, y in (("a", 0, 1), ("b", 1, 0), ("c", 0.4, 0.4), ("d", 0, 0.5))
    ]
    chart = scatter("t", ("x", "y"), spots)
    (front,) = re.findall(r'class="front" d="M([^"]+)"', chart)
    assert len(front.split("L")) == 3  # without d, which a beats


def test_cells_are_as_dark_as_their_values() -> None:
    signed = heat_map("t", ["a"], ["1", "2", "3"], [[0.5, -1.0, None]], signed=True)
    assert re.findall(r'class="cell (\w+)".*?fill-opacity="([\d.]+)"', signed) == [
        ("positive", "0.530"),
        ("negative", "1.000"),
    ]
    amounts = heat_map("t", ["a"], ["1", "2"], [[4.0, 1.0]], signed=False)
    assert re.findall(r'fill-opacity="([\d.]+)"', amounts) == ["1.000", "0.530"]


def test_all_runs_in_the_picture_of_rouge_against_reward_have_the_same_figure() -> None:
    """Two with a reward and one with an accuracy alone: the reward, and the third is named; with all accuracies, these."""

    def run(name: str, accuracy: float | None, **scores: float) -> Run:
        answers = {("p", 0): Completed("p", "c", "r", 1, True, scores={"rougeL": 0.5, **scores})}
        metrics = [] if accuracy is None else [{"step": 1.0, "val/preference/accuracy": accuracy}]
        return Run(name, metrics=metrics, answers=answers)

    def shown(*runs: Run) -> str:
        page = comparison_page(runs, compare(runs))
        return page[page.index('<section id="pareto">') :]

    mixed = shown(run("one", None, reward=1.0), run("two", None, reward=2.0), run("three", 0.7))
    assert "<figcaption>reward over ROUGE-L</figcaption>" in mixed
    assert "Without ROUGE-L or reward, and so not here: three." in mixed
    alike = shown(run("one", 0.6, reward=1.0), run("two", 0.8), run("three", 0.7))
    assert "<figcaption>val/preference/accuracy over ROUGE-L</figcaption>" in alike
    assert "not here" not in alike


def test_figures_of_another_measure_are_not_put_on_one_axis() -> None:
    def run(name: str, scale: str) -> Run:
        scores, scales = {"rougeL": 0.5, "reward": 1.0}, {"reward": scale}
        return Run(name, answers={("p", 0): Completed("p", "c", "r", 1, True, scores=scores, scales=scales)})

    runs = [run("one", "a reward"), run("two", "another"), run("three", "a reward")]
    assert [spot.name for spot in spots_of(runs, "reward", 0.95)] == ["one", "three"]
    page = comparison_page(runs, compare(runs))
    assert "Their reward is another measure, and so they are not here: two." in page
    assert "Without ROUGE-L" not in page
