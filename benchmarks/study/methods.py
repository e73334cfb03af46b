"""Reads ``methods.yaml``, and draws what is tried of each method's ranges."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from fits import CONFIGS
from runs import Method

HERE = Path(__file__).parent


def read_methods(path: Path = HERE / "methods.yaml") -> dict[str, Method]:
    """All methods by name, in order; those with forms once per form."""
    content = yaml.safe_load(path.read_text())
    return {
        method.name: method
        for name, entry in content["methods"].items()
        for method in _forms(name, entry, content["defaults"]["options"])
    }


def draws(method: Method, count: int) -> list[dict[str, Any]]:
    """What of a method's ranges is tried, at random and always the same; all of it where there is no more.

    Args:
        method: The method.
        count: How many.
    """
    every = [dict(zip(method.ranges, values, strict=True)) for values in product(*method.ranges.values())]
    return random.Random(f"draws of {method.name}").sample(every, min(count, len(every)))


def _forms(name: str, entry: Mapping[str, Any], defaults: Mapping[str, Any]) -> Iterator[Method]:
    options = {**(defaults if entry.get("defaults", True) else {}), **entry.get("options", {})}
    forms = {form: more for form, more in entry.get("forms", {"": {}}).items() if form not in entry.get("without", [])}
    layers = tuple(str(HERE / layer if not (CONFIGS / layer).exists() else layer) for layer in entry["layers"])
    for form, more in forms.items():
        ranges = {key: values for key, values in entry["ranges"].items() if key not in more}
        if options.get("trainer.callbacks.strength") == 0 or more.get("trainer.callbacks.strength") == 0:
            ranges.pop("trainer.callbacks.strength", None)
        yield Method(
            f"{name}, {form}" if form else name,
            layers,
            options | more,
            ranges,
            tuple(entry.get("objectives", ("instruction", "preference"))),
        )
