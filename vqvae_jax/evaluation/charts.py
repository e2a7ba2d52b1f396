"""Charts for the HTML report: data in, the coordinates of an SVG out; the template gives them their colours."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 360, 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 348, 12, 172
_TICKS = MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10])
_MOST_DOTS = 40
"""A line of more points is drawn without dots."""
_MOST_POINTS = 600
"""A line of more points is thinned: there are not more pixels to draw it on."""

Points = Sequence[tuple[float, float]]


@dataclasses.dataclass(frozen=True)
class Chart:
    """One chart in SVG units.

    Attributes:
      title, x_label: for people; ``description`` says in words what the chart shows.
      x_ticks, y_ticks: position and text of each.
      lines: by name, the points of a polyline; ``dots`` has those to mark.
      bars: x, y, width, height and text of each.
      rule: x1, y1, x2, y2 of a dashed line, and its name.
    """

    title: str
    description: str
    x_label: str
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    lines: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    dots: list[tuple[float, float, str]] = dataclasses.field(default_factory=list)
    bars: list[tuple[float, float, float, float, str]] = dataclasses.field(default_factory=list)
    rule: tuple[float, float, float, float, str] | None = None
    width, height, left, right, top, bottom = WIDTH, HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM


class _Axis:
    """Data to SVG units, with round ticks; it reaches from the first tick to the last where ``to_ticks``."""

    def __init__(self, low: float, high: float, start: float, end: float, *, to_ticks: bool, logarithmic: bool = False):
        self._scale = math.log10 if logarithmic else float
        low, high = self._scale(low), self._scale(high)
        if not high > low:
            low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
        ticks = range(math.floor(low), math.ceil(high) + 1) if logarithmic else _TICKS.tick_values(low, high)
        self._low, self._high = (ticks[0], ticks[-1]) if to_ticks else (low, high)
        self._start, self._end = start, end
        values = [10.0**tick if logarithmic else tick for tick in ticks if self._low <= tick <= self._high]
        self.ticks = [(self(value), f"{round(value, 10) + 0.0:,.10g}") for value in values]

    def __call__(self, value: float) -> float:
        share = (self._scale(value) - self._low) / (self._high - self._low)
        return round(float(self._start + share * (self._end - self._start)), 1)


def histogram(title: str, values: Sequence[float], x_label: str, *, unit: str = "slices") -> Chart | None:
    """How many of the finite values lie in each of up to 24 equal ranges; None if there is no finite value."""
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return None
    counts, edges = np.histogram(values, bins=min(24, max(5, math.isqrt(len(values)) * 2)))
    x = _Axis(float(edges[0]), float(edges[-1]), _LEFT, _RIGHT, to_ticks=False)
    y = _Axis(0, int(counts.max()), _BOTTOM, _TOP, to_ticks=True)
    bars = []
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        width = max(x(high) - x(low) - 1, 1)
        text = f"{low:.3f} to {high:.3f}: {count} {unit}"
        bars.append((x(low), y(count), round(width, 1), round(_BOTTOM - y(count), 1), text))
    mean = float(np.mean(values))
    description = (
        f"Histogram of {len(values)} {unit}: from {min(values):.3f} to {max(values):.3f}, "
        f"mean {mean:.3f}, median {np.median(values):.3f}."
    )
    whole = [tick for tick in y.ticks if "." not in tick[1]]
    return Chart(title, description, x_label, x.ticks, whole, bars=bars, rule=(x(mean), _TOP, x(mean), _BOTTOM, "mean"))


def lines(
    title: str,
    series: dict[str, Points],
    x_label: str,
    *,
    level: tuple[float, str] | None = None,
    logarithmic: bool = False,
) -> Chart | None:
    """Lines through (x, y) points, by name; None if no point is finite.

    ``level`` is a y to mark by a dashed line and its name. On a ``logarithmic`` y axis points of 0 are left out.
    """
    lowest = 0 if logarithmic else -math.inf
    series = {
        name: [point for point in points if all(map(math.isfinite, point)) and point[1] > lowest]
        for name, points in series.items()
    }
    series = {name: points for name, points in series.items() if points}
    if not series:
        return None
    xs, ys = zip(*(point for points in series.values() for point in points), strict=True)
    ys = [*ys, *([level[0]] if level else [])]
    x = _Axis(min(xs), max(xs), _LEFT, _RIGHT, to_ticks=False)
    y = _Axis(min(ys), max(ys), _BOTTOM, _TOP, to_ticks=True, logarithmic=logarithmic)
    drawn, dots, words = [], [], []
    for name, points in series.items():
        kept = np.unique(np.linspace(0, len(points) - 1, min(len(points), _MOST_POINTS)).round().astype(int))
        placed = [(x(points[index][0]), y(points[index][1])) for index in kept]
        drawn.append((name, " ".join(f"{left:g},{top:g}" for left, top in placed)))
        if len(points) <= _MOST_DOTS:
            dots += [(*place, f"{points[i][0]:,g}: {points[i][1]:.4g}") for place, i in zip(placed, kept, strict=True)]
        words.append(f"{name}: from {points[0][1]:.4g} to {points[-1][1]:.4g}.")
    rule = (_LEFT, y(level[0]), _RIGHT, y(level[0]), level[1]) if level else None
    return Chart(title, " ".join(words), x_label, x.ticks, y.ticks, lines=drawn, dots=dots, rule=rule)
