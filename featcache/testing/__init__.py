"""What every plugin must be, as tests to inherit: one contract for each kind. Needs pytest.

In the tests of a package of yours:

    from featcache.testing import CorpusContract

    class TestMine(CorpusContract):
        spec = "mine:3"

Where one needs files, override its fixtures. Methods and mappings have their contracts in `distill.testing`, detectors and
evaluators in `evalsuite.testing`.
"""

import pytest

pytest.register_assert_rewrite(
    *(f"{__name__}.{kind}" for kind in ("corpora", "derivations", "engines", "inputs", "interchange", "models"))
)

from featcache.testing.corpora import CorpusContract  # noqa: E402
from featcache.testing.derivations import DerivationContract  # noqa: E402
from featcache.testing.engines import EngineContract  # noqa: E402
from featcache.testing.inputs import InputContract  # noqa: E402
from featcache.testing.interchange import FormatContract  # noqa: E402
from featcache.testing.models import ModelContract  # noqa: E402

__all__ = ["CorpusContract", "DerivationContract", "EngineContract", "FormatContract", "InputContract", "ModelContract"]
