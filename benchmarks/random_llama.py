"""Write a Llama-2 architecture of real size with random weights, one file per layer, without ever holding the model.

    python benchmarks/random_llama.py 7b /tmp/llama-2-7b-random

Memory and speed depend on shapes, not on values: what is measured on these weights holds for the published ones. One
layer is in memory at a time (7b: 13.5 GB on disk).
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm
from transformers import LlamaConfig, LlamaTokenizer

from hbat_lightning.data import embedded

SIZES = {
    "8m": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 8, "num_attention_heads": 4},
    "60m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
SCALE = 0.02  # Llama's own initialisation


def make_config(size: str) -> LlamaConfig:
    """The configuration of Llama-2 of this size."""
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, rms_norm_eps=1e-5, **SIZES[size])
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    return config


def shards(config: LlamaConfig) -> Iterator[dict[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of every file: the embeddings, each layer, and what stands behind them."""
    hidden, middle, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    yield {"model.embed_tokens.weight": (vocabulary, hidden)}
    for number in range(config.num_hidden_layers):
        layer = f"model.layers.{number}"
        attention = {f"{layer}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        norms = {f"{layer}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
        widening = {f"{layer}.mlp.{name}_proj.weight": (middle, hidden) for name in ("gate", "up")}
        yield attention | norms | widening | {f"{layer}.mlp.down_proj.weight": (hidden, middle)}
    yield {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Norms are ones; matrices are normal, with Llama's deviation."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.randn(shape, generator=generator, dtype=torch.float32).mul_(SCALE).to(torch.bfloat16)


def write(size: str, folder: Path, tokenizer: Path | None = None, seed: int = 0) -> None:
    """Write weights, configuration and tokenizer.

    Args:
        size: A key of :data:`SIZES`.
        folder: Where to.
        tokenizer: A ``tokenizer.model`` of Llama-2; the package's own small tokenizer when not given.
        seed: Of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, generator = make_config(size), torch.Generator().manual_seed(seed)
    files, total, places = list(shards(config)), 0, {}
    for number, shapes in enumerate(tqdm(files, desc=f"writing {folder}", unit="file")):
        name = f"model-{number + 1:05d}-of-{len(files):05d}.safetensors"
        tensors = {key: random_tensor(shape, generator) for key, shape in shapes.items()}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        places |= dict.fromkeys(tensors, name)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    _write_tokenizer(folder, tokenizer)
    config.save_pretrained(folder)  # last: a folder with a configuration is a whole one


def _write_tokenizer(folder: Path, tokenizer: Path | None) -> None:
    if tokenizer is None:
        with embedded.materialise(embedded.TINY_LLAMA) as small:
            for file in Path(small).glob("*token*"):
                shutil.copy(file, folder / file.name)
        return
    shutil.copy(tokenizer, folder / "tokenizer.model")
    LlamaTokenizer.from_pretrained(folder, add_bos_token=True).save_pretrained(folder)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.model of Llama-2; a small one of our own otherwise")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write(args.size, args.folder, args.tokenizer, args.seed)


if __name__ == "__main__":
    main()
