"""Progress that remembers the lines that a run kept."""


class RecordingProgress:
    """All lines, in order. Nothing happens at a poll."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)

    def poll(self) -> None: ...
