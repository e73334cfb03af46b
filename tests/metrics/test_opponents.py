"""Another run's answers, as they were written: any character may be in them, and a prompt may have several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hbat_lightning.completions import Completed
from hbat_lightning.errors import UserError
from hbat_lightning.metrics.opponents import Opponents


def answers(*prompts: str) -> list[Completed]:
    return [Completed(prompt=prompt, completion="own", reference="", tokens=1, stopped=True) for prompt in prompts]


def test_answers_are_taken_in_turn_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "predictions.jsonl"
    rows = [("p", "first\u2028line"), ("q", "other\u0085"), ("p", "second")]
    lines = [json.dumps({"prompt": prompt, "completion": answer}, ensure_ascii=False) for prompt, answer in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    opponents = Opponents(str(path))
    assert opponents.of(answers("p", "q")) == ["first\u2028line", "other\u0085"]
    assert opponents.of(answers("p")) == ["second"]
    with pytest.raises(UserError, match="no completion of the prompt 'r'"):
        opponents.of(answers("r"))
