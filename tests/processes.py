"""What tests/test_distributed.py lets several processes do: `torchrun --nproc-per-node 2 tests/processes.py OUT WORK ...`."""

import os
import signal
import sys
from pathlib import Path

import torch

import minidino.cli
import minidino.stages
from minidino.config import override, preset
from minidino.distributed import all_reduce, gather, here, my_rows, n_processes, rank, together
from minidino.learning.losses import koleo_loss, sinkhorn_knopp, update_center
from minidino.learning.train import State
from minidino.stages import adapt, distill, pretrain

TINY = [
    "crops.global_size=32", "crops.local_size=16", "vit.width=16", "vit.depth=2", "vit.heads=2", "optim.batch_size=16",
    "heads.n_prototypes=32", "heads.hidden_dim=16", "heads.bottleneck_dim=8", "loss.ibot_start_frac=0.1",
    "loss.ibot_full_frac=0.3", "run.steps=20", "run.log_every=1", "run.knn_every=20", "run.checkpoint_every=5",
    "run.precision=fp32", "teacher.momentum=0.992", "teacher.temp=0.07", "teacher.warmup_temp=0.04", "teacher.patch_temp=none",
    "heads.prototype_std=none", "heads.mlp_gain=none", "optim.base_lr=1e-3", "data.n_scenes=48", "data.n_test_scenes=24", "data.short_side=32",
]  # fmt: skip


def tiny(*changes: str):
    return override(preset("scenes-cpu"), [*TINY, *changes])


def rows_of(process: int) -> torch.Tensor:
    """Five rows for the first process, none for the second."""
    return torch.randn(5, 7, generator=torch.Generator().manual_seed(0))[: 0 if process else None]


def words(out: Path) -> None:
    """What each process gets to hear, in a file of its own."""
    number = torch.tensor(float(rank() + 1))
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))[my_rows(8)].requires_grad_()
    loss = koleo_loss(gather(x))
    loss.backward()
    torch.save({
        "sum": all_reduce(number), "max": all_reduce(number, op="max"), "untouched": number, "loss": loss.detach(),
        "rows": my_rows(8, 2), "gradient": x.grad,
        "sinkhorn": sinkhorn_knopp(rows_of(rank()), 0.1, all_reduce=all_reduce),
        "center": update_center(torch.zeros(1, 7), rows_of(rank()), all_reduce=all_reduce),
    }, out / f"words-{n_processes()}-{rank()}.pt")  # fmt: skip


def later(out: Path) -> None:
    """The stages after pretraining, of the run `plain` beside them."""
    adapt(out / "plain", out / "adapted", 40, 4)
    distill(str(out / "plain"), out / "taught", ["vit_tiny,width=8,depth=1,heads=1"], 4)


class Stop(Exception):
    """A run that ends early."""


def until(step: int, work) -> None:
    """Run `work` until a step has been noted."""
    note = minidino.stages.note

    def note_and_stop(learner, *told) -> None:
        note(learner, *told)
        if learner.state.step == step:
            raise Stop

    minidino.stages.note = note_and_stop
    try:
        work()
    except Stop:
        pass
    finally:
        minidino.stages.note = note


def die_once(step: int) -> None:
    """The second process is killed at a step, the first time it gets there."""
    note = minidino.stages.note

    def note_and_die(learner, *told) -> None:
        note(learner, *told)
        if learner.state.step == step and rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)

    minidino.stages.note = note_and_die


def count(out: Path) -> None:
    """From now on, write down how many numbers of the student each process holds."""
    spread = minidino.stages.spread

    def spread_and_count(config, state: State) -> None:
        spread(config, state)
        held = sum(part.numel() for part in here(list(state.student.parameters())))
        (out / f"held-{config.run.parallel}-{rank()}.txt").write_text(str(held))

    minidino.stages.spread = spread_and_count


def main() -> None:
    out, asked = Path(sys.argv[1]), sys.argv[2:]
    torch.set_num_threads(1)
    if asked[0] == "die":
        die_once(9)
        sys.exit(minidino.cli.main(["train", "--out", str(out), *TINY]))
    count(out)
    with together():
        for work in asked:
            name, _, changes = work.partition(":")
            if name == "words":
                words(out)
            elif name == "later":
                later(out)
            elif name == "resume":
                pretrain(tiny(), out / changes, resume=True)
            elif name == "begin":
                until(7, lambda: pretrain(tiny(), out / "passed-on"))
            else:
                pretrain(tiny(*changes.split()), out / name)


if __name__ == "__main__":
    main()
