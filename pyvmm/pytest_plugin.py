# pytest_plugin.py: pyvmm in tests, its own and those of other projects. pytest loads it wherever pyvmm is installed, so
# nothing else of pyvmm is imported before a test asks for it.
"""The fixture `vm`, the mark `needs`, and the option `--kvm`.

    from pyvmm.pytest_plugin import needs

    @needs("kvm")
    def test_hello(vm):
        guest = vm(memory="64M", cpus=2)
        guest.load("hello")
        assert guest.run(timeout=5).ok

A feature that is missing skips the test with --kvm=auto, and fails it with --kvm=on, or in CI (environment CI=true);
but `needs(..., optional=True)` skips there too: for what no command brings on the host in question, such as what its
CPU lacks. What a test needs besides must be in a mark of its own, without `optional`.
"""

from __future__ import annotations

import os
from contextlib import ExitStack

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from typing import Any

    from pyvmm.host import Finding
    from pyvmm.machine import VM

_VMS = pytest.StashKey["list[VM]"]()
_PATIENCE = 0.2
"""Seconds in which a guest that is crashing is through with it, before its test is reported."""


def needs(*features: str, optional: bool = False) -> pytest.MarkDecorator:
    """Marks a test with the features of the host (pyvmm.host.Feature) without which it cannot be run."""
    return pytest.mark.needs(*features, optional=optional)


@pytest.fixture
def vm(request: pytest.FixtureRequest) -> Iterator[Callable[..., VM]]:
    """Makes VMs: vm(memory="64M", cpus=2), with the arguments of pyvmm.VM; all are closed at the end of the test.

    Where the test fails, what their guests printed and how they crashed is added to its report.
    """
    made: list[VM] = request.node.stash.setdefault(_VMS, [])
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> VM:  # noqa: ANN401
            from pyvmm.machine import VM

            made.append(stack.enter_context(VM(*args, **options)))
            return made[-1]

        yield make


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --kvm."""
    parser.getgroup("pyvmm").addoption(
        "--kvm",
        choices=("auto", "on", "off"),
        default="auto",
        help="tests whose needs this host does not meet: auto skips them (but is 'on' where CI=true), on fails them, "
        "off skips all that need KVM",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Announces the mark."""
    config.addinivalue_line("markers", "needs(*features, optional=False): features of the host, see pyvmm.host.Feature")


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """What host this is; nothing in a run without tests that need one."""
    if config.get_verbosity() < 0 or config.getoption("--kvm") == "off" or not any(map(_needed, items)):
        return []
    from pyvmm.cli.doctor import summary_line

    return [f"pyvmm {line.strip()}" for line in summary_line().splitlines()]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips or fails a test whose needs are not met, before its fixtures are made."""
    needed = _needed(item)
    if not needed:
        return
    mode = _mode(item.config)
    with ExitStack() as stack:
        from pyvmm import host

        if mode == "off":
            stack.enter_context(host.without("kvm"))
        missing = [(found, optional) for name, optional in needed if not (found := host.finding(name)).ok]
    if mode == "on":
        for found, optional in missing:
            if not optional:
                pytest.fail(f"{_lack(found)} (--kvm=on)", pytrace=False)
    if missing:
        pytest.skip(_lack(missing[0][0]) if mode != "off" else f"--kvm=off: {_lack(missing[0][0])}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds to the report of a failure what its guests had to say."""
    report = yield
    if report.failed and call.when != "teardown":
        made: list[VM] = item.stash.get(_VMS, [])
        for number, machine in enumerate(made):
            if printed := machine.printed:
                report.sections.append((f"VM {number}: {machine!r}: printed by the guest", printed))
            if crash := _crash(machine):
                report.sections.append((f"VM {number}: crash", crash))
    return report


def _needed(item: pytest.Item) -> list[tuple[str, bool]]:
    """(feature, optional) of all marks; the fixture `vm` needs KVM without saying so."""
    named = [("kvm", False)] if "vm" in getattr(item, "fixturenames", ()) else []
    for mark in item.iter_markers("needs"):
        named += [(str(name), bool(mark.kwargs.get("optional"))) for name in mark.args]
    return named


def _mode(config: pytest.Config) -> str:
    mode = str(config.getoption("--kvm"))
    return "on" if mode == "auto" and os.environ.get("CI") == "true" else mode


def _lack(finding: Finding) -> str:
    return f"needs {finding.feature}: {finding.value}; {finding.remedy}"


def _crash(machine: VM) -> str:
    """The report of a guest that crashed, also where the test never asked for its end."""
    from pyvmm.errors import GuestCrash

    try:
        if machine.started:
            machine.wait(_PATIENCE)
    except GuestCrash as crash:
        return crash.report or str(crash)
    except BaseException as error:  # what ended a vCPU's thread is the test's to report, if it asked
        return f"{type(error).__name__}: {error}"
    return ""
