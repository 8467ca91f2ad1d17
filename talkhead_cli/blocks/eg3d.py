"""EG3D's generator of faces (Chan et al. 2022), as its published weights have it.

Its shape is that of the paper and of StyleGAN2, with the names that its files give to tensors.
Of a file are used what draws the planes and the decoder; the mapping network lends its mean style,
and the upscaling half stays out: ours says alpha as well.

EG3D's space has x to the right of the picture, y up and z towards the camera, in a cube of side 1.
Ours has y down and z away from the camera, in face heights from between the ears.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.blocks.mlp import raw_density_of
from talkhead_cli.blocks.planes import scattered

Kind = Literal["eg3d", "eg3d-fixed"]
KINDS: tuple[Kind, ...] = ("eg3d", "eg3d-fixed")
N_STYLE, N_STYLES, N_POSE = 512, 14, 25
CHANNELS, SIZE, HIDDEN = 32, 256, 64
# Side of maps -> width; each side has two layers, the first one, and a drawing of its own.
WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128}
# Where a face of ours lies in EG3D's cube at first: its height, and the middle between its ears.
# Of EG3D's camera (focal length 4.26 picture widths, 2.7 from the middle) and how much of FFHQ's
# crop a face takes; finding a person goes on from there.
FACE, EARS = 0.37, (0.0, 0.02, 0.03)


def layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that a file must hold beside its `superresolution.`"""
    found: dict[str, tuple[int, ...]] = {
        "backbone.mapping.w_avg": (N_STYLE,),
        **_linear("backbone.mapping.embed", N_POSE, N_STYLE),
        **_linear("backbone.mapping.fc0", 2 * N_STYLE, N_STYLE),
        **_linear("backbone.mapping.fc1", N_STYLE, N_STYLE),
        **_linear("decoder.net.0", CHANNELS, HIDDEN),
        **_linear("decoder.net.2", HIDDEN, 1 + CHANNELS),
    }
    before = 0
    for side, width in WIDTHS.items():
        block = f"backbone.synthesis.b{side}"
        found[f"{block}.resample_filter"] = (4, 4)
        if not before:
            found[f"{block}.const"] = (width, side, side)
        for layer, n_in in [("conv0", before), ("conv1", width)][not before :]:
            name = f"{block}.{layer}"
            found |= {
                f"{name}.weight": (width, n_in, 3, 3), f"{name}.bias": (width,),
                f"{name}.noise_strength": (), f"{name}.noise_const": (side, side),
                f"{name}.resample_filter": (4, 4), **_linear(f"{name}.affine", N_STYLE, n_in),
            }  # fmt: skip
        found |= {
            f"{block}.torgb.weight": (3 * CHANNELS, width, 1, 1),
            f"{block}.torgb.bias": (3 * CHANNELS,),
            **_linear(f"{block}.torgb.affine", N_STYLE, width),
        }  # fmt: skip
        before = width
    return found


def _linear(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def checked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's generator without its upscaling half, in float32; ValueError names what does not
    fit."""
    wanted = layout()
    held = {k: v for k, v in tensors.items() if not k.startswith("superresolution.")}
    for name in sorted(wanted.keys() | held.keys()):
        have = tuple(held[name].shape) if name in held else None
        if have != wanted.get(name):
            raise ValueError(f"{name} is {have}, not {wanted.get(name)}")
    return {k: v.float().contiguous() for k, v in held.items()}


class _Layer(nn.Module):
    """A modulated convolution of StyleGAN2 with its noise, at twice the size where it is the first
    of its size (Karras et al. 2020, appendix B)."""

    filter: Tensor
    noise: Tensor

    def __init__(self, n_in: int, n_out: int, side: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        self.weight = nn.Parameter(torch.randn(n_out, n_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(n_out))
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(side, side))
        self.scale = _Scale(n_in)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        """x (1, C, h, w), style (1, N_STYLE) -> (1, n_out, side, side)."""
        weight = self.weight * self.scale(style)[0, :, None, None]
        weight = weight * (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).rsqrt()
        if self.up:
            x = _smoothed(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), 1)
        else:
            x = F.conv2d(x, weight, padding=1)
        x = x + self.noise * self.strength + self.bias[:, None, None]
        return math.sqrt(2) * F.leaky_relu(x, 0.2)


class _Drawing(nn.Module):
    """What one size says of the planes."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * CHANNELS, n_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3 * CHANNELS))
        self.scale = _Scale(n_in)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = self.scale(style)[0] / math.sqrt(self.weight.shape[1])
        return F.conv2d(x, self.weight * scale[:, None, None], self.bias)


class _Scale(nn.Module):
    """A style -> scales of input channels; weights count in units of their usual size."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, N_STYLE))
        self.bias = nn.Parameter(torch.ones(n_out))

    def forward(self, style: Tensor) -> Tensor:
        return F.linear(style, self.weight / math.sqrt(N_STYLE), self.bias)


class EG3DGenerator(nn.Module):
    """Styles -> three planes, in EG3D's own space and order."""

    mean_style: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean_style", torch.zeros(N_STYLE))
        first = min(WIDTHS)
        self.start = nn.Parameter(torch.randn(WIDTHS[first], first, first))
        self.layers, self.draw = nn.ModuleList(), nn.ModuleList()
        before = WIDTHS[first]
        for side, width in WIDTHS.items():
            if side > first:
                self.layers.append(_Layer(before, width, side, up=True))
            self.layers.append(_Layer(width, width, side, up=False))
            self.draw.append(_Drawing(width))
            before = width

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of `checked`."""
        self.mean_style.copy_(tensors["backbone.mapping.w_avg"])
        layers = iter(self.layers)
        for (side, draw), first in zip(
            zip(WIDTHS, self.draw, strict=True), [True] + [False] * 6, strict=True
        ):
            block = f"backbone.synthesis.b{side}"
            if first:
                self.start.copy_(tensors[f"{block}.const"])
            for name in ["conv1"] if first else ["conv0", "conv1"]:
                layer = next(layers)
                assert isinstance(layer, _Layer)
                for own, theirs in _NAMES.items():
                    layer.get_parameter(own).copy_(tensors[f"{block}.{name}.{theirs}"])
                layer.noise.copy_(tensors[f"{block}.{name}.noise_const"])
            for own in ("weight", "bias", "scale.weight", "scale.bias"):
                theirs = own.replace("scale", "affine")
                draw.get_parameter(own).copy_(tensors[f"{block}.torgb.{theirs}"])

    def forward(self, change: Tensor) -> Tensor:
        """change (N_STYLES, N_STYLE) of the mean style -> planes (3, CHANNELS, SIZE, SIZE)."""
        styles = self.mean_style + change
        x = self.start[None]
        planes: Tensor | None = None
        layers = iter(self.layers)
        at = 0  # a drawing hears the style of the layer that comes next
        for index, draw in enumerate(self.draw):
            for _ in range(1 if index == 0 else 2):
                x = next(layers)(x, styles[at : at + 1])
                at += 1
            said = draw(x, styles[at : at + 1])
            planes = said if planes is None else said + _doubled(planes)
        assert planes is not None and at == N_STYLES - 1
        return planes.unflatten(1, (3, CHANNELS))[0]


_NAMES = {
    "weight": "weight", "bias": "bias", "strength": "noise_strength",
    "scale.weight": "affine.weight", "scale.bias": "affine.bias",
}  # fmt: skip


class EG3DPlacing(nn.Module):
    """Planes of EG3D's space -> our planes, by where a face of ours lies in it.

    Both are read along axes, and so are the maps between them: each plane of ours is one of
    theirs, read at other places.  kind: of which order planes are.  The published files draw
    the last two on the same axes (z and x, told apart by nothing but their order); of the
    fixed ones the last has z and y.
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.log_face = nn.Parameter(torch.tensor(math.log(FACE)))
        self.ears = nn.Parameter(torch.tensor(EARS))

    def forward(self, planes: Tensor, reach: Tensor) -> Tensor:
        """planes (3, C, S, S) -> planes xy, xz, yz (3, C, S, S) in the room of `gathered`."""
        size = planes.shape[-1]
        line = (2 * torch.arange(size, device=planes.device) + 1) / size - 1
        ours = scattered(line[:, None], reach)  # (S, 3)
        flip = ours.new_tensor([1.0, -1.0, -1.0])
        x, y, z = (2 * (ours * flip * self.log_face.exp() + self.ears)).unbind(1)
        if self.kind == "eg3d-fixed":
            return torch.stack([
                _read(planes[0], x, y), _read(planes[1], x, z), _read(planes[2], z, y, turned=True),
            ])  # fmt: skip
        flat = _read(planes[1], x, z) + _read(planes[2], z, x, turned=True)
        return torch.stack([_read(planes[0], x, y), flat, torch.zeros_like(flat)])


def _read(plane: Tensor, across: Tensor, down: Tensor, *, turned: bool = False) -> Tensor:
    """A plane (C, S, S) at every pair of places (n,), (m,), nothing beyond its rim: (C, m, n), or
    turned (C, n, m)."""
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
    found = F.grid_sample(plane[None], grid[None], padding_mode="zeros", align_corners=False)[0]
    return found.transpose(1, 2) if turned else found


class EG3DDecoder(nn.Module):
    """What points' features say of density and colour, as our fields count them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1 + CHANNELS)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """The tensors of `checked`, whose weights count in units of their usual size."""
        for layer, name in ((self.first, "decoder.net.0"), (self.last, "decoder.net.2")):
            weight = tensors[f"{name}.weight"]
            layer.weight.copy_(weight / math.sqrt(weight.shape[1]))
            layer.bias.copy_(tensors[f"{name}.bias"])

    def forward(self, read: Tensor) -> Tensor:
        """(N, CHANNELS) -> raw density and features (N, 1 + CHANNELS)."""
        said = self.last(F.softplus(self.first(read)))
        # per unit of EG3D's cube -> per face height
        density = FACE * F.softplus(said[:, :1].float() - 1)
        return torch.cat([raw_density_of(density).to(said.dtype), said[:, 1:]], 1)


def _smoothed(x: Tensor, pad: int, *, before: int = 0) -> Tensor:
    """Maps (B, C, h, w) under the filter 1 3 3 1 both ways, which keeps sums times four: what
    stands between the pixels of a map at twice the size."""
    line = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 4
    c = x.shape[1]
    x = F.pad(x, (pad + before, pad, pad + before, pad))
    x = F.conv2d(x, line.view(1, 1, 1, 4).expand(c, 1, 1, 4), groups=c)
    return F.conv2d(x, line.view(1, 1, 4, 1).expand(c, 1, 4, 1), groups=c)


def _doubled(x: Tensor) -> Tensor:
    """Maps (B, C, h, w) at twice the size: zeros between the pixels, smoothed."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h, 2, w, 2)
    wide[:, :, :, 0, :, 0] = x
    return _smoothed(wide.view(b, c, 2 * h, 2 * w), 1, before=1)
