"""Deferred handling of stop signals, so that training ends at a checkpoint."""

import signal
from types import FrameType
from typing import Self


class StopRequest:
    """Context in which SIGTERM and SIGINT set `made` instead of ending the process. For the main thread only."""

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._record) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.made = True

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
