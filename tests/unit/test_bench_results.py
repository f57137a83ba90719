# test_bench_results.py: what the benchmarks' tables are made of, on values made by hand.
from __future__ import annotations

from math import isnan

import pytest

from pyvmm.bench import MANY, Collected, Result, alternate, grouped, scaled
from pyvmm.cli.bench_tables import ratio


def test_sides_take_turns_and_the_first_round_does_not_count():
    order = []

    def side(name):
        return lambda: order.append(name) or float(len(order))

    a, b = alternate({"a": side("a"), "b": side("b")}, "s", rounds=2, group="g")
    assert order == ["a", "b"] * 3
    assert (a.values, b.values, a.group) == ((3.0, 5.0), (4.0, 6.0), "g")


def test_ratios_are_of_rounds_or_of_medians():
    base, other = Result("base", "s", (1.0, 2.0, 4.0)), Result("other", "s", (2.0, 2.0, 2.0))
    assert other.ratios(base) == (2.0, 1.0, 0.5)
    assert ratio(other, base) == "1.00 (0.50-2.00)"
    assert ratio(base, base) == "1.00"
    assert Result("fewer", "s", (4.0,)).ratios(base) == (2.0,)
    many = Result("many", "s", tuple(map(float, range(1, MANY + 1))))
    assert many.ratios(many) == (1.0,)
    assert ratio(Result("share", "%", (1.0,)), base) == ""
    assert ratio(other, Result("nothing", "s", (0.0, 0.0, 0.0))) == ""


def test_quantiles():
    result = Result("r", "s", tuple(float(i) for i in range(100, 0, -1)))
    assert (result.quantile(0), result.quantile(0.9), result.quantile(1), result.median) == (1, 91, 100, 50.5)
    assert isnan(Result("none", "s", ()).median)


@pytest.mark.parametrize(
    ("value", "unit", "shown", "as_unit"),
    [
        (2.5, "s", 2.5, "s"),
        (0.25, "s", 250.0, "ms"),
        (2e-6, "s", 2.0, "us"),
        (2e-7, "s", 0.2, "us"),
        (0.5, "%", 0.5, "%"),
    ],
)
def test_units_with_few_digits(value, unit, shown, as_unit):
    result = scaled(Result("r", unit, (value,)))
    assert (result.median, result.unit) == (pytest.approx(shown), as_unit)


def test_what_is_collected_comes_by_groups():
    found = Collected()
    found.add("one", "a", "s", 1.0)
    found.add("two", "a", "%", 2.0)
    found.add("one", "b", "s", 3.0, 4.0)
    found.add("one", "a", "s", 5.0)
    results = found.results()
    assert [(each.group, each.name, each.values) for each in results] == [
        ("one", "a", (1.0, 5.0)),
        ("one", "b", (3.0, 4.0)),
        ("two", "a", (2.0,)),
    ]
    assert list(grouped(results)) == ["one", "two"]
