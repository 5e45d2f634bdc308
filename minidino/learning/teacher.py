"""Student and teacher: one network twice, the second a slow average of the first."""

import copy
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from minidino.config import HeadConfig, RunConfig
from minidino.distributed import here
from minidino.images.batches import Batch
from minidino.model.heads import DINOHead
from minidino.model.vit import VisionTransformer, build_vit


class Network(nn.Module):
    """A backbone with its heads: class tokens go through dino_head, masked patches through ibot_head.

    Tied heads are one module under two names.
    """

    def __init__(self, backbone: VisionTransformer, dino_head: DINOHead, ibot_head: DINOHead | None = None):
        super().__init__()
        self.backbone, self.dino_head = backbone, dino_head
        self.ibot_head = dino_head if ibot_head is None else ibot_head

    def parts(self) -> dict[str, nn.Module]:
        """The modules whose gradients are clipped each for itself; tied heads once."""
        parts = {"backbone": self.backbone, "dino_head": self.dino_head}
        return parts if self.ibot_head is self.dino_head else parts | {"ibot_head": self.ibot_head}


class Imitator(nn.Module):
    """A student that learns the tokens of a teacher without heads, through a linear map for each kind of token.

    Args:
        backbone: of the student.
        teacher_width: D of the teacher's tokens.
    """

    def __init__(self, backbone: VisionTransformer, teacher_width: int):
        super().__init__()
        self.backbone = backbone
        self.class_map = nn.Linear(backbone.width, teacher_width)
        self.patch_map = nn.Linear(backbone.width, teacher_width)

    def parts(self) -> dict[str, nn.Module]:
        return {"backbone": self.backbone, "class_map": self.class_map, "patch_map": self.patch_map}


@dataclass
class Frozen:
    """A teacher that never learns. What it says of a batch is worked out once, however many students ask."""

    network: nn.Module
    sha256: str  # of its weights when it began to teach
    said: tuple[Batch, Any] | None = None

    def once(self, batch: Batch, say: Callable[[], Any]) -> Any:
        """say(), or what it was for the same batch before."""
        if self.said is None or self.said[0] is not batch:
            self.said = batch, say()
        return self.said[1]


def build_backbone(config: RunConfig) -> VisionTransformer:
    """The backbone of a config, its positions stored for the grid of a global crop."""
    return build_vit(**asdict(config.vit), in_chans=config.data.channels, img_size=config.crops.global_size)


def build_head(h: HeadConfig, in_dim: int, ibot: bool = False) -> DINOHead:
    """The head of class tokens, or that of masked patches."""
    n_prototypes = (h.ibot_n_prototypes if ibot else None) or h.n_prototypes
    bottleneck_dim = (h.ibot_bottleneck_dim if ibot else None) or h.bottleneck_dim
    return DINOHead(
        in_dim, n_prototypes, h.hidden_dim, bottleneck_dim, h.n_layers, h.weight_norm, mlp_gain=h.mlp_gain,
        prototype_std=h.prototype_std, freeze_g=h.weight_g == "paper",
    )  # fmt: skip


def build_student(config: RunConfig) -> Network | Imitator:
    """A fresh student; the seed of torch's global generator decides its weights."""
    backbone = build_backbone(config)
    if config.distill.targets == "features":
        return Imitator(backbone, config.distill.teacher_width)
    dino_head = build_head(config.heads, backbone.width)
    return Network(backbone, dino_head, None if config.heads.tied else build_head(config.heads, backbone.width, True))


def make_teacher(student: nn.Module) -> nn.Module:
    """A copy that never sees a gradient and never drops a path."""
    return copy.deepcopy(student).requires_grad_(False).eval()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Move the teacher a little towards the student: t = momentum * t + (1 - momentum) * s.

    Source: DINOv2 paper, section 4; official dinov2/train/ssl_meta_arch.py update_teacher (b8931f7).
    """
    torch._foreach_lerp_(here(list(teacher.parameters())), here(list(student.parameters())), 1 - momentum)
