"""Images of reports, and their pages in a second language, take longer than a small study: they are made where they are
asked for."""

from collections.abc import Iterator
from contextlib import contextmanager

from rankscope.report import write
from rankscope.report.content import Content
from rankscope.report.figures import Figure
from rankscope.text.catalogue import load

asked = False
_render, _draw, others = write.render_image, write.draw_charts, write.other_languages


def _render_if_asked(figure: Figure) -> dict[str, str | bytes]:
    return _render(figure) if asked else {}


def _draw_if_asked(content: Content) -> dict[str, str]:
    return _draw(content) if asked else {}


def _others_if_asked(language: str) -> list[str]:
    needed = asked or not write.can_draw(load(language))  # without a font of the language, figures are in English
    return others(language) if needed else []


INSTEAD = {"render_image": _render_if_asked, "draw_charts": _draw_if_asked, "other_languages": _others_if_asked}
"""Replacements in `rankscope.report.write`, by name."""


@contextmanager
def images() -> Iterator[None]:
    """Context in which reports have images, and a page in each language."""
    global asked
    asked = True
    try:
        yield
    finally:
        asked = False
