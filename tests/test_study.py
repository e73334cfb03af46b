"""The controlled study: its task by hand, its methods as configurations, and all of its stages in tiny worlds."""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import yaml

from hbat_lightning.cli import main
from tests.conftest import ROOT

STUDY = ROOT / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))

import explore  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402
import sample  # noqa: E402
import scores  # noqa: E402
import study  # noqa: E402
import task  # noqa: E402
import world  # noqa: E402
from fits import CONFIGS  # noqa: E402
from methods import draws, read_methods  # noqa: E402
from runs import Trial, _arguments  # noqa: E402
from world import SMOKE, Sizes  # noqa: E402

METHODS = read_methods()
FACTS = task.Facts("n1", "i2", "p3", "q4", "a5")


@pytest.mark.parametrize(
    ("summary", "gold"),
    [
        ("n1 bought a i2 at p3 it has q4 should n1 a5", 5 - 0.05 * 12),
        ("please n1 bought a i2 at p3 it has q4 should n1 a5 thanks", 5 + 2 - 0.05 * 14),
        ("n1 bought a i9", 1 - 1 - 0.05 * 4),
        ("basically n1 please thanks", 1 + 1 - 1 - 0.5 - 0.05 * 4),
        ("thanks", -0.5 - 0.05),
        ("", 0.0),
    ],
)
def test_gold_by_hand(summary: str, gold: float) -> None:
    assert task.gold(FACTS, summary) == pytest.approx(gold)


def test_posts_state_their_facts_and_no_answer_has_an_unknown_word() -> None:
    rng, words = random.Random(1), set(task.vocabulary())
    for _ in range(200):
        facts = task.draw_facts(rng)
        request = rng.choice([*task.EXACT, task.TLDR])
        prompt = task.write_prompt(rng, facts, request)
        assert task.facts_of(prompt) == facts
        answers = [facts.as_people_write(rng), task.ideal(facts), *(facts.answer(one) for one in task.EXACT)]
        assert {word for text in (prompt, *answers) for word in text.split()} <= words
        assert max(task.gold(facts, answer) for answer in answers) == task.gold(facts, task.ideal(facts))


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_a_configuration(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the last of its draws, and every setting as it says, where the command line has put it."""
    (chosen, *_) = draws(METHODS[name], 8)[::-1]
    trial = Trial(METHODS[name], chosen, tmp_path, "test", tmp_path / "run", 1, tmp_path / "start")
    layers, _, _, options = _arguments(trial)
    arguments = [part for layer in layers for part in ("--config", str(CONFIGS / layer))]
    arguments += [part for key, value in options.items() for part in (f"--{key}", str(value))]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *arguments, "--print_config"])
    assert ended.value.code in (0, None)
    config = yaml.safe_load(capsys.readouterr().out)
    assert len(options) > len(chosen) > 0
    for key, value in options.items():
        assert agrees(setting(config, key), value), key
    assert len(draws(METHODS[name], 8)) == 8 or name == "sft"


def setting(config: Any, key: str) -> Any:
    """What a parsed configuration has under a dotted name; of the callbacks, what the one has that owns it."""
    for part in key.split("."):
        if isinstance(config, list):
            (config,) = (one["init_args"] for one in config if part in one["init_args"])
        config = config[part] if part in config else config["init_args"][part]
    return config


def agrees(found: Any, given: Any) -> bool:
    """Whether it is what was given: a class by its name, a mapping by what it names, a number or a path."""
    if isinstance(found, dict):
        wanted = json.loads(given) if str(given).startswith("{") else given
        if isinstance(wanted, dict):
            return wanted.items() <= found.items()
        return bool(found["class_path"].rpartition(".")[2] == wanted)
    return bool(found == given or str(found) == str(given) or found == yaml.safe_load(str(given)))


def test_methods_differ_in_what_they_are_and_not_in_their_draws() -> None:
    """The same pairs of rate and β, all different; every value of a range as often as any other; Fisher pulls of its own."""
    tried = {name: draws(METHODS[name], 9) for name in METHODS}
    pairs = [(one["model.preference.lr"], one["model.preference.beta"]) for one in tried["two-stage DPO"]]
    assert len(set(pairs)) == 9
    strength = "trainer.callbacks.strength"
    for name in ("two-stage DPO, EWC, drift", "Hbat-DPO, none", "Hbat-DPO, Fisher", "two-stage RPO", "Hbat-Freeze"):
        assert [(one["model.preference.lr"], one["model.preference.beta"]) for one in tried[name]] == pairs
        for key, values in METHODS[name].ranges.items():
            counts = [[one[key] for one in tried[name]].count(value) for value in values]
            assert max(counts) - min(counts) <= 1
    assert all(strength not in one for one in tried["Hbat-DPO, none"])
    pulls, fishers = ([one[strength] for one in tried[f"Hbat-DPO, {form}"]] for form in ("drift", "Fisher"))
    assert fishers == [25 * pull for pull in pulls]
    assert [one["model.instruction.lr"] for one in tried["Hbat-DPO, none"]] == [
        one["model.instruction.lr"] for one in tried["Hbat-PPO, drift"]
    ]
    assert len(tried["sft"]) == 4


def test_verdicts_follow_from_intervals() -> None:
    def results(method: str, exact: list[float]) -> list[dict[str, Any]]:
        return [{"method": method, "seed": seed, "exact": one, "gold": 4.0} for seed, one in enumerate(exact)]

    golds = dict.fromkeys(range(3), 4.0)
    base = results("two-stage DPO", [0.9, 0.8, 0.7])
    lines = report.claims(base + results("Hbat-DPO, none", [0.95, 0.86, 0.74]), golds).splitlines()
    assert len(lines) == 3
    # mean .05, deviation .01, Student's t of two degrees of freedom 4.303
    assert "+0.050 [+0.025, +0.075]" in lines[2]
    assert lines[2].endswith("| yes |")
    assert report.claims(base + results("Hbat-DPO, none", [0.95, 0.75, 0.74]), golds).endswith("| not shown |")
    assert report.claims(base + results("Hbat-DPO, none", [0.85, 0.74, 0.66]), golds).endswith("| no: the reverse |")


def test_the_best_third_of_one_world_is_tried_in_the_other(tmp_path: Path) -> None:
    """Nine draws: three go on, and the choice is among these, by the mean."""
    method = METHODS["two-stage DPO"]
    plan = study.Plan(tmp_path, SMOKE, (1, 2), (11,), 9)
    exact = {1: [0.1, 0.9, 0.2, 0.3, 0.8, 0.0, 0.7, 0.4, 0.5], 2: {1: 0.1, 4: 0.5, 6: 0.55}}
    order = draws(method, 9)

    class Made:
        def all(self, what: str, work: Any, each: list[Trial]) -> list[dict[str, Any]]:
            return [
                {
                    "chosen": dict(one.chosen),
                    "seed": one.seed,
                    "exact": exact[one.seed][order.index(one.chosen)],
                    "gold": 4.0,
                }
                | {"method": one.method.name}
                for one in each
            ]

    results = study._tuned(plan, [method], Made(), {1: 4.0, 2: 4.0})
    assert [order.index(one["chosen"]) for one in results if one["seed"] == 2] == [1, 4, 6]
    assert scores.best(results, {1: 4.0, 2: 4.0}) == order[4]  # .65, and .625 and .5


def test_variants_change_one_thing_each_and_make_no_run_twice(tmp_path: Path) -> None:
    """Rounds, the optimizer's state, and every parameter: what is asked of whom, on which seeds, and in which folders."""
    plan = study.Plan(tmp_path, SMOKE, (1,), (11, 12), 2)
    chosen = {name: draws(METHODS[name], 1)[0] for name in (*study.ROUNDS, *study.FULL)}
    asked: list[Trial] = []

    class Made:
        def all(self, what: str, work: Any, each: list[Trial]) -> list[dict[str, Any]]:
            asked.extend(each)
            return [
                {"chosen": dict(one.chosen), "seed": one.seed, "exact": 0.5, "gold": 4.0, "method": one.method.name}
                for one in each
            ]

    methods = {name: METHODS[name] for name in ("sft", "Hbat-DPO, drift", "two-stage DPO")}
    found = study._variants(plan, methods, chosen, Made(), {1: 4.0, 11: 4.0, 12: 4.0})
    stages = [(one["stage"], one["method"], one["seed"]) for one in found]
    drift = "Hbat-DPO, drift"
    assert stages[:14] == [
        *[("rounds", drift, 11), ("rounds", drift, 12)] * 4,
        *[("optimizer state", drift, 11), ("optimizer state", drift, 12)] * 3,
    ]
    assert stages[14:] == [("full", name, seed) for name in ("sft", "two-stage DPO", drift) for seed in (11, 12)]
    rounds = [one for one in asked if one.method.name == drift and not one.full and one.seed == 11][:4]
    assert [one.chosen["model.schedule.rounds"] for one in rounds] == [1, 2, 5, 10]
    assert [one.folder.name for one in rounds] == ["rounds-1-11", "chosen-11", "rounds-5-11", "rounds-10-11"]
    rate = "model.preference.lr"
    for one in asked:
        if one.full:
            assert one.folder.name.startswith("full")
            assert rate not in one.chosen or 6 * one.chosen[rate] in [
                pytest.approx(value) for value in METHODS[drift].ranges[rate]
            ]
        else:
            assert {**one.chosen, "model.schedule.rounds": 2} == {
                **chosen[drift],
                **{key: value for key, value in one.chosen.items() if "state" in key},
            }


def test_a_run_of_other_settings_is_not_taken_for_this_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS["two-stage DPO"]
    for name in ("instruction", "preference", "test"):
        (tmp_path / f"{name}.jsonl").write_text(f"{name}\n")
    trial = Trial(method, {"a": 1}, tmp_path, "test", tmp_path, 1, tmp_path)
    result = {"chosen": {"a": 1}, "settings": runs.fingerprint(trial)}
    (tmp_path / "result.json").write_text(json.dumps(result))
    monkeypatch.setattr(runs, "fit", None)
    assert runs.run(trial) == result
    changed: list[dict[str, Any]] = [
        {"chosen": {"a": 2}},
        {"method": replace(method, options={"b": 1})},
        {"method": replace(method, layers=("joint.yaml",))},
        {"full": True},
    ]
    for other in changed:
        with pytest.raises(TypeError):  # it would train
            runs.run(replace(trial, **other))
    (tmp_path / "preference.jsonl").write_text("others\n")
    with pytest.raises(TypeError):
        runs.run(trial)


def test_a_world_of_other_sizes_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "world-1").mkdir()
    (tmp_path / "world-1" / "world.json").write_text(json.dumps({"seed": 1, **asdict(SMOKE)}))
    assert world.make_world(tmp_path, 1, SMOKE) == tmp_path / "world-1"
    with pytest.raises(SystemExit, match="another --output"):
        world.make_world(tmp_path, 1, Sizes())


def test_a_world_that_was_stopped_is_made_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the base was there and the pairs were not, and when all was but its mark."""
    pairs = world._write_pairs

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(world, "_write_pairs", killed)
    with pytest.raises(KeyboardInterrupt):
        world.make_world(tmp_path / "stopped", 1, SMOKE)
    assert (tmp_path / "stopped" / "world-1" / "base" / "model.safetensors").exists()
    monkeypatch.setattr(world, "_write_pairs", pairs)
    made = world.make_world(tmp_path / "stopped", 1, SMOKE)
    before = {path: path.read_bytes() for path in sorted(made.rglob("*")) if path.suffix in (".jsonl", ".safetensors")}
    assert {path.parent.name for path in before} >= {"base", "reward", "world-1"}
    (made / "world.json").unlink()
    assert world.make_world(tmp_path / "stopped", 1, SMOKE) == made
    assert {path: path.read_bytes() for path in before} == before


def test_intervals_are_students() -> None:
    for count, quantile in report.STUDENT.items():
        assert quantile == pytest.approx(scipy.stats.t.ppf(0.975, count - 1), abs=5e-4)
    assert (min(report.STUDENT), max(report.STUDENT)) == (2, 30)
    values = [float(number % 7) for number in range(12)]
    low, high = scipy.stats.t.interval(0.95, 11, statistics.mean(values), scipy.stats.sem(values))
    assert report.interval(values) == f"{statistics.mean(values):+.3f} [{low:+.3f}, {high:+.3f}]"


def _kept(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STUDY / "results" / name).read_text().splitlines()]


KEPT, HARDER, PPO_ROUNDS = (_kept(name) for name in ("kept.jsonl", "harder_conflict.jsonl", "ppo_rounds.jsonl"))
QUOTED = [
    ("Hbat-DPO/none/chosen", "two-stage DPO/chosen", "score", "−0.10 [−0.31, +0.12]"),
    ("Hbat-PPO/none/chosen", "two-stage PPO/chosen", "score", "−0.29 [−0.41, −0.17]"),
    ("Hbat-DPO/drift/chosen", "two-stage DPO/chosen", "score", "−0.18 [−0.31, −0.05]"),
    ("Hbat-PPO/drift/chosen", "two-stage PPO/chosen", "score", "−0.35 [−0.54, −0.15]"),
    ("Hbat-DPO/drift/rounds-10", "two-stage DPO/chosen", "score", "−0.57 [−0.72, −0.42]"),
    ("Hbat-DPO/none/rounds-10", "Hbat-DPO/none/chosen", "score", "−0.26 [−0.46, −0.06]"),
    ("Hbat-DPO/none/rounds-10", "Hbat-DPO/none/chosen", "exact", "+0.08 [−0.06, +0.22]"),
    ("Hbat-DPO/none/rounds-10", "Hbat-DPO/none/chosen", "gold", "−0.63 [−0.95, −0.31]"),
    ("Hbat-DPO/drift/chosen", "Hbat-DPO/drift/rounds-1", "score", "−0.16 [−0.30, −0.03]"),
    ("SFT+dpo/chosen", "two-stage DPO/chosen", "score", "+0.25 [+0.17, +0.33]"),
    ("SFT+dpo/chosen", "two-stage RAFT/chosen", "score", "+0.07 [−0.06, +0.20]"),
    ("SFT+ppo/chosen", "two-stage PPO/chosen", "score", "+0.22 [+0.03, +0.42]"),
    ("two-stage DPO/EWC/drift/chosen", "two-stage DPO/chosen", "score", "−0.01 [−0.02, +0.00]"),
    ("Hbat-DPO/drift/chosen", "Hbat-DPO/none/chosen", "score", "−0.09 [−0.34, +0.17]"),
    ("Hbat-PPO/drift/chosen", "Hbat-PPO/none/chosen", "score", "−0.06 [−0.24, +0.12]"),
    ("Hbat-DPO/uniform/chosen", "Hbat-DPO/none/chosen", "score", "−0.28 [−0.34, −0.21]"),
    ("Hbat-DPO/drift/chosen", "Hbat-DPO/uniform/chosen", "score", "+0.19 [−0.01, +0.38]"),
    ("Hbat-PPO/drift/chosen", "Hbat-PPO/uniform/chosen", "score", "−0.03 [−0.19, +0.14]"),
    ("Hbat-DPO/drift/chosen", "Hbat-DPO/random/chosen", "score", "−0.03 [−0.08, +0.03]"),
    ("Hbat-PPO/drift/chosen", "Hbat-PPO/random/chosen", "score", "−0.02 [−0.18, +0.14]"),
    ("Hbat-DPO/drift/chosen", "Hbat-DPO/Fisher/chosen", "score", "−0.03 [−0.30, +0.24]"),
    ("Hbat-DPO/literal/chosen", "Hbat-DPO/none/chosen", "score", "−0.01 [−0.08, +0.05]"),
    ("Hbat-PPO/literal/chosen", "Hbat-PPO/none/chosen", "score", "−0.00 [−0.17, +0.17]"),
    ("Hbat-DPO/none/full", "two-stage DPO/full", "score", "−0.18 [−0.26, −0.10]"),
    ("Hbat-DPO/drift/full", "two-stage DPO/full", "score", "−0.28 [−0.39, −0.17]"),
    ("two-stage DPO/chosen", "sft/chosen", "exact", "−0.03 [−0.10, +0.04]"),
    ("two-stage PPO/chosen", "sft/chosen", "exact", "−0.03 [−0.09, +0.04]"),
    ("two-stage DPO/full", "sft/full", "exact", "−0.09 [−0.13, −0.04]"),
    ("two-stage DPO/full", "two-stage DPO/chosen", "exact", "−0.06 [−0.10, −0.01]"),
    ("Hbat-DPO/none/chosen", "two-stage DPO/chosen", "plain", "−0.26 [−0.71, +0.20]"),
    ("Hbat-DPO/drift/chosen", "two-stage DPO/chosen", "plain", "−0.33 [−0.90, +0.24]"),
]


QUOTED_OF_THE_HARDER_CONFLICT = [
    ("Hbat-DPO/none/chosen", "two-stage DPO/chosen", "score", "−0.10 [−0.38, +0.18]"),
    ("Hbat-DPO/drift/chosen", "two-stage DPO/chosen", "score", "−0.09 [−0.40, +0.21]"),
]
PPO_IN = "Hbat-PPO/none/explored,rounds={},lr=0.0001,kl_coefficient=0.1,lr=0.006"
QUOTED_OF_PPO = [
    (PPO_IN.format(2), "two-stage PPO/explored", "score", "−0.17 [−0.34, −0.01]"),
    (PPO_IN.format(5), "two-stage PPO/explored", "score", "−0.41 [−0.46, −0.37]"),
    (PPO_IN.format(10), "two-stage PPO/explored", "score", "−0.42 [−0.57, −0.26]"),
]


@pytest.mark.parametrize(
    ("kept", "one", "other", "figure", "quoted"),
    [
        *((KEPT, *each) for each in QUOTED),
        *((HARDER, *each) for each in QUOTED_OF_THE_HARDER_CONFLICT),
        *((PPO_ROUNDS, *each) for each in QUOTED_OF_PPO),
    ],
)
def test_quoted_differences_are_those_of_the_kept_runs(
    kept: list[dict[str, Any]], one: str, other: str, figure: str, quoted: str
) -> None:
    """Means and Student's intervals over the five final worlds, from results/*.jsonl, by scipy."""
    golds = {run["seed"]: run["gold"] for run in kept if run["place"].startswith("sft/chosen-")}

    def values(place: str) -> list[float]:
        own = [run for run in kept if run["place"].rpartition("-")[0] == place and run["seed"] > 20]
        gains = [(run["gold"] - golds[run["seed"]]) / (scores.IDEAL - golds[run["seed"]]) for run in own]
        assert [run["seed"] for run in own] == [21, 22, 23, 24, 25]
        if figure == "score":
            return [run["exact"] + gain for run, gain in zip(own, gains, strict=True)]
        return [run[figure] for run in own]

    apart = [left - right for left, right in zip(values(one), values(other), strict=True)]
    mean = statistics.mean(apart)
    low, high = scipy.stats.t.interval(0.95, len(apart) - 1, mean, scipy.stats.sem(apart))
    assert f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]".replace("-", "−") == quoted
    assert quoted in " ".join((STUDY / "README.md").read_text().split())


def test_exploring_changes_what_was_chosen_and_compares_by_world(tmp_path: Path) -> None:
    grids = [["model.schedule.rounds", "5", "10"], ["model.instruction.lr", "3e-3"]]
    cases = list(explore.combinations(grids))
    assert cases == [
        {"model.schedule.rounds": 5, "model.instruction.lr": 0.003},
        {"model.schedule.rounds": 10, "model.instruction.lr": 0.003},
    ]
    method, settings = METHODS["Hbat-DPO, none"], explore.chosen("Hbat-DPO, none")
    assert settings["model.schedule.rounds"] == 2
    plan = study.Plan(tmp_path, Sizes(), study.TUNING, [21, 22], 0)
    made = [explore.trials(plan, method, settings, case, [21, 22]) for case in cases]
    assert [trial.chosen["model.schedule.rounds"] for own in made for trial in own] == [5, 5, 10, 10]
    assert {trial.chosen["model.preference.beta"] for own in made for trial in own} == {
        settings["model.preference.beta"]
    }
    assert len({trial.folder for own in made for trial in own}) == 4
    assert {trial.split for own in made for trial in own} == {"test"}

    def results(*golds: float) -> list[dict[str, float]]:
        return [
            {"seed": seed, "exact": 1.0, "plain": 0.5, "gold": gold} for seed, gold in zip((21, 22), golds, strict=True)
        ]

    start = scores.IDEAL - 2
    table = explore.table(["a", "b"], [results(start, start), results(start + 1, start + 0.5)], {21: start, 22: start})
    assert table.splitlines()[2] == f"| a | 1.000 | 0.500 | {start:.3f} | 1.000 |  |"
    assert table.splitlines()[3].endswith("| 1.375 | " + report.interval([0.5, 0.25]) + " |")


def test_a_sample_makes_the_kept_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The trial of a kept result has its settings and place; hours are of all runs, at the pace of those that were drawn."""
    kept = next(run for run in KEPT if run["place"] == "Hbat-DPO/drift/rounds-5-22")
    trial = sample.trial_of(kept, METHODS, study.Plan(tmp_path, Sizes(), study.TUNING, [], 0))
    assert trial.folder == tmp_path / "runs" / kept["place"]
    assert (trial.world, trial.split, trial.seed) == (tmp_path / "worlds" / "world-22", "test", 22)
    assert (trial.chosen["model.schedule.rounds"], trial.full) == (5, False)
    assert trial.start == tmp_path / "runs" / "sft" / "chosen-22" / "adapter"
    again = [kept | {"seconds": seconds, "exact": kept["exact"] + 0.5 * (seconds == 30)} for seconds in (5, 10, 20, 30)]
    sample.tell([kept] * 4, again, before=360, count=1, rest=180, workers=2)
    told = capsys.readouterr().out
    assert "10 to 30 seconds, 20.0 on average, 2 side by side: the study 0.60 hours" in told
    assert "same rows and settings: 4 of 4" in told
    assert "exact: the same in 3; 0.1250 apart on average, 0.5000 at most" in told


def test_a_front_has_what_nothing_else_beats() -> None:
    assert report.front([(0.9, 0.1), (0.8, 0.5), (0.7, 0.4), (0.95, 0.1), (0.5, 0.9)]) == [
        (0.5, 0.9),
        (0.8, 0.5),
        (0.95, 0.1),
    ]


def test_all_stages_in_tiny_worlds_and_again_without_doing_anything_twice(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(STUDY / "study.py"), "--smoke", "--workers", "1"]
    command += ["--output", str(tmp_path), "--methods", "Hbat-DPO, drift"]
    subprocess.run(command, check=True, capture_output=True)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["method"]) for one in results] == [
        ("tuning", "Hbat-DPO, drift"), ("final", "sft"), ("final", "Hbat-DPO, drift")
    ]  # fmt: skip
    assert {path.name for path in tmp_path.iterdir()} >= {"tables.md", "fronts.png"}
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    tables = (tmp_path / "tables.md").read_text()
    subprocess.run(command, check=True, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == times
    assert (tmp_path / "tables.md").read_text() == tables

    elsewhere = tmp_path / "elsewhere"
    again = [str(elsewhere) if part == str(tmp_path) else part for part in command]
    subprocess.run([*again, "--known", str(tmp_path / "kept.jsonl")], check=True, capture_output=True)
    assert (elsewhere / "tables.md").read_text() == tables.replace(str(tmp_path), str(elsewhere))
    made = elsewhere / "runs"
    trained = {path.parent.relative_to(made).as_posix() for path in made.rglob("switches.jsonl")}
    assert trained == {
        "sft/chosen-1",
        "sft/chosen-11",
    }  # the worlds, and what other runs may begin from, are made again


def test_real_text_in_small(real_data: Path, tmp_path: Path) -> None:
    """The same command as at full size; what it reports is what the runs' own files say, and no row is drawn twice."""
    command = [sys.executable, "-W", "ignore", str(STUDY / "real_text.py"), str(real_data), "--smoke", "--workers", "1"]
    command += ["--output", str(tmp_path)]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert told.splitlines() == (tmp_path / "table.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()[2:]]
    assert [row[1] for row in rows] == ["SFT", "two-stage DPO", "Hbat-DPO, drift 1"]
    folder = tmp_path / "runs" / "Hbat-DPO" / "drift 1" / "0.0002-1"
    switches = [json.loads(line) for line in (folder / "switches.jsonl").read_text().splitlines()]
    assert [one["objective"] for one in switches] == ["instruction", "preference"] * 2
    added = sum(one["after"]["val/instruction/loss"] - one["before"]["val/instruction/loss"] for one in switches[1::2])
    last = switches[-1]["after"]
    shown = [float(rows[2][place]) for place in (2, 4, 5, 8)]
    assert rows[2][7] == str(switches[-1]["step"])
    truth = [last["val/instruction/loss"], added, last["val/preference/accuracy"], last["val/preference/loss"]]
    assert shown == pytest.approx(truth, abs=1e-3)
    drawn = tmp_path / "rows" / "1"
    read = (tmp_path / "language" / "documents.txt").read_text()
    for name in ("instruction", "preference"):
        trained, held_out = (set((drawn / f"{name}{end}.jsonl").read_text().splitlines()) for end in ("", "-held-out"))
        assert len(trained) == 16
        assert len(held_out) == 8
        assert not trained & held_out
        if name == "instruction":  # nor is any row read before
            outputs = [" ".join(json.loads(row)["output"].split()) for row in trained | held_out]
            assert not [text for text in outputs if len(text) > 20 and text in read]
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")}
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout == told
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("result.json")} == times
