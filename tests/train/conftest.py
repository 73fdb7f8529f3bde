"""Trainers of one structure, of which there are many here, compile once."""

import pytest


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    import tiny  # not above: the type checker comes in before the packages

    tiny.compile_once(tmp_path_factory.mktemp("compiled"))
