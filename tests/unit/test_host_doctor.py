# test_host_doctor.py: the doctor's report, JSON and exit status, of hosts that do not exist.
from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from pyvmm import host
from pyvmm.cli import doctor, main
from pyvmm.host import Feature, settings, trials_kvm
from pyvmm.host.feature import Outcome
from pyvmm.host.probe import PROBES
from pyvmm.kvm import Kvm

FACTS = dict.fromkeys(settings.facts())
KEYS = {"group", "title", "ok", "value", "numbers", "only_slower", "needs", "cost", "remedy", "seconds"}


def findings_of(ok):
    """What the table says of a host where everything, or nothing, works."""
    value = "a value of some length, with an error as the kernel gives it: ENOTSUP, Operation not supported"
    return [probe.found(Outcome(ok, value)) for probe in PROBES]


def shown(findings, facts=FACTS, encoding="utf-8", **options):
    raw = io.BytesIO()
    with io.TextIOWrapper(raw, encoding=encoding) as file:
        doctor.show(Console(file=file, highlight=False, **options), findings, facts)
        file.flush()
        return raw.getvalue().decode(encoding)


@pytest.fixture
def fake_host(monkeypatch):
    def install(ok):
        monkeypatch.setattr(host, "findings", lambda: findings_of(ok))
        monkeypatch.setattr(host, "facts", lambda: FACTS)

    return install


@pytest.mark.parametrize("ok", [True, False])
def test_the_report_fits_80_columns_and_has_no_colours_in_a_file(ok):
    text = shown(findings_of(ok), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    assert not any(line != line.rstrip() for line in text.splitlines())


def test_what_is_missing_has_cost_and_remedy_below_it():
    words = " ".join(shown(findings_of(False), width=80).split())
    for probe in PROBES:
        assert f"cost: {probe.cost} help: {probe.remedy}" in words
    assert "cost:" not in shown(findings_of(True), width=80)


def test_the_marks_tell_missing_from_slow_without_colours():
    lines = shown(findings_of(False), width=80).splitlines()
    marks = {probe.title: ("~" if probe.only_slower else "✗") for probe in PROBES}
    for title, mark in marks.items():
        assert any(line.startswith(f" {mark} {title} ") for line in lines)
    assert all(f" ✓ {title} " in shown(findings_of(True), width=80) for title in marks)


def test_a_terminal_without_unicode_can_show_it():
    assert " + /dev/kvm" in shown(findings_of(True), encoding="ascii", width=80)
    assert " x /dev/kvm" in shown(findings_of(False), encoding="ascii", width=80)


def test_what_was_not_tried_is_one_line():
    probe = PROBES[-1]
    finding = probe.found(Outcome(False, "not tried: needs kvm"), Feature.KVM)
    assert " - moving 2 MiB" in shown([finding], width=80)
    assert probe.cost not in shown([finding], width=80)


def test_markup_in_a_value_is_text():
    finding = PROBES[0].found(Outcome(False, "[bold]always[/bold] [madvise] never"))
    assert "[bold]always[/bold] [madvise] never" in shown([finding], width=80)


def test_a_host_that_tells_nothing_is_shown():
    assert "up to ?, recommended ?" in shown(findings_of(True), width=80)


@pytest.mark.parametrize(("ok", "status"), [(True, 0), (False, doctor.EXIT_NO_GUESTS)])
@pytest.mark.parametrize("options", [["--json"], [], ["--summary"]])
def test_the_exit_status_says_whether_guests_can_run(fake_host, capsys, ok, status, options):
    fake_host(ok)
    assert main(["doctor", *options]) == status
    assert capsys.readouterr().out


@pytest.mark.parametrize("ok", [True, False])
def test_json_has_one_object_with_stable_keys(fake_host, capsys, ok):
    fake_host(ok)
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert report.keys() == {"schema", "ok", "seconds", "host", "findings"}
    assert report["ok"] is ok
    assert report["host"].keys() == FACTS.keys()
    assert report["findings"].keys() == set(Feature)
    for finding in report["findings"].values():
        assert finding.keys() == KEYS
        assert (finding["cost"] is None) == ok
        assert (finding["remedy"] is None) == ok


def test_the_summary_is_short(fake_host):
    for ok in (True, False):
        fake_host(ok)
        lines = doctor.summary_line().splitlines()
        assert max(map(len, lines)) <= 80
        assert len(lines) <= 12


def test_no_kvm_says_what_helps(monkeypatch):
    monkeypatch.setattr(trials_kvm, "Kvm", lambda: Kvm("/dev/there-is-none"))
    outcome = trials_kvm.opens()
    assert (outcome.ok, outcome.value) == (False, "no /dev/there-is-none")
    assert "modprobe" in outcome.remedy


def test_facts_need_no_kvm(monkeypatch):
    monkeypatch.setattr(settings, "Kvm", lambda: Kvm("/dev/there-is-none"))
    known = settings.facts()
    assert known["max_vcpus"] is None
    assert known["kernel"]
    assert known["memory_bytes"] > 0
