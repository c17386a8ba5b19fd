"""Random moments that can be repeated: a test that fails prints the seed that it drew them with."""

from __future__ import annotations

import os
import random
import time

import pytest


@pytest.fixture
def rng() -> random.Random:
    """Seeded by SNPC_TEST_SEED, else by the clock. pytest shows what a failed test printed."""
    seed = int(os.environ.get("SNPC_TEST_SEED", time.time_ns() % 2**32))
    print(f"to repeat the random moments of this test: SNPC_TEST_SEED={seed}")
    return random.Random(seed)
