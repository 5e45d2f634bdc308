"""The projection head: from a token to logits over prototypes."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidino.model.attention import autocast_off


class DINOHead(nn.Module):
    """Score tokens against K learned prototypes by cosine.

        logits = g_k  v_k / ||v_k||  .  z / ||z||        z = MLP(x), GELU between its layers

    Only the MLP follows autocast; the norm and the logits are at least float32, because the logits are
    divided by a temperature as low as 0.04 and half precision would show there.

    Args:
        in_dim: D, the width of the backbone.
        n_prototypes: K.
        hidden_dim, bottleneck_dim: widths inside the MLP and of z.
        n_layers: linear layers of the MLP, at least 1.
        weight_norm: False makes the prototypes a plain linear layer, as DINOv3 does.
        mlp_gain: None draws the MLP from a normal of std 0.02 as released; a number draws it Xavier normal with that
            gain, so that a small head does not start by shrinking what it is given.
        prototype_std: None draws the prototypes as torch's Linear does, as released; a number: normal with that std.
        freeze_g: True keeps the lengths g at 1 (DINO's norm_last_layer).
    Raises:
        ValueError: no layers, or freeze_g without weight_norm.
    Source: official dinov2/layers/dino_head.py (b8931f7).
    Differs: float32 logits under autocast; weight norm is written out, with the released key names.
    """

    def __init__(
        self,
        in_dim: int,
        n_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        n_layers: int = 3,
        weight_norm: bool = True,
        mlp_gain: float | None = None,
        prototype_std: float | None = None,
        freeze_g: bool = False,
    ):
        super().__init__()
        if n_layers < 1:
            raise ValueError(f"expected n_layers of at least 1, got {n_layers}")
        if freeze_g and not weight_norm:
            raise ValueError("freeze_g holds the lengths of weight-normalised prototypes: it needs weight_norm=True")
        widths = [in_dim] + [hidden_dim] * (n_layers - 1) + [bottleneck_dim]
        layers = [layer for pair in zip(widths, widths[1:]) for layer in (nn.Linear(*pair), nn.GELU())]
        self.mlp = nn.Sequential(*layers[:-1])
        for layer in self.mlp[::2]:
            if mlp_gain is None:
                nn.init.trunc_normal_(layer.weight, std=0.02)
            else:
                nn.init.xavier_normal_(layer.weight, gain=mlp_gain)
            nn.init.zeros_(layer.bias)
        if weight_norm:
            self.last_layer = WeightNormLinear(bottleneck_dim, n_prototypes, freeze_g)
        else:
            self.last_layer = nn.Linear(bottleneck_dim, n_prototypes, bias=False)
        if prototype_std is not None:
            nn.init.normal_(self.last_layer.weight_v if weight_norm else self.last_layer.weight, std=prototype_std)

    def bottleneck(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B b"]:
        """The MLP's answer at unit length, at least float32."""
        z = self.mlp(x)
        eps = 1e-6 if z.dtype == torch.float16 else 1e-12
        return F.normalize(_at_least_float32(z), dim=-1, eps=eps)

    def prototypes(self) -> Float[Tensor, "K b"]:
        """The directions that logits are measured along, one row each, as the last layer uses them."""
        weight = self.last_layer.weight
        return _at_least_float32(weight() if callable(weight) else weight)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B K"]:
        """Logits, not yet divided by a temperature."""
        z = self.bottleneck(x)
        with autocast_off(z):
            return F.linear(z, self.prototypes())


class WeightNormLinear(nn.Module):
    """Parameters of K directions v with lengths g; keys weight_g (K, 1) and weight_v (K, b) as released."""

    def __init__(self, in_dim: int, n_prototypes: int, freeze_g: bool):
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(n_prototypes, 1), requires_grad=not freeze_g)
        self.weight_v = nn.Parameter(torch.empty(n_prototypes, in_dim))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))  # what nn.Linear draws

    def weight(self) -> Float[Tensor, "K b"]:
        """g v / ||v||, row by row."""
        v = _at_least_float32(self.weight_v)
        return self.weight_g * v / v.norm(dim=1, keepdim=True)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
