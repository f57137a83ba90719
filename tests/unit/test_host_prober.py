# test_host_prober.py: how probes are asked, kept, switched off and reported, with probes of our own.
from __future__ import annotations

import threading
import time
from graphlib import TopologicalSorter

import pytest

from pyvmm.errors import BadInput
from pyvmm.host.feature import Feature, Outcome
from pyvmm.host.probe import PROBES
from pyvmm.host.prober import SWITCH, Probe, Prober


class Trial:
    """A probe's function that counts its calls, and does what the test says."""

    def __init__(self, outcome=None, error=None, seconds=0.0):
        self.outcome = outcome or Outcome(True, "works")
        self.error = error
        self.seconds = seconds
        self.calls = 0

    def __call__(self):
        self.calls += 1
        time.sleep(self.seconds)
        if self.error is not None:
            raise self.error
        return self.outcome


def probe(feature, trial, **options):
    return Probe(feature, "group", f"title of {feature}", trial, cost="some cost", remedy="some remedy", **options)


@pytest.fixture(autouse=True)
def nothing_switched_off(monkeypatch):
    monkeypatch.delenv(SWITCH, raising=False)


def test_a_trial_is_made_when_first_asked_and_only_then():
    trial, other = Trial(), Trial()
    prober = Prober([probe(Feature.THP, trial), probe(Feature.KSM, other)])
    assert trial.calls == 0
    assert prober.has(Feature.THP)
    assert prober.has("thp")
    assert (trial.calls, other.calls) == (1, 0)
    assert [finding.feature for finding in prober.findings()] == [Feature.THP, Feature.KSM]
    assert (trial.calls, other.calls) == (1, 1)


@pytest.mark.parametrize(
    ("error", "shown"),
    [(OSError(22, "Invalid argument"), "[Errno 22] Invalid argument"), (MemoryError(), "MemoryError")],
)
def test_a_trial_that_raises_is_a_finding_and_ends_nothing(error, shown):
    prober = Prober([probe(Feature.THP, Trial(error=error)), probe(Feature.KSM, Trial())])
    broken, fine = prober.findings()
    assert (broken.ok, broken.value) == (False, shown)
    assert (broken.cost, broken.remedy) == ("some cost", "some remedy")
    assert fine.ok


def test_an_interrupt_of_the_user_is_not_swallowed():
    prober = Prober([probe(Feature.THP, Trial(error=KeyboardInterrupt()))])
    with pytest.raises(KeyboardInterrupt):
        prober.has(Feature.THP)


def test_a_slow_trial_is_timed_and_made_once_for_all_threads():
    trial = Trial(seconds=0.05)
    prober = Prober([probe(Feature.THP, trial)])
    threads = [threading.Thread(target=prober.has, args=(Feature.THP,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert trial.calls == 1
    assert prober.finding(Feature.THP).seconds >= 0.05


def test_a_trial_knows_better_what_helps():
    prober = Prober([probe(Feature.THP, Trial(Outcome(False, "no", "do this")))])
    assert prober.finding(Feature.THP).remedy == "do this"


@pytest.mark.parametrize("way", ["environment", "block"])
def test_switched_off_is_shown_and_not_tried(monkeypatch, way):
    trial = Trial()
    prober = Prober([probe(Feature.THP, trial), probe(Feature.KSM, Trial())])
    if way == "environment":
        monkeypatch.setenv(SWITCH, "ksm, thp,")
        off = prober.finding(Feature.THP)
        monkeypatch.delenv(SWITCH)
    else:
        with prober.without("thp", Feature.KSM):
            off = prober.finding(Feature.THP)
            assert not prober.has(Feature.KSM)
    assert (off.ok, off.value, trial.calls) == (False, "switched off", 0)
    assert prober.has(Feature.THP)
    assert prober.has(Feature.KSM)


def test_blocks_without_a_feature_nest_and_end_with_an_exception():
    prober = Prober([probe(Feature.THP, Trial())])
    with prober.without("thp"):
        with pytest.raises(ZeroDivisionError), prober.without("thp"):
            raise ZeroDivisionError
        assert not prober.has("thp")
    assert prober.has("thp")


def test_what_a_missing_feature_carries_is_not_tried():
    trial = Trial()
    prober = Prober(
        [
            probe(Feature.UFFD, Trial()),
            probe(Feature.UFFD_MOVE, trial, requires=(Feature.UFFD,)),
            probe(Feature.UFFD_MOVE_LARGE, Trial(), requires=(Feature.UFFD_MOVE,)),
        ]
    )
    with prober.without("uffd"):
        assert [finding.needs for finding in prober.findings()] == [None, Feature.UFFD, Feature.UFFD_MOVE]
        assert prober.finding("uffd_move").value == "not tried: needs uffd"
    assert trial.calls == 0
    assert prober.has("uffd_move_large")


def test_a_name_that_is_none_is_refused(monkeypatch):
    prober = Prober([probe(Feature.THP, Trial())])
    with pytest.raises(BadInput, match=r"no feature 'thq'.*thp"):
        prober.has("thq")
    with pytest.raises(BadInput, match="thq"), prober.without("thq"):
        pass
    monkeypatch.setenv(SWITCH, "thq")
    with pytest.raises(BadInput, match="thq"):
        prober.findings()


def test_the_table_has_each_feature_once_and_no_circle():
    assert sorted(probe.feature for probe in PROBES) == sorted(Feature)
    TopologicalSorter({row.feature: row.requires for row in PROBES}).prepare()


@pytest.mark.parametrize("row", PROBES, ids=lambda row: row.feature)
def test_each_feature_says_what_its_lack_costs_and_what_helps(row):
    for text in (row.title, row.cost, row.remedy):
        assert text == text.strip()
        assert text
        assert text.isascii()
    assert len(row.title) <= 23


def test_the_groups_of_the_table_are_not_scattered():
    groups = [row.group for row in PROBES]
    assert groups == sorted(groups, key=["KVM", "memory", "userfaultfd"].index)
