# test_torture.py: the memory engine under random operations, judged by the guest, a model, KVM and the kernel.
from __future__ import annotations

import json
from contextlib import nullcontext

import pytest

from pyvmm import host
from pyvmm._native import lib
from pyvmm.cli import main
from pyvmm.layout import MIB
from pyvmm.memory.engine import Engine
from pyvmm.pytest_plugin import needs
from pyvmm.testing.torture import Torture, TortureFailure

pytestmark = needs("kvm", "uffd_guest")

SECONDS = 6
ODD = 48 * MIB + 5 * 4096
"""RAM that ends within a block."""

WAYS = [pytest.param(True, marks=needs("uffd_move"), id="move"), pytest.param(False, id="copy")]
SIZES = [pytest.param("2m", marks=needs("thp")), "4k"]


@pytest.mark.parametrize("move", WAYS)
@pytest.mark.parametrize("pages", SIZES)
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize("memory", [48 * MIB, ODD])
def test_torture(memory, cpus, pages, move):
    seed = 1000 * cpus + memory // 4096 % 512 + 10 * (pages == "2m") + move
    with nullcontext() if move else host.without("uffd_move"), Torture(seed, memory, cpus, pages) as torture:
        try:
            torture.run(SECONDS)
        except TortureFailure as failure:
            pytest.fail(failure.report, pytrace=False)
        assert torture.checks >= 1
        faults = torture.vm.memory.engine.stats().answers
        assert faults["failed"] == 0
        assert faults["pages"] > 0
        print(f"{torture.operations} operations, {torture.checks} checks, faults {faults}")


def test_the_command(capsys):
    assert main(["torture", "--seconds", "1", "--seed", "7", "--json", "--mem", "32M"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert (result["seed"], result["ok"], result["wrong"]) == (7, True, None)
    assert result["operations"] == sum(result["done"].values()) > 0
    assert err.startswith("seed 7\n")


def test_a_lost_page_is_found(monkeypatch, capsys):
    """The oracle at work: an engine that takes what it removes for zeros is caught, and named with its seed."""
    remove = Engine.remove

    def lose(self, page, count=1, what="aside"):
        gone = remove(self, page, count, what)
        words = lib.pv_engine_pages(self._native)
        for each in range(page, page + count):
            if words[each] & lib.PV_PAGE_HOME == lib.PV_HOME_ASIDE:
                words[each] = lib.PV_HOME_ZERO
        return gone

    monkeypatch.setattr(Engine, "remove", lose)
    assert main(["torture", "--seconds", "20", "--seed", "3", "--mem", "16M"]) == 1
    err = capsys.readouterr().err
    assert "pyvmm: seed 3: " in err
    assert "the last " in err
    assert "remove " in err
