"""What stores, runs, exports and results look like has not changed by accident."""

import json

import formats
from compare import differences


def test_formats_are_as_recorded(tmp_path):
    """Where a change is meant: `python tests/golden/formats.py`, and the reason in the commit."""
    found = json.loads(json.dumps(formats.formats(tmp_path)))
    expected = json.loads(formats.EXPECTED.read_text())
    assert "\n".join(differences(expected, found)) == ""
