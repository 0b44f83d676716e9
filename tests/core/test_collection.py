"""The search for garbage rests inside, and afterwards is what it was, whatever happens."""

import gc

import pytest

from lavis.core.collection import no_collection


@pytest.mark.parametrize("enabled", [True, False])
def test_it_is_afterwards_what_it_was(enabled):
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        with pytest.raises(ZeroDivisionError), no_collection():
            assert 1 // gc.isenabled()
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
