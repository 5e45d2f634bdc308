"""Does it help to train the backbone itself on the labels? Linear head and backbone together, for a short while.

    finetune(vit, train, test, size) -> accuracy, and the classifier that has it

The published answer is: a little (86.5 to 88.5 % on ImageNet for ViT-g), so frozen features are enough for most uses.
Earlier blocks learn more slowly than later ones: what they know serves every task.

Source: DINOv2 paper, section 7.1 and table 5; layer-wise rates as in BEiT (Bao et al. 2021, arXiv 2106.08254).
"""

import copy
import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from tqdm import tqdm

from minidino.images.pixels import Pixels
from minidino.learning.optim import cosine_schedule, parameter_groups
from minidino.model.vit import VisionTransformer
from minidino.probes.features import extract, in_float32
from minidino.probes.grid import labelled_crops

LR_TIMES_WIDTH = 0.2


class Classifier(nn.Module):
    """A backbone and a linear head on its class token: images (B, C, H, W), normalised, to logits (B, n_classes)."""

    def __init__(self, backbone: VisionTransformer, n_classes: int):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(backbone.width, n_classes)
        with torch.no_grad():
            self.head.weight.normal_(0, 0.01)
            self.head.bias.zero_()

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B n_classes"]:
        return self.head(self.backbone(images))


@in_float32
def finetune(
    vit: VisionTransformer,
    train: Pixels,
    test: Pixels,
    size: int,
    *,
    steps: int = 500,
    batch_size: int = 64,
    lr: float | None = None,
    layerwise_decay: float = 0.75,
    weight_decay: float = 0.05,
    smoothing: float = 0.1,
    scale: tuple[float, float] = (0.25, 1.0),
    n_classes: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> dict:
    """Train a copy of a backbone, with a linear head, on randomly cropped and flipped pictures with labels.

    Args:
        vit: stays as it is; its stochastic depth is that of the copy, too. The copy learns in float32.
        train, test: pictures with labels; those with a label below 0 (unknown) do not count.
        size: px, side of the crops and of the squares it is judged on.
        steps, batch_size, weight_decay: of AdamW; gradients longer than 1 are clipped.
        lr: its rate; a tenth of the steps warms up, then a cosine to 0. None: 0.2 / width, 5e-4 for ViT-S; tried at a
            width of 64, where a third of it learns less.
        layerwise_decay: what the rate of each block is multiplied by, from the last to the first; 1 makes all equal.
        smoothing: share of each label that is spread over all classes.
        scale: share of a picture's area in a crop, smallest and largest.
        n_classes: None counts from the largest label.
        seed: draws the head, the order, the crops and what stochastic depth leaves out.
        progress: a bar with images per second.
    Returns:
        "accuracy", top-1 fraction on the test pictures, and "classifier", the `Classifier`.
    Raises:
        ValueError: nothing labelled to learn from or to judge; steps or batch_size below 1; a label beyond n_classes; a
            loss or logits that are not finite.
    Differs: the paper takes the recipe of DeiT III, whose many augmentations are for ImageNet; this is its core.
    """
    test = test.labelled()
    if min(len(test), steps, batch_size) < 1:
        raise ValueError("expected labelled test pictures, steps and batch_size of at least 1, got "
                         f"{len(test)}, {steps} and {batch_size}")  # fmt: skip
    counted = int(max(train.labels.max(initial=-1), test.labels.max())) + 1
    n_classes = n_classes or counted
    if n_classes < counted:
        raise ValueError(f"expected labels below n_classes = {n_classes}, got {counted - 1}")
    device, lr = next(vit.parameters()).device, LR_TIMES_WIDTH / vit.width if lr is None else lr
    crops = islice(labelled_crops(train, size, batch_size, seed, scale, device), steps)
    n_images = steps * min(batch_size, int((train.labels >= 0).sum()))
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        model = Classifier(copy.deepcopy(vit).float(), n_classes).to(device).requires_grad_(True).train()
        with tqdm(total=n_images, unit="images", disable=not progress, leave=False) as bar:
            for images in _learn(model, crops, steps, lr, layerwise_decay, weight_decay, smoothing):
                bar.update(len(images))
    tokens = extract(model.eval().backbone, test.squares(size), progress=progress)["cls"]
    with torch.no_grad():
        logits = model.head(tokens.to(device)).cpu()
    if not logits.isfinite().all():
        raise ValueError(f"the logits are not finite after {steps} steps: lower the rate, now {lr:g}")
    right = logits.argmax(1) == torch.from_numpy(test.labels)
    return {"accuracy": right.double().mean().item(), "classifier": model}


def _learn(
    model: Classifier,
    crops: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    layerwise_decay: float,
    weight_decay: float,
    smoothing: float,
) -> Iterator[Tensor]:
    """One update for each batch; yields the images it saw."""
    groups = parameter_groups(model, layerwise_decay, decay_tokens=False)
    search = torch.optim.AdamW([{"params": group["params"]} for group in groups], lr=lr)
    rate = cosine_schedule(lr, 0.0, steps, warmup_steps=steps // 10, start=lr / max(steps // 10, 1))
    for step, (images, labels) in enumerate(crops):
        for target, group in zip(search.param_groups, groups, strict=True):
            target["lr"], target["weight_decay"] = rate(step) * group["lr_mult"], weight_decay * group["wd_mult"]
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), labels.to(images.device), label_smoothing=smoothing)
        if not math.isfinite(loss.item()):
            raise ValueError(f"the loss is {loss.item()} at step {step}: lower the rate, now {lr:g}")
        search.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        search.step()
        yield images
