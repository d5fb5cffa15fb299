"""Charts: round ticks within their range, curves that keep their ends, and frames for whatever there is to draw."""

import math
import xml.etree.ElementTree as xml

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.evaluation import svg

numbers = st.floats(-1e9, 1e9, allow_nan=False)


@settings(max_examples=40)
@given(numbers, st.floats(1e-6, 1e9))
def test_ticks_are_few_rising_and_inside(low, width):
    high = low + width
    ticks = svg._ticks(low, high)
    assert 1 <= len(ticks) <= 6 and ticks == sorted(set(ticks))
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert all(low - slack <= tick <= high + slack for tick in ticks)


@settings(max_examples=40)
@given(st.lists(st.one_of(numbers, st.just(math.nan), st.just(math.inf)), min_size=1, max_size=60))
def test_whatever_is_drawn_is_xml_within_its_frame(values):
    text = svg.curves("a < b & c", [svg.Curve("x", 0, list(enumerate(values)))])
    if not any(map(math.isfinite, values)):
        assert text == ""
        return
    chart = xml.fromstring(text)
    assert chart.get("aria-label") == "a < b & c"
    for line in chart.iter("polyline"):
        for pair in line.get("points").split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 360 and 0 <= y <= 220
    assert text.count("×") == sum(not math.isfinite(v) for v in values)


@given(st.floats(-6, 6), st.floats(1.001, 12))
def test_ticks_of_a_logarithmic_axis_are_round_and_inside(low, width):
    ticks = svg._decades(low, low + width)
    assert 1 <= len(ticks) <= 6 and ticks == sorted(ticks)
    for tick in ticks:
        assert low <= tick <= low + width and f"{10**tick:.1e}"[:3] in ("1.0", "2.0", "3.0", "5.0")


def test_a_long_curve_keeps_its_last_point_and_what_is_no_number():
    points = [(float(x), 1.0) for x in range(10_000)]
    points[777] = (777.0, math.nan)
    kept = svg._thinned(points)
    assert len(kept) < 300 and kept[-1] == points[-1] and points[777] in kept


@settings(max_examples=40)
@given(st.integers(241, 6000), st.floats(0, 1, exclude_max=True), st.integers(0, 2**32 - 1))
def test_a_long_curve_keeps_every_spike_in_its_place(count, where, seed):
    """A single high record among thousands is seen, as is a single low one."""
    values, at = np.random.default_rng(seed).standard_normal(count).tolist(), int(where * count)
    values[at], values[at - 1] = 2e9, -2e9
    kept = svg._thinned(list(enumerate(values)))
    assert len(kept) <= 242 and kept == sorted(kept) and set(kept) <= set(enumerate(values))
    assert (at, 2e9) in kept and ((at - 1) % len(values), -2e9) in kept


def test_a_spike_of_a_long_curve_is_drawn():
    values = [9.0 if x == 2777 else 2.0 for x in range(5000)]
    (line,) = xml.fromstring(svg.curves("loss", [svg.Curve("x", 0, list(enumerate(values)))])).iter("polyline")
    heights = [float(pair.split(",")[1]) for pair in line.get("points").split()]
    assert max(heights) - min(heights) > 100


@pytest.mark.parametrize(("values", "said"), [([1.0, 5.0], "4"), ([0.01, 1.0], "0.1"), ([0.4, 5.0], "2")])
def test_an_axis_is_logarithmic_where_values_span_more_than_ten(values, said):
    text = svg.curves("t", [svg.Curve("x", 0, list(enumerate(values)))])
    assert f">{said}</text>" in text


def test_bars_are_as_high_as_their_values():
    chart = xml.fromstring(svg.bars("use", [4.0, 8.0], [2.0, 8.0], 8.0, "position"))
    heights = [float(rect.get("height")) for rect in chart.iter("rect")]
    assert heights[1] / heights[0] == pytest.approx(0.5, abs=0.01) and heights[2] == heights[3] == max(heights)
