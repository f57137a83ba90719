# receiving.py: the destination's side of a round: pages into guest memory, from all channels at once. Pages of 4 KiB.
"""`Receiver`: a thread a channel."""

from __future__ import annotations

import threading

from pyvmm.errors import ProtocolError
from pyvmm.migration.pages import PageChannels

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.migration.pages import Arrivals, PageChannel

_STEP = 1 << 14
"""Pages between two looks at whether it is to end: 64 MiB."""


class Receiver(PageChannels):
    """Rounds from channels, whose closing is the caller's. seen: pages that have come in any round."""

    def __init__(self, channels: Sequence[PageChannel]) -> None:
        super().__init__(channels)
        self._threads: list[threading.Thread] = []
        self._errors: list[BaseException] = []
        self._told = [0] * len(channels)

    def round(self, arrivals: Arrivals, number: int, pages: int) -> int:
        """Receives all of a round, of so many pages. Returns how many came. Raises what a channel met with, and
        ProtocolError where the numbers do not agree."""
        arrivals.begin(number)
        first, *rest = range(len(self._channels))
        for index in rest:
            thread = threading.Thread(target=self._channel, args=(index, arrivals), name="migration pages")
            self._threads.append(thread)
            thread.start()
        self._channel(first, arrivals)
        for thread in self._threads:
            thread.join()
        self._threads.clear()
        if self._errors:
            raise self._errors[0]
        came = arrivals.count()
        if came != pages or sum(self._told) != pages:
            raise ProtocolError(
                f"round {number}: {came} pages came of {pages}, and the source says that it sent {sum(self._told)}"
            )
        return came

    def _channel(self, index: int, arrivals: Arrivals) -> None:
        try:
            end = None
            while end is None and not self._errors:
                end = self._channels[index].receive(arrivals, _STEP)
            self._told[index] = end or 0
        except BaseException as error:  # whatever it is, it is the session's to deal with
            self._errors.append(error)
            self.end()
