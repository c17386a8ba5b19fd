"""Tiny models whose hidden layers are normalized inside, exported with the real exporters.

As ``exports.py``, which says how. ``matcher``: two streams of points through one set of weights, as LightGlue does it;
``sublayer_norm``: gated layers with a norm in their middle; ``conv_norms``: convolutions with the norms of pictures
between them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tests.models.exports import WIDTH, Exports, Model, _image_inputs, _randomize, register

if TYPE_CHECKING:
    import torch

HIDDEN_NORMS: Exports = {}

POINTS = 32  # width of the matcher, of 2 heads
HIDDEN = 24  # channels between the convolutions, and of the gated layers

_register = functools.partial(register, into=HIDDEN_NORMS, source=__file__)
_STREAM = {0: "batch", 1: "points"}


@_register("ts17 dyn20")
def _build_matcher(attention: str) -> Model:
    """Self and cross attention; both directions of the latter share the projection of queries and keys, and messages
    are concatenated to their stream in front of a layer with a LayerNorm inside."""
    import torch
    from torch import nn

    def split(x: torch.Tensor) -> Any:
        return x.unflatten(-1, (2, POINTS // 2)).transpose(1, 2)  # type: ignore[no-untyped-call]

    def merge(x: torch.Tensor) -> Any:
        return x.transpose(1, 2).flatten(-2)

    class Update(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = nn.Sequential(
                nn.Linear(2 * POINTS, 2 * POINTS), nn.LayerNorm(2 * POINTS), nn.GELU(), nn.Linear(2 * POINTS, POINTS)
            )

        def forward(self, x: torch.Tensor, message: torch.Tensor) -> Any:
            return x + self.ffn(torch.cat([x, message], -1))

    class SelfBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.out = (nn.Linear(POINTS, POINTS) for _ in range(4))
            self.update = Update()

        def forward(self, x: torch.Tensor) -> Any:
            q, k, v = split(self.q(x)), split(self.k(x)), split(self.v(x))
            weights = (q @ k.transpose(-1, -2) * (POINTS // 2) ** -0.5).softmax(-1)
            return self.update(x, self.out(merge(weights @ v)))

    class CrossBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qk, self.v, self.out = (nn.Linear(POINTS, POINTS) for _ in range(3))
            self.update = Update()

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            a, b = split(self.qk(x)), split(self.qk(y))
            scale = (POINTS // 2) ** -0.25
            scores = (a * scale) @ (b * scale).transpose(-1, -2)
            to_x = merge(scores.softmax(-1) @ split(self.v(y)))
            to_y = merge(scores.transpose(-1, -2).softmax(-1) @ split(self.v(x)))
            return self.update(x, self.out(to_x)), self.update(y, self.out(to_y))

    class Matcher(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter = nn.Linear(12, POINTS)
            self.own, self.cross = SelfBlock(), CrossBlock()
            self.final = nn.Linear(POINTS, POINTS)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            x, y = self.own(self.enter(x)), self.own(self.enter(y))
            x, y = self.cross(x, y)
            return self.final(x) @ self.final(y).transpose(-1, -2)

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {
            "x": torch.randn(batch, length, 12, generator=generator),
            "y": torch.randn(batch, length + 3, 12, generator=generator),
        }

    module = Matcher()
    _randomize(module)
    axes = {"x": _STREAM, "y": {0: "batch", 1: "others"}, "scores": {0: "batch", 1: "points", 2: "others"}}
    return Model(module, inputs, "scores", axes)


@_register("ts17 dyn20")
def _build_sublayer_norm(attention: str) -> Model:
    """A gated layer with a LayerNorm in its middle, one with an RMSNorm, and one that normalizes before a GELU."""
    import torch
    from torch import nn

    class RootMeanSquare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(HIDDEN))

        def forward(self, x: torch.Tensor) -> Any:
            return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.weight

    class Gated(nn.Module):
        def __init__(self, norm: nn.Module) -> None:
            super().__init__()
            self.before = nn.LayerNorm(WIDTH)
            self.gate, self.up = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)
            self.norm, self.down = norm, nn.Linear(HIDDEN, WIDTH)

        def forward(self, x: torch.Tensor) -> Any:
            n = self.before(x)
            return x + self.down(self.norm(nn.functional.silu(self.gate(n)) * self.up(n)))

    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(WIDTH, HIDDEN), nn.LayerNorm(HIDDEN), nn.GELU(), nn.Linear(HIDDEN, WIDTH)
            )

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.layers(x)

    module = nn.Sequential(
        nn.Linear(12, WIDTH),
        Gated(nn.LayerNorm(HIDDEN)),
        Gated(RootMeanSquare()),
        Plain(),
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 7),
    )
    _randomize(module)

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch, length, 12, generator=generator)}

    return Model(module, inputs, "logits", {"x": _STREAM, "logits": _STREAM})


@_register("ts17 ts14 dyn21")
def _build_conv_norms(attention: str) -> Model:
    """Pointwise layers of a picture with a norm inside: per channel, over all channels, over groups of channels; then
    wide kernels with a norm over all channels between them."""
    from torch import nn

    class Layer(nn.Module):
        def __init__(self, norm: nn.Module, kernel: int = 1) -> None:
            super().__init__()
            self.up = nn.Conv2d(16, HIDDEN, kernel, padding=kernel // 2)
            self.norm, self.down = norm, nn.Conv2d(HIDDEN, 16, kernel, padding=kernel // 2)

        def forward(self, x: torch.Tensor) -> Any:
            return x + self.down(nn.functional.silu(self.norm(self.up(x))))

    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.instance = Layer(nn.InstanceNorm2d(HIDDEN, affine=True))
            self.whole = Layer(nn.GroupNorm(1, HIDDEN))
            self.groups = Layer(nn.GroupNorm(4, HIDDEN))
            self.wide = Layer(nn.GroupNorm(1, HIDDEN), 3)
            self.enter, self.classes = nn.Conv2d(3, 16, 2, 2), nn.Linear(16, 7)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.wide(self.groups(self.whole(self.instance(self.enter(x)))))
            return self.classes(x.mean((2, 3)))

    module = Pooled()
    _randomize(module)
    axes = {"x": {0: "batch", 2: "height", 3: "width"}, "logits": {0: "batch"}}
    return Model(module, _image_inputs(12), "logits", axes)
