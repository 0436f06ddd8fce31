"""The bench that the tests of faults share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Bench


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()
