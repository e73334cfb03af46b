"""Processes that tests start reach no other machine: Python imports this at its start from ``PYTHONPATH`` (see ``conftest``).

What is tried is written to the file that ``HBAT_TESTS_REACHED`` names, so that it is seen where a library hides the error.
"""

import os
import socket
import sys

_OWN = ("localhost", "::1", "::", "0.0.0.0", "", socket.gethostname())


def _guard(event: str, args: tuple[object, ...]) -> None:
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        if not isinstance(address, tuple):  # a path, of this machine
            return
        host = address[0]
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = args[0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else str(host or "")
    if name in _OWN or name.startswith("127."):
        return
    with open(os.environ["HBAT_TESTS_REACHED"], "a") as file:
        file.write(f"{event} {name}\n")
    raise OSError(f"no network in the tests: {name}")


sys.addaudithook(_guard)
