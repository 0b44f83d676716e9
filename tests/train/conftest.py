import pytest

from tests.train.world import make_world


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A cache folder with the tiny world in it."""
    folder = tmp_path_factory.mktemp("cache")
    make_world(folder)
    return folder
