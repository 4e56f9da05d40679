from __future__ import annotations

import pytest

from tests.api.harness import Model, World, make_model, make_world


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def world(model: Model) -> World:
    return make_world(model)
