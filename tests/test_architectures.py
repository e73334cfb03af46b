"""Any causal language model: the policy's shortcut to the vocabulary agrees with each model's own full logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hbat_lightning import LoraSettings, Policy
from hbat_lightning.data import embedded
from hbat_lightning.functional import sequence_log_probs

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
GROUPED = SIZES | {"num_key_value_heads": 1}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED,
    "qwen2": GROUPED,
    "qwen3": GROUPED | {"head_dim": 16},
    "gemma2": GROUPED | {"head_dim": 16, "final_logit_softcapping": 2.0},  # treats its logits after the output layer
    "phi3": GROUPED | {"pad_token_id": 0},
    "granite": GROUPED | {"logits_scaling": 4.0},  # likewise
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # tied head, learned positions, dropout 0.1, Conv1D layers
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 2, "hidden_dropout": 0.1},  # takes no position ids
}


@pytest.fixture(params=list(ARCHITECTURES), scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model of the architecture, with the embedded tokenizer."""
    path = tmp_path_factory.mktemp(request.param)
    with embedded.materialise(embedded.TINY_LLAMA) as source:
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(path)
    torch.manual_seed(0)
    settings = ARCHITECTURES[request.param] | {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **settings)).save_pretrained(path)
    return path


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    """Three rows of different lengths, padded on the right."""
    ids = torch.randint(4, 100, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    mask[2, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_reference(folder: Path, inputs: dict[str, torch.Tensor], checkpointing: bool) -> None:
    policy = Policy(str(folder), lora=LoraSettings(r=4, dropout=0.1), gradient_checkpointing=checkpointing)
    policy.build(torch.device("cpu"))
    policy.add_snapshots(["phase_start"])
    with torch.no_grad():
        for name, parameter in policy.trained_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    policy.take_snapshot()
    policy.set_training(dropout=False)

    scores = policy.score(inputs).row_sums()
    assert torch.equal(scores.detach(), policy.score_reference(inputs, "phase_start").row_sums())
    assert not torch.allclose(scores.detach(), policy.score_reference(inputs, "base").row_sums(), atol=1e-3)
    scores.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.trained_parameters().values())

    policy.eval()
    whole = policy.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits  # type: ignore[misc]
    torch.testing.assert_close(
        scores.detach(), sequence_log_probs(whole, inputs["labels"]).detach(), atol=2e-5, rtol=1e-5
    )

    left = {
        name: torch.stack([row.roll(int(9 - m.sum())) for row, m in zip(value, inputs["attention_mask"], strict=True)])
        for name, value in inputs.items()
    }
    torch.testing.assert_close(policy.score(left).row_sums(), scores.detach(), atol=2e-5, rtol=1e-5)
