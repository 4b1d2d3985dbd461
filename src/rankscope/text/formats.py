"""Numbers and tables as people read them. Sizes are decimal (1 MB = 1e6 bytes), times are s, min or h."""

import math
from decimal import Decimal
from typing import NamedTuple

from rankscope.text.catalogue import Catalogue

MINUS = "\N{MINUS SIGN}"


class Unit(NamedTuple):
    """A unit that a chart's whole axis uses: values are divided by `factor`."""

    name: str
    factor: float


class Table(NamedTuple):
    """Cells of text, in which a line break parts a value from its interval.

    `numeric` says which columns are aligned as numbers, `chosen` which row the verdict chose.
    """

    caption: str
    headers: list[str]
    numeric: list[bool]
    rows: list[list[str]]
    chosen: int | None = None


def known(value: float | None) -> bool:
    """Whether there is a finite number to show."""
    return value is not None and math.isfinite(value)


def size_unit(largest_bytes: float) -> Unit:
    for name, factor in (("GB", 1e9), ("MB", 1e6)):
        if largest_bytes >= factor:
            return Unit(name, factor)
    return Unit("kB", 1e3)


def time_unit(largest_seconds: float, text: Catalogue) -> Unit:
    """Minutes from two minutes on, hours from two hours on: below, the smaller unit says more."""
    if largest_seconds >= 7200:
        return Unit(text("unit.hours"), 3600.0)
    if largest_seconds >= 120:
        return Unit(text("unit.minutes"), 60.0)
    return Unit(text("unit.seconds"), 1.0)


def size(value_bytes: float) -> str:
    """`1.25 GB`, `38.4 MB`."""
    unit = size_unit(value_bytes)
    return f"{_three_digits(value_bytes / unit.factor)} {unit.name}"


def duration(seconds: float, text: Catalogue) -> str:
    """`42.1 s`, `3.50 min`, `2.10 h`."""
    unit = time_unit(seconds, text)
    return f"{_three_digits(seconds / unit.factor)} {unit.name}"


def percent(share: float) -> str:
    """`0.01` -> `1%`, `0.0025` -> `0.25%`."""
    return f"{share * 100:.3g}%"


def signed_percent(share: float) -> str:
    """`0.0213` -> `+2.13%`."""
    return f"{share * 100:+.3g}%".replace("-", MINUS)


def change(new: float, old: float) -> str:
    """The relative change in percent, with its sign; `±0%` below half a percent."""
    percents = round((new / old - 1) * 100)
    return "±0%" if percents == 0 else signed(percents, 0) + "%"


def signed(value: float, digits: int = 4) -> str:
    """`+0.0031`, with a true minus sign for negatives."""
    return f"{value:+.{digits}f}".replace("-", MINUS)


def loss(value: float) -> str:
    return f"{value:.4f}".replace("-", MINUS)


def rate(value: float) -> str:
    """A learning rate as people write it: `2e-4`, `0.01`."""
    return f"{value:g}" if value >= 0.01 else f"{Decimal(str(value)).normalize():E}".lower()


def _three_digits(value: float) -> str:
    digits = 0 if value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:,.{digits}f}"
