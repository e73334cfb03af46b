"""Win rate by a language model that reads both answers."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from hbat_lightning.completions import Completed
from hbat_lightning.metrics.base import MeanScore, Surroundings
from hbat_lightning.metrics.chat_server import Body, ChatServer
from hbat_lightning.metrics.opponents import Opponents

QUESTION = """Two assistants have answered the same request. Which answer is better? Judge how well it does what the request \
asks for: is it right, complete, clear, and no longer than it must be? The order of the answers means nothing.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

End with one of these lines, and nothing behind it: [[A]] if A is better, [[B]] if B is better, [[C]] if they are as good."""

_VERDICT = re.compile(r"\[\[([ABC])\]\]")


class JudgeWinRate(MeanScore):
    """Share of prompts where a judge prefers the completion: the win rate that papers report of GPT-4.

    Every pair is shown twice, in both orders, since judges prefer a place. A prompt is won (1) or lost (0) where both verdicts
    say so, and tied (½) where a verdict is a tie or they contradict each other, as in MT-bench (Zheng et al. 2023). An answer
    without a verdict is a refusal; its prompt has no score. Logged are ``judge_win_rate``, and of all prompts the shares
    ``judge_tie``, ``judge_flip`` (contradictions, among the ties) and ``judge_refusal``.

    It is off unless it stands in ``model.init_args.metrics``. Prompts and answers go to the server that ``url`` names. Answers
    are kept in ``judge.jsonl`` in the run folder, so that nothing is asked, or paid, twice. Requests, tokens and, with prices,
    money are told at the end. The key is read from the environment variable ``key_variable``, and never written anywhere.

    Args:
        url: Address of an OpenAI-compatible server, up to ``/v1``.
        model: Name of the model there.
        against: A ``predictions.jsonl`` to compare with; the data's answers when not given.
        question: What is asked, with ``{prompt}``, ``{first}`` and ``{second}``; verdicts are ``[[A]]``, ``[[B]]``, ``[[C]]``.
        max_tokens: Upper bound of a judge's answer; for a model that thinks first, more.
        temperature: Of the judge.
        key_variable: Name of the environment variable that holds the server's key, if it wants one.
        attempts: How often a question is asked until it is given up, with growing pauses.
        timeout: Seconds that an answer may take.
        prompt_price: Price of a million tokens of questions.
        completion_price: Price of a million tokens of answers.
        kwargs: torchmetrics' own.
    """

    with_intervals = ("judge_win_rate",)

    def __init__(
        self,
        url: str,
        model: str,
        against: str | None = None,
        question: str = QUESTION,
        max_tokens: int = 512,
        temperature: float = 0.0,
        key_variable: str = "HBAT_JUDGE_KEY",
        attempts: int = 6,
        timeout: float = 120.0,
        prompt_price: float | None = None,
        completion_price: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(["judge_win_rate", "judge_tie", "judge_flip", "judge_refusal"], **kwargs)
        missing = [part for part in ("{prompt}", "{first}", "{second}") if part not in question]
        if missing or not url.startswith(("http://", "https://")):
            raise ValueError(
                f"the judge needs an http address, and a question with {', '.join(missing) or 'all its parts'}"
            )
        self.url, self.model, self.question = url, model, question
        self.against, self._opponents = against, Opponents(against)
        self.max_tokens, self.temperature, self.key_variable = max_tokens, temperature, key_variable
        self.attempts, self.timeout = attempts, timeout
        self.prompt_price, self.completion_price = prompt_price, completion_price
        self._server: ChatServer | None = None

    def build(self, surroundings: Surroundings) -> None:
        """Open the cache in the run folder; nothing is sent."""
        if self._server is None:
            name = f"judge.{surroundings.rank}.jsonl" if surroundings.rank else "judge.jsonl"
            self._server = ChatServer(
                self.url, surroundings.folder / name, self.key_variable, self.attempts, self.timeout
            )

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`; none where there is nothing to compare with."""
        others = self._opponents.of(answers)
        return [
            {} if other is None else self.compare(answer.prompt, answer.completion, other)
            for answer, other in zip(answers, others, strict=True)
        ]

    def scale(self, name: str) -> str:
        """The judge, what it is asked, and the opponents."""
        asked = hashlib.blake2b(self.question.encode(), digest_size=8).hexdigest()
        settings = f"{self.max_tokens} tokens, temperature {self.temperature:g}"
        return f"{self.model}, question {asked}, {settings}, against {self._opponents.identity()}"

    def compare(self, prompt: str, one: str, other: str) -> dict[str, float]:
        """Scores of one answer against another."""
        forth, back = self.verdict(prompt, one, other), self.verdict(prompt, other, one)
        if forth is None or back is None:
            return {"judge_refusal": 1.0, "judge_tie": 0.0, "judge_flip": 0.0}
        back = 1 - back
        flip = {forth, back} == {0.0, 1.0}
        value = forth if forth == back else 0.5
        return {
            "judge_refusal": 0.0,
            "judge_win_rate": value,
            "judge_tie": float(value == 0.5),
            "judge_flip": float(flip),
        }

    def verdict(self, prompt: str, first: str, second: str) -> float | None:
        """What the judge says of the first answer: 1 better, 0 worse, ½ neither; ``None`` where it says nothing of the kind."""
        if self._server is None:
            raise RuntimeError("call build() first")
        parts = {"{prompt}": prompt, "{first}": first, "{second}": second}
        # In one pass: what stands in a prompt or an answer is no place to put another one.
        asked = re.sub(r"\{(?:prompt|first|second)\}", lambda found: parts[found[0]], self.question)
        body: Body = {
            "model": self.model,
            "messages": [{"role": "user", "content": asked}],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        said = _VERDICT.findall(self._server.ask(body))
        return {"A": 1.0, "B": 0.0, "C": 0.5}[said[-1]] if said else None

    def notes(self) -> list[str]:
        """What was asked, and what it cost."""
        if self._server is None:
            return []
        usage = self._server.usage
        told = (
            f"judge: {usage.requests:,} requests, {usage.cached:,} answers from {self._server.cache.name}, {usage.retries:,} "
            f"retries; {usage.prompt_tokens:,} tokens of questions, {usage.completion_tokens:,} of answers"
        )
        if self.prompt_price is not None and self.completion_price is not None:
            cost = usage.prompt_tokens * self.prompt_price + usage.completion_tokens * self.completion_price
            told += f"; cost {cost / 1e6:,.4f}"
        return [told]
