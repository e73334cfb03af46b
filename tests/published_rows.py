"""A few rows of every format as its publisher lays them out, and options that put them in the place of a run's data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets

from hbat_lightning import DataSource
from hbat_lightning.data import embedded


def post(number: int) -> dict[str, Any]:
    return {"id": f"t3_{number}", "subreddit": "r/tests", "title": f"title {number}", "post": f"a b c {number} d"}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


ROWS: dict[str, Callable[[int], dict[str, Any]]] = {
    "tldr": lambda number: post(number) | {"summary": f"b {number}"},
    "comparisons": lambda number: {
        "info": post(number) | {"site": None, "article": None},
        "summaries": [{"text": f" {answer} {number}", "policy": "sup", "note": None} for answer in "ab"],
        "choice": number % 2,
        "worker": "w",
        "batch": "batch3",
        "split": "train",
        "extra": {"confidence": None},
    },
    "alpaca": lambda number: {
        "instruction": f"do {number}",
        "input": "x y" * (number % 2),
        "output": f"done {number}",
        "text": "all of it",
    },
    "alpaca_farm": lambda number: {
        "instruction": f"do {number}",
        "input": "x y" * (number % 2),
        "output_1": f"a {number}",
        "output_2": f"b {number}",
        "preference": 1 + number % 2,
        "raw_preference": 4,
    },
    "messages": lambda number: {
        "prompt": f"hi {number}",
        "prompt_id": str(number),
        "messages": [
            turn("user", f"hi {number}"),
            turn("assistant", "yes"),
            turn("user", "so"),
            turn("assistant", "no"),
        ],
    },
    "preference": lambda number: {
        "prompt": f"hi {number}",
        "prompt_id": str(number),
        "chosen": [turn("user", f"hi {number}"), turn("assistant", f"a {number}")],
        "rejected": [turn("user", f"hi {number}"), turn("assistant", f"b {number}")],
        "messages": [turn("user", f"hi {number}"), turn("assistant", f"a {number}")],
        "score_chosen": 7.0,
        "score_rejected": 5.0,
    },
}


def small_data(sources: Mapping[str, DataSource | None], folder: Path) -> list[str]:
    """Options for few rows: of the embedded task, or of the named format in the place of a hub id."""
    options = []
    own = {objective: source for objective, source in sources.items() if source}
    # alone, an objective needs two windows for two steps; together, the second window shall be the other one's
    count = 24 if len(own) == 1 else 20
    for objective, source in own.items():
        key = f"--data.init_args.{objective}"
        options += [f"{key}.limit", str(count), f"{key}.val_fraction", "0.25"]
        if not embedded.is_embedded(source.path) and not Path(source.path).exists():
            assert source.format, f"{source.path}: {objective} names no format"
            path = folder / f"{objective}.parquet"
            datasets.Dataset.from_list([ROWS[source.format](number) for number in range(count)]).to_parquet(str(path))
            options += [f"{key}.path", str(path)]
            for choice in ("split", "subset", "revision", "data_files", "val_split"):
                options += [f"{key}.{choice}", "null"]
    return options
