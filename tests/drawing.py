"""Images of reports, which take longer than a small study: they are drawn where they are asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from rankscope.report import write
from rankscope.report.figures import Figure

asked = False
_render = write.render_image


def render_if_asked(figure: Figure) -> dict[str, str | bytes]:
    """Replacement of `rankscope.report.write.render_image`."""
    return _render(figure) if asked else {}


@contextmanager
def images() -> Iterator[None]:
    """Context in which reports have images."""
    global asked
    asked = True
    try:
        yield
    finally:
        asked = False
