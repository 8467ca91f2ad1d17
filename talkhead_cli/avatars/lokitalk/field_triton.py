"""LokiTalk's field as three Triton kernels, for inference: the twin of `LokiField.__call__`.

The kernels deform points, read the planes, and compute density and colour.  As separate torch
operations a point moves some seven kilobytes through GPU memory; between these kernels, a few
hundred bytes.  Matrix products take float16 inputs and accumulate in float32; positions are
float32.  There are no gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, nn

from talkhead_cli.avatars.lokitalk import field
from talkhead_cli.blocks.mlp import THIN
from talkhead_cli.blocks.planes import GATHER
from talkhead_cli.blocks.remember import remembered

if TYPE_CHECKING:
    from talkhead_cli.avatars.lokitalk.field import LokiField
    from talkhead_cli.avatars.lokitalk.method import LokiTalk

BLOCK, WARPS = 64, 4  # points and warps per program
READ_BLOCK = 64  # points per program of the kernel that reads planes
REGISTERS = 128  # limit per thread of `_deform`: more would lower occupancy
N_HIDDEN = 16  # outputs of the density net that feed the colour net
OUT = 16  # columns of a small layer and of a piece of input: the minimum of tl.dot
CHANNELS = 4  # of a texel
# Triton kernels can read globals only if they are constexpr.
_OUT, _THIN, _GATHER = tl.constexpr(OUT), tl.constexpr(THIN), tl.constexpr(GATHER)
_WHOLE = tl.constexpr(math.asinh(GATHER))
_MAX_SHIFT, _DEPTH = tl.constexpr(field.MAX_SHIFT), tl.constexpr(field.DEPTH)
_REACH, _LOOK = tl.constexpr(field.REACH), tl.constexpr(field.LOOK_SCALE)


class Packed(NamedTuple):
    """An avatar's weights in the kernels' layout; layers padded to powers of two or pieces of OUT.

    matrices  (M,) float16, layer after layer, rows are inputs and columns outputs
    biases    (B,) float32, then the colour net's weights (3, 32) for the view direction
    texels    (S,) float16, level after level, channels last
    levels    (2, L) int32: first texel of each level, and the side of its planes
    waves     (3, E) float32 of the frequency encoding: axis (3: padding), turns per unit, phase
    sizes     E, trunk, head as padded, L
    """

    matrices: Tensor
    biases: Tensor
    texels: Tensor
    levels: Tensor
    waves: Tensor
    sizes: tuple[int, int, int, int]


def fused_field(field: LokiField) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the kernels as a function of x (N, 3), d (N, 3), row (N,): density (N,) and channels
    (N, 8), float32.  A point of row -1 is skipped: density 0, channels undefined."""
    avatar = field.avatar
    if avatar.training:  # CUDA graph replays change weights without raising tensor versions
        weights = packed(avatar)
    else:
        learnt = [t for layer in _layers(avatar) for t in (layer.weight, layer.bias)]
        learnt += list(avatar.volume.levels)
        weights = remembered(avatar, "kernel", learnt, lambda: packed(avatar))
    affine, rows, codes = field.kernel_inputs()

    def asked(x: Tensor, d: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
        return evaluate(weights, x, d, row, affine, rows, codes)

    return asked


def _layers(avatar: LokiTalk) -> list[nn.Linear]:
    """Return the linear layers in the order in which points pass them."""
    nets = (
        avatar.attention,
        avatar.face_field,
        avatar.torso_field,
        avatar.density_net,
        avatar.colour_net,
    )
    return [m for net in nets for m in net if isinstance(m, nn.Linear)]


@torch.no_grad()
def packed(avatar: LokiTalk) -> Packed:
    """Return an avatar's weights in the kernels' layout."""
    device, n = avatar.aabb.device, avatar.octaves
    encoded = _rounded(3 * (1 + 2 * n))
    trunk, head = (triton.next_power_of_2(n) for n in (avatar.widths.trunk, avatar.widths.head))
    levels = list(avatar.volume.levels)
    assert {tuple(level.shape[:2]) for level in levels} == {(3, CHANNELS)}, "other planes"
    layers = _layers(avatar)
    colour = layers[-2].weight
    # column 0 of the density net's output is the density, which the colour net ignores
    maps = [
        *(layer.weight for layer in layers[:-2]),
        F.pad(colour[:, :N_HIDDEN], (1, 0)),
        layers[-1].weight,
    ]
    # each level's inputs are padded separately, since `_shade` consumes them level by level
    read = maps[-4].unflatten(1, (len(levels), -1))
    maps[-4] = F.pad(read, (0, OUT - read.shape[2])).flatten(1)
    field = [(encoded, trunk), (trunk, trunk), (trunk, OUT)]
    rooms = [
        (encoded, 32),
        (32, OUT),
        *field,
        *field,
        (len(levels) * OUT, head),
        (head, 32),
        (32, 32),
        (32, OUT),
    ]
    matrices = [
        F.pad(w.T, (0, b - w.shape[0], 0, a - w.shape[1]))
        for w, (a, b) in zip(maps, rooms, strict=True)
    ]
    biases = [
        F.pad(layer.bias, (0, b - len(layer.bias)))
        for layer, (_, b) in zip(layers, rooms, strict=True)
    ]
    looks = colour[:, N_HIDDEN:].T  # (3, 32), weights of the view direction

    sizes = (level.numel() // CHANNELS for level in levels[:-1])
    begins = itertools.accumulate(sizes, initial=0)
    shape = [list(begins), [level.shape[-1] for level in levels]]
    texels = torch.cat([level.permute(0, 2, 3, 1).flatten() for level in levels])

    waves = [(axis, 0.0, 0.0) for axis in range(3)]
    for phase in (0.0, 0.25):  # cos x = sin(x + a quarter of a turn)
        waves += [(axis, 2.0 ** (k - 1), phase) for axis in range(3) for k in range(n)]
    waves += [(3, 0.0, 0.0)] * (encoded - len(waves))
    return Packed(
        torch.cat([m.flatten() for m in matrices]).half(),
        torch.cat([*biases, looks.flatten()]).float(),
        texels.half(),
        torch.tensor(shape, dtype=torch.int32, device=device),
        torch.tensor(waves, dtype=torch.float32, device=device).T.contiguous(),
        (encoded, trunk, head, len(levels)),
    )


def _rounded(n: int) -> int:
    """Round n up to a multiple of OUT, the piece in which encodings are computed."""
    return -(-n // OUT) * OUT


@torch.no_grad()
def evaluate(
    weights: Packed,
    x: Tensor,
    d: Tensor,
    row: Tensor,
    affine: Tensor,
    rows: Tensor,
    codes: Sequence[Tensor],
) -> tuple[Tensor, Tensor]:
    """Return density (N,) and channels (N, 8) of points.

    affine (55,) constants: framing (12), alignment (12), position-only attention (6, 4) and (4,),
    reach of the planes (3,) · rows (T, 24) shoulders and light of each row · codes: first-layer
    terms of rows, face (2 T, trunk), density (2 T, head), torso (T, trunk)
    """
    n, x, d, row = len(x), x.contiguous(), d.contiguous(), row.contiguous()
    encoded, trunk, head, n_levels = weights.sizes
    found, channels = x.new_empty(n), x.new_empty(n, 8)
    if not n:
        return found, channels
    place = torch.empty_like(x)
    read = x.new_empty(n, n_levels * OUT, dtype=torch.float16)
    face, density, torso = (
        F.pad(code.float(), (0, wide - code.shape[1]))
        for code, wide in zip(codes, (trunk, head, trunk), strict=True)
    )
    blocks = triton.cdiv(n, BLOCK)
    nets = weights.matrices, weights.biases
    _deform[(blocks,)](
        x, row, place, channels, n, *nets, weights.waves, affine, rows, face, torso,
        E=encoded, W=trunk, BLOCK=BLOCK, num_warps=WARPS, maxnreg=REGISTERS,
    )  # fmt: skip
    _read[(triton.cdiv(n, READ_BLOCK), n_levels)](
        place,
        row,
        read.view(torch.int32),
        n,
        weights.texels.view(torch.int32),
        weights.levels,
        L=n_levels,
        BLOCK=READ_BLOCK,
    )
    _shade[(blocks,)](
        x, d, row, read, found, channels, n, *nets, rows, density,
        E=encoded, W=trunk, H=head, L=n_levels, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    return found, channels


@triton.jit
def _affine(place, x0, x1, x2):
    """Apply maps [A | b] (3, 4), one per point or one for all, to points."""
    y0 = tl.load(place) * x0 + tl.load(place + 1) * x1 + tl.load(place + 2) * x2
    y1 = tl.load(place + 4) * x0 + tl.load(place + 5) * x1 + tl.load(place + 6) * x2
    y2 = tl.load(place + 8) * x0 + tl.load(place + 9) * x1 + tl.load(place + 10) * x2
    return y0 + tl.load(place + 3), y1 + tl.load(place + 7), y2 + tl.load(place + 11)


@triton.jit
def _times(h, matrices, at, K: tl.constexpr, N: tl.constexpr):
    """Multiply h (B, K) by the matrix (K, N) stored at offset `at` -> (B, N) float32."""
    down, across = tl.arange(0, K), tl.arange(0, N)
    return tl.dot(h.to(tl.float16), tl.load(matrices + at + down[:, None] * N + across[None, :]))


@triton.jit
def _bias(biases, at, N: tl.constexpr):
    return tl.load(biases + at + tl.arange(0, N))[None, :]


@triton.jit
def _layer(h, matrices, biases, at, bias, K: tl.constexpr, N: tl.constexpr):
    """Apply the linear layer at offsets `at` and `bias` to h (B, K) -> (B, N) float32."""
    return _times(h, matrices, at, K, N) + _bias(biases, bias, N)


@triton.jit
def _own_row(row, point, here):
    """Return rows of points (0 if skipped), which points are not skipped, whether those all have
    the same row, as neighbours mostly do, and their largest row (-1 if all are skipped)."""
    own = tl.load(row + point, mask=here, other=-1).to(tl.int32)
    asked = own >= 0
    one = tl.max(own, 0)
    return tl.maximum(own, 0), asked, tl.min(tl.where(asked, own, one), 0) == one, one


@triton.jit
def _codes(table, row, alike, one, N: tl.constexpr):
    """Load the code terms of points' rows, (B, N)."""
    across = tl.arange(0, N)
    if alike:
        codes = tl.load(table + one * N + across)[None, :] + tl.zeros((row.shape[0], N), tl.float32)
    else:
        codes = tl.load(table + row[:, None] * N + across[None, :])
    return codes


@triton.jit
def _column(h, i, N: tl.constexpr):
    """Return column i of h (B, N)."""
    return tl.sum(tl.where(tl.arange(0, N)[None, :] == i, h, 0.0), 1)


@triton.jit
def _waves(table, first, f0, f1, f2, E: tl.constexpr):
    """Return columns `first` to `first` + 15 of the frequency encoding, (B, 16)."""
    across = first + tl.arange(0, _OUT)
    axis = tl.load(table + across)[None, :]
    rate = tl.load(table + E + across)[None, :]
    phase = tl.load(table + 2 * E + across)[None, :]
    at = tl.where(axis == 0, f0[:, None], tl.where(axis == 1, f1[:, None], f2[:, None]))
    return tl.where(axis == 3, 0.0, tl.where(rate == 0, at, _sine(at * rate + phase)))


@triton.jit
def _sine(turns):
    """Return sin(2 pi turns) to 4e-6; the library's sine, which is accurate for angles of any
    size, fills the instruction cache."""
    t = turns - tl.floor(turns + 0.5)
    t = tl.where(t > 0.25, 0.5 - t, tl.where(t < -0.25, -0.5 - t, t))
    x = 6.283185307179586 * t
    y = x * x
    return x * (1 + y * (-1 / 6 + y * (1 / 120 + y * (-1 / 5040 + y / 362880))))


@triton.jit
def _tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def _gathered(x, reach):
    """Return asinh(GATHER x / reach) / asinh(GATHER), as `planes.warped`."""
    u = tl.abs(_GATHER * x / reach)
    y = tl.log(u + tl.sqrt(u * u + 1)) / _WHOLE
    return tl.where(x < 0, -y, y)


@triton.jit
def _deform(
    x, row, places, channels, n, matrices, biases, waves, affine, rows, face, torso,
    E: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute attention, both displacements, and plane coordinates of the displaced points."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = point < n
    own, asked, alike, one = _own_row(row, point, here)
    if one < 0:
        return
    x0 = tl.load(x + 3 * point, mask=here, other=0.0)
    x1 = tl.load(x + 3 * point + 1, mask=here, other=0.0)
    x2 = tl.load(x + 3 * point + 2, mask=here, other=0.0)

    # Attention: a net's logits plus position-only ones (ellipsoids and a half-space).
    f0, f1, f2 = _affine(affine, x0, x1, x2)
    h = tl.zeros((BLOCK, 32), tl.float32)
    for k in range(0, E, _OUT):
        h += _times(_waves(waves, k, f0, f1, f2, E), matrices, k * 32, _OUT, 32)
    h = tl.maximum(h + _bias(biases, 0, 32), 0.0)
    h = _layer(h, matrices, biases, E * 32, 32, 32, _OUT)
    lips = _column(h, 0, _OUT) + _prior(affine + 24, x0, x1, x2, 0)
    eyes = _column(h, 1, _OUT) + tl.maximum(
        _prior(affine + 24, x0, x1, x2, 1), _prior(affine + 24, x0, x1, x2, 2)
    )
    below = _column(h, 2, _OUT) + _prior(affine + 24, x0, x1, x2, 3)
    lips, eyes, below = tl.sigmoid(lips), tl.sigmoid(eyes), tl.sigmoid(below)

    # The face field.
    y0, y1, y2 = x0, x1, x2
    moved_by_face = tl.zeros((BLOCK,), tl.float32)
    reach = lips + eyes
    at, bias = E * 32 + 32 * _OUT, 32 + _OUT
    if tl.max(tl.where(asked, reach, 0.0), 0) > _REACH:
        g = tl.zeros((BLOCK, W), tl.float32)
        for k in range(0, E, _OUT):
            g += _times(_waves(waves, k, f0, f1, f2, E), matrices, at + k * W, _OUT, W)
        g += _bias(biases, bias, W) + lips[:, None] * _codes(face, 2 * own, alike, 2 * one, W)
        g = tl.maximum(g + eyes[:, None] * _codes(face + W, 2 * own, alike, 2 * one, W), 0.0)
        h = tl.maximum(_layer(g, matrices, biases, at + E * W, bias + W, W, W), 0.0)
        h = _layer(h, matrices, biases, at + E * W + W * W, bias + 2 * W, W, _OUT)
        scale = tl.where(reach > _REACH, tl.minimum(reach, 1.0), 0.0) * _MAX_SHIFT
        s0 = scale * _tanh(_column(h, 0, _OUT) / _MAX_SHIFT)
        s1 = scale * _tanh(_column(h, 1, _OUT) / _MAX_SHIFT)
        s2 = _DEPTH * scale * _tanh(_column(h, 2, _OUT) / _MAX_SHIFT)
        moved_by_face = tl.abs(s0) + tl.abs(s1) + tl.abs(s2)
        y0, y1, y2 = y0 + s0, y1 + s1, y2 + s2
    at, bias = at + E * W + W * W + W * _OUT, bias + 2 * W + _OUT

    # The torso field, at the points displaced by the face field.
    moved_by_torso = tl.zeros((BLOCK,), tl.float32)
    z0, z1, z2 = y0, y1, y2
    if tl.max(tl.where(asked, below, 0.0), 0) > _REACH:
        f0, f1, f2 = _affine(affine, y0, y1, y2)
        g = _bias(biases, bias, W) + _codes(torso, own, alike, one, W)
        for k in range(0, E, _OUT):
            g += _times(_waves(waves, k, f0, f1, f2, E), matrices, at + k * W, _OUT, W)
        h = tl.maximum(
            _layer(tl.maximum(g, 0.0), matrices, biases, at + E * W, bias + W, W, W), 0.0
        )
        h = _layer(h, matrices, biases, at + E * W + W * W, bias + 2 * W, W, _OUT)
        c0, c1, c2 = _own_affine(rows, own, alike, one, y0, y1, y2, 0)
        scale = tl.where(below > _REACH, below, 0.0)
        s0 = scale * (c0 - y0 + _MAX_SHIFT * _tanh(_column(h, 0, _OUT) / _MAX_SHIFT))
        s1 = scale * (c1 - y1 + _MAX_SHIFT * _tanh(_column(h, 1, _OUT) / _MAX_SHIFT))
        s2 = scale * (c2 - y2 + _MAX_SHIFT * _tanh(_column(h, 2, _OUT) / _MAX_SHIFT))
        moved_by_torso = tl.abs(s0) + tl.abs(s1) + tl.abs(s2)
        z0, z1, z2 = z0 + s0, z1 + s1, z2 + s2

    place = channels + 8 * point.to(tl.int64)
    tl.store(place + 3, lips, mask=here)
    tl.store(place + 4, eyes, mask=here)
    tl.store(place + 5, below, mask=here)
    tl.store(place + 6, moved_by_face, mask=here)
    tl.store(place + 7, moved_by_torso, mask=here)
    p0, p1, p2 = _affine(affine + 12, z0, z1, z2)
    place = places + 3 * point
    tl.store(place, _gathered(p0, tl.load(affine + 52)), mask=here)
    tl.store(place + 1, _gathered(p1, tl.load(affine + 53)), mask=here)
    tl.store(place + 2, _gathered(p2, tl.load(affine + 54)), mask=here)


@triton.jit
def _read(places, row, read, n, texels, levels, L: tl.constexpr, BLOCK: tl.constexpr):
    """Sample one level's planes xy, xz, yz bilinearly with border padding: four channels each,
    then four zeros.  Two channels are one 32-bit access."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    level = tl.program_id(1)
    here = (point < n) & (tl.load(row + point, mask=point < n, other=-1) >= 0)
    p0 = tl.load(places + 3 * point, mask=here, other=0.0)[:, None]
    p1 = tl.load(places + 3 * point + 1, mask=here, other=0.0)[:, None]
    p2 = tl.load(places + 3 * point + 2, mask=here, other=0.0)[:, None]
    begin, side = tl.load(levels + level), tl.load(levels + L + level)
    last = side - 1
    pair = tl.arange(0, 8)[None, :]
    plane = pair // 2
    u = tl.where(plane == 2, p1, p0)
    v = tl.where(plane == 0, p1, p2)
    u = tl.minimum(tl.maximum(((u + 1) * side - 1) * 0.5, 0.0), last.to(tl.float32))
    v = tl.minimum(tl.maximum(((v + 1) * side - 1) * 0.5, 0.0), last.to(tl.float32))
    u0, v0 = u.to(tl.int32), v.to(tl.int32)
    right, below = u - u0.to(tl.float32), v - v0.to(tl.float32)
    u1, v1 = tl.minimum(u0 + 1, last), tl.minimum(v0 + 1, last)
    first = texels + (begin + plane * side * side) * 2 + pair % 2
    wanted = here[:, None] & (plane < 3)
    a = tl.load(first + (v0 * side + u0) * 2, mask=wanted, other=0)
    b = tl.load(first + (v0 * side + u1) * 2, mask=wanted, other=0)
    c = tl.load(first + (v1 * side + u0) * 2, mask=wanted, other=0)
    d = tl.load(first + (v1 * side + u1) * 2, mask=wanted, other=0)
    low = _between(_half(a), _half(b), _half(c), _half(d), right, below)
    high = _between(_half(a >> 16), _half(b >> 16), _half(c >> 16), _half(d >> 16), right, below)
    at = (point.to(tl.int64)[:, None] * L + level) * 8 + pair
    tl.store(read + at, (_bits(high) << 16) | (_bits(low) & 0xFFFF), mask=here[:, None])


@triton.jit
def _half(bits):
    """Reinterpret the lower sixteen bits as float16, as float32."""
    return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _bits(value):
    return value.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)


@triton.jit
def _between(a, b, c, d, right, below):
    top = a + right * (b - a)
    return top + below * (c + right * (d - c) - top)


@triton.jit
def _shade(
    x, d, row, read, found, channels, n, matrices, biases, rows, density,
    E: tl.constexpr, W: tl.constexpr, H: tl.constexpr, L: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute density, and colour with view direction and the row's light."""
    point = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = point < n
    own, asked, alike, one = _own_row(row, point, here)
    if one < 0:
        tl.store(found + point, tl.zeros((BLOCK,), tl.float32), mask=here)
        return
    place = channels + 8 * point.to(tl.int64)
    lips = tl.load(place + 3, mask=here, other=0.0)
    eyes = tl.load(place + 4, mask=here, other=0.0)
    below = tl.load(place + 5, mask=here, other=0.0)
    # skip the weights of the attention net and both fields
    at = E * 32 + 32 * _OUT + 2 * (E * W + W * W + W * _OUT)
    bias = 32 + _OUT + 2 * (2 * W + _OUT)
    h = _bias(biases, bias, H) + lips[:, None] * _codes(density, 2 * own, alike, 2 * one, H)
    h += eyes[:, None] * _codes(density + H, 2 * own, alike, 2 * one, H)
    across = tl.arange(0, _OUT)
    for level in range(L):
        column = point.to(tl.int64)[:, None] * (L * _OUT) + level * _OUT + across[None, :]
        part = tl.load(read + column, mask=asked[:, None], other=0.0)
        h += _times(part, matrices, at + level * _OUT * H, _OUT, H)
    at, bias = at + L * _OUT * H, bias + H
    h = _layer(tl.maximum(h, 0.0), matrices, biases, at, bias, H, 32)
    at, bias = at + H * 32, bias + 32
    solid = tl.exp(tl.minimum(_column(h, 0, 32) - _THIN, 7.0))
    tl.store(found + point, tl.where(asked, solid, 0.0), mask=here)

    h = _layer(h, matrices, biases, at, bias, 32, 32)
    look = biases + bias + 32 + _OUT
    for axis in tl.static_range(3):
        along = _LOOK * tl.load(d + 3 * point + axis, mask=here, other=0.0)
        h += along[:, None] * tl.load(look + axis * 32 + tl.arange(0, 32))[None, :]
    at, bias = at + 32 * 32, bias + 32
    h = _layer(tl.maximum(h, 0.0), matrices, biases, at, bias, 32, _OUT)
    x0 = tl.load(x + 3 * point, mask=here, other=0.0)
    x1 = tl.load(x + 3 * point + 1, mask=here, other=0.0)
    x2 = tl.load(x + 3 * point + 2, mask=here, other=0.0)
    l0, l1, l2 = _own_affine(rows, own, alike, one, x0, x1, x2, 12)
    head = 1 - below
    tl.store(place, tl.sigmoid(_column(h, 0, _OUT) + head * l0), mask=here)
    tl.store(place + 1, tl.sigmoid(_column(h, 1, _OUT) + head * l1), mask=here)
    tl.store(place + 2, tl.sigmoid(_column(h, 2, _OUT) + head * l2), mask=here)


@triton.jit
def _own_affine(rows, own, alike, one, x0, x1, x2, at: tl.constexpr):
    """Apply to points the maps (3, 4) stored at offset `at` of their rows."""
    if alike:
        y0, y1, y2 = _affine(rows + one * 24 + at, x0, x1, x2)
    else:
        y0, y1, y2 = _affine(rows + own * 24 + at, x0, x1, x2)
    return y0, y1, y2


@triton.jit
def _prior(table, x0, x1, x2, i: tl.constexpr):
    """Return position-only attention logit i (of 4): a quadratic form, clamped to [-6, 6]."""
    y = tl.load(table + 24 + i)
    y += tl.load(table + i) * x0 + tl.load(table + 4 + i) * x1 + tl.load(table + 8 + i) * x2
    y += tl.load(table + 12 + i) * x0 * x0 + tl.load(table + 16 + i) * x1 * x1
    y += tl.load(table + 20 + i) * x2 * x2
    return tl.minimum(tl.maximum(y, -6.0), 6.0)
