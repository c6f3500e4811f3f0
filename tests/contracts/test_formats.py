"""Every registered interchange format is one."""

import pytest

from featcache.interchange import load_format, names
from featcache.testing import FormatContract


class TestFormats(FormatContract):
    @pytest.fixture(params=names())
    def registered(self, request, tmp_path):
        try:
            load_format(request.param).require(tmp_path)
        except ValueError as error:
            pytest.skip(str(error))
        return request.param
