"""A pushed student comes back from the hub as the encoder that it was; against a stand-in of the hub, with its real client."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from hub_standin import CLIENTS_OWN, STRANGER, TOKEN, UNKNOWN, hub_here
from huggingface_hub import constants, metadata_load
from small_world import make_images
from test_export import make_run_in

import distill
from distill.training.run import Run
from featcache import load_encoder
from featcache.models.timm import open_model
from featcache.run_folder import RECORD, WEIGHTS
from featcache_cli import programs

pytestmark = CLIENTS_OWN
REPOSITORY = "me/student"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_here(tmp_path, monkeypatch) as hub:
        yield hub


@pytest.fixture
def run(tmp_path):
    return make_run_in(tmp_path)


def pushed_files(hub, revision="main"):
    return {name: data for name, data in hub.files("model", REPOSITORY, revision).items() if name != ".gitattributes"}


def images_of(encoder):
    size = encoder.preprocess.size
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def code_of(card):
    return card.decode().split("```python\n")[1].split("```")[0]


def another(tmp_path, name="other"):
    run = make_run_in(tmp_path, name=name)
    student = load_encoder(f"run:{run.path}").module.backbone
    run.finish(
        {key: value + 1 for key, value in student.state_dict().items()}, json.loads((run.path / RECORD).read_text())
    )
    return run


def test_timm_and_featcache_both_load_a_timm_student(hub, tmp_path):
    run = make_run_in(tmp_path, "timm/lcnet_035", image_size=64)
    pushed = distill.push(run, REPOSITORY)
    assert (pushed.changed, pushed.commit) == (True, hub.head("model", REPOSITORY))
    assert tuple(pushed_files(hub)) == pushed.files
    assert not hub.repositories["model", REPOSITORY].private
    here, there = load_encoder(f"run:{run.path}"), load_encoder(f"run:hf-hub:{REPOSITORY}")
    assert there.fingerprint == here.fingerprint
    assert there.name == f"run:hf-hub:{REPOSITORY}@{pushed.commit}"
    images, card = images_of(here), pushed_files(hub)["README.md"]
    with torch.no_grad():
        wanted = here.module(images)["embedding"]
        model = timm.create_model(f"hf-hub:{REPOSITORY}", pretrained=True).eval()
        torch.testing.assert_close(model(images), wanted, atol=1e-5, rtol=1e-5)
        for code in (pushed.hub_code, code_of(card)):
            names = {}
            exec(code, names)
            torch.testing.assert_close(names["model"](images), wanted, atol=1e-5, rtol=1e-5)
        # As timm's model it is an encoder too, whose projection stands where timm's classifiers do.
        again = open_model(f"hf-hub:{REPOSITORY}")
        torch.testing.assert_close(again(images)["embedding"], wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("classes", [None, ["cat", "dog"]])
def test_what_timm_does_not_know_its_card_loads(hub, tmp_path, classes):
    run = make_run_in(tmp_path, classes=classes)
    pushed = distill.push(run, REPOSITORY, revision="v1", licence="apache-2.0")
    assert pushed.hub_code == ""
    here, there = (load_encoder(f"run:{of}") for of in (run.path, f"hf-hub:{REPOSITORY}@v1"))
    assert there.fingerprint == here.fingerprint
    names = {}
    exec(code_of(pushed_files(hub, "v1")["README.md"]), names)
    images = images_of(here)
    with torch.no_grad():
        wanted = here.module(images)["logits" if classes else "embedding"]
        torch.testing.assert_close(names["model"](images), wanted, atol=1e-5, rtol=1e-5)
    (tmp_path / "card.md").write_bytes(pushed_files(hub, "v1")["README.md"])
    assert metadata_load(tmp_path / "card.md") == {
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
        "tags": ["featcache", "knowledge-distillation"],
        "license": "apache-2.0",
    }
    assert list(hub.files("model", REPOSITORY)) == [".gitattributes"]  # main is as it was


def test_it_is_fetched_once_and_works_without_a_network(hub, run, monkeypatch):
    commit = distill.push(run, REPOSITORY).commit
    wanted = load_encoder(f"run:hf-hub:{REPOSITORY}").fingerprint
    before = len(hub.asked("GET /*/resolve/*"))
    assert before == len(pushed_files(hub)) - 4  # all but the card and what others load
    assert load_encoder(f"run:hf-hub:{REPOSITORY}").fingerprint == wanted
    assert len(hub.asked("GET /*/resolve/*")) == before
    asked = len(hub.requests)
    assert load_encoder(f"run:hf-hub:{REPOSITORY}@{commit}").fingerprint == wanted
    assert len(hub.requests) == asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision in ("", "@main", f"@{commit}"):
        assert load_encoder(f"run:hf-hub:{REPOSITORY}{revision}").fingerprint == wanted
    with pytest.raises(ValueError, match=r"^hf-hub:me/nothing: the student cannot be had \(HF_HUB_OFFLINE is set"):
        load_encoder("run:hf-hub:me/nothing")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens
    assert load_encoder(f"run:hf-hub:{REPOSITORY}").fingerprint == wanted
    with pytest.raises(ValueError, match=r"no connection to 127.0.0.1:9: .*not in the cache; connect"):
        load_encoder("run:hf-hub:me/nothing")


def test_a_revision_is_that_student_and_its_commit_is_recorded(hub, run, tmp_path):
    first = distill.push(run, REPOSITORY)
    other = another(tmp_path)
    second = distill.push(other, REPOSITORY, overwrite=True, message="one more")
    assert hub.repositories["model", REPOSITORY].messages[-1] == "one more"
    hub.repositories["model", REPOSITORY].tags["v1"] = first.commit
    for of, commit, revision in (
        (run, first.commit, "@v1"),
        (other, second.commit, ""),
        (run, first.commit, f"@{first.commit}"),
    ):
        found = load_encoder(f"run:hf-hub:{REPOSITORY}{revision}")
        assert found.name == f"run:hf-hub:{REPOSITORY}@{commit}"
        assert found.fingerprint == load_encoder(f"run:{of.path}").fingerprint
    with pytest.raises(ValueError, match="no such branch, tag or commit"):
        load_encoder(f"run:hf-hub:{REPOSITORY}@v9")
    for revision, what in (("v1", "a tag"), (first.commit, "a commit")):
        with pytest.raises(ValueError, match=f"is {what}, which stays .* give a branch"):
            distill.push(run, REPOSITORY, revision=revision)


def test_nothing_there_is_replaced_unasked(hub, run, tmp_path):
    first = distill.push(run, REPOSITORY)
    again = distill.push(run, REPOSITORY)
    assert (again.changed, again.commit) == (False, first.commit)
    other = another(tmp_path)
    with pytest.raises(
        ValueError, match=r"^me/student: it holds other files already \(.*model.safetensors.*--overwrite"
    ):
        distill.push(other, REPOSITORY)
    assert hub.head("model", REPOSITORY) == first.commit
    branch = distill.push(other, REPOSITORY, revision="next")
    assert hub.head("model", REPOSITORY) == first.commit
    assert hub.head("model", REPOSITORY, "next") == branch.commit
    with pytest.raises(ValueError, match="public already"):
        distill.push(run, REPOSITORY, private=True)


def test_what_a_user_wrote_into_the_card_and_other_files_stay_and_leftovers_go(hub, tmp_path):
    repository = make_run_in(tmp_path, classes=["cat", "dog"])
    (repository.path / "head.safetensors").write_bytes(b"a head")
    distill.push(repository, REPOSITORY)
    files = dict(hub.files("model", REPOSITORY))
    files["README.md"] = files["README.md"].replace(b"---\n", b"---\nlicense: mit\n", 1)
    hub.repositories["model", REPOSITORY].commit("main", {**files, "notes.txt": b"mine"}, "by hand")
    distill.push(another(tmp_path), REPOSITORY, overwrite=True)
    now = hub.files("model", REPOSITORY)
    assert "head.safetensors" in files
    assert "head.safetensors" not in now
    assert now["notes.txt"] == b"mine"
    (tmp_path / "card.md").write_bytes(now["README.md"])
    assert metadata_load(tmp_path / "card.md")["license"] == "mit"


def test_a_student_that_was_kept_on_the_way(hub, run):
    student = load_encoder(f"run:{run.path}").module.backbone
    weights = {key: value * 2 for key, value in student.state_dict().items()}
    record = json.loads((run.path / RECORD).read_text()) | {"snapshot": {"epoch": 1.0, "step": 3}}
    run.save_snapshot(3, weights, record)
    run.log([{"epoch": 1, "step": 3, "loss": 0.5}, {"epoch": 2, "step": 6, "loss": 0.25}])
    distill.push(f"{run.path}@epoch=1", REPOSITORY)
    kept, whole = (load_encoder(f"run:{run.path}{at}").fingerprint for at in ("@epoch=1", ""))
    assert load_encoder(f"run:hf-hub:{REPOSITORY}").fingerprint == kept != whole
    assert [json.loads(line)["step"] for line in pushed_files(hub)["metrics.jsonl"].splitlines()] == [3]


def test_it_is_exported_and_pushed_on_as_any_run(hub, run, tmp_path):
    distill.push(run, REPOSITORY)
    made = distill.export(f"run:hf-hub:{REPOSITORY}", tmp_path / "out")
    wanted = distill.export(run, tmp_path / "wanted")
    assert (made.path / "model.safetensors").read_bytes() == (wanted.path / "model.safetensors").read_bytes()
    assert "| loss | 0.25 |" in (made.path / "README.md").read_text()
    distill.push(f"run:hf-hub:{REPOSITORY}", "me/copy")
    assert hub.files("model", "me/copy")[WEIGHTS] == hub.files("model", REPOSITORY)[WEIGHTS]


def test_code_that_it_names_is_not_run_unasked(hub, run, tmp_path, monkeypatch):
    record = json.loads((run.path / RECORD).read_text())
    distill.push(run, REPOSITORY)
    files = dict(hub.files("model", REPOSITORY))
    files[RECORD] = json.dumps(record | {"architecture": "no_such_module:make"}).encode()
    hub.repositories["model", REPOSITORY].commit("main", files, "a trap")
    with pytest.raises(ValueError, match=r"names code, no_such_module:make.*--trust-code"):
        load_encoder(f"run:hf-hub:{REPOSITORY}")


def test_what_is_no_student_of_ours_is_said(hub, run):
    distill.push(run, REPOSITORY)
    files = dict(hub.files("model", REPOSITORY))
    del files[RECORD]
    hub.repositories["model", REPOSITORY].commit("main", files, "timm's alone")
    with pytest.raises(
        ValueError, match=r"holds no student.json, which `distill push` puts there.*timm/hf-hub:me/student"
    ):
        load_encoder(f"run:hf-hub:{REPOSITORY}")
    for spec in ("run:hf-hub:student", "run:hf-hub:a/b/c", "run:hf-hub:me/x@"):
        with pytest.raises(ValueError, match=r"is no repository of the hub .*give USER/NAME"):
            load_encoder(spec)


# -- what goes wrong ------------------------------------------------------------------------------------------


@pytest.fixture
def hurried(monkeypatch):
    """The client's waiting between attempts, as much as was waited for."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


@pytest.mark.parametrize(
    ("token", "repository", "said"),
    [
        ("", REPOSITORY, "no token: set HF_TOKEN, or log in with `hf auth login`"),
        (UNKNOWN, REPOSITORY, r"does not know this token \(401\)"),
        (TOKEN, "stranger/student", r"may not do that \(403\)"),
        (STRANGER, REPOSITORY, r"may not do that \(403\)"),
        (TOKEN, "student", r"is no repository of the hub .*give USER/NAME"),
    ],
)
def test_a_login_that_may_not_is_told_so(hub, run, monkeypatch, token, repository, said):
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=said) as refused:
        distill.push(run, repository)
    assert "\n" not in str(refused.value)
    assert not hub.repositories


def test_a_private_student_is_for_its_owner(hub, run, monkeypatch):
    distill.push(run, REPOSITORY, private=True)
    assert hub.repositories["model", REPOSITORY].private
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    for token in ("", STRANGER):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(ValueError, match="no such repository, or one that needs another login"):
            load_encoder(f"run:hf-hub:{REPOSITORY}")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert load_encoder(f"run:hf-hub:{REPOSITORY}").fingerprint == load_encoder(f"run:{run.path}").fingerprint


def test_an_interrupted_upload_shows_nothing_and_is_gone_on_with(hub, run):
    hub.fail("PUT", "/lfs/*", 403, after=1)
    with pytest.raises(ValueError, match="me/student: "):
        distill.push(run, REPOSITORY)
    assert not pushed_files(hub)
    sent = len(hub.lfs)
    assert sent >= 1
    distill.push(run, REPOSITORY)
    large = [name for name in pushed_files(hub) if name.endswith(".safetensors")]
    assert len(hub.asked("PUT /lfs/*")) == len({*hub.lfs}) + 1  # the one that failed
    assert len(large) == 2
    assert load_encoder(f"run:hf-hub:{REPOSITORY}").fingerprint == load_encoder(f"run:{run.path}").fingerprint


def test_a_push_that_loses_its_answer_is_repeated_safely(hub, run):
    """The commit was made, and the connection failed then."""
    hub.fail("POST", "/api/models/*/commit/*", 502)
    with pytest.raises(ConnectionError, match="push again: what the hub has already is not sent twice"):
        distill.push(run, REPOSITORY)
    first = distill.push(run, REPOSITORY)
    assert distill.push(run, REPOSITORY).commit == first.commit


def test_two_pushes_at_once_do_not_mix(hub, run):
    distill.push(run, REPOSITORY, revision="main")
    files = {**hub.files("model", REPOSITORY), "config.json": b"{}"}
    repository = hub.repositories["model", REPOSITORY]
    hub.fail("POST", "*/preupload/*", 0, meanwhile=lambda: repository.commit("main", files, "somebody else"))
    run.log([{"epoch": 1, "loss": 0.125}])
    with pytest.raises(ConnectionError, match=r"somebody else pushed to it meanwhile \(412\); look, then push again"):
        distill.push(run, REPOSITORY, overwrite=True)
    assert repository.messages[-1] == "somebody else"
    hub.fail("POST", "*/commit/*", 409)
    with pytest.raises(ConnectionError, match=r"\(409\)"):
        distill.push(run, REPOSITORY, overwrite=True)


def test_the_hub_may_ask_to_wait(hub, run, hurried):
    """What the client may repeat it repeats, waiting as long as it is told; the commit it does not."""
    hub.fail("POST", "*/preupload/*", 429, headers={"Retry-After": "7"})
    hub.fail("POST", "*/commit/*", 429)
    with pytest.raises(ConnectionError, match=r"asks to wait \(429, too many requests\).*push again"):
        distill.push(run, REPOSITORY)
    assert 7 <= max(hurried) <= 9
    distill.push(run, REPOSITORY)
    shutil.rmtree(constants.HF_HUB_CACHE, ignore_errors=True)
    hub.fail("GET", f"/api/models/{REPOSITORY}*", 429, times=20)
    with pytest.raises(ValueError, match=r"asks to wait \(429"):
        load_encoder(f"run:hf-hub:{REPOSITORY}")


def test_no_network_is_one_line(hub, run, monkeypatch, hurried):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ConnectionError, match=r"^me/student: http://127.0.0.1:9: .*push again"):
        distill.push(run, REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set; unset it to push"):
        distill.push(run, REPOSITORY)


# -- secrets --------------------------------------------------------------------------------------------------


def test_neither_folders_nor_passwords_are_pushed(hub, run, tmp_path):
    config = (run.path / "config.toml").read_text()
    config += '\n[places]\nbucket = "https://user:secret@host/photos?X-Amz-Signature=abc"\n'
    (run.path / "config.toml").write_text(config)
    record = json.loads((run.path / RECORD).read_text()) | {"teacher": f"timm/resnet18:{tmp_path}/weights.safetensors"}
    (run.path / RECORD).write_text(json.dumps(record))
    distill.push(run, REPOSITORY)
    for name, data in pushed_files(hub).items():
        for secret in (str(tmp_path), "secret", 'abc"', "X-Amz"):
            assert secret.encode() not in data, name
    assert json.loads(pushed_files(hub)[RECORD])["teacher"] == "timm/resnet18:weights.safetensors"


def test_a_card_that_would_tell_the_token_is_not_pushed(hub, run, monkeypatch, tmp_path):
    monkeypatch.setattr("distill.exporting.push.public", lambda value: value)
    config = (run.path / "config.toml").read_text()
    (run.path / "config.toml").write_text(f'{config}\n[mine]\nnote = "{TOKEN}"\n')
    with pytest.raises(ValueError, match=r"config\.toml would tell the hub's token; nothing is pushed"):
        distill.push(run, REPOSITORY)
    assert not pushed_files(hub)


def test_the_token_is_nowhere(hub, run, tmp_path, monkeypatch, capfd, caplog):
    """Not in what is pushed, fetched, printed, logged or written, in success and in failure."""
    caplog.set_level("DEBUG")
    monkeypatch.setenv("FEATCACHE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    make_images(tmp_path / "photos", 8)
    lines = [
        f"distill push {run.path} {REPOSITORY} --dry-run",
        f"distill push {run.path} {REPOSITORY} --json push.json",
        f"featcache extract photos --teacher run:hf-hub:{REPOSITORY} --out s.zarr --json extract.json",
        f"distill fit --store s.zarr --corpus photos --student run:hf-hub:{REPOSITORY} --method cosine --epochs 1 --out runs/b",
        f"distill export run:hf-hub:{REPOSITORY} out --json export.json",
        f"distill push {run.path} stranger/x",
        "featcache extract photos --teacher run:hf-hub:me/nothing --out t.zarr",
    ]
    codes = []
    for line in lines:
        monkeypatch.setattr(sys, "argv", line.split())
        with pytest.raises(SystemExit) as ended:
            getattr(programs, f"run_{line.split()[0]}")()
        codes.append(ended.value.code or 0)
    out, err = capfd.readouterr()
    assert codes == [0, 0, 0, 0, 0, 2, 2], out + err
    assert f"would push {run.path} to {REPOSITORY}: " in err.replace("\n", " ")
    assert TOKEN not in out + err + caplog.text
    assert "SignedInSecret" not in out + err
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 30
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    commit = hub.head("model", REPOSITORY)
    assert json.loads(Path("push.json").read_text())["commit"] == commit
    assert json.loads(Path("extract.json").read_text())["encoder"] == f"run:hf-hub:{REPOSITORY}@{commit}"
    assert Run(Path("runs/b")).config["student"] == f"run:hf-hub:{REPOSITORY}@{commit}"
    assert "loads with the code in its README.md, not by timm" in err
