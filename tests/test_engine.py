"""Where chunks run changes nothing: the same manifest in this process, out of order, and by workers that are killed."""

import logging
import os
import pickle
import signal
import sys
from functools import partial

import numpy as np
import pytest
import torch

from minidino import engine
from minidino.cli import main
from minidino.curate import curate
from minidino.curation.embeddings import embed
from minidino.curation.pipeline import Curation, Describer
from minidino.curation.search import Index, Plan
from minidino.engine import LOCAL, pick_engine, spans
from minidino.images.datasets import open_images
from minidino.images.pixels import load_pixels
from minidino.images.pools import draw_pool

PLANS = [Plan("flat"), Plan("ivf-flat", 12), Plan("ivf-pq", 12, 8)]


def coarse(images):
    """Grey on 6 x 6 places without its mean."""
    gray = torch.nn.functional.adaptive_avg_pool2d(images.float().mean(1, keepdim=True), 6).flatten(1)
    return gray - gray.mean(1, keepdim=True)


def dying(marker, images):
    """The first worker that is asked is killed."""
    if not marker.exists():
        marker.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return coarse(images)


def failing(limit, images):
    """Dislikes bright pictures."""
    if images.float().mean() > limit:
        raise ValueError("too bright")
    return coarse(images)


class Backwards:
    """Works like another machine that is in no hurry: all is pickled, and the last chunk comes first."""

    threads = 1

    def map(self, work, items, gpu=False):
        items = [tuple(part() if callable(part) else part for part in item) for item in items]
        answers = [pickle.loads(pickle.dumps(work))(*pickle.loads(pickle.dumps(item))) for item in items[::-1]]
        return iter(answers[::-1])

    def keep(self, work, items):
        return [partial(lambda answer: answer, answer) for answer in self.map(work, items)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A drawn pool with copies, junk and two files that are no pictures, and an examination that is in it."""
    root = tmp_path_factory.mktemp("engine")
    pool = draw_pool(40, copies=0.5, junk=0.1, size=48, seed=2)
    for name in ("pool", "exam"):
        (root / name).mkdir()
    for name, file in zip(pool.names, pool.files):
        (root / "pool" / name).write_bytes(file)
    for name, file in list(zip(pool.names, pool.files))[:3]:
        (root / "exam" / name).write_bytes(file)
    (root / "pool" / "notes.txt").write_text("no picture")
    (root / "pool" / "cut.png").write_bytes(pool.files[0][:200])
    return root


def run(folders, out, where=LOCAL, describe=coarse):
    """Manifest and quarantine of a run by thresholds."""
    curation = Curation(folders / "pool", out, 48, say=lambda words: None, progress=False, engine=where)
    curation.drop_same()
    curation.drop_copies(Describer("copy", describe, 24, "coarse grey"), 0.9)
    curation.drop_leaks(folders / "exam", 0.9)
    return curation.write().read_bytes(), (out / "pixels" / "quarantine.csv").read_bytes()


@pytest.fixture(scope="module")
def here(folders, tmp_path_factory):
    return run(folders, tmp_path_factory.mktemp("here"))


# ------------------------------------------------------------------------------------------------ without Ray


def test_chunks_are_fixed_by_their_place():
    assert spans(10, 4) == [(0, 4), (4, 8), (8, 10)] and spans(10, 4, 8) == [(8, 10)] and spans(3, 4, 3) == []
    assert list(LOCAL.map(pow, [(2, 3), (3, 2)])) == [8, 9] and LOCAL.keep(pow, [(2, 3)]) == [8]


def test_the_manifest_does_not_depend_on_who_works_when(folders, here, tmp_path):
    assert run(folders, tmp_path, Backwards()) == here
    manifest, quarantine = here
    assert b"too close to exam" in manifest and b",copy," in manifest and b",same picture," in manifest
    assert quarantine.count(b"\n") == 3 and b"notes.txt" in quarantine and b"cut.png" in quarantine


def cloud(n, width=32, seed=0):
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(9).normal(size=(20, width))
    return (centres[rng.integers(20, size=n)] + 0.6 * rng.normal(size=(n, width))).astype(np.float32)


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
@pytest.mark.parametrize("where", [LOCAL, Backwards()], ids=["local", "backwards"])
def test_shards_find_what_the_whole_bank_finds(monkeypatch, plan, where):
    monkeypatch.setattr("minidino.curation.search.CHUNK", 50)
    bank, queries = cloud(910), cloud(120, seed=1)
    whole = Index(bank, 9, plan=plan, say=lambda words: None)
    monkeypatch.setattr("minidino.curation.search.SHARD", 300)  # 4 shards, the last of 10 rows
    parts = Index(bank, 9, plan=plan, say=lambda words: None, engine=where)
    assert parts.n_probe == whole.n_probe
    for found, truth in ((parts.search(queries), whole.search(queries)), (parts.graph(), whole.graph())):
        if plan.kind == "ivf-flat":  # faiss adds up four rows of a list at a time: which four differs, and so do near ties
            np.testing.assert_allclose(found.similarity, truth.similarity, rtol=0, atol=2e-7)
            np.testing.assert_array_equal(np.sort(found.rows, axis=1), np.sort(truth.rows, axis=1))
            assert (found.rows != truth.rows).mean() < 1e-3
        else:
            np.testing.assert_array_equal(found.rows, truth.rows)
            np.testing.assert_array_equal(found.similarity, truth.similarity)


def test_of_equal_rows_those_of_the_first_chunks_are_taken(monkeypatch):
    monkeypatch.setattr("minidino.curation.search.CHUNK", 4)
    bank = np.repeat(np.eye(3, dtype=np.float32), [2, 18, 3], axis=0)
    whole = Index(bank, 7).search(bank)
    monkeypatch.setattr("minidino.curation.search.SHARD", 8)
    parts = Index(bank, 7).search(bank)
    assert (parts.rows == whole.rows).all() and (parts.similarity == whole.similarity).all()
    assert np.sort(parts.rows[2])[:6].tolist() == [2, 3, 4, 5, 6, 7] and parts.rows[2].max() < 12
    similarity, rows = Index(bank[:9], 11).search(bank[:1])  # more than there are, over two shards
    assert np.sort(rows[0]).tolist() == [-1, -1, *range(9)] and np.isneginf(similarity[0, 9:]).all()


def test_an_engine_that_is_not_there_is_said_in_one_line(folders, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="expected an engine of .*'local', 'ray'.*, got 'spark'"):
        pick_engine("spark")
    monkeypatch.setattr(engine, "find_spec", lambda name: None)
    assert main(["curate", str(folders / "pool"), "--out", str(tmp_path / "out"), "--engine", "ray"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pip install 'minidino[ray]'" in said and not (tmp_path / "out").exists()


def test_memory_maps_travel_as_the_names_of_their_files(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.float16).reshape(4, 3))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    told = engine._named(mapped)
    assert len(pickle.dumps(told)) < 300 and (engine._opened(told) == mapped).all()
    assert engine._opened(told).filename == str(mapped.filename)
    assert (engine._opened(engine._named(mapped[1:3])) == mapped[1:3]).all()
    assert (engine._opened(engine._named(mapped.T)) == mapped.T).all()


def test_scripted_models_travel_as_their_own_files():
    module = engine._unscripted(engine._scripted(torch.jit.script(torch.nn.Linear(3, 2))))
    again = engine._unscripted(engine._scripted(module))
    assert torch.equal(again.weight, module.weight) and torch.equal(again(torch.ones(1, 3)), module(torch.ones(1, 3)))


# ------------------------------------------------------------------------------------------------ with Ray


@pytest.fixture(scope="module")
def ray():
    module = pytest.importorskip("ray", reason="needs the extra ray: pip install 'minidino[ray]'")
    if "RAY_ADDRESS" not in os.environ:  # else a cluster of two CPUs that is there already
        module.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    module.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know this file
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pick_engine("ray")
    torch.set_num_threads(threads)
    module.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    module.shutdown()


def test_ray_writes_the_same_manifest(ray, folders, here, tmp_path):
    assert run(folders, tmp_path, ray) == here


def test_a_killed_worker_loses_nothing(ray, folders, here, tmp_path):
    marker = tmp_path / "died"
    assert run(folders, tmp_path / "out", ray, partial(dying, marker)) == here and marker.exists()


def test_networks_and_proofs_are_the_same_with_ray(ray, folders, tmp_path):
    """What the stage trains is kept in the folder, and copied."""
    kept = {"copy_steps": 2, "short_side": 48, "protect": [folders / "exam"], "say": lambda words: None}
    one = curate(folders / "pool", tmp_path / "one", **kept)
    (tmp_path / "two").mkdir()
    for weights in (tmp_path / "one").glob("copies-*.safetensors"):
        (tmp_path / "two" / weights.name).write_bytes(weights.read_bytes())
    two = curate(folders / "pool", tmp_path / "two", engine="ray", **kept)
    assert one.read_bytes() == two.read_bytes()
    for name in ("copy.npy", "copies.npz"):
        stages = [np.load(tmp_path / folder / "stages" / name) for folder in ("one", "two")]
        pairs = [stages] if name == "copy.npy" else [[stage["labels"] for stage in stages]]
        assert all((a == b).all() for a, b in pairs)


def test_an_error_of_the_work_is_raised_here_and_what_was_done_is_kept(ray, folders, tmp_path):
    pixels = load_pixels(open_images(folders / "pool"), 48, tmp_path / "pixels", progress=False)
    settings = {"kind": "copy", "made_by": "coarse", "chunk": 8, "progress": False, "engine": ray}
    bright = [pixels.select(range(start, stop)).whole(24).float().mean() for start, stop in spans(len(pixels), 8)]
    limit = float(max(bright[:2])) + 1e-3  # the first two chunks pass
    assert max(bright) > limit
    with pytest.raises(ValueError, match="^too bright$"):
        embed(pixels, partial(failing, limit), 24, tmp_path / "x.npy", **settings)
    assert '"done": 0' not in (tmp_path / "x.json").read_text()
    found = embed(pixels, coarse, 24, tmp_path / "x.npy", **settings)
    whole = embed(pixels, coarse, 24, tmp_path / "y.npy", **settings | {"engine": LOCAL})
    assert (tmp_path / "x.npy").read_bytes() == (tmp_path / "y.npy").read_bytes() and len(found.rows) == len(whole.rows)


def test_a_chunk_that_kills_every_worker_is_given_up_in_one_line(ray, monkeypatch):
    monkeypatch.setattr(engine, "RETRIES", 1)
    with pytest.raises(ChildProcessError, match="worker died 2 times") as caught:
        list(ray.map(lambda: os.kill(os.getpid(), signal.SIGKILL), [()]))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.kind)
def test_shards_stay_with_ray_and_answer_the_same(ray, monkeypatch, plan):
    monkeypatch.setattr("minidino.curation.search.SHARD", 300)
    bank, queries = cloud(700), cloud(50, seed=1)
    found, truth = (Index(bank, 5, plan=plan, say=lambda words: None, engine=where).search(queries)
                    for where in (ray, LOCAL))  # fmt: skip
    assert (found.rows == truth.rows).all() and (found.similarity == truth.similarity).all()


def test_machines_too_small_for_the_threads_are_refused(ray, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    with pytest.raises(ValueError, match="expected a machine with 64 CPUs.*got at most 2; set OMP_NUM_THREADS=2"):
        pick_engine("ray")
