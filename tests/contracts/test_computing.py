"""Every registered engine is one, with its default options."""

import pytest

from featcache.engines import open_engine
from featcache.plugins import plugin_names
from featcache.testing import EngineContract


class TestEngines(EngineContract):
    @pytest.fixture(params=plugin_names("featcache.engines"))
    def engine(self, request):
        if request.param == "ray":
            pytest.importorskip("ray", reason="needs featcache[ray]")
        return open_engine(request.param)
