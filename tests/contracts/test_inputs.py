"""What every registered kind of input must do."""

import json
from importlib.metadata import EntryPoint

import pytest

from featcache.inputs import AUGMENTS, Input, Views, input_of
from featcache.inputs.images import Preprocess
from featcache.plugins import load_plugin, plugin_names

EXAMPLES = {"images": Preprocess(resize=10, crop=8, size=6, mode="squash")}


@pytest.mark.parametrize("name", plugin_names("featcache.inputs"))
def test_its_record_makes_it_again(name):
    example = EXAMPLES[name]
    record = json.loads(json.dumps(example.to_dict()))
    assert input_of(record) == example == load_plugin("featcache.inputs", name).open_input(record)
    assert hash(example) == hash(input_of(record))
    assert (record.get("input", "images"), isinstance(example, Input)) == (name, True)
    assert set(example.augments) <= set(AUGMENTS)


@pytest.mark.parametrize("name", plugin_names("featcache.inputs"))
def test_a_view_is_a_function_of_its_arguments(name):
    example = EXAMPLES[name]
    for augment in example.augments:
        views = Views(count=1 if augment == "none" else 3, augment=augment, seed=3)
        for view in range(views.count):
            drawn = example.draw((30, 20), views, "a", view)
            assert drawn == example.draw((30, 20), views, "a", view)
            assert len(drawn.parameters) == len(example.parameters)


def test_one_new_file_is_an_input(tmp_path, monkeypatch):
    (tmp_path / "numbers_input.py").write_text(
        "from featcache.inputs.images import Preprocess\nclass Numbers(Preprocess):\n    kind = 'number'\n"
        "def open_input(record):\n    return Numbers(resize=record['count'], crop=1, size=1)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = EntryPoint("numbers", "numbers_input", "featcache.inputs")
    monkeypatch.setattr("featcache.plugins.entry_points", lambda group: [entry] if group == entry.group else [])
    assert input_of({"input": "numbers", "count": 3}).kind == "number"
    with pytest.raises(ValueError, match="unknown input 'number'; did you mean numbers"):
        input_of({"input": "number"})
