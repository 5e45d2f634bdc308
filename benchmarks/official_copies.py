"""What copy detection shares with the code released for SSCD; official_curation.py runs it.

Pooling, losses and their gradients, whitening, and the measure, on the same inputs. Stand-ins take the place of what the
released training imports and nothing here asks: PyTorch Lightning, Classy Vision, AugLy.
"""

import tempfile
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from types import MethodType, SimpleNamespace
from unittest.mock import patch

import copies as measure
import numpy as np
import torch
import torch.nn.functional as F
from official_clusters import edge
from official_data import Row, listening, same
from torch import Tensor, nn

from minidino.curate import COPY_STEPS, trained_describer
from minidino.curation.duplicates import hash_duplicates
from minidino.curation.search import unit_rows
from minidino.images.pixels import Pixels
from minidino.images.scenes import draw_scenes
from minidino.learning import copies
from minidino.learning.copies import CopyDescriptor, CopyNet

TEMPERATURE, STEPS, SIDE = 0.05, 30, 48  # of InfoNCE; of the small training; px
Rows = Iterator[Row]


class Transform:
    """For Classy Vision's."""


NOTHING = {"build_transforms": None, "build_transform": None, "ClassyTransform": Transform}
ALONE = {"get_world_size": lambda: 1, "get_rank": lambda: 0, "all_reduce_mean": None, "all_reduce_sum": None, "barrier": None}
STAND_INS = {
    "pytorch_lightning": {"LightningModule": nn.Module, "LightningDataModule": object},
    "pytorch_lightning.callbacks": {"LearningRateMonitor": None, "BasePredictionWriter": object},
    "pytorch_lightning.plugins": {"DDPSpawnPlugin": None},
    "pytorch_lightning.utilities.apply_func": {"move_data_to_device": None},
    "pl_bolts.optimizers.lars": {"LARS": None},
    "pl_bolts.optimizers.lr_scheduler": {"LinearWarmupCosineAnnealingLR": None},
    "classy_vision.dataset.transforms": NOTHING | {"register_transform": lambda name: lambda kind: kind},
    "classy_vision.dataset.transforms.mixup": {"MixupTransform": Transform},
    "classy_vision.models": {"build_model": None},
    "classy_vision.generic.distributed_util": ALONE,
    "classy_vision.generic.registry_utils": {"import_all_modules": lambda *_: None},
    "distutils.util": {"strtobool": None},
    "pandas": {},
}
MODULES = {"training": "sscd.train", "disc": "disc_eval", "pooling": "sscd.models.gem_pooling", "model": "sscd.models.model",
           "metrics": "sscd.datasets.isc.metrics"}  # fmt: skip


# ---------------------------------------------------------------- the net and its losses


def pooling(there: SimpleNamespace, power: float = 3.0) -> Rows:
    """From the maps of the last stage on, in float64: descriptors, and the gradients of maps and weights."""
    torch.manual_seed(0)
    net, pool, unit = CopyNet(8, 16).double(), there.pooling.GlobalGeMPool2d(3), there.model.L2Norm()
    nn.init.constant_(net.power, power)
    images = torch.tensor(draw_scenes(16, SIDE).images).permute(0, 3, 1, 2) / 255
    for training, words in ((True, "in training"), (False, "in use")):
        net.train(training)
        with listening(net.stages, "forward") as heard:
            ours = net(images.double())
        maps = heard[0][2]
        theirs, pull = unit(net.project(pool(maps))), torch.randn(ours.shape, dtype=torch.float64)
        of = [maps, *net.project.parameters()]
        a, b = (torch.cat([x.flatten() for x in torch.autograd.grad((z * pull).sum(), of, retain_graph=True)])
                for z in (ours, theirs))  # fmt: skip
        yield same("pooling", f"descriptors, {words}", ours.numel(), (ours - theirs).detach().abs().max(), 1e-14)
        yield same("pooling", f"gradients, {words}", len(a), (a - b).abs().max() / b.abs().max(), 1e-14)


@cache
def taught() -> tuple[nn.Module, list[tuple[Tensor, Tensor, float, float]]]:
    """A net that learns from drawn scenes; of each step both views and both losses."""
    pixels = Pixels.from_array(draw_scenes(400, SIDE, seed=7).images, [0] * 400, ["scene"])
    torch.manual_seed(0)
    net = CopyNet(16, 64)
    with listening(copies, "info_nce", "koleo_loss") as heard:
        for _ in copies.train_copies(pixels, net, STEPS, batch_size=48, size=SIDE, temperature=TEMPERATURE):
            pass
    steps = []
    for (_, (one, other, _), nce), (*_, koleo) in zip(heard[::2], heard[1::2], strict=True):
        steps.append((one.detach().double(), other.detach().double(), nce.item(), koleo.item()))
    return net, steps


def their_loss(there: SimpleNamespace, z: Tensor, kinds: Tensor, part: str) -> Tensor:
    """InfoNCE or entropy of the released step, on one process and without mixing."""
    heard: dict[str, Tensor] = {}
    step = there.training.SSCD
    here = SimpleNamespace(mixup=None, infonce_temperature=TEMPERATURE, entropy_weight=1.0, global_rank=0, logger=None,
                           log_dict=lambda parts, **_: heard.update(parts))  # fmt: skip
    here.cross_gpu_similarity = MethodType(step.cross_gpu_similarity, here)
    step.loss(here, z, kinds)
    return heard[part]


def pulls(losses: tuple[Tensor, Tensor], x: Tensor) -> float:
    """How far the gradients of two losses are apart, of the largest number."""
    a, b = (torch.autograd.grad(loss, x)[0] for loss in losses)
    return ((a - b).abs().max() / b.abs().max()).item()


def losses(there: SimpleNamespace) -> Rows:
    """Of every step of the small training. The released divisor of InfoNCE is larger by 1e-6, which is allowed for."""
    found = []
    for one, other, nce, koleo in taught()[1]:
        ids = torch.arange(len(one))
        z, x = torch.cat([one, other]).requires_grad_(), one.clone().requires_grad_()
        theirs, ours = their_loss(there, z, ids.repeat(2), "InfoNCE"), copies.info_nce(*z.chunk(2), TEMPERATURE)
        others = (z @ z.T / TEMPERATURE).detach().fill_diagonal_(-torch.inf).exp().sum(1)
        spread = their_loss(there, F.normalize(x), ids, "entropy")
        found.append({
            "InfoNCE as trained": abs(nce / theirs.item() - 1),
            "InfoNCE": abs(ours + (1e-6 / others).log1p().mean() - theirs).item(),
            "gradients of InfoNCE": pulls((ours, theirs), z),
            "entropy of the first views, as trained": abs(koleo - spread.item()),
            "gradients of this entropy": pulls((copies.koleo_loss(x), spread), x),
        })  # fmt: skip
    for what, bound in zip(found[0], (1e-6, 1e-12, 1e-8, 1e-6, 1e-5), strict=True):  # the last two are in float32
        yield same("losses", what, len(found), max(row[what] for row in found), bound)


# ---------------------------------------------------------------- whitening


class Given(nn.Module):
    """A net that says what it is shown: pictures of one pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.project = [SimpleNamespace(out_features=dim)]

    def forward(self, images: Tensor) -> Tensor:
        return images[:, :, 0, 0]


def whitened(rows: np.ndarray, shrinkage: float) -> np.ndarray:
    """What our describer makes of descriptors of length 1: their cosines."""
    with patch.object(copies, "SHRINKAGE", shrinkage):
        describe = CopyDescriptor(Given(rows.shape[1]))
        describe.whiten(torch.tensor(rows))
    found = describe(torch.tensor(rows)[:, :, None, None]).numpy()
    return found @ found.T


def whitening(there: SimpleNamespace, shrinkage: float = 0.0) -> Rows:
    """Cosines, since axes are each one's own. The released code does not shrink; its rounding is told by float64."""
    net, _ = taught()
    images = torch.tensor(draw_scenes(500, SIDE, seed=8).images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        rows = net.eval()(images).numpy()

    def their_whitened(rows: np.ndarray) -> np.ndarray:
        some = there.disc.Embeddings(np.arange(len(rows)), rows)
        return there.disc.project(f"PCAW{rows.shape[1]},L2norm,Flat", some, some, some)[0].embeddings

    theirs = their_whitened(rows)
    values, axes = np.linalg.eigh(np.cov(rows.T.astype(np.float64)))
    true = unit_rows((rows - rows.mean(0, dtype=np.float64)) @ axes / values**0.5)
    true, theirs = true @ true.T, theirs @ theirs.T
    apart, rounding = np.abs(whitened(rows, shrinkage) - true).max(), np.abs(theirs - true).max()
    shrunk = np.abs(whitened(rows, copies.SHRINKAGE) - theirs)
    few = rows[:20]
    work = partial(whitened, few, copies.SHRINKAGE), partial(their_whitened, few)
    yield edge("whitening of 20 rows of 64 numbers", *work, ("20 rows", "an error"))
    told = {"shrunk": [float(shrunk.mean()), float(shrunk.max())]}
    yield same("whitening", "cosines beside float64", true.size, apart, float(rounding), **told)


# ---------------------------------------------------------------- the measure


def judged(there: SimpleNamespace, name: str, score: np.ndarray, truth: np.ndarray) -> Rows:
    """Recall where 99 of 100 links are right, and the curve; pairs of equal score are taken together."""
    task = measure.Task(None, object(), truth, np.full(len(truth), ""), np.ones_like(truth))
    ours, metrics = measure.judged(score, task), there.metrics
    precision, recall, cuts = metrics.precision_recall(truth, score, int(truth.sum()))
    best = metrics.find_operating_point(precision, recall, cuts, 0.99)[1] or 0.0
    micro = float(metrics.average_precision(recall, precision))
    yield same("measure", f"recall, {name}", truth.size, abs(ours["recall"] - best), 1e-14, recall=float(best), micro_ap=micro)
    last = [int((cuts > point["threshold"]).sum()) - 1 for point in ours["curve"]]
    theirs = [(precision[i], recall[i]) if i >= 0 else (1.0, 0.0) for i in last]
    mine = [(point["precision"], point["recall"]) for point in ours["curve"]]
    yield same("measure", f"curve, {name}", 2 * len(mine), np.abs(np.subtract(mine, theirs)).max(), 1e-14)


def measures(there: SimpleNamespace, data: Path | None) -> Rows:
    rng = np.random.default_rng(0)
    truth = rng.random((60, 200)) < 0.02
    score = np.clip(0.2 * rng.standard_normal(truth.shape) + 0.8 * truth, -1, 1)
    yield from judged(there, "random scores", score, truth)
    yield from judged(there, "many equal scores", (5 * score).round() / 5, truth)
    yield from judged(there, "no link is right enough", -score.round(1), truth)
    if data:
        yield from photographs(there, data)


def photographs(there: SimpleNamespace, data: Path) -> Rows:
    """Altered photographs against references, by colours and by our describer, taught on the pool; with and without the
    released normalisation of scores, which takes from each the mean of a query's three best in the pool."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        task, pool = measure.copies_task(data, folder), measure.pool_task(data, folder).left
        thumbs = pool.whole(16).flatten(1).numpy()
        distinct = pool.select(np.sort(hash_duplicates(thumbs).representatives))
        describer = trained_describer(distinct, folder, COPY_STEPS, 0)
        sets = [there.disc.Embeddings(np.arange(len(each)), unit_rows(measure.rows_of(describer, each, folder)))
                for each in (task.left, task.right, distinct)]  # fmt: skip
    by_colours = measure.cosines(lambda pixels: pixels.whole(16).flatten(1).numpy() - 127.5, task)
    yield from judged(there, "photographs by colours", by_colours, task.truth)
    adjusted = there.disc.apply_score_norm(*sets, there.disc.ScoreNormalization.parse("1.0[0,2]"))
    for words, (queries, references) in {"CopyNet": sets[:2], "CopyNet, scores normalised": adjusted}.items():
        yield from judged(there, f"photographs by {words}", queries.embeddings @ references.embeddings.T, task.truth)
