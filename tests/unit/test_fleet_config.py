# test_fleet_config.py: fleet.toml, run folders, and what `pyvmm host` says of what cannot be: one line, and 2.
from __future__ import annotations

import json
import os

import pytest

from pyvmm.cli import main
from pyvmm.errors import BadInput, HostError
from pyvmm.fleet.config import load
from pyvmm.fleet.folder import Folder, default, only
from pyvmm.layout import MIB

FULL = """
[host]
budget = "2G"
policy = "swap-only"
interval = 5
[host.states]
clear = { below = 20, means = [] }
hard = { below = 1, above = 1.5, means = ["balloon", "swap"] }
[[vm]]
name = "web-1"
guest = "touch"
memory = "512M"
cpus = 2
append = "pattern=zipf"
shares = 7
reservation = "64M"
limit = "256M"
balloon = true
swap = true
options = ["--pages", "4k"]
[[vm]]
name = "b"
guest = "./x.elf"
memory = 67108864
"""
LEAST = '[host]\nbudget = "64M"\n[[vm]]\nname = "a"\nguest = "hello"\nmemory = "32M"\n'


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "fleet.toml"
        path.write_text(text)
        return str(path)

    return write


def test_all_that_it_can_say(file, tmp_path):
    fleet = load(file(FULL))
    assert (fleet.budget, fleet.policy, fleet.interval) == (2 << 30, "swap-only", 5.0)
    clear, hard = fleet.states[1], fleet.states[3]
    assert (clear.below, clear.above, clear.means) == (0.2, pytest.approx(0.22), ())
    assert (hard.below, hard.above, hard.means) == (0.01, 0.015, ("balloon", "swap"))
    web, plain = fleet.guests
    assert (web.name, web.guest, web.memory, web.cpus, web.append) == ("web-1", "touch", 512 * MIB, 2, "pattern=zipf")
    assert (web.shares, web.reservation, web.limit) == (7, 64 * MIB, 256 * MIB)
    assert (web.balloon, web.swap, web.options) == (True, True, ["--pages", "4k"])
    assert plain.guest == f"{tmp_path}/./x.elf"
    assert (plain.memory, plain.cpus, plain.shares, plain.reservation) == (64 * MIB, 1, 640, 8 * MIB)
    assert (plain.limit, plain.balloon, plain.swap, plain.options) == (64 * MIB, False, False, [])


MISTAKES = [
    ("", "[host]: missing"),
    ("x", "Expected '=' after a key"),
    ("a = 1\n", "the file: no key 'a'"),
    ('[host]\nbudget = "64M"\n', "[[vm]]: missing"),
    (LEAST.replace('"64M"', '"x"'), "[host]: budget: 'x' is not a size"),
    (LEAST.replace('"64M"', "1.5"), "[host]: budget: give a size"),
    (LEAST.replace('"64M"', "true"), "[host]: budget: give a size"),
    (LEAST.replace('"64M"', '"1M"'), "[host]: budget: give 8M to"),
    (LEAST.replace("budget", "bugdet"), "[host]: no key 'bugdet': it may have budget, policy, interval, states"),
    (LEAST.replace("[[vm]]", 'policy = "lru"\n[[vm]]'), "[host]: policy: no policy 'lru': choose one of class-based"),
    (LEAST.replace("[[vm]]", 'policy = "x.py:X"\n[[vm]]'), "x.py: No such file"),
    (LEAST.replace("[[vm]]", "interval = 0\n[[vm]]"), "[host]: interval: give a number, 0.05 to 3600"),
    (LEAST.replace("[[vm]]", "interval = nan\n[[vm]]"), "[host]: interval: give a number"),
    (LEAST.replace("[[vm]]", "states = 1\n[[vm]]"), "[host.states]: no table"),
    (LEAST.replace("[[vm]]", "[host.states]\nx = {}\n[[vm]]"), "[host.states]: no key 'x'"),
    (LEAST.replace("[[vm]]", "[host.states]\nlow = 1\n[[vm]]"), "[host.states.low]: no table"),
    (LEAST.replace("[[vm]]", "[host.states]\nlow = {x = 1}\n[[vm]]"), "[host.states.low]: no key 'x'"),
    (LEAST.replace("[[vm]]", "[host.states]\nlow = {below = 99}\n[[vm]]"), "[host.states]: low: it is worse than hard"),
    (LEAST.replace("[[vm]]", "[host.states]\nhigh = {below = 9}\n[[vm]]"), "[host.states.high]: below, above"),
    (LEAST.replace("[[vm]]", '[host.states]\nlow = {means = "x"}\n[[vm]]'), "[host.states.low]: means: give a list"),
    (LEAST.replace("[[vm]]", '[host.states]\nlow = {means = ["x"]}\n[[vm]]'), "[host.states]: low: no means 'x'"),
    (LEAST.replace('name = "a"', ""), "[[vm]] 1: name: missing"),
    (LEAST.replace('"a"', '"../a"'), "[[vm]] 1: name: '../a': give 1 to 32 letters"),
    (LEAST.replace('"a"', '".a"'), "[[vm]] 1: name: '.a'"),
    (LEAST.replace('"a"', '""'), "[[vm]] 1: name: give a text"),
    (LEAST.replace('"a"', "5"), "[[vm]] 1: name: give a text"),
    (LEAST + LEAST[LEAST.index("[[vm]]") :], "[[vm]] 2: name: 'a' is another one's already"),
    (LEAST.replace('guest = "hello"', ""), "[[vm]] a: guest: missing"),
    (LEAST.replace('"32M"', '"1M"'), "[[vm]] a: memory: a VM of a fleet has at least 8M"),
    (LEAST + "cpus = 0", "[[vm]] a: cpus: give a whole number, 1 to 64"),
    (LEAST + "cpus = true", "[[vm]] a: cpus: give a whole number"),
    (LEAST + "shares = 0", "[[vm]] a: shares: give a whole number, 1 to"),
    (LEAST + 'limit = "64M"', "[[vm]] a: limit: 64M is more than its memory"),
    (LEAST + 'limit = "1M"', "[[vm]] a: limit: give 8M to"),
    (LEAST + 'limit = "16M"\nreservation = "17M"', "[[vm]] a: reservation: 17M is more than it may ever have"),
    (LEAST + "balloon = 1", "[[vm]] a: balloon: give true or false"),
    (LEAST + "ram = 1", "[[vm]] a: no key 'ram': it may have name, guest, memory"),
    (LEAST + 'options = "--pages 4k"', "[[vm]] a: options: give a list of texts"),
    (LEAST + 'options = ["--control=x"]', "[[vm]] a: options: --control=x is not for a fleet's VM"),
    (LEAST + 'append = "\\u0000"', "[[vm]] a: append: give a text"),
    ("vm = 1\n" + LEAST[: LEAST.index("[[vm]]")], "[[vm]]: missing"),
    ("vm = [1]\n" + LEAST[: LEAST.index("[[vm]]")], "[[vm]] 1: no table"),
    ("x = " + "[" * 100_000, "."),
    ("#" * (1 << 20) + "\n", "more than 1048576 bytes"),
]


@pytest.mark.parametrize(("text", "words"), MISTAKES, ids=range(len(MISTAKES)))
def test_a_mistake_is_one_line_that_names_the_key(file, capsys, text, words):
    path = file(text)
    assert main(["host", "up", path]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"pyvmm: {path}: ")
    assert words in err
    assert err.count("\n") == 1


class TestFolder:
    def test_it_is_this_users_alone(self, tmp_path):
        folder = Folder(str(tmp_path / "pyvmm" / "x"))
        assert os.stat(folder.path).st_mode & 0o777 == os.stat(tmp_path / "pyvmm").st_mode & 0o777 == 0o700
        assert Folder(folder.path).path == folder.path
        os.chmod(folder.path, 0o750)
        with pytest.raises(BadInput, match="not this user's alone"):
            Folder(folder.path)

    def test_what_is_none(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(BadInput, match="not this user's alone"):
            Folder(str(tmp_path / "file"))
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(BadInput, match="not this user's alone"):
            Folder(str(tmp_path / "link"))
        with pytest.raises(HostError, match="No such file"):
            Folder(str(tmp_path / "none"), make=False)
        os.chmod(tmp_path, 0o777)
        with pytest.raises(BadInput, match="others may write to the folder above it"):
            Folder(str(tmp_path / "x"))

    def test_the_default(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        assert default("x") == f"{tmp_path}/pyvmm/x"
        with pytest.raises(BadInput, match="a fleet's name"):
            default("../x")
        with pytest.raises(BadInput, match="no fleet runs in"):
            only()
        for name in ("x", "y"):
            folder = Folder(default(name))
            open(folder.socket, "w").close()
            if name == "x":
                assert only() == folder.path
        with pytest.raises(BadInput, match="say which fleet: x, y"):
            only()
        monkeypatch.delenv("XDG_RUNTIME_DIR")
        assert default("x") == f"/tmp/pyvmm-{os.getuid()}/x"

    def test_a_lock_is_free_when_all_who_have_it_have_closed_it(self, tmp_path):
        folder = Folder(str(tmp_path / "x"))
        first = folder.lock("a")
        second = os.dup(first)  # as a child has it
        os.close(first)
        assert folder.lock("a") is None
        os.close(second)
        again = folder.lock("a")
        assert again is not None
        os.close(again)
        assert folder.names() == ["a"]

    def test_the_last_words_of_a_vm(self, tmp_path):
        folder = Folder(str(tmp_path / "x"))
        assert folder.last_line("a") == ""
        with open(folder.of("a", "log"), "wb") as file:
            file.write(b"x" * 1000 + b"\nlast \x1b[31m\xff words\n\n")
        assert folder.last_line("a") == "last [31m\ufffd words"


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["up"], "say which fleet"),
            (["up", "none.toml"], "none.toml: No such file"),
            (["status", "--folder", "none"], "run folder"),
            (["status", "x", "--detach"], "--detach is for"),
            (["top", "--vms", "3"], "--vms is for `pyvmm host simulate`"),
            (["simulate", "x"], "simulate needs no fleet"),
            (["simulate", "--vms", "0"], "0 VMs: give 1 to 4096"),
            (["simulate", "--vms", "2", "--trace", "x"], "give one of --vms and --trace"),
            (["simulate", "--ticks", "0"], "--ticks 0"),
            (["simulate", "--budget", "0"], "--budget 0"),
            (["simulate", "--policy", "clock"], "no policy 'clock'"),
        ],
    )
    def test_bad_input_is_one_line_and_2(self, tmp_path, monkeypatch, capsys, arguments, words):
        monkeypatch.chdir(tmp_path)
        assert main(["host", *arguments]) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1

    def test_without_a_daemon(self, tmp_path, capsys):
        folder = Folder(str(tmp_path / "x"))
        for action in ("status", "top"):
            assert main(["host", action, "--folder", folder.path]) == 2
            assert f"no daemon in {folder.path}: `pyvmm host up FILE`" in capsys.readouterr().err
        assert main(["host", "stop", "--folder", folder.path]) == 2
        assert f"nothing runs in {folder.path}" in capsys.readouterr().err

    def test_simulate(self, capsys):
        assert main(["host", "simulate"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "3 VMs, promised 768.0 MiB, in 537.6 MiB, 60 ticks"
        assert [line.split()[0] for line in lines[2:6]] == ["class-based", "balloon-only", "swap-only", "proportional"]
        assert lines[2].split()[-1] == "1.0"
        assert main(["host", "simulate", "--vms", "9", "--policy", "swap-only", "--ticks", "5", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["vms"], found["ticks"], [each["name"] for each in found["policies"]]) == (9, 5, ["swap-only"])
        assert sum(found["policies"][0]["states"].values()) == 5

    def test_a_policy_of_ones_own_that_raises(self, tmp_path, capsys):
        path = tmp_path / "mine.py"
        path.write_text(
            "from pyvmm.fleet.policy import Policy\n"
            "class Mine(Policy):\n    def split(self, vm, over, means):\n        return 1 / 0\n"
        )
        assert main(["host", "simulate", "--policy", f"{path}:Mine"]) == 2
        assert "Mine: line 4: ZeroDivisionError" in capsys.readouterr().err
