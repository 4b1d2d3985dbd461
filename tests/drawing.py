"""Images of reports, which take longer than a small study: they are drawn where they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from rankscope.report import write
from rankscope.report.content import Content
from rankscope.report.figures import Figure

asked = False
_render, _draw = write.render_image, write.draw_charts


def _render_if_asked(figure: Figure) -> dict[str, str | bytes]:
    return _render(figure) if asked else {}


def _draw_if_asked(content: Content) -> dict[str, str]:
    return _draw(content) if asked else {}


INSTEAD = {"render_image": _render_if_asked, "draw_charts": _draw_if_asked}
"""Replacements in `rankscope.report.write`, by name."""


@contextmanager
def images() -> Iterator[None]:
    """Context in which reports have images."""
    global asked
    asked = True
    try:
        yield
    finally:
        asked = False
