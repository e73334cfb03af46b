"""README and ``docs/`` as tests read them: fences, commands, links, and tables of logged columns."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCS = sorted((ROOT / "docs").rglob("*.md"))
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
CONFIGS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml"))
# A layer changes settings of a model that another file names.
LAYERS = {name for name in CONFIGS if "class_path" not in yaml.safe_load((ROOT / name).read_text()).get("model", {})}

_FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def fences(language: str, text: str = README) -> list[str]:
    """The code fences of a language; ``""`` are those of the command line."""
    return [body for name, body in _FENCE.findall(text) if name == language]


def commands_in(text: str) -> Iterator[str]:
    """Every ``hbat …`` of a page, in code fences and between backticks, on one line and without comments."""
    yield from commands_of_lines([*fences("", text), *re.findall(r"`(hbat [^`]*--[^`]*)`", text)])


def commands_of_lines(texts: list[str]) -> Iterator[str]:
    """The lines that are commands, those that go on behind a backslash put together."""
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            if line.strip().startswith("hbat "):
                yield " ".join(shlex.split(line, comments=True))


def commands() -> Iterator[str]:
    """Every ``hbat …`` of README, docs, and the configurations' first lines."""
    for text in [README, *(path.read_text() for path in DOCS)]:
        yield from commands_in(text)
    yield from commands_of_lines([re.sub(r"^#", "", (ROOT / name).read_text(), flags=re.MULTILINE) for name in CONFIGS])


def options() -> set[str]:
    """Every option that README and docs name between backticks without its command, with the values it has there."""
    prose = (_FENCE.sub("", text) for text in [README, *(path.read_text() for path in DOCS)])
    return {option for text in prose for option in re.findall(r"`([^`\n]*)`", text) if option.startswith("--")}


# ---- links -----------------------------------------------------------------------------------------------------------


def links(text: str) -> list[str]:
    """Targets of the links of a page; what stands in code is none."""
    prose = re.sub(r"`[^`\n]*`", "code", _FENCE.sub("", text))
    return re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """Names of the headings of a page, as GitHub makes them."""
    seen: dict[str, int] = {}
    names = set()
    for heading in re.findall(r"^#+ +(.*?) *$", _FENCE.sub("", text), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if name in seen else name)
        seen[name] = seen.get(name, 0) + 1
    return names


# ---- tables of logged columns ------------------------------------------------------------------------------------------


def columns(text: str) -> set[str]:
    """What the tables of a page that begin with ``| column |`` have in their first cells; ``{a,b}/c`` are two."""
    names: set[str] = set()
    for table in re.findall(r"^\| column \|.*\n\|[ -|]*\n((?:\|.*\n?)+)", text, re.MULTILINE):
        for row in table.splitlines():
            for name in re.findall(r"`([^`]+)`", row.split("|")[1]):
                names |= set(_expanded(name))
    return names


def _expanded(name: str) -> Iterator[str]:
    parts = [part.strip("{}").split(",") for part in re.split(r"(\{[^}]*\})", name)]
    yield from map("".join, product(*parts))
