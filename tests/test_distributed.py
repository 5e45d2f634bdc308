"""Several processes are one: what they tell each other, the same losses, runs that are handed on, one that is lost."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import later, rows_of, tiny, until
from safetensors.torch import load_file

from minidino import distributed
from minidino.cli import main
from minidino.learning.losses import koleo_loss, sinkhorn_knopp, update_center
from minidino.runs import Run
from minidino.stages import pretrain

HERE = Path(__file__).parent
CENTRED = "loss.targets=centering loss.koleo=0"  # of two neighbours equally near, rounding would choose
PARTS = "optim.accumulate=2"
pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="torch without gloo"
)


def launch(n: int, *words: object, restarts: int = 0) -> subprocess.CompletedProcess:
    """tests/processes.py in n processes of one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n),
               "--max-restarts", str(restarts), str(HERE / "processes.py"), *map(str, words)]  # fmt: skip
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs of one process."""
    out, threads = tmp_path_factory.mktemp("alone"), torch.get_num_threads()
    torch.set_num_threads(1)
    for name, changes in (("plain", ""), ("parts", PARTS), ("centred", CENTRED)):
        pretrain(tiny(*changes.split()), out / name)
    later(out)
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    done = launch(2, out, "words", "plain:", f"parts:{PARTS} run.parallel=fsdp", f"centred:{CENTRED}", "later", "begin")
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def four(two):
    """Four processes; they also take over what two have begun and one has gone on with."""
    until(14, lambda: pretrain(tiny(), two / "passed-on", resume=True))
    done = launch(4, two, "words", "four:", "resume:passed-on")
    assert done.returncode == 0, done.stderr[-3000:]
    return two


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in Run(folder).records()]


# ---------------------------------------------------------------- what they tell each other


@pytest.mark.parametrize("n", [2, 4])
def test_sums_and_maxima_are_those_of_all_and_the_numbers_themselves_stay(four, n):
    heard = [torch.load(four / f"words-{n}-{i}.pt", weights_only=True) for i in range(n)]
    assert [words["sum"].item() for words in heard] == [n * (n + 1) / 2] * n
    assert [words["max"].item() for words in heard] == [n] * n
    assert [words["untouched"].item() for words in heard] == list(range(1, n + 1))


@pytest.mark.parametrize("n", [2, 4])
def test_neighbours_are_looked_for_in_all_processes_and_gradients_find_their_way_back(four, n):
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    loss = koleo_loss(x)
    loss.backward()
    heard = [torch.load(four / f"words-{n}-{i}.pt", weights_only=True) for i in range(n)]
    for words in heard:
        torch.testing.assert_close(words["loss"], loss.detach())
    gradient = torch.cat([words["gradient"] for words in heard]) / n  # each process has a loss of its own: the mean counts
    torch.testing.assert_close(gradient, x.grad)


def test_a_process_without_rows_has_its_say_in_sinkhorn_and_center(two):
    first, second = (torch.load(two / f"words-2-{i}.pt", weights_only=True) for i in range(2))
    torch.testing.assert_close(first["sinkhorn"], sinkhorn_knopp(rows_of(0), 0.1))
    assert second["sinkhorn"].shape == (0, 7)
    torch.testing.assert_close(second["center"], update_center(torch.zeros(1, 7), rows_of(0)))


def test_every_row_belongs_to_one_process_and_a_part_of_the_batch_to_all(four):
    rows = [torch.load(four / f"words-2-{i}.pt", weights_only=True)["rows"].tolist() for i in range(2)]
    assert rows == [[0, 1, 4, 5], [2, 3, 6, 7]]  # two parts: 0 to 3 and 4 to 7
    rows = [torch.load(four / f"words-4-{i}.pt", weights_only=True)["rows"].tolist() for i in range(4)]
    assert rows == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_one_process_hears_itself():
    x = torch.randn(3, 2)
    assert distributed.all_reduce(x) is x and distributed.mean(x) is x and distributed.gather(x) is x
    assert (distributed.rank(), distributed.n_processes(), distributed.is_first()) == (0, 1, True)
    assert distributed.my_rows(4, 2).tolist() == [0, 1, 2, 3]
    assert not distributed.restarted()
    with distributed.together(), distributed.first_goes_first():
        distributed.wait()
    tree = {"a": [x, 1], "b": (x, None)}
    assert distributed.whole(tree)["a"][0] is x and distributed.here([x])[0] is x


def test_what_does_not_divide_and_what_cannot_be_reduced_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="expected op 'sum' or 'max', got 'mean'"):
        distributed.all_reduce(torch.zeros(1), "mean")
    monkeypatch.setattr(distributed, "n_processes", lambda: 3)
    with pytest.raises(ValueError, match=r"multiple of 6 \(optim.accumulate 2 times 3 processes\), got 16"):
        distributed.my_rows(16, 2)


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize(
    "theirs, ours",
    [("plain", "plain"), ("four", "plain"), ("passed-on", "plain"), ("parts", "parts"), ("centred", "centred"),
     ("adapted", "adapted"), ("taught", "taught")],
)  # fmt: skip
def test_losses_are_those_of_one_process(alone, four, theirs, ours):
    expected = losses(alone / ours)
    assert len(expected) == (4 if ours in ("adapted", "taught") else 20) and len(set(expected)) == len(expected)
    assert losses(four / theirs) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    "theirs, ours", [("plain", "plain"), ("four", "plain"), ("passed-on", "plain"), ("parts", "parts")]
)
def test_so_are_the_weights_that_come_out(alone, four, theirs, ours):
    for file in ("weights.safetensors", "heads.safetensors"):
        expected, got = load_file(alone / ours / file), load_file(four / theirs / file)
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("key", ["koleo", "rankme", "teacher_entropy", "prototypes_used", "knn", "grad_norm_backbone"])
def test_what_the_doctor_reads_is_of_the_whole_batch(alone, four, key):
    for theirs, ours in (("plain", "plain"), ("four", "plain"), ("parts", "parts")):
        expected, got = ([record[key] for record in Run(folder).records() if key in record]
                         for folder in (alone / ours, four / theirs))  # fmt: skip
        assert got and got == pytest.approx(expected, rel=1e-5)


def test_every_step_is_told_once_though_the_processes_changed_twice(four):
    assert [record["step"] for record in Run(four / "passed-on").records()] == list(range(20))


def test_a_checkpoint_of_parts_is_that_of_one_process(alone, two):
    expected, got = (Run(folder / "parts").load(torch.device("cpu"))[1] for folder in (alone, two))
    assert got.keys() == expected.keys() and got["step"] == 20
    for name in ("student", "teacher"):
        for weights in (got[name], expected[name]):
            for key in [key for key in weights if key.endswith("qkv.bias")]:
                weights[key] = weights[key].chunk(3)[::2]  # of the keys' bias only rounding has a gradient
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=2e-5)
    ours, theirs = (saved["optimizer"]["state"] for saved in (got, expected))
    assert ours.keys() == theirs.keys()
    for number, moments in theirs.items():
        for key, value in moments.items():
            torch.testing.assert_close(ours[number][key], value, rtol=1e-3, atol=1e-6)


def test_each_process_holds_its_share_of_the_parameters(two):
    whole, parts = ([int((two / f"held-{how}-{i}.txt").read_text()) for i in range(2)] for how in ("ddp", "fsdp"))
    assert whole[0] == whole[1] == sum(parts) and max(parts) < 0.6 * whole[0]


# ---------------------------------------------------------------- what goes wrong


def test_a_killed_process_is_replaced_and_the_run_goes_on(two, tmp_path):
    done = launch(2, tmp_path / "run", "die", restarts=1)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr  # torchrun saw it die
    assert [record["step"] for record in Run(tmp_path / "run").records()] == list(range(20))
    expected, got = (load_file(folder / "weights.safetensors") for folder in (two / "plain", tmp_path / "run"))
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_several_processes_are_for_training_alone(monkeypatch, capsys):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert main(["probe", "runs/none"]) == 2
    assert "torchrun is for train, adapt and distill" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["run.precision=fp16", "optim.freeze_backbone_frac=0.5"])
def test_fsdp_says_what_it_cannot_run(monkeypatch, change):
    from minidino.learning import train

    monkeypatch.setattr(train, "n_processes", lambda: 2)
    config = tiny("run.parallel=fsdp", change)
    with pytest.raises(ValueError, match="expected 'ddp' with fp16 or with heads that learn first, got 'fsdp'"):
        train.start(config, torch.device("cpu"))


def test_processes_at_different_steps_do_not_start(monkeypatch):
    from minidino.learning import train

    monkeypatch.setattr(train, "n_processes", lambda: 2)
    monkeypatch.setattr(train, "all_reduce", lambda steps, op: torch.tensor([9, 0]))  # another one is at 9
    with pytest.raises(ValueError, match="do all see the same run folder"):
        train.spread(tiny(), train.start(tiny(), torch.device("cpu")))

