"""A client of an OpenAI-compatible address: retries, a cache on the disk, and what it all cost."""

from __future__ import annotations

import hashlib
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hbat_lightning.errors import UserError
from hbat_lightning.files import append_text, replace_text, whole_lines
from hbat_lightning.privacy import REMOVED, without_keys

Body = dict[str, Any]
_TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)


@dataclass
class Usage:
    """What was asked.

    Attributes:
        requests: Answers that came from the server.
        cached: Answers that came from the disk.
        retries: Requests that had to be repeated.
        prompt_tokens: Tokens of the requests, as the server has counted.
        completion_tokens: Tokens of its answers.
    """

    requests: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class ChatServer:
    """Asks a chat model, each question once.

    Answers are kept in a file, under a digest of address and question; a question that is there is not asked again. The key,
    where the server wants one, is read from an environment variable with every request, goes into its header, and nowhere else.

    Args:
        url: Address up to ``/v1``, such as ``http://localhost:8000/v1``.
        cache: The file of answers.
        key_variable: Name of the environment variable that holds the key; there need be none.
        attempts: How often a question is asked until it is given up.
        timeout: Seconds that an answer may take.
        pause: Seconds before the first repetition, twice as many before each further one, unless the server says how long.
        sleep: Waits so many seconds.
    """

    def __init__(
        self,
        url: str,
        cache: Path,
        key_variable: str,
        attempts: int = 6,
        timeout: float = 120.0,
        pause: float = 1.0,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.url, self.cache, self.key_variable = url.rstrip("/"), cache, key_variable
        self.attempts, self.timeout, self.pause, self.sleep = attempts, timeout, pause, sleep
        self.usage = Usage()
        self._answers: dict[str, str] | None = None

    def ask(self, body: Body) -> str:
        """The text of the model's answer.

        Args:
            body: What ``/chat/completions`` takes, in plain types.

        Raises:
            UserError: The server cannot be reached, refuses, or says something else than an answer.
        """
        text = json.dumps([self.url, body], sort_keys=True, ensure_ascii=False)
        digest = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
        known = self._known()
        if digest in known:
            self.usage.cached += 1
            return known[digest]
        answer = self._answer(self._post(json.dumps(body).encode()))
        known[digest] = answer
        self.cache.parent.mkdir(parents=True, exist_ok=True)
        append_text(self.cache, json.dumps({"question": digest, "answer": answer}, ensure_ascii=False) + "\n")
        return answer

    def _known(self) -> dict[str, str]:
        if self._answers is None:
            lines = whole_lines(self.cache) if self.cache.exists() else []
            if self.cache.exists():
                replace_text(self.cache, "".join(f"{line}\n" for line in lines))  # without one that was torn
            self._answers = {row["question"]: row["answer"] for row in map(json.loads, lines)}
        return self._answers

    def _answer(self, reply: bytes) -> str:
        try:
            read = json.loads(reply)
            answer = read["choices"][0]["message"]["content"] or ""
            usage = read.get("usage") or {}
            counts = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._shown}: this is no chat completion: {self._quote(reply)}; give the address of an OpenAI-compatible "
                "server, up to /v1"
            ) from error
        self.usage.requests += 1
        self.usage.prompt_tokens += counts[0]
        self.usage.completion_tokens += counts[1]
        return str(answer)

    def _post(self, body: bytes) -> bytes:
        headers = {"Content-Type": "application/json"}
        key = os.environ.get(self.key_variable)
        if key:
            headers["Authorization"] = f"Bearer {key}"
        wait = self.pause
        for attempt in range(self.attempts):
            request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
            try:
                with _OPENER.open(request, timeout=self.timeout) as reply:
                    return bytes(reply.read())
            except urllib.error.HTTPError as error:
                said, asked = self._quote(error.read()), error.headers.get("Retry-After") or ""
                problem = f"HTTP {error.code} {said}".strip()
                if error.code not in _TRANSIENT:
                    raise UserError(f"{self._shown}: {problem}; {self._advice(error.code)}") from None
                delay = max(wait, float(asked)) if asked.replace(".", "", 1).isdecimal() else wait
            except (OSError, urllib.error.URLError) as error:  # timeouts are among them
                problem, delay = str(getattr(error, "reason", error)), wait
            if attempt + 1 < self.attempts:
                self.usage.retries += 1
                self.sleep(delay)
                wait *= 2
        raise UserError(
            f"{self._shown}: no answer after {self.attempts} attempts, the last: {problem}; is the server running?"
        )

    def _advice(self, code: int) -> str:
        if code in (401, 403):
            return f"put the key into the environment variable {self.key_variable}"
        return "check address, model and settings of the judge"

    @property
    def _shown(self) -> str:
        return without_keys(self.url)

    def _quote(self, reply: bytes) -> str:
        text = without_keys(" ".join(reply.decode(errors="replace").split()))
        key = os.environ.get(self.key_variable)
        return (text.replace(key, REMOVED) if key else text)[:200]  # a server may say what it was given


class _Unmoved(urllib.request.HTTPRedirectHandler):
    """Goes nowhere else: the key is for one server."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """None."""


_OPENER = urllib.request.build_opener(_Unmoved)
