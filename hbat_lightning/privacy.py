"""What must not reach a file or a log: keys to other people's services, and names."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO, cast

REMOVED = "(removed)"
_SECRET = re.compile(
    r"(?:^|_)(?:api_?key|key|key_?id|token|secret|password|passwd|passphrase|credentials?|pat|auth)$", re.IGNORECASE
)
_ACCOUNT = re.compile(r"(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
_SHORTEST = 8  # characters of a secret; shorter values would be found in innocent words


def without_secret_settings(value: Any, instead: str | None = REMOVED) -> Any:
    """A configuration without the values of keys that are named like secrets, a logger's ``api_key`` for example.

    Secrets that stand in other values are taken out of them; see :func:`without_keys`.

    Args:
        value: The configuration, in plain types.
        instead: What stands in the place of a secret.
    """
    if isinstance(value, dict):
        return {
            key: instead if inner is not None and _SECRET.search(str(key)) else without_secret_settings(inner, instead)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secret_settings(inner, instead) for inner in value]
    return without_keys(value) if isinstance(value, str) else value


def without_keys(text: str) -> str:
    """Take accounts in addresses, and the values of environment variables that are named like secrets, out of a text."""
    text = _ACCOUNT.sub(REMOVED, text)
    for value in _keys():
        text = text.replace(value, REMOVED)
    return text


def _keys() -> list[str]:
    """Values of environment variables that are named like secrets."""
    return [value for name, value in os.environ.items() if _SECRET.search(name) and len(value) >= _SHORTEST]


def without_secrets(text: str) -> str:
    """Take out of a text what must not be published: keys, and the path of the home folder, which mostly is a name."""
    text, home = without_keys(text), str(Path.home())
    return text.replace(f"{home}/", "~/") if len(home) > 1 else text


# ---- what is printed --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def keyless_streams() -> Iterator[None]:
    """What is printed inside passes through :func:`without_keys`; so does the traceback of an error that ends the process."""
    sys.excepthook = _print_exception
    with (
        contextlib.redirect_stdout(cast(TextIO, _Keyless(sys.stdout))),
        contextlib.redirect_stderr(cast(TextIO, _Keyless(sys.stderr))),
    ):
        yield


class _Keyless:
    """A stream that takes keys out of each text that is written to it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, without keys; tells the length of what it was given."""
        self._stream.write(without_keys(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    sys.stderr.write(without_keys("".join(traceback.format_exception(kind, error, trace))))
