# test_pageset.py: a set of pages does what Python's set does.
from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.memory.pageset import PageSet

PAGES = 200
RUN = st.tuples(st.integers(0, PAGES), st.integers(0, PAGES)).map(lambda ends: (min(ends), max(ends) - min(ends)))


def expand(runs):
    return [page for first, count in runs for page in range(first, first + count)]


@given(st.lists(RUN, max_size=8), st.lists(RUN, max_size=8), st.lists(RUN, max_size=8))
def test_like_a_set(runs, taken, others):
    pages, model = PageSet(PAGES, runs), set(expand(runs))
    for run in taken:
        found = expand(pages.take(*run))
        assert found == sorted(model & set(expand([run])))
        model -= set(found)
    assert expand(pages.runs()) == sorted(model)
    assert expand(pages.complement().runs()) == sorted(set(range(PAGES)) - model)
    other = PageSet(PAGES, others)
    assert expand(pages.remove(other).runs()) == sorted(model - set(expand(others)))


def test_many_runs_are_taken_at_once():
    pages = PageSet(1000, [(page, 1) for page in range(0, 1000, 2)])
    assert pages.take(1, 998) == [(page, 1) for page in range(2, 999, 2)]
    assert expand(pages.runs()) == [0]


@pytest.mark.parametrize("run", [(-1, 1), (PAGES, 1), (0, PAGES + 1), (5, -1)])
def test_pages_beyond(run):
    pages = PageSet(PAGES)
    for method in (pages.add, pages.take):
        with pytest.raises(IndexError, match=f"of {PAGES}"):
            method(*run)
