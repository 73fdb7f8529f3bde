"""Trainers of one structure, of which there are many here, compile once."""

import pytest
import tiny


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    tiny.compile_once(tmp_path_factory.mktemp("compiled"))
