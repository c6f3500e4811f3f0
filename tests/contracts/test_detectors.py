"""Every registered OOD detector is one."""

import numpy as np
import pytest

from evalsuite.detectors import arguments_of, names
from evalsuite.testing import DetectorContract


class TestDetectors(DetectorContract):
    @pytest.fixture(params=names())
    def registered(self, request):
        return request.param

    @pytest.fixture
    def arguments(self, registered, tmp_path):
        """For the detectors that need them, files of text embeddings: one for each cluster, and words for none."""
        arrays = {"text": np.eye(4, 8), "negatives": np.roll(np.tile(np.eye(4, 8), (25, 1)), 4, axis=1)}
        arrays["negatives"] += 0.1 * np.random.default_rng(1).random((100, 8))
        for argument, array in arrays.items():
            np.save(tmp_path / f"{argument}.npy", array)
        return {name: str(tmp_path / f"{name}.npy") for name in arguments_of(registered) if name in arrays}
