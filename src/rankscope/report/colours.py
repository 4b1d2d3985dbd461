"""The colours of the page and of its charts, each named once.

Ranks have Okabe and Ito's colours, which people with colour vision deficiency can tell apart
(https://jfly.uni-koeln.de/color/), without those too pale on their background. Parts of memory have Paul Tol's muted
colours, on dark his light ones (https://personal.sron.nl/~pault/), so that no part looks like a rank.
"""

from collections.abc import Mapping, Sequence


def _numbered(name: str, colours: Sequence[str]) -> dict[str, str]:
    return {f"{name}-{number}": colour for number, colour in enumerate(colours)}


LIGHT: Mapping[str, str] = {
    "paper": "#fdfdfc", "raised": "#f4f4f1", "ink": "#1c1c1a", "muted": "#5c5c58", "line": "#e2e2dd",
    "accent": "#00619a", "good": "#00714f",
    **_numbered("rank", ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b"]),
    **_numbered("part", ["#8a8a86", "#332288", "#CC6677", "#DDCC77", "#882255", "#44AA99", "#117733", "#c4c4be"]),
}  # fmt: skip
DARK: Mapping[str, str] = {
    "paper": "#161615", "raised": "#20201e", "ink": "#e8e8e6", "muted": "#a8a8a4", "line": "#383836",
    "accent": "#6fc0f0", "good": "#43cda2",
    **_numbered("rank", ["#56B4E9", "#E69F00", "#2fc79b", "#CC79A7", "#F0E442", "#D55E00", "#b5b5b5"]),
    **_numbered("part", ["#73736f", "#77AADD", "#FFAABB", "#EEDD88", "#EE8866", "#44BB99", "#BBCC33", "#a5a5a0"]),
}  # fmt: skip
PAGE: Mapping[str, str] = {name: f"var(--{name})" for name in LIGHT}
"""What the page's charts are drawn with: they change with its theme, and on paper, without being drawn anew."""


def declarations(colours: Mapping[str, str]) -> str:
    """As CSS: `--paper: #fdfdfc; --raised: …`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def numbered(name: str, colours: Mapping[str, str]) -> list[str]:
    """All of one name, in order: of `rank`, `rank-0` and so on."""
    return [colour for key, colour in colours.items() if key.startswith(f"{name}-")]
