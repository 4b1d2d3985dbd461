"""Settings of all property tests: the same examples in each run."""

from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("rankscope", deadline=None, derandomize=True, database=None, max_examples=60)
settings.load_profile("rankscope")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the files of all examples; a test writes its file anew for each."""
    return tmp_path_factory.mktemp("properties")
