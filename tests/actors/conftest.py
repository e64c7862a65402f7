"""A place in memory for every test."""

from __future__ import annotations

import pytest

from esper_ray.storage import Root


@pytest.fixture
def root(request: pytest.FixtureRequest) -> Root:
    return Root.open(f"memory://{request.node.name}/run")
