import pytest
from recorded import Game


@pytest.fixture(scope="session")
def game():
    return Game()
