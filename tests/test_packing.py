"""Batches as one row of tokens, with shared prompts once: the same figures as row by row, on every architecture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hbat_lightning import LoraSettings, Policy
from hbat_lightning.data import embedded
from hbat_lightning.packing import Piece, pack
from hbat_lightning.scoring import CausalScorer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
GROUPED = SIZES | {"num_key_value_heads": 2}
WINDOW = 5
PACKED: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": GROUPED | {"sliding_window": WINDOW},
    "qwen2": GROUPED | {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": GROUPED | {"head_dim": 16},
    "qwen3_moe": GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "phi3": GROUPED | {"pad_token_id": 0},
    "gemma3_text": GROUPED
    | {"head_dim": 16, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]},
    "granite": GROUPED | {"logits_scaling": 4.0},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 32,
    },
    "gpt_neox": SIZES | {"rotary_pct": 0.5},
}
PADDED: dict[str, tuple[dict[str, Any], str]] = {
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 2}, "takes no positions"),
    "gemma2": (GROUPED | {"head_dim": 16}, "attention is eager"),
    "llama4_text": (
        GROUPED
        | {"head_dim": 16, "attention_chunk_size": 4, "num_local_experts": 1, "intermediate_size_mlp": 64}
        | {"layer_types": ["chunked_attention"] * 2, "no_rope_layers": [1, 1], "moe_layers": []},
        "cut into chunks",
    ),
    "qwen3_next": (
        GROUPED
        | {"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "num_experts": 0}
        | {
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
        "1 of 2 layers",
    ),
}


def make_model(name: str, folder: Path, sizes: dict[str, Any]) -> str:
    """A tiny model with random weights that say something, and the embedded tokenizer."""
    with embedded.materialise(embedded.TINY_LLAMA) as source:
        tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    settings = {"initializer_range": 0.2, "vocab_size": len(tokenizer), **ids} | sizes
    AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings)).save_pretrained(folder)
    return str(folder)


def pairs(side: str = "right") -> dict[str, Tensor]:
    """Chosen and rejected answers of three pairs: prompts of 9, 4 and 2 tokens, a pair whose answer is empty, padding."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(4, 100, (length,), generator=generator) for length in (9, 4, 2)]
    answers = [torch.randint(4, 100, (length,), generator=generator) for length in (4, 3, 7, 6, 9, 0)]
    rows = [torch.cat([prompts[place % 3], answer]) for place, answer in enumerate(answers)]
    width = max(map(len, rows)) + 2
    inputs = {"input_ids": torch.zeros(6, width).long(), "attention_mask": torch.zeros(6, width).long()}
    inputs["labels"] = torch.full((6, width), -100)
    for place, row in enumerate(rows):
        begin = 0 if side == "right" else width - len(row)
        prompt = len(prompts[place % 3])
        inputs["input_ids"][place, begin : begin + len(row)] = row
        inputs["attention_mask"][place, begin : begin + len(row)] = 1
        inputs["labels"][place, begin + prompt : begin + len(row)] = row[prompt:]
    return inputs


def make_policy(folder: str, **settings: Any) -> Policy:
    torch.manual_seed(2)
    policy = Policy(folder, lora=LoraSettings(r=4), **settings)
    policy.build(torch.device("cpu"))
    policy.add_snapshots(["phase_start"])
    with torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in policy.trained_parameters().items():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    policy.take_snapshot()
    policy.set_training(dropout=False)
    return policy


def alone(policy: Policy, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Summed log-probabilities of every row by itself, from the model's full logits; and gradients of a weighted sum."""
    sums = []
    for ids, mask, labels in zip(*(inputs[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        real = mask.bool()
        logits = policy.model(input_ids=ids[real].unsqueeze(0), use_cache=False).logits[0, :-1]  # type: ignore[misc]
        targets = labels[real][1:]
        every = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        sums.append(every[targets != -100].sum())
    return torch.stack(sums).detach(), gradients(policy, torch.stack(sums))


def gradients(policy: Policy, sums: Tensor) -> dict[str, Tensor]:
    """Of a sum in which every row has another weight."""
    trained = policy.trained_parameters()
    loss = (sums * torch.linspace(-1, 1, len(sums))).sum()
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.fixture(params=list(PACKED), scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_model(request.param, tmp_path_factory.mktemp(request.param), PACKED[request.param])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("side", ["right", "left"])
def test_packed_batches_are_their_rows_alone(folder: str, side: str, checkpointing: bool) -> None:
    """Log-probabilities and gradients, with prompts longer and shorter than a sliding window, checkpointed or not."""
    policy = make_policy(folder, gradient_checkpointing=checkpointing)
    inputs = pairs(side)
    scores = policy.score(inputs).row_sums()
    assert policy._scorer.packs
    assert policy.model.config.get_text_config()._attn_implementation == "sdpa"  # type: ignore[union-attr]
    assert torch.equal(scores.detach(), policy.score_reference(inputs, "phase_start").row_sums())
    found = gradients(policy, scores)
    truth, true_gradients = alone(policy, inputs)
    torch.testing.assert_close(scores.detach(), truth, atol=1e-4, rtol=1e-5)
    for name, gradient in true_gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("name", list(PADDED))
def test_models_that_would_compute_something_else_run_padded(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes, reason = PADDED[name]
    policy = make_policy(make_model(name, tmp_path, sizes))
    with caplog.at_level("INFO"):
        scores = policy.score(pairs()).row_sums().detach()
    assert not policy._scorer.packs
    assert reason in caplog.text
    torch.testing.assert_close(scores, alone(policy, pairs())[0], atol=1e-4, rtol=1e-5)


def test_layout() -> None:
    """Prompts once, answers behind the first; no token of padding; places of every token."""
    inputs = pairs("left")
    layout = pack(inputs, share=True)
    assert layout.pieces == [Piece(13), Piece(6, 0, 9), Piece(7), Piece(9, 2, 4), Piece(9)]
    assert layout.input_ids.shape == layout.position_ids.shape == (1, 13 + 6 + 7 + 9 + 9)
    real = inputs["attention_mask"].bool()
    assert torch.equal(layout.input_ids[0][layout.place][real], inputs["input_ids"][real])
    positions = inputs["attention_mask"].cumsum(-1) - 1
    assert torch.equal(layout.position_ids[0][layout.place][real], positions[real])
    assert torch.equal(layout.place[2, -9:-7], layout.place[5, -2:])  # the pair whose second answer is empty

    whole = pack(inputs, share=False)
    assert whole.pieces == [Piece(int(length)) for length in inputs["attention_mask"].sum(-1)]
    unlabelled = pack({name: inputs[name] for name in ("input_ids", "attention_mask")}, share=True)
    assert unlabelled.pieces == whole.pieces


def test_with_dropout_no_row_takes_part_in_the_noise_of_another(base_folder: str, monkeypatch: Any) -> None:
    policy = make_policy(base_folder)
    shared = []
    monkeypatch.setattr(
        "hbat_lightning.scoring.pack", lambda inputs, share: shared.append(share) or pack(inputs, share)
    )
    policy.score(pairs())
    policy.set_training(dropout=True)
    policy.score(pairs())
    assert shared == [True, True, False]  # the first is the trial


def test_packing_can_be_turned_off(base_folder: str) -> None:
    policy = make_policy(base_folder, packing=False)
    assert not policy._scorer.packs
    torch.testing.assert_close(
        policy.score(pairs()).row_sums(), make_policy(base_folder).score(pairs()).row_sums(), atol=1e-4, rtol=1e-5
    )


def test_quantised_layers(base_folder: str) -> None:
    """NF4 with checkpointing and autocast, where an adapter's gradients pass through 4-bit layers."""
    settings = {"quantization": "nf4", "gradient_checkpointing": True, "dtype": "float32"}
    packed, padded = make_policy(base_folder, **settings), make_policy(base_folder, **settings, packing=False)
    one, other = packed.score(pairs()).row_sums(), padded.score(pairs()).row_sums()
    assert packed._scorer.packs
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-5)
    theirs = gradients(padded, other)
    for name, gradient in gradients(packed, one).items():
        torch.testing.assert_close(gradient, theirs[name], atol=1e-4, rtol=1e-3)
    with torch.autocast("cpu", torch.bfloat16):
        scorer = CausalScorer(packed.model)  # type: ignore[arg-type]
        assert scorer.packs
        torch.testing.assert_close(scorer(pairs()).row_sums(), one, atol=0.2, rtol=0.05)
