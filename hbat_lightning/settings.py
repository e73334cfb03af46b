"""What an object was made with, in plain types."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

_ABSENT = object()


def plain(value: Any) -> Any:
    """A value in types that a file read with ``weights_only`` brings back: numbers, texts, lists and dictionaries.

    Objects become their settings, see :func:`settings_of`; classes and functions their import path.
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence):
        return [plain(inner) for inner in value]
    if isinstance(value, type) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    return settings_of(value)


def settings_of(thing: Any, until: type = object) -> dict[str, Any]:
    """The class of an object and what it was made with, as far as it keeps that under the names of its parameters.

    That it does is scikit-learn's convention for ``get_params``; the classes here follow it.

    Args:
        thing: Any object.
        until: A base class whose own parameters are left out.

    Returns:
        ``class``, and every setting in plain types.
    """
    names = [field.name for field in fields(thing)] if is_dataclass(thing) else parameters(type(thing), until)
    found = {name: getattr(thing, name, _ABSENT) for name in names}
    return {"class": type(thing).__name__} | {
        name: plain(value) for name, value in found.items() if value is not _ABSENT
    }


def parameters(made: type, until: type = object) -> Iterator[str]:
    """Names of a constructor's parameters, with those that it hands on to its base classes.

    Args:
        made: The class.
        until: A base class whose own parameters are left out.
    """
    for owner in made.__mro__:
        if owner in (until, object):
            return
        if "__init__" not in vars(owner):
            continue
        own = list(inspect.signature(vars(owner)["__init__"]).parameters.values())[1:]
        yield from (one.name for one in own if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY))
        if not any(one.kind == one.VAR_KEYWORD for one in own):
            return


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names; an object's class stands under the name of the object."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = prefix if key == "class" and prefix else f"{prefix}.{key}".strip(".")
        found |= flat(value, name) if isinstance(value, Mapping) else {name: value}
    return found
