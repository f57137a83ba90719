# test_pytest_plugin.py: which tests the plugin skips, fails and runs, by option, by CI and by what the host has.
from __future__ import annotations

import pytest

CONFTEST = """
import sys
pytest_plugins = [] if "pyvmm.pytest_plugin" in sys.modules else ["pyvmm.pytest_plugin"]
"""

TESTS = """
import pytest
from pyvmm.pytest_plugin import needs

def test_plain(): pass

@needs("kvm")
def test_kvm(): raise SystemExit("ran without KVM")

@pytest.mark.needs("dirty_ring", optional=True)
def test_optional(): raise SystemExit("ran without KVM")

@needs("kvm")
@needs("dirty_ring", optional=True)
def test_both(): raise SystemExit("ran without KVM")

def test_fixture(vm): raise SystemExit("ran without KVM")
"""


@pytest.fixture
def outcomes(pytester, monkeypatch):
    """Runs TESTS where KVM is switched off, in a process of its own."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    monkeypatch.setenv("PYVMM_WITHOUT", "kvm")

    def run(*options, ci):
        monkeypatch.setenv("CI", ci)
        result = pytester.runpytest_subprocess("-rsf", "--strict-markers", "-W", "error", *options, timeout=30)
        return result, result.parseoutcomes()

    return run


@pytest.mark.parametrize(
    ("option", "ci", "expected"),
    [
        ("auto", "", {"passed": 1, "skipped": 4}),
        ("auto", "true", {"passed": 1, "skipped": 1, "failed": 3}),
        ("on", "", {"passed": 1, "skipped": 1, "failed": 3}),
        ("off", "", {"passed": 1, "skipped": 4}),
        ("off", "true", {"passed": 1, "skipped": 4}),
    ],
)
def test_what_is_skipped_and_what_fails(outcomes, option, ci, expected):
    result, found = outcomes(f"--kvm={option}", ci=ci)
    failed = found.pop("errors", 0) + found.pop("failed", 0)  # what fails before the test is an error to pytest
    assert found | ({"failed": failed} if failed else {}) == expected
    result.stdout.fnmatch_lines(
        ["*needs *kvm*switched off*PYVMM_WITHOUT*" if option != "off" else "*--kvm=off: needs *"]
    )


def test_a_name_that_is_none_is_an_error_also_where_all_is_skipped(outcomes, pytester):
    pytester.makepyfile("import pytest\n@pytest.mark.needs('kwm')\ndef test_it(): pass")
    result, found = outcomes("--kvm=off", "test_a_name_that_is_none_is_an_error_also_where_all_is_skipped.py", ci="")
    assert found == {"errors": 1}
    result.stdout.fnmatch_lines(["*no feature 'kwm': choose from kvm, *"])


def test_other_projects_see_nothing_of_us(outcomes, pytester):
    pytester.makepyfile(test_other="def test_it(): pass")
    result, found = outcomes("test_other.py", ci="true")
    assert found == {"passed": 1}
    result.stdout.no_fnmatch_line("*pyvmm *host:*")
