"""Searches, too, predict once what several tests ask: see `tests/conftest.py`."""

from collections.abc import Iterator
from typing import Any

import pytest

from rankscope.search import run


@pytest.fixture(scope="session", autouse=True)
def _predicted_once(predicted_once: Any) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "predict", predicted_once)
        yield
