"""benchmarks/audit.py: what the original exercise measured follows the order of its ranks."""

import os
import re
import subprocess
import sys

import pytest

from scripts import BENCHMARKS


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_memory_by_two_readings_follows_the_order() -> None:
    """One table: the original's reading is higher for whichever rank comes second, rankscope's is there too."""
    command = [sys.executable, str(BENCHMARKS / "audit.py"), "--ranks", "1,2", "--steps", "2"]
    done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
    found = {name: (int(one), int(two)) for name, one, two in re.findall(r"\| (.*) \| (\d+) \| (\d+) \|", done.stdout)}
    first, second = (found[f"RSS, mean of two readings, order {order}"] for order in ("1, 2", "2, 1"))
    assert first[0] < first[1], "rank 1 was trained first"
    assert second[0] > second[1], "rank 2 was trained first"
    own = found["rankscope: private memory, mean in training"]
    assert 0 < own[0] < 1.1 * own[1]
