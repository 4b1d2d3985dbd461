"""Numbers and tables as people read them. Sizes are decimal (1 MB = 1e6 bytes), times are s, min or h."""

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
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


def time_unit(largest_seconds: float, text: "Catalogue") -> Unit:
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


def duration(seconds: float, text: "Catalogue") -> str:
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


BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "kib": 2**10, "mib": 2**20, "gib": 2**30}

SECONDS = {"s": 1, "min": 60, "h": 3600, "d": 86400}

FLOPS = {"flops": 1, "gflops": 10**9, "tflops": 10**12, "pflops": 10**15}


def parse_bytes(text: str | float) -> int:
    """`24GB` -> 24,000,000,000; `24GiB` counts in 1,024s; a bare number is bytes.

    Raises:
        ValueError: it is not a size of a byte or more; the message shows what is.
    """
    expected = "a size such as 24GB, 512MB or 16GiB"
    size = int(_parse(text, BYTES, "b", expected))
    if size < 1:
        raise ValueError(f"expected {expected}")
    return size


def parse_seconds(text: str | float) -> float:
    """`90s`, `45min`, `2h`, `1.5d`; a bare number is seconds.

    Raises:
        ValueError: it is not a time; the message shows what is.
    """
    return float(_parse(text, SECONDS, "s", "a time such as 90s, 45min or 2h"))


def parse_flops(text: str | float) -> float:
    """`400TFLOPS` -> 4e14 operations a second; also GFLOPS and PFLOPS; a bare number is operations a second.

    Raises:
        ValueError: it is not a rate; the message shows what is.
    """
    return float(_parse(text, FLOPS, "flops", "a rate such as 400TFLOPS or 1.2PFLOPS"))


def _parse(text: str | float, units: dict[str, int], bare: str, expected: str) -> Fraction:
    """Exactly: as a float, 2.01GB would be a byte off."""
    try:
        if isinstance(text, str):
            match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", text)
            value = Fraction(match[1]) * units[match[2].lower() or bare] if match else Fraction(0)
        else:  # a number is taken as it is: YAML's 1e-5 for one
            value = Fraction(0 if isinstance(text, bool) else text)
        if float(value) > 0:
            return value
    except (KeyError, ValueError, OverflowError, TypeError):  # no such unit, not finite, too many digits, or a list
        pass
    raise ValueError(f"expected {expected}")


_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def visible(text: str) -> str:
    """Text in which nothing acts unseen: control characters (a terminal obeys them), and those that turn the direction
    of the text around them, become U+FFFD. Tabs and line breaks stay.
    """
    return _UNSEEN.sub("\ufffd", text)
