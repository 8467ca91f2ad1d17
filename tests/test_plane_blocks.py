"""Blocks of Talk3D: planes, the U-Net that edits them, the upscaler."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from talkhead_cli.blocks.plane_unet import PlaneUNet, SplitConv, rolled_out
from talkhead_cli.blocks.planes import PlanePyramid, RowPlanes
from talkhead_cli.blocks.upscale import Upscaler

AXES = ((0, 1), (0, 2), (1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_planes_of_many_rows_are_read_as_each_alone(dtype: torch.dtype) -> None:
    """Sixteen rows of large planes: a texel is less than half precision can tell apart."""
    torch.manual_seed(0)
    planes = torch.randn(16, 3, 2, 256, 256, dtype=dtype)
    x, row = 2.6 * torch.rand(200, 3) - 1.3, torch.randint(16, (200,))  # some outside
    found = RowPlanes(planes)(x, row)
    alone = torch.cat(
        [RowPlanes(planes[r : r + 1])(x[None, n], row[:1]) for n, r in enumerate(row.tolist())]
    )
    assert found.shape == (200, 2) and torch.allclose(found, alone, atol=2e-3)


def test_a_reading_is_the_mean_of_three_planes_each_with_two_axes() -> None:
    ramp = torch.linspace(-0.9, 0.9, 10)  # texel centres of ten texels in [-1, 1]
    planes = ramp.expand(1, 3, 1, 10, 10)  # along the width: x, x, y
    x, row = torch.tensor([[0.3, -0.5, 0.7], [0.0, 0.6, -0.2]]), torch.zeros(2, dtype=torch.long)
    assert torch.allclose(RowPlanes(planes)(x, row)[:, 0], (2 * x[:, 0] + x[:, 1]) / 3, atol=1e-6)
    found = RowPlanes(planes.transpose(3, 4))(x, row)[:, 0]
    assert torch.allclose(found, (x[:, 1] + 2 * x[:, 2]) / 3, atol=1e-6)


def test_a_pyramid_is_the_sum_of_its_levels_and_knows_its_mirror() -> None:
    torch.manual_seed(0)
    pyramid = PlanePyramid((2, 8), 3)
    with torch.no_grad():
        pyramid.levels[1].zero_()
        pyramid.levels[0].fill_(0.5)
    assert torch.allclose(pyramid(), torch.full((3, 3, 8, 8), 0.5))
    assert pyramid.asymmetry() == 0 and pyramid.roughness() == 0
    with torch.no_grad():
        pyramid.levels[1][2].copy_(torch.randn(3, 8, 8))  # the plane that has no x
    assert pyramid.asymmetry() == 0 < pyramid.roughness()
    with torch.no_grad():
        half = torch.randn(3, 8, 4)
        pyramid.levels[1][1].copy_(torch.cat([half, half.flip(-1)], -1))
    assert pyramid.asymmetry() == 0
    with torch.no_grad():
        pyramid.levels[1][0, :, :, 0] += 1
    assert pyramid.asymmetry() > 0


def test_roll_out_carries_an_axis_from_plane_to_plane() -> None:
    """A ramp along one axis of space, drawn on one plane, reaches the planes that share the axis
    along that axis, and not the others."""
    ramp = torch.arange(4.0)
    for source, pair in enumerate(AXES):
        for axis in pair:
            drawn = ramp.expand(4, 4) if axis == pair[0] else ramp[:, None].expand(4, 4)
            planes = torch.zeros(1, 3, 1, 4, 4)
            planes[0, source, 0] = drawn
            wide, tall = rolled_out(planes)
            for target, (along_width, along_height) in enumerate(AXES):
                for line, along in ((wide, along_width), (tall, along_height)):
                    got = line[0, target, 0]
                    if target == source or along not in pair:
                        assert not got.any(), (source, axis, target)
                    elif along == axis:
                        assert torch.equal(got, ramp), (source, axis, target)
                    else:  # the other axis of the source: constant along it
                        assert torch.equal(got, torch.full((4,), 1.5))


def test_a_split_convolution_is_one_over_the_plane_and_the_others_spread_over_it() -> None:
    torch.manual_seed(0)
    conv = SplitConv(2, 5)
    torch.nn.init.normal_(conv.bias)
    planes = torch.randn(3, 3, 2, 6, 6)
    found = conv(planes)
    wide, tall = rolled_out(planes)
    for plane in range(3):
        own, along, down = (
            w.unflatten(0, (3, -1))[plane] for w in (conv.own, conv.wide, conv.tall)
        )
        joined = torch.cat(
            [
                planes[:, plane],
                wide[:, plane, :, None].expand(-1, -1, 6, -1),
                tall[:, plane, :, :, None].expand(-1, -1, -1, 6),
            ],
            1,
        )
        # any kernel of that sum along the axis on which the map is constant
        share = torch.tensor([0.2, 0.5, 0.3])
        kernel = torch.cat([own, along[:, :, None] * share[:, None], down[..., None] * share], 1)
        padded = F.pad(joined, (1, 1, 1, 1), mode="replicate")
        want = F.conv2d(padded, kernel, conv.bias.view(3, -1)[plane])
        assert torch.allclose(found[:, plane], want, atol=1e-5)


@pytest.mark.parametrize("split", [True, False])
def test_the_unet_starts_silent_and_hears_every_token_in_every_row_alone(split: bool) -> None:
    torch.manual_seed(0)
    net = PlaneUNet(4, 16, (8, 8, 12), 5, 10, split=split)
    planes, tokens = torch.randn(3, 4, 16, 16), torch.randn(2, 5, 10)
    assert not net(planes, tokens).any()
    assert not net.is_silent, "it can still be taught"
    net.requires_grad_(False)
    assert net.is_silent
    for parameter in net.last.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not net.is_silent
    said = net(planes, tokens)
    assert said.shape == (2, 3, 4, 16, 16)
    assert torch.allclose(net(planes, tokens[1:]), said[1:], atol=1e-5), "rows know no neighbours"
    for token in range(5):
        other = tokens.clone()
        other[1, token] += 1
        change = (net(planes, other) - said).abs().amax((1, 2, 3, 4))
        assert change[1] > 1e-4 > 1e-5 > change[0]


@pytest.mark.parametrize("times", [1, 2, 4])
def test_an_upscaler_starts_as_interpolation(times: int) -> None:
    torch.manual_seed(0)
    marched = torch.rand(2, 7, 8, 8)
    made = Upscaler(7, 6, times)(marched)
    plain = marched[:, [0, 1, 2, 6]]
    for _ in range(times.bit_length() - 1):
        plain = F.interpolate(plain, scale_factor=2, mode="bilinear")
    assert made.shape == (2, 4, 8 * times, 8 * times) and torch.allclose(made, plain)
