"""Small pictures as inline SVG: curves over phases, bars, heat maps and points. Colours are classes of the page's style."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from hbat_lightning.comparison.runs import Span
from hbat_lightning.comparison.table import number

WIDTH, HEIGHT = 360, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 10, 10, 30
_MOST_POINTS = 300

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """A curve.

    Attributes:
        label: What it is.
        points: Its points, from left to right.
        kind: A class of the style, which has its colour.
        dots: Whether points are marked.
    """

    label: str
    points: Sequence[Point]
    kind: str
    dots: bool = False


@dataclass(frozen=True)
class Spot:
    """A point of a :func:`scatter`.

    Attributes:
        name: What it is.
        kind: A class of the style.
        x: Value, low and high.
        y: Value, low and high.
    """

    name: str
    kind: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Frame:
    """What charts beside each other share.

    Attributes:
        x: Least and greatest value.
        y: Least and greatest value.
        log: Whether heights are logarithms.
        x_label: What the x axis has.
    """

    x: Point
    y: Point
    log: bool = False
    x_label: str = "optimizer step"
    scales: tuple[Scale, Scale] = field(init=False)

    def __post_init__(self) -> None:
        """Make the scales."""
        low, high = (math.log10(v) if self.log else v for v in self.y)
        span, steps = (high - low) or 1.0, (self.x[1] - self.x[0]) or 1.0

        def across(value: float) -> float:
            return _LEFT + (value - self.x[0]) / steps * (WIDTH - _LEFT - _RIGHT)

        def up(value: float) -> float:
            height = math.log10(max(value, self.y[0])) if self.log else value
            return HEIGHT - _BOTTOM - (height - low) / span * (HEIGHT - _TOP - _BOTTOM)

        object.__setattr__(self, "scales", (across, up))


def frame_of(curves: Sequence[Sequence[Point]], end: float, log: bool = False, zero: bool = False) -> Frame:
    """A frame that holds all of some curves, from step 0 to the last.

    Args:
        curves: The curves.
        end: The last step.
        log: Whether logarithms are shown, where all values allow for it.
        zero: Whether 0 must be in it.
    """
    values = [y for curve in curves for _, y in curve if math.isfinite(y)] or [0.0, 1.0]
    low, high = min(values), max(values)
    log = log and low > 0 and high / low > 20
    if zero:
        low, high = min(low, 0.0), max(high, 0.0)
    pad = 0.06 * ((high - low) or abs(high) or 1.0)
    bounds = (low / 1.15, high * 1.15) if log else (low - pad, high + pad)
    return Frame((0.0, max(end, 1.0)), bounds, log)


def line_chart(title: str, frame: Frame, lines: Sequence[Line], spans: Sequence[Span] = ()) -> str:
    """Curves, with phases shaded."""
    across, up = frame.scales
    parts = [_shade(span, frame) for span in spans]
    parts += _axes(frame)
    for line in lines:
        points = [(x, y) for x, y in line.points if math.isfinite(y)]
        pieces = [_thinned(piece) for piece in ([points] if line.dots else _pieces(points, spans)) if piece]
        if not pieces:
            continue
        path = "".join("M" + "L".join(f"{across(x):.1f} {up(y):.1f}" for x, y in piece) for piece in pieces)
        tip = f"<title>{escape(line.label)}, last {number(points[-1][1])}</title>"
        parts.append(f'<path class="line {line.kind}" d="{path}">{tip}</path>')
        marked = pieces if line.dots else [piece for piece in pieces if len(piece) == 1]
        parts += [_dot(across(x), up(y), line, number(y)) for piece in marked for x, y in piece]
    return _svg(title, parts)


def bar_chart(
    title: str, frame: Frame, bars: Sequence[tuple[float, float, str, str]], spans: Sequence[Span] = ()
) -> str:
    """Bars from 0.

    Args:
        title: What it shows.
        frame: Its bounds.
        bars: Of each the x, the height, a class of the style and what it is.
        spans: Phases, shaded.
    """
    across, up = frame.scales
    parts = [*(_shade(span, frame) for span in spans), *_axes(frame)]
    zero, width = up(0.0), max(3.0, min(12.0, 0.4 * (WIDTH - _LEFT) / max(1, len(bars))))
    for x, y, kind, label in (bar for bar in bars if math.isfinite(bar[1])):
        top, bottom = sorted((up(y), zero))
        parts.append(
            f'<rect class="bar {kind}" x="{min(across(x) - width, WIDTH - _RIGHT - width):.1f}" y="{top:.1f}" '
            f'width="{width:.1f}" height="{max(0.8, bottom - top):.1f}"><title>{escape(label)}: {y:+.4g}</title></rect>'
        )
    parts.append(f'<line class="zero" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    return _svg(title, parts)


def heat_map(
    title: str, names: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[float | None]], signed: bool
) -> str:
    """A cell for each row and column; as dark as its value is large.

    Args:
        title: What it shows.
        names: Of the rows.
        columns: Of the columns.
        values: By row and column; ``None`` where there is none.
        signed: Whether values are cosines; else the root of the share of the largest is shown.
    """
    left = 8 + 5.6 * max((len(name) for name in names), default=0)
    row_height = 14 if len(names) > 12 else 18
    height = _TOP + row_height * len(names) + 24
    width = (WIDTH - left - _RIGHT) / max(1, len(columns))
    largest = max((abs(v) for row in values for v in row if v is not None and math.isfinite(v)), default=0.0) or 1.0
    parts = []
    for place, (name, row) in enumerate(zip(names, values, strict=True)):
        y = _TOP + place * row_height
        parts.append(
            f'<text class="tick end" x="{left - 5:.0f}" y="{y + row_height / 2 + 3.5:.1f}">{escape(name)}</text>'
        )
        for column, value in enumerate(row):
            if value is None or not math.isfinite(value):
                continue
            share = min(1.0, abs(value)) if signed else (abs(value) / largest) ** 0.5
            kind = "negative" if signed and value < 0 else "positive" if signed else "amount"
            parts.append(
                f'<rect class="cell {kind}" x="{left + column * width:.1f}" y="{y}" width="{max(0.5, width - 1):.1f}" '
                f'height="{row_height - 1}" fill-opacity="{0.06 + 0.94 * share:.3f}"><title>{escape(name)}, '
                f"{escape(columns[column])}: {value:.4g}</title></rect>"
            )
    every = max(1, math.ceil(len(columns) / 10))
    for column in range(0, len(columns), every):
        x = left + (column + 0.5) * width
        parts.append(f'<text class="tick middle" x="{x:.1f}" y="{height - 10}">{escape(columns[column])}</text>')
    return _svg(title, parts, height)


def scatter(title: str, labels: tuple[str, str], spots: Sequence[Spot]) -> str:
    """Points with intervals, and the line of those that no other point beats in both.

    Args:
        title: What it shows.
        labels: What the axes have; more is better on both.
        spots: The points.
    """
    frame = Frame(_bounds([spot.x for spot in spots]), _bounds([spot.y for spot in spots]), x_label=labels[0])
    across, up = frame.scales
    best = [one for one in spots if not any(_beats(other, one) for other in spots)]
    front = sorted((across(one.x[0]), up(one.y[0])) for one in best)
    parts = [*_axes(frame), '<path class="front" d="M' + "L".join(f"{x:.1f} {y:.1f}" for x, y in front) + '"/>']
    for spot in spots:
        x, y = across(spot.x[0]), up(spot.y[0])
        side, shift = ("end", -8) if x > WIDTH * 0.6 else ("start", 8)
        known = f"{escape(labels[0])} {number(spot.x[0])}, {escape(labels[1])} {number(spot.y[0])}"
        parts += [
            f'<path class="whisker {spot.kind}" d="M{across(spot.x[1]):.1f} {y:.1f}H{across(spot.x[2]):.1f}'
            f'M{x:.1f} {up(spot.y[1]):.1f}V{up(spot.y[2]):.1f}"/>',
            f'<circle class="dot {spot.kind}" cx="{x:.1f}" cy="{y:.1f}" r="5">',
            f"<title>{escape(spot.name)}: {known}</title></circle>",
            f'<text class="name {side}" x="{x + shift:.1f}" y="{y - 8:.1f}">{escape(spot.name)}</text>',
        ]
    return _svg(title, parts)


def _bounds(values: Sequence[Sequence[float]]) -> Point:
    low, high = min(min(own) for own in values), max(max(own) for own in values)
    pad = 0.12 * ((high - low) or abs(high) or 1.0)
    return low - pad, high + pad


def _beats(one: Spot, other: Spot) -> bool:
    mine, theirs = (one.x[0], one.y[0]), (other.x[0], other.y[0])
    return mine != theirs and mine[0] >= theirs[0] and mine[1] >= theirs[1]


def _svg(title: str, parts: Sequence[str], height: float = HEIGHT) -> str:
    shown = escape(title, quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{shown}">{"".join(parts)}</svg>'


def _shade(span: Span, frame: Frame) -> str:
    across, _ = frame.scales
    begin, end = across(span.begin), across(min(span.end, frame.x[1]))
    return (
        f'<rect class="phase {span.objective}" x="{begin:.1f}" y="{_TOP}" width="{max(0.0, end - begin):.1f}" '
        f'height="{HEIGHT - _TOP - _BOTTOM}"><title>{escape(span.objective)} phase, steps {span.begin + 1} to {span.end}'
        "</title></rect>"
    )


def _axes(frame: Frame) -> list[str]:
    across, up = frame.scales
    parts = []
    for value in _ticks(*frame.y, frame.log):
        y = up(value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{_short(value)}</text>')
    for value in _ticks(*frame.x, False, 5):
        parts.append(
            f'<text class="tick middle" x="{across(value):.1f}" y="{HEIGHT - _BOTTOM + 13}">{_short(value)}</text>'
        )
    middle = (_LEFT + WIDTH - _RIGHT) / 2
    parts.append(f'<text class="tick middle" x="{middle:.0f}" y="{HEIGHT - 4}">{escape(frame.x_label)}</text>')
    return parts


def _ticks(low: float, high: float, log: bool, about: int = 4) -> list[float]:
    if log:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        factors = (1, 3) if len(decades) < 5 else (1,)
        return [factor * 10.0**n for n in decades for factor in factors if low <= factor * 10.0**n <= high]
    if high <= low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.3g}"


def _dot(x: float, y: float, line: Line, value: str) -> str:
    tip = f"<title>{escape(line.label)}: {value}</title>"
    return f'<circle class="dot {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">{tip}</circle>'


def _pieces(points: Sequence[Point], spans: Sequence[Span]) -> list[list[Point]]:
    """A curve where it has values: it breaks off where a phase has none, or steps are missing."""
    ends = [span.end for span in spans]
    gaps = sorted(right[0] - left[0] for left, right in pairwise(points))
    usual = gaps[len(gaps) // 2] if gaps else 1.0
    pieces: list[list[Point]] = [[]]
    for point in points:
        if pieces[-1]:
            before = pieces[-1][-1][0]
            skipped = bisect_left(ends, point[0]) - bisect_left(ends, before) > 1  # a phase ends with its last step
            if skipped or point[0] - before > 3 * usual:
                pieces.append([])
        pieces[-1].append(point)
    return pieces


def _thinned(points: Sequence[Point]) -> list[Point]:
    """No more points than can be told apart: means over stretches of equal number."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    cuts = [len(points) * n // _MOST_POINTS for n in range(_MOST_POINTS + 1)]
    parts = [points[begin:end] for begin, end in pairwise(cuts)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]
