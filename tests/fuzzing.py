"""What the property tests draw from: tokenizers of every kind, odd texts, and templates written a second time by hand."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from hbat_lightning.data.fields import Message
from hbat_lightning.data.templates import TextTemplate

LLAMA = Path(__file__).resolve().parents[2] / "shared" / "data" / "llama2_tokenizer.model"
CORPUS = ["the cat sat on the mat and the dog sat by the door\n\nuser assistant system hello there\n\n\n\n\n" * 20]

# ---- texts --------------------------------------------------------------------------------------------------------

# What opens and closes turns anywhere, the tokens of the tokenizers below, and pieces of them.
_MARKERS = (
    "<s> </s> <unk> <pad> <bos> [INST] [/INST] <<SYS>> <|im_start|> <|im_end|> <|im_start|>assistant <|endoftext|>"
    " <|eot_id|> <|start_header_id|> <|user|> <|assistant|> [CLS] [SEP] [PAD] [UNK] <<s>> <|im_ end|> <s </ < | ☃"
    " <0x0A> ▁ ### Human: Assistant: TL;DR: {content} {context} {{7*7}} {%raw%} {{bos_token}}"
)
MARKERS = _MARKERS.split()
ODD = [
    *("\x00", "\x07", "\x1b[31m", "\x7f", "\x85", "\r", "\r\n", "\t", "\n", "\n\n\n", " ", "  ", "\u2028", "\u2029"),
    *("\ufeff", "\u200b", "\u200d", "\u202e", "\u0301", "e\u0301", "é", "ﬁ", "＜ｓ＞", "＜|IM_END|＞", "<|IM_START|>"),
    *(
        "\U0001f468\u200d\U0001f469\u200d\U0001f467",
        "\U0010fa01",
        "\U0010fa02",
        "\ufdd0answer\ufdd1",
        "\uffff",
        "猫",
        "नमस्ते",
    ),
    *("\U0010fa01<|im_end|>\U0010fa02", "\U0010fa01</s>", "\u3000", "\xa0"),
]
WORDS = ["the cat", " sat", "hello", "door\n", "a", "NaN", "null", "0", "#"]
pieces = st.one_of(
    st.sampled_from([*MARKERS, *(f"{marker}\n" for marker in MARKERS)]),
    st.sampled_from(ODD),
    st.sampled_from(WORDS),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)


@cache  # hypothesis looks at a strategy anew wherever it is made anew
def texts(most: int = 6) -> st.SearchStrategy[str]:
    """Text with something besides blanks in it, as the readers let through."""
    drawn = st.lists(pieces, min_size=1, max_size=most).map("".join)
    huge = st.tuples(pieces, st.integers(200, 600)).map(lambda two: two[0] * two[1])
    return st.one_of(*[drawn] * 24, huge).filter(lambda text: bool(text.strip()))


_yes_or_no, _few = st.booleans(), st.integers(1, 3)


@st.composite
def _conversations(draw: st.DrawFn) -> list[Message]:
    """Turns that the layouts let through: perhaps a system message, a user, and answers in between, a user last."""
    messages = [Message("system", draw(texts()))] if draw(_yes_or_no) else []
    for turn in range(draw(_few)):
        if turn:
            messages.append(Message("assistant", draw(texts())))
        context = draw(texts()) if draw(_few) == 1 else ""
        messages.append(Message("user", draw(texts()), context))
    return messages


conversations = _conversations()

# ---- templates, written a second time ---------------------------------------------------------------------------------

Write = Callable[[Sequence[Message]], list[str]]
"""A conversation -> the text before each answer, without answers and what stops them; the last is the prompt's."""


def merged(message: Message) -> str:
    return f"{message.content}\n\n{message.context}" if message.context else message.content


def turns(opening: Callable[[str], str], turn: Callable[[Message], str], generation: str, behind: str) -> Write:
    """Templates that write turn by turn."""

    def write(messages: Sequence[Message]) -> list[str]:
        written, text = [], opening(messages[0].role)
        for message in messages:
            if message.role == "assistant":
                written.append(text + generation)
                text = behind
            else:
                text += turn(message)
        return [*written, text + generation]

    return write


def alpaca(messages: Sequence[Message]) -> list[str]:
    intro = "Below is an instruction that describes a task"
    if messages[0].context:
        intro += ", paired with an input that provides further context"
    intro += ". Write a response that appropriately completes the request.\n\n"

    def turn(message: Message) -> str:
        if message.role == "system":
            return message.content + "\n\n"
        given = f"### Input:\n{message.context}\n\n" if message.context else ""
        return f"### Instruction:\n{message.content}\n\n{given}"

    opening = lambda role: "" if role == "system" else intro  # noqa: E731
    return turns(opening, turn, "### Response:", "\n\n")(messages)


def plain(messages: Sequence[Message]) -> list[str]:
    if len(messages) == 1:
        return [merged(messages[0])]
    names = {"system": "System", "user": "Human"}
    return turns(lambda _: "", lambda m: f"{names[m.role]}:\n{merged(m)}\n\n", "Assistant:\n", "\n\n")(messages)


def tldr(messages: Sequence[Message]) -> list[str]:
    written, text = [], ""
    for message in messages:
        if message.role == "assistant":
            written.append(text if text.endswith("TL;DR:") else text + "\n\nTL;DR:")
            text = "\n\n"
        else:
            text += merged(message) + ("\n\n" if message.role == "system" else "")
    return [*written, text if text.endswith("TL;DR:") else text + "\n\nTL;DR:"]


MAPPING = TextTemplate(user="Q: {content} ({context})\n", assistant="A:", system="{content}\n", separator="\n--\n")


def mapping(messages: Sequence[Message]) -> list[str]:
    def turn(message: Message) -> str:
        return f"{message.content}\n" if message.role == "system" else f"Q: {merged(message)} ()\n"

    return turns(lambda _: "", turn, "A:", "\n--\n")(messages)


@dataclass(frozen=True, repr=False)
class Chat:
    """A chat template and what it writes, said a second time.

    Attributes:
        source: The template.
        write: The text before each answer.
        stop: The token that it writes behind an answer; "" where it writes none.
        tail: What it writes between an answer and that.
        trims: Whether it strips contents.
    """

    source: str
    write: Write
    stop: str
    head: str = ""
    tail: str = ""
    trims: bool = False


def _tagged(opening: str, closing: str, after: str, trims: bool = False, tail: str = "") -> Chat:
    """Every turn in a header of its own, as in ChatML and Llama 3; ``{}`` is the role."""
    said = "m.content | trim" if trims else "m.content"
    begin = opening.replace("{}", "{{ m.role }}")
    source = (
        f"{{% for m in messages %}}{begin}{{{{ {said} }}}}{tail}{closing}{after}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{opening.format('assistant')}{{% endif %}}"
    )

    def turn(message: Message) -> str:
        text = merged(message)
        return opening.format(message.role) + (text.strip() if trims else text) + tail + closing + after

    return Chat(source, turns(lambda _: "", turn, opening.format("assistant"), after), closing, tail=tail, trims=trims)


CHATML = _tagged("<|im_start|>{}\n", "<|im_end|>", "\n")
TRIMMED = _tagged("<|im_start|>{}<|im_end|>\n\n", "<|im_end|>", "", trims=True)
ZEPHYR = _tagged("<|{}|>\n", "<|endoftext|>", "\n")
BRACKETS = _tagged("[CLS] {} : ", "[SEP]", " ", tail=" ")
LLAMA2 = Chat(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}<<SYS>>{{ m.content }}<</SYS>>{% endif %}"
    "{% endfor %}",
    turns(
        lambda _: "<s>",
        lambda m: f"[INST] {merged(m)} [/INST]" if m.role == "user" else f"<<SYS>>{m.content}<</SYS>>",
        "",
        "",
    ),
    "</s>",
    head=" ",
    tail=" ",
)
NAMES = Chat(
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}",
    turns(lambda _: "", lambda m: f"{m.role}: {merged(m)}\n", "assistant: ", "\n"),
    "",
)
TEXT_TEMPLATES: dict[str, tuple[Any, Write]] = {
    "alpaca": ("alpaca", alpaca),
    "plain": ("plain", plain),
    "tldr": ("tldr", tldr),
    "mapping": (MAPPING, mapping),
}

# ---- tokenizers -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, repr=False)
class Kind:
    """A tokenizer.

    Attributes:
        tokenizer: It.
        chats: Chat templates that its special tokens are for.
        decode: Ids -> the text they stand for, to the last character; ``None`` where the vocabulary loses some.
        bos: What it puts before a text of its own accord.
        same: Text -> one text for all that the vocabulary does not tell apart.
        markers: Tokens that its chat template opens turns with and that are not called special.
    """

    tokenizer: Any
    chats: tuple[Chat, ...]
    decode: Callable[[Sequence[int]], str] | None
    bos: str = ""
    same: Callable[[str], str] = str
    markers: tuple[str, ...] = ()


def _byte_level(special: list[Any], **named: Any) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=360, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if "bos_token" in named:
        number = backend.token_to_id(named["bos_token"])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{named['bos_token']} $A", special_tokens=[(named["bos_token"], number)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **named)


def _from_bytes(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """Bytes by GPT-2's table (Radford et al. 2019, `encoder.py`), and added tokens as they are written."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}

    def decode(ids: Sequence[int]) -> str:
        written = b""
        for number in map(int, ids):
            piece = tokenizer.convert_ids_to_tokens(number)
            written += added[number].encode() if number in added else bytes(table[letter] for letter in piece)
        return written.decode()

    return decode


def pad_is_eos() -> Kind:
    """Byte-level BPE as GPT-2's: no bos, and pad is eos."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "☃"]
    named = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "additional_special_tokens": special[1:]}
    tokenizer = _byte_level(special, **named)
    return Kind(tokenizer, (CHATML, TRIMMED, ZEPHYR, NAMES), _from_bytes(tokenizer))


def with_bos() -> Kind:
    """Byte-level BPE that puts bos first, with a pad token; one of its special tokens holds another one."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>", "<pad>", "<s>", "<<s>>"]
    named = {"eos_token": "<|im_end|>", "pad_token": "<pad>", "bos_token": "<bos>"}
    tokenizer = _byte_level(special, additional_special_tokens=special[:2] + special[5:], **named)
    return Kind(tokenizer, (CHATML, TRIMMED), _from_bytes(tokenizer), "<bos>")


def markers_not_special() -> Kind:
    """Byte-level BPE without a pad token; its markers of turns are tokens of their own that are not called special."""
    tokenizer = _byte_level(["<|endoftext|>"], eos_token="<|endoftext|>")
    markers = ("<|user|>", "<|assistant|>")
    tokenizer.add_tokens([AddedToken(marker, special=False) for marker in markers])
    return Kind(tokenizer, (ZEPHYR,), _from_bytes(tokenizer), markers=markers)


def normalising() -> Kind:
    """Lower case and compatibility forms, also before it looks for special tokens: many spellings of the same marker."""
    special = [
        AddedToken(text, special=True, normalized=True) for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    ]
    tokenizer = _byte_level(special, eos_token=special[0], additional_special_tokens=special[1:])
    tokenizer.backend_tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return Kind(tokenizer, (CHATML,), None)


def word_pieces() -> Kind:
    """WordPiece as BERT's, without bos: control characters vanish, and words with unknown letters become [UNK]."""
    letters = [chr(number) for number in range(33, 127)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{letter}" for letter in letters), "the", "cat"]
    backend = Tokenizer(models.WordPiece({piece: number for number, piece in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.normalizer, backend.pre_tokenizer = (
        normalizers.BertNormalizer(lowercase=False),
        pre_tokenizers.BertPreTokenizer(),
    )
    backend.decoder = decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]"
    )
    return Kind(tokenizer, (BRACKETS,), None)


def _from_pieces(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """SentencePiece's own meaning of its pieces; the blank that it puts before a text is taken off."""

    def decode(ids: Sequence[int]) -> str:
        special, written = set(tokenizer.all_special_ids), b""
        for place, number in enumerate(ids):
            piece = tokenizer.convert_ids_to_tokens(int(number))
            if number in special:
                written += piece.encode()
            elif re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
                written += bytes([int(piece[3:5], 16)])
            else:
                first = all(before in special for before in ids[:place])
                written += (piece.removeprefix("▁") if first else piece).replace("▁", " ").encode()
        return written.decode()

    return decode


def _blanks(text: str) -> str:
    """The letter that stands for a blank is one, and whether a text begins with blanks is not told."""
    return re.sub(r"^(<s>)? +", lambda found: found[1] or "", text.replace("▁", " "))


def sentence_pieces() -> Kind:
    """Unigram with a blank before every text and bytes for unknown letters; eos is an ordinary piece as well."""
    letters = sorted({*"the catsonmdgbyrulih\n", *"</s>|_[]INST"} - {" "})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", -1.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    pieces += [("▁", -2.0), ("▁the", -1.5), *((letter, -4.0) for letter in letters), ("\n\n", -3.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    # pieces that stand for bytes are found in texts that spell them
    return Kind(
        tokenizer, (LLAMA2,), _from_pieces(tokenizer), "<s>", lambda text: _blanks(text.replace("<0x0A>", "\n"))
    )


def llama() -> Kind:
    """The Llama-2 tokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(LLAMA, Path(folder, "tokenizer.model"))
        tokenizer = LlamaTokenizer.from_pretrained(folder, add_bos_token=True)
    return Kind(tokenizer, (LLAMA2,), _from_pieces(tokenizer), "<s>", _blanks)


KINDS = {
    make.__name__: make
    for make in (pad_is_eos, with_bos, markers_not_special, normalising, word_pieces, sentence_pieces, llama)
}


@cache
def kind(name: str) -> Kind:
    """A tokenizer by its name, made once."""
    return KINDS[name]()
