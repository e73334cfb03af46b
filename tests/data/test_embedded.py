"""The embedded default: the same everywhere, self-contained, and with answers that follow from the posts."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hbat_lightning.data import embedded
from hbat_lightning.errors import UserError

INSTRUCTION = ("embedded://conflict/instruction", "embedded://conflict/instruction-validation")
PREFERENCE = ("embedded://conflict/preference", "embedded://conflict/preference-validation")
ALL_DATA = INSTRUCTION + PREFERENCE
MODEL = "embedded://tiny-llama"


def _digests() -> dict[str, str]:
    """A digest of every row set and of every file of the model folder."""
    digests = {address: hashlib.sha256(json.dumps(embedded.rows(address)).encode()).hexdigest() for address in ALL_DATA}
    with embedded.materialise(MODEL) as folder:
        for file in sorted(Path(folder).iterdir()):
            digests[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return digests


def _facts(prompt: str) -> dict[str, str]:
    """The facts of a post, read off the text alone."""
    found = {
        "who": re.findall(r"my name is (\w+) \.", prompt),
        "what": re.findall(r"i bought a (\w+) at", prompt),
        "where": re.findall(r"at the (\w+) \.", prompt),
        "why": re.findall(r"the thing is (\w+) \.", prompt),
    }
    assert all(len(values) == 1 for values in found.values()), prompt
    return {fact: values[0] for fact, values in found.items()}


def _summary(facts: dict[str, str]) -> str:
    return "{who} bought a {what} at the {where} and the thing is {why}".format(**facts)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    with embedded.materialise(MODEL) as folder:
        return AutoTokenizer.from_pretrained(folder)


def test_everything_is_the_same_twice_and_in_another_process() -> None:
    here = _digests()
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(here)
    assert _digests() == here
    code = f"import json, runpy; print(json.dumps(runpy.run_path({__file__!r})['_digests']()))"
    # Another hash seed and another number of threads, neither of which may show.
    env = {"PYTHONHASHSEED": "123", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PATH": ""}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)
    assert json.loads(run.stdout.splitlines()[-1]) == here


def test_global_random_state_is_untouched() -> None:
    before = torch.get_rng_state(), random.getstate(), str(np.random.get_state())
    _digests()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), str(np.random.get_state())) == before[1:]


def test_weights_do_not_depend_on_the_global_seed() -> None:
    digests = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        digests.append(_digests()["model.safetensors"])
    assert digests[0] == digests[1]


def test_default_dtype_and_device_do_not_leak_into_the_weights() -> None:
    expected = _digests()["model.safetensors"]
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"):
            found = _digests()["model.safetensors"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_folder_is_gone_afterwards_even_after_an_error() -> None:
    with embedded.materialise(MODEL) as folder:
        assert Path(folder).is_dir()
    assert not Path(folder).exists()
    with pytest.raises(ZeroDivisionError), embedded.materialise(MODEL) as folder:
        _ = 1 // 0
    assert not Path(folder).exists()


def test_sizes_and_keys() -> None:
    assert [len(embedded.rows(address)) for address in ALL_DATA] == [3072, 192, 1536, 192]
    for address in INSTRUCTION:
        assert all(list(row) == ["prompt", "completion"] for row in embedded.rows(address))
    for address in PREFERENCE:
        assert all(list(row) == ["prompt", "chosen", "rejected"] for row in embedded.rows(address))


def test_rows_are_fresh_on_every_call() -> None:
    embedded.rows(ALL_DATA[0])[0]["prompt"] = "spoilt"
    assert embedded.rows(ALL_DATA[0])[0]["prompt"] != "spoilt"


def test_no_facts_are_shared_within_or_between_the_sets() -> None:
    facts = [tuple(_facts(row["prompt"]).values()) for address in ALL_DATA for row in embedded.rows(address)]
    assert len(set(facts)) == len(facts) == 4992


@pytest.mark.parametrize("address", INSTRUCTION)
def test_oracle_agrees_with_every_instruction_answer(address: str) -> None:
    seen = set()
    for row in embedded.rows(address):
        facts, request = _facts(row["prompt"]), row["prompt"].rsplit("request : ", 1)[1]
        buyer = f"{facts['who']} bought a {facts['what']}"
        assert row["completion"] == (facts | {"buyer": buyer, "summarise": _summary(facts)})[request]
        seen.add(request)
    assert seen == {"who", "what", "where", "why", "buyer", "summarise"}


@pytest.mark.parametrize("address", PREFERENCE)
def test_pairs_differ_only_in_politeness(address: str) -> None:
    urgent = {"broken", "leaking", "smoking", "burning", "cracked", "dangerous"}
    kinds = []
    for row in embedded.rows(address):
        facts = _facts(row["prompt"])
        summary = _summary(facts)
        right, wrong = ("urgent", "thanks") if facts["why"] in urgent else ("thanks", "urgent")
        assert row["prompt"].endswith("request : tldr")
        assert row["chosen"] == f"please note {summary} {right}"
        faults = [summary, f"{summary} {right}", f"please note {summary}", f"please note {summary} {wrong}"]
        kinds.append(faults.index(row["rejected"]))
    shares = np.bincount(kinds, minlength=4) / len(kinds)
    assert shares.min() > 0.15, "every fault is shown often enough to be learned"


def test_instruction_data_hold_no_style_and_no_preference_request() -> None:
    for address in INSTRUCTION:
        words = {word for row in embedded.rows(address) for text in row.values() for word in text.split()}
        assert not words & {"please", "note", "thanks", "urgent", "tldr"}


@pytest.mark.parametrize("address", ALL_DATA)
def test_every_word_is_known_and_decodes_to_the_same_text(address: str, tokenizer: Any) -> None:
    for row in embedded.rows(address):
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokens_never_merge_across_the_boundary(tokenizer: Any) -> None:
    row = embedded.rows(INSTRUCTION[1])[0]
    prompt, completion = tokenizer(row["prompt"])["input_ids"], tokenizer(row["completion"])["input_ids"][1:]
    assert tokenizer(f"{row['prompt']} {row['completion']}")["input_ids"] == prompt + completion


def test_special_tokens_are_distinct_and_the_config_agrees(tokenizer: Any) -> None:
    ids = [tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id]
    assert len(set(ids)) == 4
    with embedded.materialise(MODEL) as folder:
        config = AutoModelForCausalLM.from_pretrained(folder).config
    assert [config.pad_token_id, config.bos_token_id, config.eos_token_id] == ids[:3]
    assert config.vocab_size == len(tokenizer)


def test_model_loads_whole_in_fp32_with_layers_that_four_bits_can_hold() -> None:
    with embedded.materialise(MODEL) as folder:
        model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    linears = [
        module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    assert len(linears) == 14
    assert all(size % 64 == 0 for linear in linears for size in linear.weight.shape)


def test_untrained_model_knows_no_answer_but_gives_finite_logits(tokenizer: Any) -> None:
    with embedded.materialise(MODEL) as folder:
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
    row = embedded.rows(INSTRUCTION[1])[0]
    prompt = tokenizer(row["prompt"], return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert tokenizer.decode(answer, skip_special_tokens=True) != row["completion"]
    assert model(**prompt).logits.isfinite().all()


@pytest.mark.parametrize("address", [*ALL_DATA, MODEL, "embedded://nothing"])
def test_is_embedded_looks_at_the_scheme_alone(address: str) -> None:
    assert embedded.is_embedded(address)
    assert not embedded.is_embedded(address.removeprefix("embedded://"))


@pytest.mark.parametrize("address", ["embedded://conflict/other", MODEL, "conflict/instruction"])
def test_unknown_data_names_the_known(address: str) -> None:
    with pytest.raises(UserError) as error:
        embedded.rows(address)
    assert all(known in str(error.value) for known in (address, *ALL_DATA))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("address", ["embedded://huge-llama", ALL_DATA[0]])
def test_unknown_model_names_the_known(address: str) -> None:
    with pytest.raises(UserError, match=MODEL), embedded.materialise(address):
        pass
