"""Progress that remembers what was said."""

from typing import Any


class Told:
    """All that was said, in order; what else happens is let pass."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def training(self, *_: Any) -> None: ...
    def reference(self, *_: Any) -> None: ...
    def ended(self, *_: Any) -> None: ...
    def measuring(self, *_: Any) -> None: ...
    def poll(self) -> None: ...
