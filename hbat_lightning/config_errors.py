"""One readable line from jsonargparse's errors, which print the whole configuration around the key that is wrong.

Their text is a tree, by indentation: keys and classes lead to the fault. The first branch is followed to its fault; the
other branches say only that the value is not one of the alternatives either.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

_KEY = re.compile(r'Parser key "([^"]+)":')
_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_CALLABLE = re.compile(r"expects a (?:function or a callable class): (.*)")
_NO_OPTION = re.compile(r"(?:Option|Subcommand '\w+' does not accept option) '([^']+)'")
_TYPE = re.compile(r"Expected an? (.+?)(?:\. Got value: (.*))?$")
_VALUE = re.compile(
    r"^\s*Given value: (?:NestedArg\(key='[^']*', val=(.*)\)|(.*?))(?:\. Got value: .*)?$", re.MULTILINE
)
_NO_CLASS = re.compile(
    r"Expected a dot import path string: (.*)|has no attribute '(\w+)'|(Import path) does not corres"
)
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_NO_FUNCTION = re.compile(r"Unexpected import object")
_ASIDES = ("Does not validate", "Subtypes:", "Errors:", "Expected a path but", "Given value")


def readable(error: Exception, args: Sequence[str] = ()) -> str:
    """One line for an error of jsonargparse: which key, what is wrong with it, and what it can be.

    Args:
        error: As raised by a parser.
        args: The arguments that were parsed; configuration files are named after them.

    Returns:
        The line; the error's own first words where its form is not known.
    """
    text = str(error)
    return _whole(text, args) or _leaf(text) or refusal(text) or " ".join(text.split())[:300]


def refusal(text: str) -> str | None:
    """What a class said of a value that it refused: a line of the tree that is not jsonargparse's own."""
    own = (*_ASIDES, "Expected", "Problem", "Parser key")
    said = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    return next((line for line in said if not line.startswith(own)), None)


def _whole(text: str, args: Sequence[str]) -> str | None:
    """The line for an error that is not about one key."""
    said = " ".join(text.split())
    if said.startswith(("Problems parsing config", "Unexpected config")):
        given = [value for flag, value in pairwise(args) if flag in ("-c", "--config")]
        given += [arg.partition("=")[2] for arg in args if arg.startswith("--config=")]
        reason = said.partition(": ")[2].replace('in "<unicode string>", ', "")[:200]
        return f"{', '.join(given)}: not a YAML file of settings{reason and f' ({reason})'}; check --config"
    if said.startswith("the following arguments are required"):
        missing = said.rpartition(": ")[2].replace("fit.", "")
        return f"nothing is given for {missing}: start from a file, such as --config configs/hbat_dpo.yaml"
    if said.startswith("unrecognized arguments"):
        return f"{said}; hbat fit --help lists the options, and --print_config shows a whole configuration"
    if "File does not exist" in said:
        return f"{said.split('exist: ', 1)[1]}: no such configuration file; check --config"
    return None


def _leaf(text: str) -> str | None:
    """The line for the first fault in the tree."""
    keys: list[tuple[int, str]] = []  # indentation, and a part of the key
    owner = ""  # the class that was asked for an option
    for line in filter(str.strip, text.splitlines()):
        indent, said = len(line) - len(line.lstrip()), line.strip().removeprefix("- ")
        while keys and keys[-1][0] >= indent:
            keys.pop()
        if callable_class := _CALLABLE.search(said):
            given = re.search(r"class_path='([^']+)'", text)
            owner, said = given[1] if given else "", callable_class[1]
            keys.append((indent, "init_args"))
        if key := _KEY.match(said):
            keys.append((indent, key[1]))
            said = said[key.end() :].strip()
        elif name := _CLASS.match(said):
            owner = name[1]
            if not dataclasses.is_dataclass(_imported(owner)):
                keys.append((indent, "init_args"))
            continue
        path = [part for _, part in keys]
        found = _fault(said, path, owner, _value(text)) if said and not said.startswith(_ASIDES) else None
        if found:
            return found
    return None


def _fault(said: str, path: list[str], owner: str, value: str) -> str | None:
    """The line for a leaf of the tree, or ``None`` for one that says nothing."""
    if option := _NO_OPTION.match(said):
        return _unknown_key(".".join([*path, option[1]]), option[1], owner)
    if value == "None" and path[-1:] == ["lora"]:
        return f"{_plain_key(path)} cannot be null on the command line: add --config configs/policy/full.yaml"
    if no_module := _NO_MODULE.search(said):
        remedy = "install it, or put PYTHONPATH=FOLDER before the command"
        return f"{_plain_key(path)}: {value!r} cannot be imported, there is no module {no_module[1]}: {remedy}"
    if _NO_FUNCTION.search(said):
        return f"{_plain_key(path)}: {value!r} is neither a function nor a class"
    if no_class := _NO_CLASS.search(said):
        name = no_class[1] or no_class[2] or value
        return f"{_plain_key(path)}: {name!r} is no class or function that fits here; give its full path, package.module.Name"
    if (kind := _TYPE.match(said)) and "NoneType" not in kind[1]:
        return f"{'.'.join(path)} is {kind[2] or value!r}; it should be {_described(kind[1])}".replace("''", "'")
    return None if said.startswith("Expected") else f"{'.'.join(path)}: {said}".removeprefix(": ")[:300]


def _unknown_key(key: str, name: str, owner: str) -> str:
    known = _parameters(owner)
    near = difflib.get_close_matches(name, known, n=1)
    if near:
        return f"{key} is no key of the configuration; did you mean {near[0]}?"
    return f"{key} is no key of the configuration; " + (
        f"{owner.rpartition('.')[2]} takes {', '.join(known)}" if known else "see hbat fit --help, or --print_config"
    )


def _plain_key(path: list[str]) -> str:
    return ".".join(path[:-1] if path[-1:] == ["init_args"] else path)


def _described(kind: str) -> str:
    """A type as people write it."""
    literal = re.match(r"typing\.Literal\[(.*)\]", kind)
    if literal:
        return f"one of {literal[1].replace(chr(39), '')}"
    return re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", kind)


def _value(text: str) -> str:
    """The innermost value that was given; it stands first."""
    found = _VALUE.search(text)
    return "" if found is None else (found[1] or found[2]).strip().strip("'")[:80]


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _parameters(path: str) -> list[str]:
    made = _imported(path) if path else None
    return [] if made is None else [name for name in inspect.signature(made).parameters if name != "self"]
