"""Stops runs again and again, lets them go on, and compares what they end with: with runs that were never stopped.

    python -m tests.soak.soak --seed 0 --stops 200 --folder /tmp/soak --results soak.md

Every stop is a real signal to a real process, or an exception or a full disk in it. Runs lie in ``--folder``; those that
fail stay there, with their output in ``log.txt``. Exit code 1 says that one did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib.pyplot  # noqa: F401  in the parent, so that no child needs to
import torch

import hbat_lightning.cli  # noqa: F401  as above
from tests.soak.runs import FINISHED, FOLDER, Commands, Launcher, Outcome, differences, with_launcher
from tests.soak.scenarios import KINDS, Dealer, Scenario
from tests.soak.traps import Fault, Stop

LIVES = 3
"""Runs that are stopped, for each one that is not."""
MOST = 8
"""Stops of one run."""
SIGNALS = {signal.SIGKILL: 6, signal.SIGTERM: 2, signal.SIGINT: 2}
FAULTS = {Fault.EXCEPTION: 2, Fault.FULL_DISK: 2}
"""How often each is drawn; faults do not come by the clock."""


@dataclass
class Life:
    """A run that was stopped and went on until it had finished.

    Attributes:
        kind: Of the scenario.
        scenario: In words.
        stops: What it met, in words, with the exit code.
        signals: The signals and faults that it was stopped by.
        failures: What went wrong: differences, or an end that no signal explains.
    """

    kind: str
    scenario: str
    stops: list[str] = field(default_factory=list)
    signals: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def draw_stop(rng: random.Random, counts: dict[str, int], seconds: float) -> Stop:
    """A stop somewhere in a run.

    Args:
        rng: Draws.
        counts: How often a whole run comes to each place.
        seconds: How long it takes.
    """
    if not counts or rng.random() < 0.2:
        return Stop(_weighed(rng, SIGNALS), "time", int(1000 * rng.uniform(0.2, seconds)))
    place = rng.choice(sorted(counts))
    return Stop(_weighed(rng, SIGNALS | FAULTS), place, 1 + int(counts[place] * rng.random() ** 2))


def _weighed(rng: random.Random, weights: dict[Any, int]) -> Any:
    return rng.choices(list(weights), list(weights.values()))[0]


def live(launcher: Launcher | Commands, place: Path, life: Life, next_stop: Callable[[bool], Stop], most: int) -> Life:
    """Stop a run so often, let it go on each time, and in the end to its end.

    Args:
        launcher: Starts it.
        place: Where.
        life: What is known of it so far; what happens to it is added.
        next_stop: Draws stops; whether the run goes on, which comes to other places, is what it is told.
        most: How often.
    """
    for number in range(most):
        stop = next_stop(number > 0)
        outcome = launcher.fit(place, resume=number > 0, stop=stop)
        if not outcome.is_of(stop, _counts(place)):
            life.failures.append(f"{stop}: exit code {outcome.code}")
        if outcome.code == FINISHED:
            return life
        life.stops.append(f"{stop} ({outcome.code})")
        life.signals.append(stop.signal.name)
    outcome = launcher.fit(place, resume=True)
    if outcome.code != FINISHED:
        life.failures.append(f"going on to the end: exit code {outcome.code}")
    return life


def soak(scenario: Scenario, kind: str, folder: Path, seed: int, commands: bool = False) -> list[Life]:
    """Run a scenario once without a stop, and then with many.

    Args:
        scenario: What to run.
        kind: Its kind.
        folder: Where.
        seed: Of the stops.
        commands: Whole command lines, each in an interpreter of its own, that only the clock stops.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)

    def work(launcher: Launcher | Commands) -> list[dict[str, Any]]:
        rng, truth, done = random.Random(seed), folder / "never stopped", []
        outcome = launcher.fit(truth)
        if outcome.code != FINISHED:
            return [asdict(Life(kind, scenario.name, failures=[f"without a stop: exit code {outcome.code}"]))]
        counts = (
            {True: {}, False: {}} if commands else {False: _counts(truth), True: _counts_going_on(launcher, folder)}
        )

        only = {place: count for place, count in counts[True].items() if place not in counts[False]}

        def next_stop(goes_on: bool) -> Stop:
            places = only if goes_on and only and rng.random() < 0.3 else counts[goes_on]
            return draw_stop(rng, places, outcome.seconds)

        for number in range(LIVES):
            place, life = folder / f"life {number}", Life(kind, scenario.name)
            live(launcher, place, life, next_stop, rng.randint(2, MOST))
            life.failures += differences(truth / FOLDER, place / FOLDER)
            done.append(asdict(life))
        return done

    result = folder / "lives.json"
    if commands:
        result.write_text(json.dumps(work(Commands(scenario.arguments))))
        outcome = Outcome(FINISHED, 0.0)
    else:
        outcome = with_launcher(scenario.arguments, work, result)
    if outcome.code != FINISHED:
        return [Life(kind, scenario.name, failures=[f"the launcher ended with exit code {outcome.code}"])]
    done = [Life(**life) for life in json.loads(result.read_text())]
    if not any(life.failures for life in done):
        shutil.rmtree(folder)
    return done


def _counts(place: Path) -> dict[str, int]:
    """How often the run that ended here last came to each place; nothing of a run that could not say so."""
    file = place / "counts.json"
    counts: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    return counts


def _counts_going_on(launcher: Launcher | Commands, folder: Path) -> dict[str, int]:
    """The places of a run that was killed early, and then goes on to its end."""
    place = folder / "going on"
    launcher.fit(place, stop=Stop(signal.SIGKILL, "after the link to a checkpoint", 1))
    launcher.fit(place, resume=True)
    return _counts(place)


def table(lives: list[Life]) -> str:
    """What was stopped, by what and where, in Markdown."""
    lines = ["| run | runs | stops | failed |", "| --- | --- | --- | --- |"]
    for kind in dict.fromkeys(life.kind for life in lives):
        own = [life for life in lives if life.kind == kind]
        failed = sum(bool(life.failures) for life in own)
        lines.append(f"| {kind} | {len(own)} | {sum(len(life.stops) for life in own)} | {failed} |")
    lines.append(
        f"| all | {len(lives)} | {sum(len(life.stops) for life in lives)} | {sum(bool(life.failures) for life in lives)} |"
    )
    settings = Counter(setting for life in lives for setting in _settings(life) for _ in life.stops)
    by_signal = Counter(name for life in lives for name in life.signals)
    places = Counter(_place(stop) for life in lives for stop in life.stops)
    lines += ["", "By kind of stop: " + ", ".join(f"{name} {count}" for name, count in by_signal.most_common()) + "."]
    lines += ["", "By setting: " + "; ".join(f"{name} {count}" for name, count in settings.most_common()) + "."]
    lines += ["", "By place: " + "; ".join(f"{place} {count}" for place, count in places.most_common()) + "."]
    return "\n".join(lines)


def _settings(life: Life) -> list[str]:
    return life.scenario.removeprefix(f"{life.kind}, ").split(", ")


def _place(stop: str) -> str:
    said = stop.partition(" ")[2]
    return "at a random time" if said.startswith("after ") and " ms " in said else said.rpartition(",")[0]


def main() -> None:
    """Soak until there were as many stops as asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stops", type=int, default=200, help="how many at least")
    parser.add_argument("--folder", type=Path, required=True, help="for the runs")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS), help="which runs")
    parser.add_argument("--commands", action="store_true", help="whole command lines, stopped by the clock only")
    parser.add_argument("--lives", type=Path, help="a file that gets a line for each run that was stopped")
    parser.add_argument("--results", type=Path, help="a Markdown file for the table")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rng, lives, number = random.Random(given.seed), [], 0
    dealer = Dealer(rng)
    while number < len(given.kinds) or sum(len(life.stops) for life in lives) < given.stops:  # each kind at least once
        kind = given.kinds[number % len(given.kinds)]
        scenario = dealer.draw(kind)
        new = soak(scenario, kind, given.folder.resolve() / f"{number:03d}", rng.getrandbits(32), given.commands)
        lives, number = lives + new, number + 1
        for life in new:
            line = json.dumps(asdict(life))
            print(line, flush=True)
            if given.lives:
                with given.lives.open("a") as file:
                    file.write(line + "\n")
    print(table(lives))
    if given.results:
        given.results.write_text(table(lives) + "\n")
    sys.exit(any(life.failures for life in lives))


if __name__ == "__main__":
    main()
