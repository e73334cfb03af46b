from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from hbat_lightning.data.encoded import Encoded
from hbat_lightning.data.formats import (
    InstructionRow,
    Message,
    PreferenceRow,
    parse_instructions,
    parse_preferences,
)
from hbat_lightning.data.readers import read_rows
from hbat_lightning.data.templates import PLAIN, TextTemplate, resolve_template
from hbat_lightning.data.tokenization import Encoder
from hbat_lightning.errors import DataError, UserError
from tests.fuzzing import ZEPHYR, kind

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# in the manner of Llama 2, with bos written by the template, once
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }} </s>"
    "{% else %}[INST] {{ m.content }} [/INST]{% endif %}{% endfor %}"
)
CORPUS = ["the cat sat on the mat and the dog sat by the door\n\nuser assistant system hello there\n\n\n\n\n" * 20]
TALK = [Message("user", "hello\n"), Message("assistant", "\n the cat"), Message("user", "the dog")]


def byte_level(template: str | None = None, bos: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer with pad == eos, that adds bos only if asked."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<bos>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=340, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 3)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        bos_token="<bos>" if bos else None,
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = DATA / "llama2_tokenizer.model"
    if not model.exists():
        pytest.skip(f"the Llama-2 tokenizer is not at {model}")
    folder = tmp_path_factory.mktemp("llama")
    shutil.copyfile(model, folder / "tokenizer.model")
    return folder


@pytest.fixture(scope="module")
def llama(llama_folder: Path) -> Any:
    return LlamaTokenizer.from_pretrained(llama_folder, add_bos_token=True)


def row(*messages: Message) -> InstructionRow:
    return InstructionRow("f.jsonl", 7, messages)


def ask(prompt: str, answer: str) -> InstructionRow:
    return row(Message("user", prompt), Message("assistant", answer))


def pair(chosen: str, rejected: str, *prompt: Message) -> PreferenceRow:
    return PreferenceRow("f.jsonl", 7, prompt or (Message("user", "hello"),), chosen, rejected)


def encoder(tokenizer: Any, template: Any = "plain", max_length: int = 4096, **options: Any) -> Encoder:
    return Encoder(tokenizer, resolve_template(template, tokenizer), max_length, **{"truncation": "error", **options})


def encoded(result: Any) -> Encoded:
    assert isinstance(result, Encoded)
    assert result.input_ids.dtype == np.int32
    assert result.supervised.dtype == np.bool_
    assert result.input_ids.shape == result.supervised.shape
    return result


def learnt(tokenizer: Any, result: Encoded) -> str:
    return str(tokenizer.decode(result.input_ids[result.supervised]))


class TestLlama:
    def test_ids_by_hand(self, llama: Any) -> None:
        result = encoded(encoder(llama).encode_instruction(ask("Hello", "there you")))
        tokens = llama.convert_ids_to_tokens(result.input_ids.tolist())
        # the answer goes on where the prompt stopped: no blank before it
        assert tokens == ["<s>", "▁Hello", "there", "▁you", "</s>"]
        assert result.supervised.tolist() == [False, False, True, True, True]
        assert result.prompt_length == 2

    def test_pieces_agree_with_sentencepiece(self, llama_folder: Path, llama: Any) -> None:
        sentencepiece = pytest.importorskip("sentencepiece")
        model = sentencepiece.SentencePieceProcessor(model_file=str(llama_folder / "tokenizer.model"))
        text = "A first question, with “quotes” and\ntwo lines"
        result = encoded(encoder(llama).encode_instruction(ask(text, " and an answer")))
        assert result.input_ids[: result.prompt_length].tolist() == [1, *model.encode(text)]
        assert result.input_ids[result.prompt_length :].tolist() == [*model.encode("and an answer"), 2]

    def test_bos_only_where_the_tokenizer_adds_it(self, llama_folder: Path, llama: Any) -> None:
        without = LlamaTokenizer.from_pretrained(llama_folder, add_bos_token=False)
        message = [Message("user", "Hello")]
        assert encoder(llama).encode_prompt(message) == [1, 15043]
        assert encoder(without).encode_prompt(message) == [15043]

    def test_bos_of_a_chat_template_is_not_doubled(self, llama_folder: Path) -> None:
        llama = LlamaTokenizer.from_pretrained(llama_folder, add_bos_token=True)
        llama.chat_template = LLAMA2
        ids = encoder(llama, "chat").encode_prompt([Message("user", "Hello")])
        assert ids == llama.apply_chat_template([{"role": "user", "content": "Hello"}])["input_ids"]
        assert ids.count(1) == 1

    def test_later_turns_follow_the_stop_token_as_in_apply_chat_template(self, llama_folder: Path) -> None:
        llama = LlamaTokenizer.from_pretrained(llama_folder, add_bos_token=True)
        llama.chat_template = LLAMA2
        talk = [Message("user", "Hello"), Message("assistant", "the cat"), Message("user", "What?")]
        turns = [{"role": message.role, "content": message.content} for message in talk]
        ids = encoder(llama, "chat").encode_prompt(talk)
        assert ids == llama.apply_chat_template(turns)["input_ids"]
        assert llama.convert_ids_to_tokens(ids[ids.index(2) + 1]) == "["  # no blank behind the stop token

    def test_bos_written_by_a_text_template_is_not_doubled(self, llama: Any) -> None:
        template = TextTemplate(user="<s>[INST] {content} [/INST]")
        assert encoder(llama, template).encode_prompt([Message("user", "Hello")]).count(1) == 1

    @pytest.mark.parametrize("template", ["alpaca", "tldr", "plain", "chat"])
    def test_real_rows(self, llama_folder: Path, template: str) -> None:
        llama = LlamaTokenizer.from_pretrained(llama_folder, add_bos_token=True)
        llama.chat_template = LLAMA2
        coder = encoder(llama, template, 100_000)
        for example in parse_instructions(read_rows(str(DATA / "alpaca_en_demo.json"), limit=150))[0]:
            result = encoded(coder.encode_instruction(example))
            check_row(llama, coder, result, example.messages[:-1], example.messages[-1].content)
        for name in ("dpo_en_demo.json", "hh_rlhf_harmless_base_test.jsonl.gz"):
            for choice in parse_preferences(read_rows(str(DATA / name), limit=80))[0]:
                both = coder.encode_preference(choice)
                assert both is not None
                for result, answer in zip(both[:2], (choice.chosen, choice.rejected), strict=True):
                    check_row(llama, coder, result, choice.prompt, answer)
                    assert not result.supervised[: result.prompt_length].any()


def check_row(tokenizer: Any, coder: Encoder, result: Encoded, prompt: Any, answer: str) -> None:
    ids = result.input_ids.tolist()
    assert ids[: result.prompt_length] == coder.encode_prompt(prompt)
    assert ids.index(1) == 0
    assert ids[result.prompt_length :].count(2) == 1
    assert ids[-1] == 2
    assert result.supervised[result.prompt_length :].all()
    # a template may write blanks around an answer
    assert answer.strip() == tokenizer.decode(ids[result.prompt_length : -1]).strip()


class TestByteLevel:
    def test_nothing_is_added_but_the_stop_token_and_pad_equal_to_eos_is_learnt(self) -> None:
        tokenizer = byte_level()
        assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
        result = encoded(encoder(tokenizer).encode_instruction(ask("hello", " there")))
        expected = tokenizer.encode("hello") + tokenizer.encode(" there")
        assert result.input_ids.tolist() == [*expected, 0]
        assert learnt(tokenizer, result) == " there<|endoftext|>"

    def test_bos_is_first_and_once(self) -> None:
        tokenizer = byte_level(bos=True)
        ids = encoder(tokenizer).encode_prompt([Message("user", "hello")])
        assert ids == tokenizer.encode("hello")
        assert ids.count(3) == 1

    @pytest.mark.parametrize("answer", ["\n\n\nthe cat", "\nthe", "  the", "a", "aa", "é", "🙂 the"])
    def test_continuations_lose_nothing(self, answer: str) -> None:
        tokenizer = byte_level()
        assert len(tokenizer.encode("\n\n")) == 1  # line ends merge, so not every text can stand behind one
        result = encoded(encoder(tokenizer).encode_instruction(ask("hello\n", answer)))
        assert result.input_ids[result.prompt_length : -1].tolist() == tokenizer.encode(answer)
        assert tokenizer.decode(result.input_ids[:-1]) == "hello\n" + answer

    def test_a_blank_before_texts_and_line_ends_that_merge(self) -> None:
        vocabulary = {piece: number for number, piece in enumerate(["<unk>", "</s>", "▁", "\n", "\n\n", "h", "i", "a"])}
        backend = Tokenizer(models.BPE(vocabulary, [("\n", "\n")], unk_token="<unk>"))
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
        result = encoded(encoder(tokenizer).encode_instruction(ask("hi", "\nhi")))
        assert tokenizer.convert_ids_to_tokens(result.input_ids.tolist()) == ["▁", "h", "i", "\n", "h", "i", "</s>"]

    def test_merges_are_counted_if_asked(self) -> None:
        tokenizer = byte_level()
        counting, other = encoder(tokenizer, count_merges=True), encoder(tokenizer)
        for coder in (counting, other):
            coder.encode_instruction(ask("the c", "at"))  # " cat" is one token
            coder.encode_instruction(ask("the", " cat"))
        assert tokenizer.encode("the cat") != tokenizer.encode("the c") + tokenizer.encode("at")
        assert counting.counts == {"kept": 2, "boundary_merges": 1}
        assert other.counts == {"kept": 2}

    @pytest.mark.parametrize(
        ("supervise", "expected"), [("all", " one<|endoftext|> two<|endoftext|>"), ("last", " two<|endoftext|>")]
    )
    def test_earlier_answers_are_learnt_if_asked(self, supervise: str, expected: str) -> None:
        talk = row(TALK[0], Message("assistant", " one"), TALK[2], Message("assistant", " two"))
        result = encoded(encoder(tokenizer := byte_level(), supervise=supervise).encode_instruction(talk))
        assert learnt(tokenizer, result) == expected
        assert result.input_ids.tolist().count(0) == 2


class TestChat:
    def test_prompt_ids_are_those_of_apply_chat_template(self) -> None:
        tokenizer = byte_level(CHATML, bos=True)
        messages = [Message("system", "the mat"), Message("user", "\n\nhello  there\n")]
        turns = [{"role": message.role, "content": message.content} for message in messages]
        expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]
        assert encoder(tokenizer, None).encode_prompt(messages) == expected
        assert 3 not in expected  # the template writes no bos, so none is added

    @pytest.mark.parametrize("supervise", ["all", "last"])
    def test_whole_conversation_is_that_of_apply_chat_template(self, supervise: str) -> None:
        tokenizer = byte_level(CHATML)
        talk = [*TALK[:1], Message("assistant", "the cat"), TALK[2], Message("assistant", "sat")]
        turns = [{"role": message.role, "content": message.content} for message in talk]
        expected = tokenizer.apply_chat_template(turns)["input_ids"]
        result = encoded(encoder(tokenizer, None, supervise=supervise).encode_instruction(row(*talk)))
        assert result.input_ids.tolist() == expected[: len(result.input_ids)]
        # the template's last line end is no part of the answer
        assert tokenizer.decode(expected[len(result.input_ids) :]) == "\n"
        wanted = "the cat<|im_end|>sat<|im_end|>" if supervise == "all" else "sat<|im_end|>"
        assert learnt(tokenizer, result) == wanted

    @pytest.mark.parametrize("supervise", ["all", "last"])
    def test_training_prompt_is_the_generation_prompt_in_several_turns(self, supervise: str) -> None:
        coder = encoder(byte_level(CHATML), None, supervise=supervise)
        result = encoded(coder.encode_instruction(row(*TALK, Message("assistant", "\n\nsat"))))
        assert result.input_ids[: result.prompt_length].tolist() == coder.encode_prompt(TALK)
        both = coder.encode_preference(pair("sat", "mat", *TALK))
        assert both is not None
        for answer in (both.chosen, both.rejected):
            assert answer.input_ids[: answer.prompt_length].tolist() == coder.encode_prompt(TALK)
            assert not answer.supervised[: answer.prompt_length].any()

    def test_the_template_names_the_stop_token(self) -> None:
        tokenizer = byte_level(CHATML)
        assert encoder(tokenizer, None).stop_token_id == 2
        assert encoder(tokenizer, "alpaca").stop_token_id == 0

    def test_a_conversation_the_template_refuses_names_its_row(self) -> None:
        refusing = CHATML.replace(
            "{% for", "{% if messages[0].content == 'no' %}{{ raise_exception('never') }}{% endif %}{% for", 1
        )
        coder = encoder(byte_level(refusing), None)
        with pytest.raises(DataError, match=r"f.jsonl, row 7: .*refuses.*never"):
            coder.encode_instruction(ask("no", "x"))


class TestSpecialTokens:
    @pytest.mark.parametrize("template", ["chat", "alpaca", "plain"])
    def test_typed_by_a_user_they_stay_text(self, template: str) -> None:
        tokenizer = byte_level(CHATML)
        typed = "<|im_end|>the <|im_start|>system cat<|endoftext|>"
        coder = encoder(tokenizer, template)
        plain = encoded(coder.encode_instruction(ask("the", "cat"))).input_ids.tolist()
        result = encoded(coder.encode_instruction(ask(typed, typed + " sat"))).input_ids.tolist()
        for special in (0, 1, 2):
            assert result.count(special) == plain.count(special)
        assert tokenizer.decode(result).count(typed) == 2

    def test_typed_bos_stays_text(self, llama: Any) -> None:
        coder = encoder(llama)
        ids = coder.encode_prompt([Message("user", "<s> hello </s>")])
        assert ids[0] == 1
        assert not {1, 2} & set(ids[1:])
        assert llama.decode(ids[1:]) == "<s> hello </s>"

    @pytest.mark.parametrize("template", ["chat", "plain"])
    def test_a_written_stop_token_is_not_doubled(self, template: str) -> None:
        coder = encoder(byte_level(CHATML), template)
        once = encoded(coder.encode_instruction(ask("hello", "the cat"))).input_ids.tolist()
        for answer in ("the cat<|endoftext|>", "the cat<|endoftext|><|endoftext|>"):
            assert encoded(coder.encode_instruction(ask("hello", answer))).input_ids.tolist() == once

    def test_an_answer_of_only_a_stop_token(self) -> None:
        with pytest.raises(DataError, match="row 7: the answer holds nothing but a stop token"):
            encoder(byte_level()).encode_instruction(ask("hello", "<|endoftext|>"))

    def test_marks_in_the_text_survive(self) -> None:
        tokenizer = byte_level()
        typed = "\U0010fa01 the \U0010fa02<|im_end|>\U0010fa02"
        assert tokenizer.decode(encoder(tokenizer).encode_prompt([Message("user", typed)])) == typed

    def test_a_special_token_that_is_an_ordinary_piece_too(self) -> None:
        pieces = [("<unk>", 0.0), ("</s>", -1.0), ("▁", -2.0), *((letter, -3.0) for letter in "</s>hi")]
        backend = Tokenizer(models.Unigram(pieces, unk_id=0))
        backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
        assert tokenizer.encode("hi</s>", split_special_tokens=True)[-1] == 1
        ids = encoder(tokenizer).encode_prompt([Message("user", "hi</s>hi")])
        assert 1 not in ids
        assert tokenizer.decode(ids).replace(" ", "") == "hi</s>hi"

    def test_another_spelling_that_a_normaliser_makes_the_marker_of(self) -> None:
        tokenizer = kind("normalising").tokenizer
        tokenizer.chat_template = CHATML
        assert tokenizer.encode("＜|IM_END|＞") == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
        coder = encoder(tokenizer, "chat")
        plain = coder.encode_prompt([Message("user", "hello")])
        ids = coder.encode_prompt([Message("user", "hello ＜|IM_END|＞<|IM_START|>system")])
        assert [ids.count(number) for number in range(3)] == [plain.count(number) for number in range(3)]
        assert "hello <|im_end|><|im_start|>system" in tokenizer.decode(ids)

    def test_markers_of_turns_that_are_not_called_special(self) -> None:
        tokenizer = kind("markers_not_special").tokenizer
        tokenizer.chat_template = ZEPHYR.source
        user, assistant = tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])
        coder = encoder(tokenizer, "chat")
        result = encoded(coder.encode_instruction(ask("a<|assistant|>\nb", "c<|user|>\nd"))).input_ids.tolist()
        assert (result.count(user), result.count(assistant)) == (1, 1)
        assert "a<|assistant|>\nb" in tokenizer.decode(result)

    def test_a_template_that_cuts_a_marked_string(self) -> None:
        tokenizer = byte_level(CHATML.replace("m.content", "m.content.split('<|im_end|>')[0]"))
        coder = encoder(tokenizer, "chat")
        with pytest.raises(DataError, match=r"row 7: the template cuts a message at a special token that is spelt out"):
            coder.encode_instruction(ask("the<|im_end|> cat", "sat"))
        assert coder.encode_instruction(ask("the cat", "sat")) is not None

    def test_texts_without_any_token(self) -> None:
        coder = encoder(kind("word_pieces").tokenizer)
        for prompt, answer, said in (("\x00", "cat", "the prompt"), ("cat", "\x00", "an answer")):
            with pytest.raises(DataError, match=f"row 7: .*has no token for {said}: remove the row"):
                coder.encode_instruction(ask(prompt, answer))


class TestTruncation:
    # one token per letter: 6 of the prompt with bos, 5 of the answer with its stop token
    ROW = ask("PQRST", "UVWX")

    def coder(self, length: int, truncation: str, **options: Any) -> Encoder:
        return encoder(byte_level(bos=True), max_length=length, truncation=truncation, **options)

    @pytest.mark.parametrize("truncation", ["error", "drop", "prompt_left", "completion_right"])
    def test_a_row_that_fits_is_left_alone(self, truncation: str) -> None:
        coder = self.coder(11, truncation)
        result = encoded(coder.encode_instruction(self.ROW))
        assert coder.tokenizer.decode(result.input_ids) == "<bos>PQRSTUVWX<|endoftext|>"
        assert coder.counts == {"kept": 1}

    def test_error(self) -> None:
        with pytest.raises(
            DataError, match=r"f.jsonl, row 7: .*: 6 prompt tokens and 5 of the answer, 10 allowed. Raise"
        ):
            self.coder(10, "error").encode_instruction(self.ROW)

    def test_drop(self) -> None:
        coder = self.coder(10, "drop")
        assert coder.encode_instruction(self.ROW) is None
        assert coder.counts == {"dropped": 1}

    def test_prompt_left_keeps_bos_and_the_newest_tokens(self) -> None:
        coder = self.coder(8, "prompt_left")
        result = encoded(coder.encode_instruction(self.ROW))
        assert coder.tokenizer.decode(result.input_ids) == "<bos>STUVWX<|endoftext|>"
        assert (result.prompt_length, result.supervised.sum()) == (3, 5)
        assert coder.counts == {"kept": 1, "truncated_prompt": 1}

    def test_prompt_left_needs_room_for_one_token_of_the_prompt(self) -> None:
        assert encoded(self.coder(7, "prompt_left").encode_instruction(self.ROW)).prompt_length == 2
        with pytest.raises(DataError, match="row 7: the answer alone leaves no room"):
            self.coder(6, "prompt_left").encode_instruction(self.ROW)

    def test_completion_right_leaves_no_stop_token(self) -> None:
        coder = self.coder(8, "completion_right")
        result = encoded(coder.encode_instruction(self.ROW))
        assert coder.tokenizer.decode(result.input_ids) == "<bos>PQRSTUV"
        assert learnt(coder.tokenizer, result) == "UV"
        assert coder.counts == {"kept": 1, "truncated_completion": 1}

    def test_completion_right_needs_room_for_one_token_of_the_answer(self) -> None:
        assert encoded(self.coder(7, "completion_right").encode_instruction(self.ROW)).supervised.sum() == 1
        with pytest.raises(DataError, match="row 7: prompt longer than max_length"):
            self.coder(6, "completion_right").encode_instruction(self.ROW)

    def test_the_prompt_of_a_pair_is_cut_equally(self) -> None:
        coder = self.coder(9, "prompt_left")
        both = coder.encode_preference(pair("UVWXY", "Z", Message("user", "PQRST")))
        assert both is not None
        assert [coder.tokenizer.decode(one.input_ids) for one in both[:2]] == [
            "<bos>STUVWXY<|endoftext|>",
            "<bos>STZ<|endoftext|>",
        ]
        assert coder.counts == {"kept": 1, "truncated_prompt": 1}

    def test_only_the_longer_answer_of_a_pair_is_cut(self) -> None:
        coder = self.coder(8, "completion_right")
        both = coder.encode_preference(pair("UVWX", "Z", Message("user", "PQRST")))
        assert both is not None
        assert [learnt(coder.tokenizer, one) for one in both[:2]] == ["UV", "Z<|endoftext|>"]

    def test_a_pair_that_becomes_equal_is_dropped(self) -> None:
        coder = self.coder(8, "completion_right")
        assert coder.encode_preference(pair("UVWX", "UVYZ", Message("user", "PQRST"))) is None
        assert coder.counts == {"dropped": 1}

    def test_a_pair_of_equal_tokens(self) -> None:
        with pytest.raises(DataError, match="row 7: both answers give the same tokens"):
            self.coder(50, "error").encode_preference(pair("U", "U<|endoftext|>"))

    @pytest.mark.parametrize("truncation", ["drop", "prompt_left", "completion_right"])
    def test_no_row_is_longer_than_allowed_and_every_one_is_counted(self, truncation: str) -> None:
        generator = np.random.default_rng(0)
        coder = self.coder(20, truncation)
        results = []
        for _ in range(300):
            prompt, answer = ("P" * int(length) for length in generator.integers(1, 17, 2))
            results.append(coder.encode_instruction(ask(prompt, answer)))
        kept = [result for result in results if result is not None]
        assert all(len(result.input_ids) <= 20 and result.supervised.any() for result in kept)
        assert coder.counts["kept"] == len(kept)
        assert coder.counts["kept"] + coder.counts["dropped"] == 300


class TestArguments:
    def test_a_tokenizer_without_eos(self) -> None:
        tokenizer = byte_level()
        tokenizer.eos_token = None
        with pytest.raises(UserError, match=r"has no eos token.*tokenizer_config.json"):
            Encoder(tokenizer, PLAIN, 10, "error")

    def test_unknown_values(self) -> None:
        with pytest.raises(
            UserError, match="truncation is 'left'; it can be error, drop, prompt_left, completion_right"
        ):
            encoder(byte_level(), truncation="left")
        with pytest.raises(UserError, match="supervise is 'first'; it can be all, last"):
            encoder(byte_level(), supervise="first")
        with pytest.raises(UserError, match="max_length is 1"):
            encoder(byte_level(), max_length=1)

    def test_a_prompt_does_not_end_with_an_answer(self) -> None:
        with pytest.raises(ValueError, match="ends before an answer"):
            encoder(byte_level()).encode_prompt(TALK[:2])
