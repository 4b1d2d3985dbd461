"""Which parametrisations are for `make test-slow`."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(names: Iterable[str], *fast: str) -> list[Any]:
    """Names as parameters of a test, of which `make test` takes the `fast` ones and `make test-slow` all others."""
    return [pytest.param(name, marks=[] if name in fast else pytest.mark.slow) for name in names]
