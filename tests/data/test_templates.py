from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hbat_lightning.data.formats import Message
from hbat_lightning.data.templates import (
    ALPACA,
    PLAIN,
    TLDR,
    ChatTemplate,
    Segment,
    TextTemplate,
    resolve_template,
)
from hbat_lightning.errors import UserError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} </s>{% else %}{{ raise_exception('no system here') }}{% endif %}"
    "{% endfor %}"
)
# as reasoning models do: only the last answer carries the block
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITHOUT_STOP = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
PREFILLED = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>{% endif %}")

USER, CONTEXT = Message("user", "Hi {content}"), Message("user", "Sum", "1 2")
ANSWER, SYSTEM = Message("assistant", "Yes {context}"), Message("system", "Be brief")
NEXT, LAST = Message("user", "More"), Message("assistant", "No")


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = template
    return tokenizer


def text(*parts: str) -> list[Segment]:
    return [Segment(part, place % 2 == 1) for place, part in enumerate(parts)]


class TestAlpaca:
    def test_the_published_prompt_without_input(self) -> None:
        expected = (
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nHi {content}\n\n### Response:"
        )
        assert ALPACA.segments([USER]) == text(expected)
        assert ALPACA.segments([USER, ANSWER]) == text(expected, "Yes {context}")

    def test_the_published_prompt_with_input(self) -> None:
        expected = (
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nSum\n\n### Input:\n1 2\n\n### Response:"
        )
        assert ALPACA.segments([CONTEXT]) == text(expected)

    def test_several_turns_and_a_system_message(self) -> None:
        assert ALPACA.segments([SYSTEM, USER, ANSWER, NEXT]) == text(
            "Be brief\n\n### Instruction:\nHi {content}\n\n### Response:",
            "Yes {context}",
            "\n\n### Instruction:\nMore\n\n### Response:",
        )


class TestTLDR:
    def test_the_mark_is_written_once(self) -> None:
        expected = text("POST: x\n\nTL;DR:", " short")
        for post in ("POST: x", "POST: x\n\nTL;DR:"):
            assert TLDR.segments([Message("user", post), Message("assistant", "short")]) == expected

    def test_an_answer_with_its_own_blank_gets_no_second(self) -> None:
        assert TLDR.segments([USER, Message("assistant", "\nshort")])[1] == Segment("\nshort", True)


class TestPlain:
    def test_a_single_prompt_stays_as_it_is(self) -> None:
        assert PLAIN.segments([USER, ANSWER]) == text("Hi {content}", "Yes {context}")
        assert PLAIN.segments([USER]) == text("Hi {content}")
        assert PLAIN.segments([CONTEXT]) == text("Sum\n\n1 2")

    def test_several_turns_name_their_speakers(self) -> None:
        assert PLAIN.segments([SYSTEM, USER, ANSWER, NEXT, LAST]) == text(
            "System:\nBe brief\n\nHuman:\nHi {content}\n\nAssistant:\n",
            "Yes {context}",
            "\n\nHuman:\nMore\n\nAssistant:\n",
            "No",
        )

    def test_different_conversations_are_different_texts(self) -> None:
        one = [Message("user", "a"), Message("user", "b")]
        other = [Message("system", "a"), Message("user", "b")]
        together = [Message("user", "a\n\nb")]
        assert len({PLAIN.segments(messages)[0].text for messages in (one, other, together)}) == 3


class TestChatTemplate:
    def test_chatml(self) -> None:
        template = ChatTemplate(tokenizer := chat_tokenizer(CHATML))
        assert template.segments([SYSTEM, USER, ANSWER, NEXT, LAST]) == text(
            "<|im_start|>system\nBe brief<|im_end|>\n<|im_start|>user\nHi {content}<|im_end|>\n<|im_start|>assistant\n",
            "Yes {context}",
            "\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
            "No",
        )
        assert (template.stop_text, template.name) == ("<|im_end|>", "chat")
        assert template.stop_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")

    def test_a_prompt_ends_where_generation_starts(self) -> None:
        segments = ChatTemplate(chat_tokenizer(CHATML)).segments([USER, ANSWER, NEXT])
        assert segments[-1] == Segment("\n<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n", False)

    def test_context_follows_the_content(self) -> None:
        segments = ChatTemplate(chat_tokenizer(CHATML)).segments([CONTEXT])
        assert segments == text("<|im_start|>user\nSum\n\n1 2<|im_end|>\n<|im_start|>assistant\n")

    def test_what_stands_before_the_stop_token_is_part_of_the_answer(self) -> None:
        assert ChatTemplate(chat_tokenizer(LLAMA2)).segments([USER, ANSWER, NEXT, LAST]) == text(
            "<s>[INST] Hi {content} [/INST]", " Yes {context} ", "<s>[INST] More [/INST]", " No "
        )

    @pytest.mark.parametrize("answer", ["a<|im_end|>\nb", "<|im_end|>", "user", "\n"])
    def test_the_end_is_found_by_place_and_not_by_text(self, answer: str) -> None:
        template = ChatTemplate(chat_tokenizer(CHATML))
        assert template.segments([USER, Message("assistant", answer)])[1] == Segment(answer, True)

    def test_a_template_without_stop_token_leaves_the_line_end_to_the_next_turn(self) -> None:
        template = ChatTemplate(chat_tokenizer(WITHOUT_STOP))
        assert (template.stop_text, template.stop_token_id) == ("", None)
        assert template.segments([USER, ANSWER, NEXT]) == text(
            "user: Hi {content}\nassistant: ", "Yes {context}", "\nuser: More\nassistant: "
        )

    def test_the_last_answer_alone(self) -> None:
        template = ChatTemplate(chat_tokenizer(THINKING))
        assert template.segments([USER, ANSWER, NEXT, LAST], last_only=True) == text(
            "<|im_start|>user\nHi {content}<|im_end|>\n<|im_start|>assistant\nYes {context}<|im_end|>\n"
            "<|im_start|>user\nMore<|im_end|>\n<|im_start|>assistant\n",
            "<think></think>No",
        )

    def test_rewritten_turns_are_refused(self) -> None:
        template = ChatTemplate(chat_tokenizer(THINKING))
        with pytest.raises(UserError, match=r"writes earlier turns differently.*supervise: last"):
            template.segments([USER, ANSWER, NEXT, LAST])

    def test_a_generation_prompt_that_answers_do_not_follow_is_refused(self) -> None:
        with pytest.raises(UserError, match="does not write answers behind its generation prompt"):
            ChatTemplate(chat_tokenizer(PREFILLED)).segments([USER, ANSWER])

    def test_messages_the_template_refuses(self) -> None:
        with pytest.raises(UserError, match=r"refuses a conversation of the turns system, user \(no system here\)"):
            ChatTemplate(chat_tokenizer(LLAMA2)).segments([SYSTEM, USER])

    def test_a_template_that_does_not_write_answers(self) -> None:
        with pytest.raises(UserError, match="does not write the assistant's answers"):
            ChatTemplate(chat_tokenizer("{{ messages[0].content }}"))


class TestResolving:
    def test_by_default_the_chat_template_or_alpaca(self) -> None:
        assert resolve_template(None, chat_tokenizer(CHATML)).name == "chat"
        assert resolve_template(None, chat_tokenizer(None)) is ALPACA

    def test_by_name_or_as_given(self) -> None:
        tokenizer = chat_tokenizer(CHATML)
        own = TextTemplate(user="Q: {content}\n", assistant="A:")
        assert [resolve_template(name, tokenizer) for name in ("alpaca", "tldr", "plain")] == [ALPACA, TLDR, PLAIN]
        assert resolve_template(own, tokenizer).name == "custom"
        assert own.segments([CONTEXT, LAST, NEXT]) == text("Q: Sum\n\n1 2\nA:", "No", "\n\nQ: More\nA:")

    def test_unknown_name(self) -> None:
        with pytest.raises(UserError, match="no template 'alpacca'; the names are chat, alpaca, tldr, plain"):
            resolve_template("alpacca", chat_tokenizer(None))

    def test_chat_without_a_chat_template(self) -> None:
        with pytest.raises(UserError, match="has no chat template; choose the template alpaca, tldr or plain"):
            resolve_template("chat", chat_tokenizer(None))
