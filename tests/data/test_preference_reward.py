"""The rule that stands for a reward model on the embedded task."""

from __future__ import annotations

import pytest

from hbat_lightning.data.conflict_task import preference_reward, preference_rows


def test_chosen_answers_alone_have_the_whole_reward() -> None:
    for row in preference_rows()[0]:
        assert preference_reward(row["prompt"], row["chosen"]) == 1.0
        assert 0 < preference_reward(row["prompt"], row["rejected"]) < 1.0


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("please note anna bought a kettle at the market and the thing is noisy thanks", 1.0),
        ("anna bought a kettle at the market and the thing is noisy thanks", 0.75),
        ("anna bought a kettle at the market and the thing is noisy", 0.5),
        ("please note anna bought a kettle at the market and the thing is noisy urgent", 0.25 + 0.5 * 12 / 13),
        ("please note thanks", 0.5),
        ("noisy", 0.0),
        ("", 0.0),
    ],
)
def test_parts_of_the_reward(completion: str, reward: float) -> None:
    prompt = "post : i bought a kettle at the market . my name is anna . the thing is noisy . request : tldr"
    assert preference_reward(prompt, completion) == pytest.approx(reward)
