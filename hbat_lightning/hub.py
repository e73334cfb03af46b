"""Hub ids, and whether the hub can be asked: a mistyped path looks like an id, and asking without a network takes a minute."""

from __future__ import annotations

import re
import socket
import urllib.request
from urllib.parse import urlsplit

# The branch of every public data set where the hub keeps it as Parquet files: `subset/split/0000.parquet`.
CONVERTED = "refs/convert/parquet"

_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_id(name: str) -> bool:
    """Whether a name can be a hub id: ``name`` or ``owner/name``."""
    return _ID.fullmatch(name) is not None


def unreachable() -> str | None:
    """The hub's host where its name does not resolve; ``None`` where it may be asked, or will not be.

    Behind a proxy names are not ours to resolve, and in the hub's own offline mode nothing is asked for.
    """
    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname or ""
    if constants.HF_HUB_OFFLINE or urllib.request.getproxies():
        return None
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return host
    return None
