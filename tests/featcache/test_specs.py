"""Specs as text: comma lists of paths with commas, and specs that name code."""

import pytest

from featcache.specs import names_code, refuse_code, refuse_code_of_corpora, split_specs


@pytest.mark.parametrize(
    ("text", "specs"),
    [
        ("timm/resnet18", ["timm/resnet18"]),
        ("timm/resnet50,open_clip/ViT-B-32:openai", ["timm/resnet50", "open_clip/ViT-B-32:openai"]),
        ("run:student,run:another", ["run:student", "run:another"]),
        ("mine:small,mine:wide", ["mine:small", "mine:wide"]),
        ("run:a=[0.1,0.2],timm/resnet18@size=64", ["run:a=[0.1,0.2]", "timm/resnet18@size=64"]),
        ("timm/resnet18:/w/a,b.safetensors", ["timm/resnet18:/w/a,b.safetensors"]),
        ("run:there,run:c", ["run:there,run:c"]),
        ("timm/resnet18:w,timm/x@size=64,run:a", ["timm/resnet18:w,timm/x@size=64", "run:a"]),
        ("timm/resnet50,timm/resnet18:student", ["timm/resnet50", "timm/resnet18:student"]),
        ("timm/x@pool=avg,open_clip/B:w,timm/x,run:c", ["timm/x@pool=avg", "open_clip/B:w,timm/x", "run:c"]),
    ],
)
def test_comma_lists_are_cut_where_a_spec_begins_and_never_inside_a_path_that_is_there(
    text, specs, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for there in ("student", "another", "there,run:c", "w,timm/x"):
        (tmp_path / there).mkdir(parents=True)
    assert split_specs(text) == specs


@pytest.mark.parametrize(
    "spec", ["os:abort", "a.b:c", "python:os:abort", "python/os:abort", "torchvision.models:resnet18"]
)
def test_code_is_refused_where_a_file_names_it(spec):
    assert names_code(spec)
    with pytest.raises(ValueError, match=r"x\.toml: names code, .*--trust-code"):
        refuse_code("x.toml", spec, False)
    refuse_code("x.toml", spec, True)


@pytest.mark.parametrize(
    "spec", ["tiny", "tiny:weights", "run:a", "timm/x:y", "builtin/efficientnet_lite0", "open_clip/a:b"]
)
def test_other_specs_name_no_code(spec):
    assert not names_code(spec)
    refuse_code("x.toml", spec, False)


@pytest.mark.parametrize(
    ("corpora", "code"),
    [
        ("photos/", None),
        (None, None),
        ("adversarial:timm/resnet18:w.safetensors::h.safetensors@epsilon=2::photos/", None),
        ("adversarial:evil:make::h.safetensors::photos/", "evil:make"),
        (["photos/", "mixed:10:adversarial:timm/resnet18::@decoder=evil.vq:make@epsilon=2::photos/"], "evil.vq:make"),
        ("adversarial:timm/resnet18::::adversarial:python:evil:make::::photos/", "python:evil:make"),
    ],
)
def test_corpora_of_files_run_no_code_unless_it_is_trusted(corpora, code):
    refuse_code_of_corpora("c.toml", corpora, trust_code=True)
    if code is None:
        refuse_code_of_corpora("c.toml", corpora, trust_code=False)
        return
    with pytest.raises(ValueError, match=f"^c.toml: names code, {code}, .*--trust-code"):
        refuse_code_of_corpora("c.toml", corpora, trust_code=False)
