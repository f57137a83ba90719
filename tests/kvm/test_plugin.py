# test_plugin.py: the fixture `vm` closes its VMs on every way out, and says what their guests had to say.
from __future__ import annotations

from pyvmm.pytest_plugin import needs

pytestmark = needs("kvm")

CONFTEST = """
import sys
pytest_plugins = [] if "pyvmm.pytest_plugin" in sys.modules else ["pyvmm.pytest_plugin"]
"""

TESTS = """
import os, pytest

made = []

def test_passes(vm):
    for _ in range(2):
        made.append(vm(memory="2M", cpus=2))
    made[0].load("hello")
    assert made[0].run(timeout=10).ok

def test_fails(vm):
    made.append(vm("4M"))
    made[-1].load("hello", "text=printed-before")
    assert made[-1].run(timeout=10).ok
    vm(memory="2M")  # never started
    raise RuntimeError("on purpose")

def test_crashes_unnoticed(vm):
    made.append(vm())
    made[-1].load("faults", "kind=triple")
    made[-1].start()
    assert made[-1].expect("never printed", timeout=1)

def test_all_are_closed():
    assert len(made) == 4
    for vm in made:
        with pytest.raises(IndexError, match="closed"):
            vm.progress()
    with os.scandir("/proc/self/fd") as fds:
        assert not [target for fd in fds if "kvm" in (target := os.readlink(fd.path))]
"""


def test_vms_are_closed_and_failures_explained(pytester):
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(TESTS)
    result = pytester.runpytest_subprocess("-W", "error", "--kvm=on", timeout=50)
    assert result.parseoutcomes() == {"passed": 2, "failed": 2}
    result.stdout.fnmatch_lines(
        [
            "pyvmm host: *",
            "*VM 0: <VM 4M, 1 vCPUs, *: printed by the guest*",
            "printed-before",
            "*VM 0: crash*",
            "*rip*",
        ]
    )
