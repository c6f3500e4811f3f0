"""The engine `ray`, on a cluster of two nodes of one core in this machine: whatever is lost, the stores are the same."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stopped import files
from warm import python_path

import featcache.engines.ray
import featcache.store.layout
from featcache import extract_all
from featcache.engines import Engine, Report, open_engine
from featcache.engines.ray import Worker
from featcache.inputs.images import KeptPixels

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::ResourceWarning"
)  # Ray's own

EXACT = {"device": "cpu", "precision": "fp32", "workers": 1, "batch_size": 4}
ROWS = 45
TEACHERS = """
import os
from pathlib import Path
from tiny import patch_encoder
def known(encoder):
    with open(os.path.join(os.environ["FEATCACHE_HOME"], "workers"), "a") as file:
        print(os.getpid(), file=file)
    return encoder
def small(): return known(patch_encoder(6, 16))
def wide(): return patch_encoder(10, 24)
"""
SPECS = ["mine:small", "mine:wide"]  # units of 8 and of 4 rows
TEXTS = "featcache.testing.models:small_text_teacher"
PROGRAM = """
import sys
import featcache.store.layout
from featcache_cli.programs import run_featcache
featcache.store.layout.CHUNK_BYTES = 8 * 6 * 2
run_featcache()
"""


# -- without a cluster ------------------------------------------------------------------------------------


class Failing:
    """Work whose service does not answer so many times; each time half of a span has been done."""

    def __init__(self, left: list[int], error: Exception):
        self.left, self.error = left, error

    def __reduce__(self):
        return _failing, (id(self.left), self.error)

    def __call__(self, spans):
        yield Report(rows=1)
        if self.left[0]:
            self.left[0] -= 1
            raise self.error
        yield Report(rows=1)


LEFT: dict[int, list[int]] = {}


def _failing(key: int, error: Exception) -> Failing:
    return Failing(LEFT[key], error)


@pytest.mark.parametrize(
    ("fails", "error", "lasts"),
    [(3, ConnectionError("gone"), False), (4, ConnectionError("gone"), True), (1, ValueError("other bits"), True)],
)
def test_what_a_service_fails_is_tried_again_and_in_the_end_told(monkeypatch, tmp_path, fails, error, lasts):
    monkeypatch.setattr(featcache.engines.ray, "PAUSES", (0, 0, 0))
    monkeypatch.chdir(tmp_path)
    work = Failing([fails], error)
    LEFT[id(work.left)] = work.left
    done = pickle.loads(Worker(pickle.dumps(work), str(tmp_path), {})({"first": 0, "stop": 8})["done"])
    if lasts:
        assert (type(done), str(done)) == (type(error), str(error))
    else:
        assert sum(report.rows for report in done) == 2  # none of what was begun is counted twice
    assert work.left == [0]


def test_an_error_that_cannot_travel_is_told_in_words(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    worker = Worker(pickle.dumps(print), str(tmp_path), {})
    worker._work = Failing([1], ValueError(lambda: None))
    done = pickle.loads(worker({"first": 0, "stop": 8})["done"])
    assert isinstance(done, RuntimeError)
    assert str(done).startswith("ValueError: <function")


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"engine ray: needs the ray package: pip install 'featcache\[ray\]'"):
        open_engine("ray")


@pytest.mark.parametrize(
    ("rest", "said"),
    [
        ("@workers=2.5", "@workers=2.5: give a number above 0"),
        ("here:6379@stall=0", "@stall=0: give a number above 0"),
        ("@gpus=nan", "@gpus=nan: give a number above 0"),
        ("@worker=2", "no such option; did you mean workers"),
    ],
)
def test_other_options_are_refused(monkeypatch, rest, said):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    with pytest.raises(ValueError, match=said):
        open_engine(f"ray:{rest}")


def test_options(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    engine = open_engine("ray:head:6379@workers=3@gpus=0.5@stall=60")
    assert (engine.address, engine.workers, engine.cpus, engine.gpus, engine.stall) == ("head:6379", 3, None, 0.5, 60)
    assert open_engine("ray").address is None


def test_ray_is_imported_only_where_something_is_computed():
    code = "import sys, featcache.engines.ray as it; list(it.Ray().map([], print)); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": python_path()}, check=True)


# -- with one ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Two nodes of one core; the teachers can be imported on both."""
    pytest.importorskip("ray", reason="needs featcache[ray]")
    from ray.cluster_utils import Cluster

    code = tmp_path_factory.mktemp("code")
    (code / "mine.py").write_text(TEACHERS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", python_path(code))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.syspath_prepend(code)
        made = Cluster(True, head_node_args={"num_cpus": 1, "object_store_memory": 80_000_000})
        made.add_node(num_cpus=1, object_store_memory=80_000_000)
        yield made
        made.shutdown()


@pytest.fixture
def engine(cluster, monkeypatch):
    """Of two workers."""
    monkeypatch.setattr(featcache.store.layout, "CHUNK_BYTES", 8 * 6 * 2)
    return open_engine(f"ray:{cluster.address}@workers=2")


@pytest.fixture
def folder(make_images):
    made = Path(make_images(ROWS))
    for row in (3, 30):
        sorted(made.rglob("*.png"))[row].write_bytes(b"no image")
    return str(made)


class Backwards(Engine):
    """The last span first, by another engine."""

    def __init__(self, other):
        self.other = other

    def map(self, spans, work):
        return self.other.map(spans[::-1], work)


@pytest.fixture
def same(tmp_path, monkeypatch):
    """`same(corpus, teachers, engine, **given)`: the stores are those that this process makes alone; the workers' ids."""

    def check(corpus, teachers, engine, **given):
        made = []
        for name, by in (("local", "local"), ("ray", engine)):
            (home := tmp_path / f"home-{name}").mkdir()
            monkeypatch.setenv("FEATCACHE_HOME", str(home))  # nothing to copy from
            outs = [tmp_path / name / f"{i}.zarr" for i in range(len(teachers))]
            told = given if by is engine else {k: v for k, v in given.items() if k != "progress"}
            stores = extract_all(corpus, teachers, outs, engine=by, **EXACT | told)
            assert all(store.sealed for store in stores)
            made.append([files(out) for out in outs])
        assert made[0] == made[1]

    return check


def workers_of(tmp_path) -> list[int]:
    """The processes that loaded `mine:small`, without this one."""
    return [pid for pid in map(int, (tmp_path / "home-ray/workers").read_text().split()) if pid != os.getpid()]


def test_several_teachers_tokens_pixels_and_failed_rows_in_reverse_order(engine, folder, tmp_path, same):
    given = {"fields": ["tokens"], "pixels": KeptPixels(size=16), "views": 2, "augment": "rrc"}
    same(folder, SPECS, Backwards(engine), **given)
    assert workers_of(tmp_path)


def test_texts(engine, tmp_path, same):
    (tmp_path / "texts.txt").write_text("".join(f"{'word ' * (row % 7)}{row}\n" for row in range(30)))
    same(f"lines:{tmp_path / 'texts.txt'}", [TEXTS], engine, dtype="float32")


def test_a_worker_killed_costs_the_units_in_its_hands(engine, folder, tmp_path, same):
    killed = []

    def kill(at):
        if not killed:
            killed.append(workers_of(tmp_path)[0])
            os.kill(killed[0], signal.SIGKILL)

    same(folder, SPECS[:1], engine, progress=kill)
    assert {*workers_of(tmp_path)} > {*killed}


def test_a_node_lost_costs_the_units_in_its_hands(engine, cluster, folder, same):
    lost = []

    def lose(at):
        if not lost:
            lost.append(cluster.list_all_nodes()[-1])
            cluster.remove_node(lost[0], allow_graceful=False)

    same(folder, SPECS[:1], engine, progress=lose)
    assert lost
    cluster.add_node(num_cpus=1, object_store_memory=80_000_000)


def test_a_driver_killed_and_the_same_command_again(engine, cluster, folder, tmp_path, same, monkeypatch):
    (tmp_path / "home-killed").mkdir()
    out = tmp_path / "ray/0.zarr"
    command = ["extract", folder, "--teacher", SPECS[0], "--out", out, "--engine", f"ray:{cluster.address}@workers=1",
               "--device", "cpu", "--precision", "fp32", "--workers", "1", "--batch-size", "4"]  # fmt: skip
    ran = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *command], stderr=subprocess.PIPE,
        env={**os.environ, "FEATCACHE_HOME": str(tmp_path / "home-killed")},
    )  # fmt: skip
    while not list(out.glob("state/c/*")):
        assert ran.poll() is None, ran.stderr.read()
        time.sleep(0.02)
    ran.kill()
    ran.communicate()
    done = []
    same(folder, SPECS[:1], engine, progress=lambda at: done.append(at.resumed))
    assert done[0] > 0


def test_nothing_finished_for_too_long_ends_it_in_a_line(cluster, folder, tmp_path, monkeypatch):
    engine = open_engine(f"ray:{cluster.address}@cpus=64@stall=2")
    with pytest.raises(TimeoutError, match=r"nothing was finished for 2 s.*64 cores.*the same command resumes"):
        extract_all(folder, SPECS[1:], [tmp_path / "a.zarr"], engine=engine, **EXACT)


@pytest.mark.parametrize("address", ["nowhere", "127.0.0.1:1", "ray://127.0.0.1:1", "127.0.0.1:99999"])
def test_no_cluster_at_an_address_is_told_in_a_line(address):
    pytest.importorskip("ray", reason="needs featcache[ray]")
    with pytest.raises(ValueError, match=r"engine ray:.*: no cluster there \(.+\); begin one: ray start --head$"):
        next(open_engine(f"ray:{address}").map([range(4)], print))
