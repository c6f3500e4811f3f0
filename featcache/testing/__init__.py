"""What every plugin must be, as tests to inherit: one contract for each kind. Needs pytest.

In the tests of a package of yours:

    from featcache.testing import CorpusContract

    class TestMine(CorpusContract):
        spec = "mine:3"

Where the spec needs files, override the fixture `corpus`. Methods and mappings have theirs in `distill.testing`, detectors
and evaluators in `evalsuite.testing`.
"""

import pytest

pytest.register_assert_rewrite(f"{__name__}.corpora", f"{__name__}.interchange")

from featcache.testing.corpora import CorpusContract  # noqa: E402
from featcache.testing.interchange import FormatContract  # noqa: E402

__all__ = ["CorpusContract", "FormatContract"]
