"""Shared by the property tests."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for the files of all examples; a test writes its file anew for each."""
    return tmp_path_factory.mktemp("properties")
