"""Tiny random models with a tokenizer of bytes, in folders, for what takes a model of its own; and a server of one."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

VERDICTS = ("[[A]]", "[[B]]", "[[C]]")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for every byte; </s> behind every text."""
    specials = ["<s>", "<pad>", "</s>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {text: number for number, text in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>")


def save_bart(folder: Path) -> None:
    """A sequence-to-sequence model."""
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=259,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=256,
        init_std=0.5,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


class Chat:
    """A language model that answers chats, as a server would: its own likeliest verdict, token by token.

    Attributes:
        asked: Bodies of the requests that were answered.
        keys: Their authorisations.
        fails: Status codes of the next replies, in the place of an answer.
    """

    def __init__(self) -> None:
        torch.manual_seed(2)
        config = LlamaConfig(
            vocab_size=259,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=4096,
            initializer_range=0.5,
        )
        self.model, self.tokenizer = LlamaForCausalLM(config).eval(), byte_tokenizer()
        self.asked: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.fails: list[int] = []

    def prompt(self, body: dict[str, Any]) -> list[int]:
        text = "".join(f"{one['role']}: {one['content']}\n" for one in body["messages"])
        return list(self.tokenizer(f"{text}assistant: ", add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def answer(self, body: dict[str, Any]) -> tuple[str, int, int]:
        """The text, and the tokens of question and answer."""
        prompt = self.prompt(body)
        choices = [self.tokenizer(text)["input_ids"] for text in VERDICTS]

        def allowed(_: int, ids: torch.Tensor) -> list[int]:
            done = ids[len(prompt) :].tolist()
            return [choice[len(done)] for choice in choices if choice[: len(done)] == done] or [2]

        ids = self.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            do_sample=False,
            max_new_tokens=body["max_tokens"],
            prefix_allowed_tokens_fn=allowed,
            pad_token_id=1,
            eos_token_id=2,
        )[0, len(prompt) :].tolist()
        return self.tokenizer.decode(ids, skip_special_tokens=True), len(prompt), len(ids)


@contextmanager
def serving(chat: Chat) -> Iterator[str]:
    """A server of ``/v1/chat/completions`` on this machine; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chat.keys.append(self.headers.get("Authorization"))
            if chat.fails:
                self._reply(chat.fails.pop(0), {"error": f"busy {chat.keys[-1]}"})
                return
            assert self.path == "/v1/chat/completions"
            chat.asked.append(body)
            text, asked, said = chat.answer(body)
            usage = {"prompt_tokens": asked, "completion_tokens": said}
            message = {"role": "assistant", "content": text}
            self._reply(200, {"choices": [{"index": 0, "message": message}], "usage": usage})

        def _reply(self, status: int, content: dict[str, Any]) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *arguments: Any) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
