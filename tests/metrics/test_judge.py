"""The judge: what follows from verdicts, by a scripted one; and all of it against a real server of a real, tiny model."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from hbat_lightning import GenerationSettings, SFTModule
from hbat_lightning.completions import Completed
from hbat_lightning.errors import UserError
from hbat_lightning.metrics import ExactMatch, JudgeWinRate, Surroundings
from hbat_lightning.metrics.chat_server import ChatServer
from tests.tiny_models import Chat, serving

KEY = "a-key-that-nobody-may-see"
VARIABLE = "SOME_SERVICE"  # not named like a secret: what is read from it is one all the same


def answer(prompt: str, completion: str, reference: str) -> Completed:
    return Completed(prompt, completion, reference, 1, True)


def judge(url: str, folder: Path, **settings: Any) -> JudgeWinRate:
    metric = JudgeWinRate(url, "tiny", key_variable=VARIABLE, **settings)
    metric.build(Surroundings(cast(Any, None), cast(Any, None), folder))
    return metric


# ---- what follows from verdicts ---------------------------------------------------------------------------------------


class Scripted:
    """Says what a function of the two answers says."""

    def __init__(self, verdict: Callable[[str, str], str]) -> None:
        self.verdict = verdict
        self.shown: list[tuple[str, str]] = []

    def ask(self, body: dict[str, Any]) -> str:
        first, second = body["messages"][0]["content"].split("|")[1:]
        self.shown.append((first, second))
        return self.verdict(first, second)


def scripted(verdict: Callable[[str, str], str], *answers: Completed) -> tuple[JudgeWinRate, Scripted]:
    metric, server = JudgeWinRate("http://nowhere/v1", "m", question="{prompt}|{first}|{second}"), Scripted(verdict)
    metric._server = cast(Any, server)
    metric.update(answers)
    return metric, server


def figures(metric: JudgeWinRate) -> dict[str, float]:
    return {name: value.item() for name, value in metric.compute().items() if not name.endswith(("_low", "_high"))}


def test_both_orders_are_asked_and_must_agree() -> None:
    longer = "The better one: [[{}]]"
    metric, server = scripted(
        lambda first, second: longer.format("A" if len(first) > len(second) else "B"),
        answer("p", "long one", "short"),
        answer("p", "s", "long"),
    )
    assert server.shown == [("long one", "short"), ("short", "long one"), ("s", "long"), ("long", "s")]
    assert figures(metric) == {"judge_win_rate": 0.5, "judge_tie": 0.0, "judge_flip": 0.0, "judge_refusal": 0.0}


@pytest.mark.parametrize(
    ("verdict", "expected"),
    [
        (
            lambda first, second: "[[A]]",
            {"judge_win_rate": 0.5, "judge_tie": 1.0, "judge_flip": 1.0, "judge_refusal": 0.0},
        ),
        (
            lambda first, second: "[[C]]",
            {"judge_win_rate": 0.5, "judge_tie": 1.0, "judge_flip": 0.0, "judge_refusal": 0.0},
        ),
        (
            lambda first, second: "[[C]]" if first == "mine" else "[[B]]",
            {"judge_win_rate": 0.5, "judge_tie": 1.0, "judge_flip": 0.0, "judge_refusal": 0.0},
        ),
        (lambda first, second: "I cannot say", {"judge_tie": 0.0, "judge_flip": 0.0, "judge_refusal": 1.0}),
        (
            lambda first, second: "[[A]]" if first == "mine" else "no",
            {"judge_tie": 0.0, "judge_flip": 0.0, "judge_refusal": 1.0},
        ),
        (
            lambda first, second: "not [[B]], so [[A]]" if first == "mine" else "not [[A]], so [[B]]",
            {"judge_win_rate": 1.0, "judge_tie": 0.0, "judge_flip": 0.0, "judge_refusal": 0.0},
        ),
    ],
    ids=["first place always", "ties", "half a tie", "refusals", "half a refusal", "the last verdict counts"],
)
def test_ties_contradictions_and_refusals(verdict: Any, expected: dict[str, float]) -> None:
    metric, _ = scripted(verdict, answer("p", "mine", "theirs"))
    assert figures(metric) == expected


def test_what_stands_in_an_answer_is_no_place_for_another() -> None:
    _, server = scripted(lambda first, second: "[[A]]", answer("p", "{second}", "{prompt}"))
    assert server.shown == [("{second}", "{prompt}"), ("{prompt}", "{second}")]


def test_without_a_reference_nothing_is_asked() -> None:
    metric, server = scripted(lambda first, second: "[[A]]", answer("p", "mine", ""))
    assert (server.shown, figures(metric)) == ([], {})


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(ValueError, match="http address"):
        JudgeWinRate("localhost:80", "m")
    with pytest.raises(ValueError, match=r"\{second\}"):
        JudgeWinRate("http://localhost/v1", "m", question="{prompt} {first}")


# ---- a real server ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat()


def by_model(chat: Chat, metric: JudgeWinRate, one: Completed) -> list[str]:
    """The verdicts in both orders, from the model itself."""
    parts = [(one.completion, one.reference), (one.reference, one.completion)]
    texts = [metric.question.format(prompt=one.prompt, first=first, second=second) for first, second in parts]
    return [
        chat.answer({"messages": [{"role": "user", "content": text}], "max_tokens": metric.max_tokens})[0]
        for text in texts
    ]


def test_a_served_model_judges_and_is_asked_once(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    chat.asked.clear()
    chat.keys.clear()
    answers = [answer(f"request {n}", "x" * (3 * n + 1), f"answer {n * n}") for n in range(6)]
    with serving(chat) as url:
        metric = judge(url, tmp_path, prompt_price=2.0, completion_price=8.0)
        metric.update(answers)
        assert len(chat.asked) == 12
        assert chat.keys == [f"Bearer {KEY}"] * 12
        again = judge(url, tmp_path)
        again.update(answers)
        assert len(chat.asked) == 12, "the cache was not used"
        assert figures(again) == figures(metric)
    value = {"[[A]]": 1.0, "[[B]]": 0.0, "[[C]]": 0.5}
    for one in answers:
        forth, back = (value[text] for text in by_model(chat, metric, one))
        expected = forth if forth == 1 - back else 0.5
        assert one.scores["judge_win_rate"] == expected
    asked = [len(chat.prompt(body)) for body in chat.asked]
    usage = cast(ChatServer, metric._server).usage
    assert (usage.requests, usage.prompt_tokens) == (12, sum(asked))
    assert usage.completion_tokens == 12 * 6  # [[A]] byte by byte, and the stop token
    cost = (sum(asked) * 2 + usage.completion_tokens * 8) / 1e6
    assert metric.notes()[0].endswith(f"cost {cost:,.4f}")
    assert "12 answers from judge.jsonl" in again.notes()[0]
    assert KEY not in (tmp_path / "judge.jsonl").read_text()


def test_a_busy_server_is_asked_again_with_growing_pauses(chat: Chat, tmp_path: Path) -> None:
    pauses: list[float] = []
    with serving(chat) as url:
        server = ChatServer(url, tmp_path / "judge.jsonl", VARIABLE, attempts=4, sleep=pauses.append)
        chat.fails[:] = [503, 429]
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        assert server.ask(body) == chat.answer(body)[0]
        assert (pauses, server.usage.retries) == ([1.0, 2.0], 2)
        chat.fails[:] = [500] * 4
        with pytest.raises(UserError, match="no answer after 4 attempts, the last: HTTP 500"):
            server.ask(body | {"max_tokens": 9})
    assert len((tmp_path / "judge.jsonl").read_text().splitlines()) == 1


def test_a_refused_key_is_named_and_not_shown(chat: Chat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)
    chat.fails[:] = [401]
    with serving(chat) as url, pytest.raises(UserError, match=VARIABLE) as said:
        judge(url, tmp_path).update([answer("p", "a", "b")])
    assert KEY not in str(said.value)


def test_nobody_there_is_one_line(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    server = ChatServer(url, tmp_path / "judge.jsonl", VARIABLE, attempts=2, sleep=lambda seconds: None)
    with pytest.raises(UserError, match="is the server running"):
        server.ask({})


def test_a_torn_line_of_the_cache_is_asked_again(chat: Chat, tmp_path: Path) -> None:
    with serving(chat) as url:
        file = tmp_path / "judge.jsonl"
        file.write_text('{"question": "to')
        assert ChatServer(url, file, VARIABLE)._known() == {}
        file.write_text(json.dumps({"question": "q", "answer": "a"}) + '\n{"question": "to')
        body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
        first = ChatServer(url, file, VARIABLE).ask(body)
        assert ChatServer(url, file, VARIABLE).ask(body) == first


def test_hbat_test_asks_the_judge_and_tells_the_cost(
    chat: Chat, make_policy: Any, make_data: Any, make_trainer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    chat.asked.clear()
    with serving(chat) as url, caplog.at_level("INFO"):
        metrics = [
            ExactMatch(),
            JudgeWinRate(url, "tiny", key_variable=VARIABLE, prompt_price=1.0, completion_price=1.0),
        ]
        module = SFTModule(make_policy(), generation=GenerationSettings(max_new_tokens=4), metrics=metrics)
        figures = make_trainer().test(module, make_data(val_batch_size=4), verbose=False)[0]
    assert {"test/exact_match", "test/judge_win_rate", "test/judge_tie", "test/judge_refusal"} <= figures.keys()
    assert len(chat.asked) == len((tmp_path / "judge.jsonl").read_text().splitlines()) == 12  # six rows, both orders
    assert "judge: 12 requests" in caplog.text
    assert "cost 0.0" in caplog.text
