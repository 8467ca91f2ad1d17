"""Talk3D's audio-guided attention U-Net: identity planes and tokens -> residual of the planes.

After Ko et al., arXiv 2403.20153.  Deliberate differences:
* group norm instead of batch norm, so that a frame does not depend on the others of its batch;
* the encoder does not depend on the row, so it runs once for all rows;
* tokens also scale and shift the outputs of the decoder's norms (adaptive group norm), so that a
  row selects details of the identity at every size instead of synthesising them, such as a lid,
  from the bottleneck alone; blinks are learned in minutes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.modulated import twice

N_GROUPS = 4  # of group norm, per plane
N_HEADS = 4
N_OCTAVES = 8  # of the positional encoding; finer ones add nothing
# For planes xy, xz, yz: which other plane, averaged over which of its axes, gives a line along
# this plane's width (height).  (plane, axis averaged), axis -1 the width, -2 the height.
_ALONG_WIDTH = ((1, -2), (0, -2), (0, -1))
_ALONG_HEIGHT = ((2, -2), (2, -1), (1, -1))


class SplitConv(nn.Module):
    """3x3 convolution of three planes, with separate weights per plane and input from all three.

    3D-aware roll-out (Rodin, Wang et al. 2022): each plane is concatenated with the other two,
    averaged over the axis it lacks and broadcast over it.  As a broadcast map is constant along an
    axis, its 3x3 convolution equals a 1D convolution of the line, broadcast afterwards: the same
    functions for a third of the work.
    """

    def __init__(self, n_in: int, n_out: int, *, split: bool = True) -> None:
        """split: separate weights per plane and roll-out; if False, one plain convolution shared by
        the planes (for ablation)."""
        super().__init__()
        self.split = split
        n = 3 if split else 1
        bound = math.sqrt(3 / (n_in * (9 + 3 + 3 if split else 9)))
        self.own = nn.Parameter(torch.empty(n * n_out, n_in, 3, 3).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(n * n_out))
        if split:
            self.wide, self.tall = (
                nn.Parameter(torch.empty(n * n_out, n_in, 3).uniform_(-bound, bound))
                for _ in range(2)
            )

    def forward(self, planes: Tensor) -> Tensor:
        """planes (B, 3, C, s, s) -> (B, 3, n_out, s, s), with replicate padding."""
        b, _, c, s, _ = planes.shape
        if not self.split:
            flat = F.pad(planes.flatten(0, 1), (1, 1, 1, 1), mode="replicate")
            return F.conv2d(flat, self.own, self.bias).unflatten(0, (b, 3))
        flat = F.pad(planes.flatten(1, 2), (1, 1, 1, 1), mode="replicate")
        own = F.conv2d(flat, self.own, self.bias, groups=3).unflatten(1, (3, -1))
        wide, tall = (
            F.conv1d(
                F.pad(line.flatten(1, 2), (1, 1), mode="replicate"), weight, groups=3
            ).unflatten(1, (3, -1))
            for line, weight in zip(rolled_out(planes), (self.wide, self.tall), strict=True)
        )
        return own + wide[..., None, :] + tall[..., None]


def rolled_out(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Planes xy, xz, yz (B, 3, C, s, s) -> the averages of the other planes along each plane's
    width and along its height, both (B, 3, C, s)."""
    means = {axis: planes.mean(axis) for axis in (-1, -2)}
    wide, tall = (
        torch.stack([means[axis][:, plane] for plane, axis in sources], 1)
        for sources in (_ALONG_WIDTH, _ALONG_HEIGHT)
    )
    return wide, tall


class PerPlane(nn.Module):
    """Linear layer with separate weights for each of the three planes."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        bound = math.sqrt(1 / n_in)
        self.weight = nn.Parameter(torch.empty(3, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.zeros(3, 1, n_out))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, 3, n, n_in) -> (B, 3, n, n_out)."""
        return torch.matmul(x, self.weight) + self.bias


class _Attention(nn.Module):
    """Bottleneck layer: self-attention per plane, cross-attention to tokens, GEGLU per plane."""

    def __init__(self, width: int, n_token: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.ask, self.answer = PerPlane(width, 3 * width), PerPlane(width, width)
        self.ask_tokens, self.answer_tokens = nn.Linear(width, width), nn.Linear(width, width)
        self.tell = nn.Linear(n_token, 2 * width)
        self.think, self.say = PerPlane(width, 8 * width), PerPlane(4 * width, width)

    def forward(self, x: Tensor, tokens: Tensor) -> Tensor:
        """x (B, 3, n, width), tokens (B, K, n_token) -> (B, 3, n, width)."""
        ask, key, value = (_heads(t) for t in self.ask(self.norms[0](x)).chunk(3, -1))
        x = x + self.answer(_joined(_attend(ask, key, value)))
        asked = _heads(self.ask_tokens(self.norms[1](x)).flatten(1, 2))
        key, value = (_heads(t) for t in self.tell(tokens).chunk(2, -1))
        told = _joined(_attend(asked, key, value))
        x = x + self.answer_tokens(told).unflatten(1, (3, -1))
        gate, value = self.think(self.norms[2](x)).chunk(2, -1)
        return x + self.say(F.gelu(gate) * value)


def _heads(x: Tensor) -> Tensor:
    """(..., n, width) -> (..., heads, n, width / heads)."""
    return x.unflatten(-1, (N_HEADS, -1)).transpose(-3, -2)


def _attend(ask: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention over (..., heads, n, d), flattened to the four dimensions fused kernels take."""
    ask, key, value, shape = *(t.flatten(0, -4) for t in (ask, key, value)), ask.shape
    return F.scaled_dot_product_attention(ask, key, value).view(shape)


def _joined(x: Tensor) -> Tensor:
    return x.transpose(-3, -2).flatten(-2)


class _Block(nn.Module):
    """(Split convolution, group norm, leaky ReLU) twice; with `n_told`, a row's tokens scale and
    shift each channel after its norm, starting from the identity."""

    def __init__(self, n_in: int, n_out: int, split: bool, n_told: int = 0) -> None:
        super().__init__()
        self.convs = nn.ModuleList(SplitConv(a, n_out, split=split) for a in (n_in, n_out))
        self.norms = nn.ModuleList(nn.GroupNorm(N_GROUPS, n_out) for _ in range(2))
        self.told = nn.ModuleList(nn.Linear(n_told, 2 * 3 * n_out) for _ in range(2 * bool(n_told)))
        for layer in self.told:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)

    def forward(self, planes: Tensor, tokens: Tensor | None = None) -> Tensor:
        """planes (B, 3, n_in, s, s), tokens (B, n_told) -> (B, 3, n_out, s, s)."""
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = conv(planes)
            # norms come out in float32 under autocast, which the rest of the block need not keep
            x = norm(x.flatten(0, 1)).to(x.dtype).unflatten(0, x.shape[:2])
            if tokens is not None:
                told = self.told[index](tokens).view(len(tokens), 3, -1, 1, 1)
                scale, shift = told.chunk(2, 2)
                x = torch.addcmul(x + shift, x, scale)
            planes = F.leaky_relu(x, 0.2)
        return planes


class PlaneUNet(nn.Module):
    """U-Net from identity planes and the tokens of T rows to each row's residual of the planes.

    The last layer is zero-initialised, so the residual starts at zero.
    """

    position: Tensor

    def __init__(
        self,
        channels: int,
        size: int,
        widths: Sequence[int],
        n_tokens: int,
        n_token: int,
        *,
        n_layers: int = 2,
        split: bool = True,
    ) -> None:
        """size: side of the planes, halved once per width · widths: channels of the levels,
        multiples of 4 · n_tokens: number of tokens, of n_token numbers each"""
        super().__init__()
        ins = (channels, *widths[:-1])
        self.down = nn.ModuleList(_Block(a, b, split) for a, b in zip(ins, widths, strict=True))
        deep = widths[-1]
        self.enter = nn.GroupNorm(N_GROUPS, deep)
        self.take, self.give = PerPlane(deep, deep), PerPlane(deep, deep)
        self.layers = nn.ModuleList(_Attention(deep, n_token) for _ in range(n_layers))
        outs = (widths[0], *widths[:-1])
        self.up = nn.ModuleList(
            _Block(a, b, split, n_tokens * n_token)
            for a, b in zip(reversed(widths), reversed(outs), strict=True)
        )
        self.last = SplitConv(widths[0], channels, split=split)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)
        self.register_buffer("position", _positions(size >> len(widths), deep), persistent=False)

    @property
    def is_silent(self) -> bool:
        """Whether the last layer is all zero and frozen, so that the residual is zero."""
        return not any(p.requires_grad or bool(p.any()) for p in self.last.parameters())

    def forward(self, planes: Tensor, tokens: Tensor) -> Tensor:
        """planes (3, C, s, s), tokens (T, K, n_token) -> residuals (T, 3, C, s, s)."""
        x, kept = planes[None], []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.avg_pool2d(x.flatten(0, 1), 2).unflatten(0, (1, 3))
        x = self._told(x, tokens)
        for block, skip in zip(self.up, reversed(kept), strict=True):
            x = block(_twice(x) + skip, tokens.flatten(1))
        return self.last(x)

    def _told(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Bottleneck: planes (1, 3, C, s, s), tokens (T, K, n_token) -> planes (T, 3, C, s, s)."""
        s = x.shape[-1]
        entered = self.enter(x.flatten(0, 1)).unflatten(0, (1, 3)).flatten(3).transpose(2, 3)
        sequence = (self.take(entered) + self.position).expand(len(tokens), -1, -1, -1)
        for layer in self.layers:
            sequence = layer(sequence, tokens)
        added = self.give(sequence).transpose(2, 3).unflatten(3, (s, s))
        return x + added


def _twice(planes: Tensor) -> Tensor:
    """Upsample planes (B, 3, C, s, s) bilinearly by two."""
    return twice(planes.flatten(0, 1)).unflatten(0, planes.shape[:2])


def _positions(size: int, width: int) -> Tensor:
    """Sinusoidal 3D position encoding of the texels of planes xy, xz, yz: (3, size^2, width).

    The coordinate along the axis that a plane lacks is set to 0.
    """
    line = (torch.arange(size) + 0.5) / size * 2 - 1
    second, first = torch.meshgrid(line, line, indexing="ij")
    zero = torch.zeros_like(first)
    places = torch.stack(
        [
            torch.stack(place, -1).view(-1, 3)
            for place in ((first, second, zero), (first, zero, second), (zero, first, second))
        ]
    )
    n_waves = min(width // 6, N_OCTAVES)
    angle = places[..., None] * (torch.pi / 2 * 2.0 ** torch.arange(n_waves))
    waves = torch.cat([angle.sin(), angle.cos()], -1).flatten(2)
    return F.pad(waves, (0, width - waves.shape[2]))
