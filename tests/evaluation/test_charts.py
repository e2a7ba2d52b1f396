"""Charts: data land where their ticks say."""

import math

import numpy as np
import pytest

from vqvae_jax.evaluation import charts


def position(ticks, value, scale=float):
    """Where a value belongs by the first and last tick, which are apart from what is tested."""
    (start, first), (end, last) = ticks[0], ticks[-1]
    low, high = (scale(float(text.replace(",", ""))) for text in (first, last))
    return start + (scale(value) - low) / (high - low) * (end - start)


@pytest.mark.parametrize("logarithmic", [False, True])
def test_points_lie_where_the_ticks_say(logarithmic):
    points = [(100, 0.02), (2500, 3.0), (1200, 0.7)]
    chart = charts.lines("a", {"b": points}, "x", logarithmic=logarithmic)
    for (x, y), (left, top, _) in zip(points, chart.dots, strict=True):
        assert left == pytest.approx(position(chart.x_ticks, x), abs=0.2)
        assert top == pytest.approx(position(chart.y_ticks, y, math.log10 if logarithmic else float), abs=0.2)


def test_a_histograms_bars_hold_every_finite_value():
    values = [*np.random.default_rng(0).normal(0.8, 0.1, 200), math.nan]
    chart = charts.histogram("a", values, "x")
    counts = [int(text.split(": ")[1].split()[0]) for *_, text in chart.bars]
    assert sum(counts) == 200
    for (_, top, _, height, _), count in zip(chart.bars, counts, strict=True):
        assert top == pytest.approx(position(chart.y_ticks, count), abs=0.2)
        assert top + height == pytest.approx(charts.Chart.bottom, abs=0.1)


@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_one_point_and_equal_values_have_a_chart_of_finite_numbers(value):
    for chart in (charts.lines("a", {"b": [(7, value)]}, "x"), charts.histogram("a", [value] * 3, "x")):
        numbers = [tick for tick, _ in (*chart.x_ticks, *chart.y_ticks)]
        assert chart.x_ticks and chart.y_ticks and np.isfinite(numbers).all()


def test_nothing_finite_is_no_chart():
    assert charts.lines("a", {"b": [(1, math.nan)]}, "x") is None
    assert charts.lines("a", {"b": [(1, 0.0)]}, "x", logarithmic=True) is None
    assert charts.histogram("a", [math.nan], "x") is None


def test_a_long_line_is_thinned_and_keeps_its_ends():
    _, points = charts.lines("a", {"b": [(i, i) for i in range(5000)]}, "x").lines[0]
    points = [tuple(map(float, point.split(","))) for point in points.split()]
    assert len(points) <= 600
    assert points[0][0] == charts.Chart.left and points[-1][0] == charts.Chart.right
