"""Fixtures: a small model, and an application that serves it."""

from __future__ import annotations

import pytest

from tests.api.harness import ApiUnderTest, Model, make_api, make_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return make_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def api(model: Model) -> ApiUnderTest:
    return make_api(model)
