"""EG3D's face generator (Chan et al. 2022), in the layout of its published weights.

The architecture is that of the paper and of StyleGAN2; tensor names are those of the files.  Used
from a file: the synthesis network that makes the planes, the decoder, and of the mapping network
only its mean style.  Super-resolution is left out, because ours also outputs alpha.

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
from talkhead_cli.blocks.planes import unwarped

Kind = Literal["eg3d", "eg3d-fixed"]
KINDS: tuple[Kind, ...] = ("eg3d", "eg3d-fixed")
N_STYLE, N_STYLES, N_POSE = 512, 14, 25
CHANNELS, SIZE, HIDDEN = 32, 256, 64
# Side of the feature maps -> channels; each side has two layers (side 4 has one) and one torgb.
WIDTHS = {4: 512, 8: 512, 16: 512, 32: 512, 64: 512, 128: 256, 256: 128}
# Initial placement of our face in EG3D's cube: its height, and the point between its ears.  From
# EG3D's camera (focal length 4.26 picture widths, 2.7 from the centre) and the share of FFHQ's
# crop that a face fills; optimised further when a person is fitted.
FACE, EARS = 0.37, (0.0, 0.02, 0.03)
PLACING = 0.02  # face heights, and log of scale


def layout() -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the tensors a file must hold, except `superresolution.*`."""
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
                f"{name}.weight": (width, n_in, 3, 3),
                f"{name}.bias": (width,),
                f"{name}.noise_strength": (),
                f"{name}.noise_const": (side, side),
                f"{name}.resample_filter": (4, 4),
                **_linear(f"{name}.affine", N_STYLE, n_in),
            }
        found |= {
            f"{block}.torgb.weight": (3 * CHANNELS, width, 1, 1),
            f"{block}.torgb.bias": (3 * CHANNELS,),
            **_linear(f"{block}.torgb.affine", N_STYLE, width),
        }
        before = width
    return found


def _linear(name: str, n_in: int, n_out: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (n_out, n_in), f"{name}.bias": (n_out,)}


def checked(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a file's tensors without `superresolution.*`, in float32; ValueError names the first
    that is missing, unknown or of another shape."""
    wanted = layout()
    held = {k: v for k, v in tensors.items() if not k.startswith("superresolution.")}
    for name in sorted(wanted.keys() | held.keys()):
        have = tuple(held[name].shape) if name in held else None
        if have != wanted.get(name):
            raise ValueError(f"{name} is {have}, not {wanted.get(name)}")
    return {k: v.float().contiguous() for k, v in held.items()}


class _Layer(nn.Module):
    """Modulated 3x3 convolution of StyleGAN2 with its constant noise; with `up` it doubles the
    size first (Karras et al. 2020, appendix B)."""

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
    """The 1x1 modulated convolution (torgb) from one size's features to plane channels."""

    def __init__(self, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3 * CHANNELS, n_in, 1, 1))
        self.bias = nn.Parameter(torch.zeros(3 * CHANNELS))
        self.scale = _Scale(n_in)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scale = self.scale(style)[0] / math.sqrt(self.weight.shape[1])
        return F.conv2d(x, self.weight * scale[:, None, None], self.bias)


class _Scale(nn.Module):
    """Affine map from a style to scales of input channels, with StyleGAN2's equalised weights."""

    def __init__(self, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_out, N_STYLE))
        self.bias = nn.Parameter(torch.ones(n_out))

    def forward(self, style: Tensor) -> Tensor:
        return F.linear(style, self.weight / math.sqrt(N_STYLE), self.bias)


class EG3DGenerator(nn.Module):
    """Synthesis network: styles -> three planes, in EG3D's own space and plane order."""

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
        """Copy the weights from the tensors that `checked` returns."""
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
        """Offsets from the mean style (N_STYLES, N_STYLE) -> planes (3, CHANNELS, SIZE, SIZE)."""
        styles = self.mean_style + change
        x = self.start[None]
        planes: Tensor | None = None
        layers = iter(self.layers)
        at = 0  # torgb shares the style of the next layer
        for index, draw in enumerate(self.draw):
            for _ in range(1 if index == 0 else 2):
                x = next(layers)(x, styles[at : at + 1])
                at += 1
            said = draw(x, styles[at : at + 1])
            planes = said if planes is None else said + _doubled(planes)
        assert planes is not None and at == N_STYLES - 1
        return planes.unflatten(1, (3, CHANNELS))[0]


_NAMES = {
    "weight": "weight",
    "bias": "bias",
    "strength": "noise_strength",
    "scale.weight": "affine.weight",
    "scale.bias": "affine.bias",
}


class EG3DPlacing(nn.Module):
    """Resampling of EG3D's planes to ours, by a learned placement of the face.

    Both sets of planes are axis-aligned, and the map between the spaces works per axis, so each of
    our planes is one of theirs, resampled.  kind: their plane order.  In the original files the
    last two planes both span z and x, in different order; in the fixed ones the last spans z and
    y.  stretch () and shift (3,) move the face from FACE and EARS, in units of PLACING: at the
    latents' learning rate, places themselves would jump by hundredths of a face.
    """

    def __init__(self, kind: Kind) -> None:
        super().__init__()
        self.kind = kind
        self.stretch = nn.Parameter(torch.zeros(()))
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, planes: Tensor, reach: Tensor) -> Tensor:
        """planes (3, C, S, S) -> planes xy, xz, yz (3, C, S, S) in coordinates of `warped`."""
        size = planes.shape[-1]
        line = (2 * torch.arange(size, device=planes.device) + 1) / size - 1
        ours = unwarped(line[:, None], reach)  # (S, 3)
        flip = ours.new_tensor([1.0, -1.0, -1.0])
        face = FACE * (PLACING * self.stretch).exp()
        ears = ours.new_tensor(EARS) + PLACING * self.shift
        x, y, z = (2 * (ours * flip * face + ears)).unbind(1)
        if self.kind == "eg3d-fixed":
            return torch.stack(
                [
                    _read(planes[0], x, y),
                    _read(planes[1], x, z),
                    _read(planes[2], z, y, turned=True),
                ]
            )
        flat = _read(planes[1], x, z) + _read(planes[2], z, x, turned=True)
        return torch.stack([_read(planes[0], x, y), flat, torch.zeros_like(flat)])


def _read(plane: Tensor, across: Tensor, down: Tensor, *, turned: bool = False) -> Tensor:
    """Sample a plane (C, S, S) on the grid across (n,) x down (m,), zero outside: (C, m, n), or
    (C, n, m) if `turned`."""
    grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), -1)
    found = F.grid_sample(plane[None], grid[None], padding_mode="zeros", align_corners=False)[0]
    return found.transpose(1, 2) if turned else found


class EG3DDecoder(nn.Module):
    """EG3D's decoder of point features, its density converted to our units and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(CHANNELS, HIDDEN)
        self.last = nn.Linear(HIDDEN, 1 + CHANNELS)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the weights from `checked`, undoing StyleGAN2's equalised scaling."""
        for layer, name in ((self.first, "decoder.net.0"), (self.last, "decoder.net.2")):
            weight = tensors[f"{name}.weight"]
            layer.weight.copy_(weight / math.sqrt(weight.shape[1]))
            layer.bias.copy_(tensors[f"{name}.bias"])

    def forward(self, read: Tensor) -> Tensor:
        """Features (N, CHANNELS) -> raw density and decoded features (N, 1 + CHANNELS)."""
        said = self.last(F.softplus(self.first(read)))
        # per unit of EG3D's cube -> per face height, but for the percents that `EG3DPlacing` learns
        density = FACE * F.softplus(said[:, :1].float() - 1)
        return torch.cat([raw_density_of(density).to(said.dtype), said[:, 1:]], 1)


def _smoothed(x: Tensor, pad: int, *, before: int = 0) -> Tensor:
    """Filter maps (B, C, h, w) with [1, 3, 3, 1] along both axes, gain 4 in total: it interpolates
    maps upsampled by zero insertion."""
    line = x.new_tensor([1.0, 3.0, 3.0, 1.0]) / 4
    c = x.shape[1]
    x = F.pad(x, (pad + before, pad, pad + before, pad))
    x = F.conv2d(x, line.view(1, 1, 1, 4).expand(c, 1, 1, 4), groups=c)
    return F.conv2d(x, line.view(1, 1, 4, 1).expand(c, 1, 4, 1), groups=c)


def _doubled(x: Tensor) -> Tensor:
    """Upsample maps (B, C, h, w) by two: zero insertion, then `_smoothed`."""
    b, c, h, w = x.shape
    wide = x.new_zeros(b, c, h, 2, w, 2)
    wide[:, :, :, 0, :, 0] = x
    return _smoothed(wide.view(b, c, 2 * h, 2 * w), 1, before=1)
