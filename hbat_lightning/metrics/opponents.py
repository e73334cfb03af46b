"""Whose answers a completion is compared with: the data's, or another run's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hbat_lightning.completions import Completed
from hbat_lightning.data.provenance import files_digest
from hbat_lightning.errors import UserError


class Opponents:
    """Answers to compare with, by prompt.

    Args:
        against: A ``predictions.jsonl`` of another run on the same prompts; the data's own answers when not given.
    """

    def __init__(self, against: str | None = None) -> None:
        self.against = against
        self._found: dict[str, list[str]] | None = None
        self._digest: str | None = None
        self._asked: Counter[str] = Counter()

    def of(self, answers: Sequence[Completed]) -> list[str | None]:
        """The other answer to each prompt; ``None`` where the data hold none. A prompt's several answers are taken in turn.

        Raises:
            UserError: The other run's file cannot be read, or does not know a prompt.
        """
        if self.against is None:
            return [answer.reference.strip() or None for answer in answers]
        known = self._read(self.against)
        missing = next((answer.prompt for answer in answers if answer.prompt not in known), None)
        if missing is not None:
            raise UserError(
                f"{self.against} has no completion of the prompt {missing[:60]!r}: make it with hbat predict on the same "
                "held-out rows (the same data, val settings and seed)"
            )
        return [self._next(answer.prompt, known[answer.prompt]) for answer in answers]

    def identity(self) -> str:
        """What tells these opponents from others: the data's answers, or a digest of the other run's file."""
        if self.against is None:
            return "the data's answers"
        if self._digest is None:
            self._digest = files_digest([Path(self.against)])
        return self._digest

    def _next(self, prompt: str, others: Sequence[str]) -> str:
        self._asked[prompt] += 1
        return others[(self._asked[prompt] - 1) % len(others)]

    def _read(self, against: str) -> dict[str, list[str]]:
        if self._found is None:
            try:
                # Not splitlines: an answer may hold one of the other characters that end a line for Unicode.
                rows = [
                    json.loads(line) for line in Path(against).read_text(encoding="utf-8").split("\n") if line.strip()
                ]
                self._found = {}
                for row in rows:
                    self._found.setdefault(row["prompt"], []).append(row["completion"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(
                    f"{against} is no predictions.jsonl ({error}): give one that hbat predict wrote"
                ) from error
        return self._found


def verdict(lead: float, tolerance: float = 0.0) -> float:
    """1 for a win, 0 for a defeat, a half for a tie.

    Args:
        lead: By how much one is ahead of the other.
        tolerance: Up to which lead it is a tie.
    """
    return 0.5 if abs(lead) <= tolerance else float(lead > 0)
