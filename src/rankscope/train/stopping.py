"""A request to stop that is not obeyed at once, so that training ends where it can go on."""

import signal
from types import FrameType, TracebackType
from typing import Self


class StopRequest:
    """While it is entered, SIGTERM and SIGINT are taken down instead of obeyed. To be entered in the main thread."""

    def __init__(self) -> None:
        self.made = False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._take_down) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _take_down(self, number: int, frame: FrameType | None) -> None:
        self.made = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
