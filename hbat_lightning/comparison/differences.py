"""Two texts, word by word, with what differs marked."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from html import escape

_WORDS = re.compile(r"\s+|\w+|[^\w\s]")


def marked(text: str, other: str) -> str:
    """A text as HTML, with the words that another does not have there marked, and those that only the other has struck out.

    Args:
        text: The text that is shown.
        other: What it is compared with.

    Returns:
        Escaped HTML with ``<ins>`` and ``<del>``.
    """
    own, theirs = _WORDS.findall(text), _WORDS.findall(other)
    parts = []
    for kind, begin, end, other_begin, other_end in SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes():
        gone, come = escape("".join(theirs[begin:end])), escape("".join(own[other_begin:other_end]))
        if kind == "equal":
            parts.append(come)
            continue
        parts += [f"<{tag}>{part}</{tag}>" for tag, part in (("del", gone), ("ins", come)) if part]
    return "".join(parts)
