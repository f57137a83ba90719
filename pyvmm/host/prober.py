# prober.py: asks probes, keeps their answers for the life of the process, and lets features be switched off.
"""`Prober`: from a table of probes to findings. A trial that raises is a finding too, never an exception."""

from __future__ import annotations

import os
import threading
import time
from contextlib import contextmanager

from pyvmm.errors import BadInput
from pyvmm.host.feature import Feature, Finding, Outcome
from pyvmm.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SWITCH = "PYVMM_WITHOUT"
"""Environment variable with features, separated by commas, that are to be taken as missing."""


class Probe(Record):
    """One feature and how to try it. `requires`: features without which the trial has no sense."""

    __slots__ = ("cost", "feature", "group", "only_slower", "remedy", "requires", "title", "trial")

    def __init__(
        self,
        feature: Feature,
        group: str,
        title: str,
        trial: Callable[[], Outcome],
        *,
        cost: str,
        remedy: str,
        requires: tuple[Feature, ...] = (),
        only_slower: bool = False,
    ) -> None:
        self.feature = feature
        self.group = group
        self.title = title
        self.trial = trial
        self.cost = cost
        self.remedy = remedy
        self.requires = requires
        self.only_slower = only_slower

    def found(self, outcome: Outcome, needs: Feature | None = None, seconds: float = 0.0) -> Finding:
        """The finding that `outcome` makes."""
        texts = (self.cost, self.remedy, self.only_slower)
        return Finding(self.feature, self.group, self.title, outcome, *texts, needs, seconds)


class Prober:
    """Tries each probe once, when first asked. All methods may be called from any thread."""

    def __init__(self, probes: Iterable[Probe]) -> None:
        self._probes = {probe.feature: probe for probe in probes}
        self._known: dict[Feature, Finding] = {}
        self._off: list[Feature] = []
        self._lock = threading.RLock()

    def has(self, feature: Feature | str) -> bool:
        """Does the feature work here? Raises BadInput for a name that is none."""
        return self.finding(feature).ok

    def findings(self) -> list[Finding]:
        """All of them, in the table's order."""
        return [self.finding(feature) for feature in self._probes]

    def finding(self, feature: Feature | str) -> Finding:
        """What is known of one feature; tried now, if it was not before. Raises BadInput for a name that is none."""
        probe = self._probes[self._named(feature)]
        off = self._off_by_environment()
        if probe.feature in off or probe.feature in self._off:
            way_back = f"take it out of {SWITCH}" if probe.feature in off else "leave the block of host.without()"
            return probe.found(Outcome(False, "switched off", way_back))
        for needed in probe.requires:
            if not self.has(needed):
                return probe.found(Outcome(False, f"not tried: needs {needed}", f"see {needed}"), needed)
        with self._lock:
            if probe.feature not in self._known:
                self._known[probe.feature] = _try(probe)
            return self._known[probe.feature]

    @contextmanager
    def without(self, *features: Feature | str) -> Iterator[None]:
        """Within the block, these features are taken as missing, by all threads."""
        names = [self._named(feature) for feature in features]
        self._off += names
        try:
            yield
        finally:
            for name in names:
                self._off.remove(name)

    def _named(self, name: Feature | str) -> Feature:
        try:
            feature = Feature(name)
        except ValueError:
            raise BadInput(f"no feature {name!r}: choose from {', '.join(self._probes)}") from None
        if feature not in self._probes:
            raise BadInput(f"nothing tries the feature {name!r}")
        return feature

    def _off_by_environment(self) -> set[Feature]:
        names = (name.strip() for name in os.environ.get(SWITCH, "").split(","))
        return {self._named(name) for name in names if name}


def _try(probe: Probe) -> Finding:
    start = time.perf_counter()
    try:
        outcome = probe.trial()
    except Exception as error:  # whatever went wrong: the feature cannot be relied on, and this says why
        outcome = Outcome(False, str(error) or type(error).__name__)
    return probe.found(outcome, seconds=time.perf_counter() - start)
