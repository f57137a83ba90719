# test_torture_sequence.py: what torture does follows from the seed, and covers what it should.
from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from pyvmm.memory import GuestMemory
from pyvmm.testing.operations import BLOCK_PAGES, KINDS, SCRATCH_PAGES, Kind, sequence
from pyvmm.testing.shelves import Store

PAGES = 10 * BLOCK_PAGES + 7


def first(seed, count=2000, pages=PAGES, kinds=None):
    return list(islice(sequence(seed, pages, kinds), count))


def test_the_same_seed_gives_the_same():
    assert first(1) == first(1)
    assert first(1) != first(2)


def test_a_seed_gives_the_same_for_ever():
    """A seed in a report of last year must still lead to its failure: this fails where the generator has changed."""
    kinds = {"a": Kind(3, "block", print), "b": Kind(2, "run", print), "c": Kind(1, "scratch", print)}
    assert [(o.kind, o.page, o.count) for o in first(11, 6, PAGES, kinds)] == [
        ("a", 3584, 512),
        ("b", 1511, 4),
        ("a", 1024, 512),
        ("c", 5041, 1),
        ("c", 4199, 1),
        ("b", 4623, 2),
    ]


def test_all_kinds_come_by_their_weights():
    found = Counter(operation.kind for operation in first(3, 20000))
    total = sum(kind.weight for kind in KINDS.values())
    for name, kind in KINDS.items():
        expected = 20000 * kind.weight / total
        assert found[name] == pytest.approx(expected, abs=4 * expected**0.5)  # standard deviations


def test_operations_stay_in_ram_and_in_one_block():
    for operation in first(4, 20000):
        scope = KINDS[operation.kind].scope
        if scope == "none":
            assert operation.count == 0
            continue
        last = operation.page + operation.count - 1
        assert 0 <= operation.page <= last < PAGES
        assert operation.page // BLOCK_PAGES == last // BLOCK_PAGES
        if scope == "block":
            assert operation.page % BLOCK_PAGES == 0
            assert operation.count in (BLOCK_PAGES, 7)
        if scope == "scratch":
            assert operation.page >= PAGES - SCRATCH_PAGES


def test_operations_meet():
    """Half of them go where one of the last eight went: with ten blocks, nearly nine in ten do by chance alone."""
    pages = 1000 * BLOCK_PAGES
    blocks = [operation.block for operation in first(5, 4000, pages) if KINDS[operation.kind].scope in ("block", "run")]
    met = sum(block in blocks[max(0, at - 8) : at] for at, block in enumerate(blocks))
    assert met / len(blocks) == pytest.approx(0.5, abs=0.05)


def test_the_store_notes_who_forgets_twice():
    store = Store(GuestMemory(16 << 20))
    locators = store.store(5, b"a" * 4096 + b"b" * 4096)
    assert store.fetch(5, locators) == b"a" * 4096 + b"b" * 4096
    store.forget(5, locators)
    assert (store.kept(), store.wrong) == (0, [])
    store.forget(6, locators[:1])
    assert store.wrong == ["page 6 forgotten twice"]
