"""A result is read back where all that it follows from is as it was, and else measured again."""

import shutil

import numpy as np
import pytest

import evalsuite.kept
from evalsuite.evaluators.knn import Knn
from evalsuite.evaluators.ood import Ood
from evalsuite.evaluators.retrieval import Retrieval
from evalsuite.kept import measured
from evalsuite.result import Result
from featcache.store.from_arrays import write_store


@pytest.fixture
def stores(tmp_path):
    def write(seed):
        rng, made = np.random.default_rng(seed), {}
        for name in ("bank", "query", "far"):
            labels = np.arange(20) % 2
            rows = rng.normal(size=(20, 4)) + 3 * labels[:, None]
            path = tmp_path / f"{name}.zarr"
            shutil.rmtree(path, ignore_errors=True)
            made[name] = write_store(path, rows, labels=labels, class_names=["a", "b"])
        return made

    return write


@pytest.fixture
def runs(monkeypatch):
    """Evaluators that have measured."""
    runs = []
    for evaluator in (Knn, Ood):
        run = evaluator.run
        monkeypatch.setattr(evaluator, "run", lambda self, run=run: runs.append(self) or run(self))
    return runs


def test_a_result_is_read_back_as_it_was_measured(stores, runs, tmp_path):
    made, path = stores(0), tmp_path / "results" / "r.json"
    first = measured(Knn(made["bank"], made["query"], k=[3]), path)
    assert Result.read(path) == first
    again = measured(Knn(str(made["bank"].path), made["query"].path, k=[3]), path)
    assert again == first
    assert again.samples.keys() == first.samples.keys()
    assert len(runs) == 1


@pytest.mark.parametrize(
    "change", ["option", "store", "code", "result", "damaged result", "damaged inputs", "evaluator"]
)
def test_whatever_changes_it_is_measured_again(stores, runs, tmp_path, monkeypatch, change):
    made, path, k = stores(0), tmp_path / "r.json", 3
    measured(Knn(made["bank"], made["query"], k=[k]), path)
    if change == "option":
        k = 2
    elif change == "store":
        made = stores(1)
    elif change == "code":
        monkeypatch.setattr(evalsuite.kept, "_code", lambda: "another")
    elif change == "result":  # by `evalsuite knn --json` with other options, say
        Knn(made["bank"], made["query"], k=[5]).run().write(path)
        runs.clear(), runs.append(None)
    elif change == "damaged result":
        path.write_text(path.read_text()[:-20])
    elif change == "damaged inputs":
        path.with_suffix(".inputs").write_text("{")
    else:
        measured(Ood(id_train=made["bank"], id_test=made["query"], far={"far": made["far"]}, k=3), path)
        runs.pop()
    found = measured(Knn(made["bank"], made["query"], k=[k]), path)
    assert len(runs) == 2
    assert found.metrics.keys() == {f"top1@{k}", *(name for name in found.metrics if not name.startswith("top1"))}
    assert found == Result.read(path)
    assert measured(Knn(made["bank"], made["query"], k=[k]), path) == found
    assert len(runs) == 2


def test_a_file_that_a_detector_names_is_part_of_it(stores, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, names = stores(0), tmp_path / "names.npy"
    evaluator = Ood(
        id_train=made["bank"], id_test=made["query"], far={"far": made["far"]}, detectors=["mcm:text=names.npy"]
    )
    np.save(names, np.eye(4)[:2])
    before = evalsuite.kept.made_of(evaluator)
    assert before["files"].keys() == {"names.npy"}
    assert evalsuite.kept.made_of(evaluator) == before
    np.save(names, np.eye(4)[2:])
    assert evalsuite.kept.made_of(evaluator) != before


def test_the_qrels_of_a_folder_are_among_what_a_result_follows_from(stores, tmp_path):
    made = stores(0)
    evaluator = Retrieval(made["bank"], made["query"], qrels=f"beir:{tmp_path}:dev")
    (tmp_path / "qrels").mkdir()
    found = []
    for grade in (1, 2):
        (tmp_path / "qrels" / "dev.tsv").write_text(f"0\t1\t{grade}\n")
        found.append(evalsuite.kept.made_of(evaluator)["files"])
    assert found[0].keys() == found[1].keys() == {str(tmp_path / "qrels" / "dev.tsv")}
    assert found[0] != found[1]
