"""A prompt that the policy has completed, and what metrics say of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Completed:
    """A completed prompt.

    Attributes:
        prompt: The prompt as text.
        completion: What the policy wrote, without special tokens.
        reference: The data's answer; empty where there is none.
        tokens: Length of the completion in tokens, its stop token included.
        stopped: Whether it ended with a stop token.
        prompt_ids: Ids of the prompt; empty where the texts are all that is known.
        completion_ids: Ids of the completion, likewise.
        scores: What metrics have found, by name.
        scales: What a score depends on beside this answer, such as a reference or a reward, by the score's name.
    """

    prompt: str
    completion: str
    reference: str
    tokens: int
    stopped: bool
    prompt_ids: list[int] = field(default_factory=list)
    completion_ids: list[int] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    scales: dict[str, str] = field(default_factory=dict)

    def row(self) -> dict[str, Any]:
        """In plain types, without the ids, for files."""
        row = asdict(self)
        del row["prompt_ids"], row["completion_ids"]
        return row
