"""What two objectives' gradients and phases do to each other, per layer and in all, as figures and a picture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hbat_lightning.functional import cosine, split_half_products
from hbat_lightning.phases import INSTRUCTION, PREFERENCE
from hbat_lightning.probes import Halves
from hbat_lightning.report import COLOURS, Row

Tensors = Mapping[str, Tensor]
_NUMBERED = re.compile(r"(\w+)\.(\d+)\.")
_WRAPPERS = re.compile(r"^(?:base_model\.)?(?:model\.)*")


def layer_of(name: str) -> str:
    """The layer that a parameter belongs to: ``layers.3``, or outside of numbered ones its module, such as ``lm_head``."""
    numbered = _NUMBERED.search(name)
    return f"{numbered[1]}.{numbered[2]}" if numbered else _WRAPPERS.sub("", name).split(".")[0]


def conflict_figures(
    instruction: Halves, preference: Halves, trained: str | None, drift: Tensors, before: Tensors
) -> dict[str, dict[str, float]]:
    """Figures of the whole model, under ``""``, and of each layer; those that are not defined are left out.

    Args:
        instruction: Gradient of the instruction objective, from two halves of its rows.
        preference: That of the preference objective.
        trained: The objective whose phase made the drift; ``None`` where both have.
        drift: By parameter name how far it has moved since the phase began; empty where that is not known.
        before: The drift of the whole phase before; empty where there was none, or the phase is not over.
    """
    sums: dict[str, Tensor] = {}
    for name in instruction.first:
        halves = [half[name] for own in (instruction, preference) for half in (own.first, own.second)]
        none = torch.zeros_like(halves[0])
        moved, moved_before = drift.get(name, none), before.get(name, none)
        touched = (halves[2] + halves[3] if trained == INSTRUCTION else halves[0] + halves[1]) / 2
        own = torch.cat([split_half_products(*halves), _further(halves, touched, moved, moved_before)])
        for layer in ("", layer_of(name)):
            sums[layer] = sums[layer] + own if layer in sums else own
    known = (trained is not None and bool(drift), bool(before))
    return {layer: _figures(products.cpu(), *known) for layer, products in sums.items()}


def _further(halves: Sequence[Tensor], touched: Tensor, drift: Tensor, before: Tensor) -> Tensor:
    """``(9,)`` inner products, in the order in which :func:`_figures` takes them."""
    flat = [value.double().flatten() for value in (*halves, touched, drift, before)]
    first, second, other_first, other_second, touched, drift, before = flat
    pairs = [(one, one) for one in (first, second, other_first, other_second, drift, before)]
    pairs += [(touched, drift), (drift, before)]
    count = torch.tensor(float(drift.numel()), dtype=torch.float64, device=drift.device)
    return torch.stack([*(torch.dot(*pair) for pair in pairs), count])


def _figures(products: Tensor, drifted: bool, drifted_before: bool) -> dict[str, float]:
    product, square, other_square, *rest = products
    first, second, other_first, other_second, drift, before, interference, tug, count = rest
    values = {
        "cosine": cosine(product, square, other_square),
        # norms of the means of both halves: with the noise in them
        "plain_cosine": cosine(
            product, (first + second + 2 * square) / 4, (other_first + other_second + 2 * other_square) / 4
        ),
        f"{INSTRUCTION}_agreement": cosine(square, first, second),
        f"{PREFERENCE}_agreement": cosine(other_square, other_first, other_second),
        f"{INSTRUCTION}_norm": square.sqrt(),
        f"{PREFERENCE}_norm": other_square.sqrt(),
    }
    if drifted:
        values |= {"interference": interference, "drift": (drift / count).sqrt()}
    if drifted and drifted_before:
        values["tug_of_war"] = cosine(tug, drift, before)
    plain = {name: float(value) for name, value in values.items()}
    return {name: value for name, value in plain.items() if math.isfinite(value)}


def draw_conflict(rows: Sequence[Row], path: Path) -> None:
    """Draw cosines over optimizer steps, what each phase was predicted to cost, and the cosine of every layer.

    Args:
        rows: Rows of ``conflict.jsonl``, at least one.
        path: The PNG file to write.
    """
    # The object-oriented interface: pyplot would keep state, and pick a backend that may want a screen.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 8.4), layout="constrained")
    FigureCanvasAgg(figure)
    cosines, costs, layers = figure.subplots(3, 1)
    for name, style, label in (("cosine", "o-", "debiased"), ("plain_cosine", ".:", "with noise")):
        cosines.plot(*_points(rows, name), style, color="#2f7d6d", label=label, markersize=4, linewidth=1.4)
    cosines.plot(
        *_points(rows, "tug_of_war"), "D--", color="#6b7280", label="of consecutive phases' drifts", markersize=4
    )
    cosines.axhline(0, color="#9ca3af", linewidth=0.8)
    cosines.set(title="cosine of the two objectives' gradients", xlabel="optimizer step")
    cosines.legend(frameon=False, fontsize=8)
    for trained, other in ((INSTRUCTION, PREFERENCE), (PREFERENCE, INSTRUCTION)):
        own = [row for row in rows if row["objective"] == trained and row["ends"]]
        costs.plot(*_points(own, "interference"), "o", color=COLOURS[other], label=f"{other} loss, by {trained} phases")
    costs.axhline(0, color="#9ca3af", linewidth=0.8)
    costs.set(title="first-order change of the other objective's loss by a phase", xlabel="optimizer step")
    costs.legend(frameon=False, fontsize=8)
    names = list(rows[-1]["layers"])
    values = [[row["layers"].get(name, {}).get("cosine", math.nan) for row in rows] for name in names]
    image = layers.imshow(values, cmap="RdBu", vmin=-1, vmax=1, aspect="auto", interpolation="nearest")
    layers.set(title="debiased cosine of every layer", xlabel="optimizer step")
    layers.set_yticks(range(len(names)), names, fontsize=7)
    every = max(1, len(rows) // 12)
    layers.set_xticks(range(0, len(rows), every), [row["step"] for row in rows[::every]])
    figure.colorbar(image, ax=layers)
    for axis in (cosines, costs):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


def _points(rows: Sequence[Row], name: str) -> tuple[list[Any], list[Any]]:
    known = [(row["step"], row["all"][name]) for row in rows if name in row["all"]]
    return [step for step, _ in known], [value for _, value in known]
