"""Curves as SVG: no script, no font, colours from the style of the page."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from launcher.record.metrics import reduce_points

WIDTH, HEIGHT = 420, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 28
BUCKETS = 320  # points of a line; between them, a band shows the lowest and the highest value
Point = tuple[float, float, float, float]  # step, lowest, mean, highest
COLOURS = 8  # in the style of the page


@dataclass(frozen=True, kw_only=True)
class Line:
    """`colour`: index in the palette of the page."""

    label: str
    steps: Sequence[int]
    values: Sequence[float]
    colour: int


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Converts values to pixels."""

    low: float
    high: float
    begin: float
    end: float

    def at(self, value: float) -> float:
        span = self.high - self.low or 1.0
        return round(self.begin + (value - self.low) / span * (self.end - self.begin), 1)


def draw_chart(title: str, lines: Sequence[Line], *, from_zero: bool) -> Markup:
    """One chart over the steps; '' if no line has a finite value."""
    reduced = [(line, points) for line in lines if (points := reduce_points(line.steps, line.values, BUCKETS))]
    if not reduced:
        return Markup("")
    every = [point for _, points in reduced for point in points]
    lows, highs = [point[1] for point in every], [point[3] for point in every]
    floor = 0.0 if from_zero else lows[0]
    ticks = round_ticks(min(*lows, floor), max(*highs, floor))
    x = Scale(low=min(p[0] for p in every), high=max(p[0] for p in every), begin=LEFT, end=WIDTH - RIGHT)
    y = Scale(low=min(ticks[0], *lows), high=max(ticks[-1], *highs), begin=HEIGHT - BOTTOM, end=TOP)
    parts = [
        *draw_grid(ticks, y),
        *draw_steps(x),
        *(part for place, (line, points) in enumerate(reduced) for part in draw_line(line, points, x, y, len(reduced) - 1 - place)),
    ]
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)} over the steps" class="chart">{"".join(parts)}</svg>'
    )


def draw_line(line: Line, points: Sequence[Point], x: Scale, y: Scale, above: int) -> Iterator[str]:
    """The band from lowest to highest, if a point stands for several steps; the means; a dot if there is one point only. `above`: the number
    of lines drawn later, which may hide this one: it is wider then."""
    colour = line.colour % COLOURS
    if any(low != high for _, low, _, high in points):
        there = [f"{x.at(step)},{y.at(high)}" for step, _, _, high in points]
        back = [f"{x.at(step)},{y.at(low)}" for step, low, _, _ in reversed(points)]
        yield f'<polygon class="band c{colour}" points="{" ".join((*there, *back))}"/>'
    middle = " ".join(f"{x.at(step)},{y.at(mean)}" for step, _, mean, _ in points)
    yield f'<polyline class="line c{colour}" stroke-width="{1.6 + 2.2 * min(above, 4):g}" points="{middle}"><title>{escape(line.label)}</title></polyline>'
    if len(points) == 1:
        yield f'<circle class="dot c{colour}" cx="{x.at(points[0][0])}" cy="{y.at(points[0][2])}" r="3"/>'


def draw_grid(ticks: Sequence[float], y: Scale) -> Iterator[str]:
    for tick in ticks:
        height = y.at(tick)
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{height}" y2="{height}"/>'
        yield f'<text class="tick" x="{LEFT - 6}" y="{height + 4}" text-anchor="end">{label_tick(tick)}</text>'


def draw_steps(x: Scale) -> Iterator[str]:
    for place, anchor in ((x.low, "start"), ((x.low + x.high) / 2, "middle"), (x.high, "end")):
        if anchor == "start" or x.high > x.low:
            yield f'<text class="tick" x="{x.at(place)}" y="{HEIGHT - 8}" text-anchor="{anchor}">{round(place):,}</text>'


def round_ticks(low: float, high: float) -> list[float]:
    """About four round numbers that cover the values."""
    span = high - low or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 3))
    size = next(power * factor for factor in (1, 2, 5, 10) if span / (power * factor) <= 4)
    first, last = math.floor(low / size), math.ceil(high / size)
    return [tick * size for tick in range(first, last + 1)]


def label_tick(value: float) -> str:
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e6:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    return f"{value:,.6g}" if abs(value) < 1e4 else f"{value / 1000:,.4g}k"
