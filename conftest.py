"""For tests and doctests alike.

One thread: on a busy two-core machine two are slower, and sums then depend on the load.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _cache_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What the library keeps between runs is not the user's here, and not that of an earlier run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONESHOT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _readme_writes_elsewhere(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The README's example exports into the current folder, as a user's script would."""
    if isinstance(request.node, pytest.DoctestItem) and request.node.path == Path(__file__).parent / "README.md":
        monkeypatch.chdir(tmp_path_factory.mktemp("readme"))
