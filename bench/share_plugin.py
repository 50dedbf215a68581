"""A pytest plugin: of the tests that were chosen, every n-th, so that n processes share them."""

from __future__ import annotations

import os

import pytest

from sp_fast.bench.gpu import SHARE_VARIABLE


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Neighbours, which are alike, go to different processes."""
    number, shares = map(int, os.environ[SHARE_VARIABLE].split("/"))
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i % shares != number])
    items[:] = items[number::shares]
