"""A batch as one row of tokens: no padding, and a prompt that several rows begin with stands in it once.

Linear layers then see real tokens only. Attention goes by pieces of the row: a prompt with the first answer to it, and
each further answer, which sees its prompt and itself. Positions are those that each row has by itself, so hidden states
are those of the padded batch, up to rounding. Sharing the prompt of a pair is from arXiv 2410.20305.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig

IGNORE = -100
_NAME = "hbat_packed"


class Piece(NamedTuple):
    """A stretch of the packed row whose tokens see each other causally.

    Attributes:
        length: Its tokens.
        first: The number of the piece that begins with its prompt; ``None`` where it brings its own.
        prompt: Tokens of that prompt.
    """

    length: int
    first: int | None = None
    prompt: int = 0


@dataclass
class Layout:
    """How a batch lies in one row.

    Attributes:
        input_ids: ``(1, N)``.
        position_ids: ``(1, N)``, each token's place in its own row of the batch.
        place: ``(B, T)`` where each token of the batch is among the N; 0 for padding.
        pieces: What attention goes by, in order.
        windows: The sliding windows of the layers that have run on it.
        local: The reach of the masks that the model has asked for, where that is limited.
    """

    input_ids: Tensor
    position_ids: Tensor
    place: Tensor
    pieces: list[Piece]
    windows: list[int | None] = field(default_factory=list)
    local: set[int | None] = field(default_factory=set)
    _masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)

    def mask(self, piece: Piece, window: int | None, like: Tensor) -> Tensor:
        """``(L, P + L)`` what is added to the scores of a piece's tokens over its prompt and itself.

        Made once for all layers, and in the type that attention computes in: another would be cast in every layer.
        """
        device = like.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else like.dtype
        key = (piece.length, piece.prompt, window, dtype, device)
        if key not in self._masks:
            query = torch.arange(piece.prompt, piece.prompt + piece.length, device=device).unsqueeze(1)
            back = query - torch.arange(piece.prompt + piece.length, device=device)
            hidden = back < 0 if window is None else (back < 0) | (back >= window)
            self._masks[key] = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)
        return self._masks[key]


def pack(inputs: dict[str, Tensor], share: bool) -> Layout:
    """Lay out a batch.

    Args:
        inputs: ``input_ids``, ``attention_mask`` and perhaps ``labels``, each ``(B, T)``, padded on either side.
        share: Let rows with the same tokens before their first supervised one share these.
    """
    device = inputs["input_ids"].device
    ids, mask = inputs["input_ids"].cpu().numpy(), inputs["attention_mask"].cpu().numpy() != 0
    supervised = inputs["labels"].cpu().numpy() != IGNORE if share and "labels" in inputs else None
    groups: dict[object, list[tuple[int, np.ndarray[Any, Any], int]]] = {}
    for row in range(len(ids)):
        columns = np.flatnonzero(mask[row])
        own = columns[:0] if supervised is None else np.flatnonzero(supervised[row, columns])
        prompt = int(own[0]) if len(own) else len(columns)
        key = ids[row, columns[:prompt]].tobytes() if supervised is not None and prompt else row
        groups.setdefault(key, []).append((row, columns, prompt))

    place = np.zeros(ids.shape, dtype=np.int64)
    parts, positions, pieces, begin = [], [], list[Piece](), 0
    for members in groups.values():
        leader, start = members[0][0], begin
        first = len(pieces)
        for row, columns, prompt in members:
            shared = 0 if row == leader else prompt
            rest = columns[shared:]
            place[row, columns[:shared]] = np.arange(start, start + shared)
            place[row, rest] = np.arange(begin, begin + len(rest))
            if len(rest):
                parts.append(ids[row, rest])
                positions.append(np.arange(shared, len(columns)))
                pieces.append(Piece(len(rest), first if shared else None, shared))
                begin += len(rest)
    flat, where = (torch.from_numpy(np.concatenate(part)).unsqueeze(0).to(device) for part in (parts, positions))
    return Layout(flat, where, torch.from_numpy(place).to(device), pieces)


# ---- attention by pieces ----------------------------------------------------------------------------------------------

_running: ContextVar[tuple[PretrainedConfig, Layout] | None] = ContextVar("running", default=None)


@contextlib.contextmanager
def attending(config: PretrainedConfig, layout: Layout | None) -> Iterator[None]:
    """Have a model attend by the pieces of a layout; where there is none, as it does by itself.

    Args:
        config: The configuration that its layers read.
        layout: The layout of what it runs on.
    """
    if layout is None:
        yield
        return
    own, token = config._attn_implementation, _running.set((config, layout))
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = own
        _running.reset(token)


def attending_again() -> contextlib.AbstractContextManager[None]:
    """A context for what is computed again in the backward pass, by then perhaps in another thread: attention as it is now."""
    running = _running.get()
    return contextlib.nullcontext() if running is None else attending(*running)


def _layout() -> Layout:
    running = _running.get()
    assert running is not None, "attending() comes first"
    return running[1]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in the place of ``sdpa``: ``(1, H, N, D)`` each -> ``(1, N, H, D)``."""
    layout = _layout()
    layout.windows.append(sliding_window)
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Split, not sliced: the gradient of a slice is a tensor of zeros as large as the whole.
    sizes = [piece.length for piece in layout.pieces]
    queries, keys, values = (torch.split(whole, sizes, dim=2) for whole in (query, key, value))
    outputs = []
    for number, piece in enumerate(layout.pieces):
        k, v = keys[number], values[number]
        if piece.first is not None:
            k = torch.cat([keys[piece.first][:, :, : piece.prompt], k], dim=2)
            v = torch.cat([values[piece.first][:, :, : piece.prompt], v], dim=2)
        limited = sliding_window is not None and k.shape[2] > sliding_window
        mask = layout.mask(piece, sliding_window if limited else None, query) if piece.prompt or limited else None
        output = scaled_dot_product_attention(
            queries[number], k, v, attn_mask=mask, dropout_p=dropout, scale=scaling, is_causal=mask is None
        )
        outputs.append(output.transpose(1, 2))
    return torch.cat(outputs, dim=1), None


def _mask(*, local_size: int | None = None, **_: Any) -> None:
    """What transformers calls for a mask: there is none, but what the model wanted is noted."""
    _layout().local.add(local_size)


AttentionInterface.register(_NAME, _attention)
AttentionMaskInterface.register(_NAME, _mask)


# ---- a batch to try it on ---------------------------------------------------------------------------------------------


def trial() -> dict[str, Tensor]:
    """Three rows of different lengths, the first two of which share a prompt."""
    ids = np.array([[1, 2, 3, 4, 5, 0], [1, 2, 3, 6, 7, 8], [5, 6, 0, 0, 0, 0]])
    mask = (ids > 0).astype(np.int64)
    labels = np.where((mask == 1) & (np.arange(6) >= [[3], [3], [1]]), ids, IGNORE)
    # From arrays, so that they have values in a memory plan too, where new tensors have none.
    return {name: torch.from_numpy(a) for name, a in (("input_ids", ids), ("attention_mask", mask), ("labels", labels))}
