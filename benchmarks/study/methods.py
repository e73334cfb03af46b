"""Reads ``methods.yaml``, and draws what is tried of each method's ranges."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from fits import CONFIGS
from runs import Method

HERE = Path(__file__).parent
STRENGTH = "trainer.callbacks.strength"


def read_methods(path: Path = HERE / "methods.yaml") -> dict[str, Method]:
    """All methods by name, in order; those with forms once per form."""
    content = yaml.safe_load(path.read_text())
    return {
        method.name: method
        for name, entry in content["methods"].items()
        for method in _forms(name, entry, content["defaults"]["options"])
    }


def draws(method: Method, count: int) -> list[dict[str, Any]]:
    """What of a method's ranges is tried: every value as often as any other, or once more.

    Methods with the same first two ranges try the same pairs of them, all different, and with the same third one the same of
    that, and so on. So they differ in what they are, not in the luck of their draws.

    Args:
        method: The method.
        count: How many; fewer where there are no more.
    """
    columns: dict[str, list[Any]] = {}
    for number, (name, values) in enumerate(method.ranges.items()):
        every = [values[place % len(values)] for place in range(count)]
        if number == 1:
            steps = len(next(iter(method.ranges.values())))  # a lattice: one further with every time through the first
            every = [values[(place + place // steps) % len(values)] for place in range(count)]
        columns[name] = every if number < 2 else _spread(name, every, list(columns.values()))
    found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    return [one for place, one in enumerate(found) if one not in found[:place]]


def _spread(name: str, values: list[Any], others: list[list[Any]]) -> list[Any]:
    """The values in an order in which each value of the other ranges meets as many different ones as can be."""
    rng = random.Random(f"order of {name}")
    orders = [rng.sample(values, len(values)) for _ in range(5000)]
    return max(orders, key=lambda order: sum(len(set(zip(column, order, strict=True))) for column in others))


def _forms(name: str, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Method]:
    options = {**(defaults if entry.get("defaults", True) else {}), **entry.get("options", {})}
    forms = {form: more for form, more in entry.get("forms", {"": {}}).items() if form not in entry.get("without", [])}
    layers = tuple(str(HERE / layer if not (CONFIGS / layer).exists() else layer) for layer in entry["layers"])
    for form, more in forms.items():
        ranges = {key: more.get(key, values) for key, values in entry["ranges"].items()}
        settled = {**options, **more}
        if settled.get(STRENGTH) == 0:
            ranges.pop(STRENGTH, None)
        yield Method(
            f"{name}, {form}" if form else name,
            layers,
            {key: value for key, value in settled.items() if key not in ranges},
            ranges,
            tuple(entry.get("objectives", ("instruction", "preference"))),
        )
