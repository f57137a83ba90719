# test_torture.py: the memory engine under random operations, judged by the guest, a model, KVM and the kernel.
from __future__ import annotations

import json
import random
from contextlib import nullcontext
from itertools import islice

import pytest

from pyvmm import host
from pyvmm._native import lib
from pyvmm.cli import main
from pyvmm.layout import MIB
from pyvmm.memory.engine import Engine
from pyvmm.pytest_plugin import needs
from pyvmm.testing import checkpoints
from pyvmm.testing.checkpoints import Tortured
from pyvmm.testing.operations import Operation, sequence
from pyvmm.testing.torture import Torture, TortureFailure

pytestmark = needs("kvm", "uffd_guest")

SECONDS = 1.5
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
        faults = torture.subject.stats().answers
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


@pytest.mark.parametrize(("seed", "pages"), [pytest.param(3, "2m", marks=needs("thp")), (1, "4k")])  # 1: dirty rings
def test_snapshots_among_the_rest(seed, pages, tmp_path, monkeypatch):
    """Many of them, with other operations between: the torture goes on with restored VMs too, and no file is left."""
    monkeypatch.setattr(checkpoints, "_SHM", str(tmp_path))
    with Torture(seed, 20 * MIB + 5 * 4096, 2, pages) as torture:
        others = (each for each in sequence(seed, torture.subject.pages) if each.kind != "snapshot")
        made, rng = {torture.vm}, random.Random(seed)
        try:
            for number in range(8):
                torture.do(Operation(number, "snapshot", 0, 0, rng.getrandbits(32)))
                made.add(torture.vm)
                for operation in islice(others, 10):
                    torture.do(operation)
            torture.finish()
        except TortureFailure as failure:
            pytest.fail(failure.report, pytrace=False)
        assert len(made) > 2, "no restored VM took the place of another"
        assert torture.subject.stats().by_home["file"] > 0
        assert torture.subject.stats().faults > torture.vm.memory.engine.stats().faults
    assert list(tmp_path.iterdir()) == []


def test_a_page_that_a_snapshot_lost_is_found(tmp_path, monkeypatch):
    """The oracle at work: by the comparison, by the copy's guest, or by the model; and the folder is removed."""
    monkeypatch.setattr(checkpoints, "_SHM", str(tmp_path))
    real = Tortured.restore.__func__

    def restore(cls, path, **options):
        machine = real(cls, path, **options)
        machine.memory.write(machine.memory.gpa_of(7 * 512), b"lost")
        return machine

    monkeypatch.setattr(Tortured, "restore", classmethod(restore))
    with Torture(3, 16 * MIB) as torture:
        rng = random.Random(5)
        with pytest.raises(TortureFailure, match=r"other bytes in the restored VM|wrong pages|has ended") as failure:
            list(map(torture.do, (Operation(number, "snapshot", 0, 0, rng.getrandbits(32)) for number in range(50))))
        assert "snapshot value=0x" in failure.value.report
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("seed", "pages"), [pytest.param(2, "2m", marks=needs("thp")), (1, "4k")])  # 1: dirty rings
def test_migrations_among_the_rest(seed, pages):
    """Many of them, with other operations while the guest leaves, and while its pages come."""
    with Torture(seed, 20 * MIB + 5 * 4096, 2, pages) as torture:
        others = (each for each in sequence(seed, torture.subject.pages) if each.kind not in ("snapshot", "migrate"))
        made, rng = {torture.vm}, random.Random(seed)
        try:
            for number in range(0, 700, 100):  # by the next one each has come to its end
                torture.do(Operation(number, "migrate", 0, 0, rng.getrandbits(32)))
                for each, operation in enumerate(islice(others, 15), number + 1):
                    torture.do(Operation(each, operation.kind, operation.page, operation.count, operation.value))
                made.add(torture.vm)
            torture.finish()
        except TortureFailure as failure:
            pytest.fail(failure.report, pytrace=False)
        assert len(made) > 2, "the guest has not moved"
        assert torture.subject.moves["moved"] >= len(made) - 1
        assert torture.subject.stats().by_home["peer"] > 0


def test_a_page_that_a_migration_lost_is_found(monkeypatch):
    """The oracle at work: by the comparison, by the guest, or by the model."""
    real = Tortured.receive.__func__

    def receive(cls, listen, **options):
        prepare = options.pop("prepare", None)

        def spoil(machine):
            if machine.memory.engine.at_home("peer").count() == 0:
                machine.memory.write(machine.memory.gpa_of(4 * 512), b"lost")
            if prepare is not None:
                prepare(machine)

        return real(cls, listen, prepare=spoil, **options)

    monkeypatch.setattr(Tortured, "receive", classmethod(receive))
    with Torture(3, 16 * MIB) as torture:
        rng = random.Random(5)

        def again(number):
            torture.do(Operation(number, "migrate", 0, 0, rng.getrandbits(32)))
            torture.check()

        with pytest.raises(TortureFailure, match=r"RAM is not the same|wrong pages|has ended") as failure:
            list(map(again, range(0, 5000, 100)))
        assert "migrate value=0x" in failure.value.report
