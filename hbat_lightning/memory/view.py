"""A memory plan as people read it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hbat_lightning.memory.advice import Advice
from hbat_lightning.memory.allocation import Category
from hbat_lightning.memory.plan import MemoryPlan

GB = 1e9


def gigabytes(size: int) -> str:
    """Bytes as people read them; small sizes in megabytes."""
    return f"{size / GB:,.2f} GB" if size >= 0.1 * GB else f"{size / 1e6:,.1f} MB"


def render(title: str, plans: Sequence[tuple[str, MemoryPlan]]) -> str:
    """The plan as tables: its moments, and what the highest consists of.

    Args:
        title: What is planned.
        plans: The plan as configured, and the one with the other choice of checkpointing, each with its heading.
    """
    headings = [heading for heading, _ in plans]
    moments = [
        [moment.name, *(gigabytes(plan.moments[place].peak.total) for _, plan in plans)]
        for place, moment in enumerate(plans[0][1].moments)
    ]
    parts = [
        [category.value, *(gigabytes(plan.highest.peak.parts.get(category, 0)) for _, plan in plans)]
        for category in Category
        if any(plan.highest.peak.parts.get(category) for _, plan in plans)
    ]
    sums = [
        ["allocated peak", *(gigabytes(plan.peak) for _, plan in plans)],
        ["process overhead", *(gigabytes(plan.overhead) for _, plan in plans)],
        ["together", *(gigabytes(plan.total) for _, plan in plans)],
    ]
    first = plans[0][1]
    lines = [title, "", *_table(["highest point of each moment", *headings], moments)]
    lines += ["", *_table([f"at the highest: {first.highest.name}", *headings], [*parts, *sums])]
    size, moment = max((one.logits, one.name) for one in first.moments)
    lines += ["", f"logits            at most {gigabytes(size)}, in {moment}"]
    lines += [f"process overhead  {first.overhead_is}"]
    if first.rehearsed[-1] != first.layers:
        few = " and ".join(str(count) for count in first.rehearsed)
        lines.append(f"layers            {first.layers}, extrapolated from {few}; --every_layer true goes through all")
    return "\n".join(lines)


def answer(plan: MemoryPlan, budget: int) -> str:
    """Whether it fits."""
    rest = budget - plan.total
    if rest >= 0:
        return f"fits into {gigabytes(budget)}: {gigabytes(plan.total)}, {gigabytes(rest)} to spare"
    return f"does not fit into {gigabytes(budget)}: {gigabytes(plan.total)}, {gigabytes(-rest)} too much"


def render_advice(found: Sequence[Advice], budget: int | None) -> str:
    """What would change it, in order of gain."""
    if not found:
        return "nothing that could be set otherwise lowers the peak"
    rows = []
    for one in found:
        fits = "" if budget is None else "fits" if one.total <= budget else "too much"
        rows.append([gigabytes(one.gain), gigabytes(one.total), fits, one.change.what, " ".join(one.change.options)])
    return "\n".join(_table(["gain", "together", "", "change", "options to add"], rows))


def as_json(plans: Sequence[tuple[str, MemoryPlan]], found: Sequence[Advice], budget: int | None) -> dict[str, Any]:
    """The report as plain types, in bytes."""
    first = plans[0][1]
    return {
        "peak": first.peak,
        "overhead": first.overhead,
        "overhead_is": first.overhead_is,
        "total": first.total,
        "budget": budget,
        "fits": None if budget is None else first.total <= budget,
        "plans": {
            heading: {
                "peak": plan.peak,
                "highest": plan.highest.name,
                "layers": plan.layers,
                "rehearsed_layers": list(plan.rehearsed),
                "moments": {
                    moment.name: {
                        "peak": moment.peak.total,
                        "parts": _named(moment.peak.parts),
                        "most_logits": moment.logits,
                    }
                    for moment in plan.moments
                },
            }
            for heading, plan in plans
        },
        "advice": [
            {"change": one.change.what, "options": list(one.change.options), "peak": one.peak, "gain": one.gain}
            for one in found
        ],
    }


def _named(parts: dict[Category, int]) -> dict[str, int]:
    return {category.value: size for category, size in parts.items()}


def _table(heading: list[str], rows: list[list[str]]) -> list[str]:
    """Columns wide enough for what is in them; figures to the right."""
    widths = [max(len(row[place]) for row in [heading, *rows]) for place in range(len(heading))]
    rule = ["-" * width for width in widths]
    return [
        "  ".join(_cell(text, width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in (heading, rule, *rows)
    ]


def _cell(text: str, width: int) -> str:
    return text.rjust(width) if text.endswith((" GB", " MB")) else text.ljust(width)
