"""Appearance encoder: a picture of a face -> multi-scale feature planes and a few slot vectors.

After S3D-NeRF (Li et al., ECCV 2024): the hierarchical facial appearance encoder, the slots that
summarise its features, and the cross-attention from these slots to the driving signals.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_GROUPS = 4
N_HEADS = 4
ROUNDS = 3  # iterations of slot attention


class AppearanceEncoder(nn.Module):
    """Feature pyramid network whose finest `n_scales` levels each give three planes.

    The first plane (xy) is parallel to the picture, so its features come from the pixel a point
    projects to.  The other two are perpendicular to the picture and have to be inferred.
    """

    def __init__(self, n_in: int, widths: Sequence[int], channels: int, n_scales: int) -> None:
        """widths: channels of the levels, the first at half the picture's size · channels: of each
        plane · n_scales: number of levels, from the finest on, that become planes."""
        super().__init__()
        ins = (n_in, *widths[:-1])
        self.down = nn.ModuleList(_halving(a, b) for a, b in zip(ins, widths, strict=True))
        self.across = nn.ModuleList(nn.Conv2d(w, widths[-1], 1) for w in widths)
        self.planes = nn.ModuleList(
            nn.Sequential(
                _padded(widths[-1], widths[-1]),
                nn.LeakyReLU(0.2),
                nn.Conv2d(widths[-1], 3 * channels, 1),
            )
            for _ in range(n_scales)
        )
        self.n_out = channels * n_scales
        self.n_deep = widths[-1]

    def forward(self, pictures: Tensor) -> tuple[list[Tensor], Tensor]:
        """pictures (P, n_in, H, W) -> list of planes (P, 3, C, s, s), the largest scale first, and
        the features (P, n, n_deep) of the n cells of the deepest level."""
        levels = []
        x = pictures
        for layer in self.down:
            x = layer(x)
            levels.append(x)
        seen = self.across[-1](levels[-1])
        tops = [seen]
        for level, layer in zip(levels[-2::-1], list(self.across)[-2::-1], strict=True):
            up = F.interpolate(tops[-1], scale_factor=2, mode="bilinear")
            tops.append(layer(level) + up)
        tops.reverse()
        planes = [head(top).unflatten(1, (3, -1)) for head, top in zip(self.planes, tops)]  # noqa: B905
        return planes, seen.flatten(2).transpose(1, 2)


def _padded(n_in: int, n_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, stride=stride, padding=1, padding_mode="replicate")


def _halving(n_in: int, n_out: int) -> nn.Sequential:
    return nn.Sequential(
        _padded(n_in, n_out, stride=2),
        nn.GroupNorm(N_GROUPS, n_out),
        nn.LeakyReLU(0.2),
        _padded(n_out, n_out),
        nn.GroupNorm(N_GROUPS, n_out),
        nn.LeakyReLU(0.2),
    )


class Slots(nn.Module):
    """Slot attention over encoder features (Locatello et al. 2020).

    Slots start from learned vectors instead of noise, so that the result is deterministic.
    """

    def __init__(self, n_in: int, n_slots: int, width: int) -> None:
        super().__init__()
        self.start = nn.Parameter(torch.randn(n_slots, width) / width**0.5)
        self.enter, self.between, self.after = (nn.LayerNorm(n) for n in (n_in, width, width))
        self.ask, self.key, self.value = (
            nn.Linear(width, width, bias=False),
            nn.Linear(n_in, width, bias=False),
            nn.Linear(n_in, width, bias=False),
        )
        self.update = nn.GRUCell(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, seen: Tensor) -> Tensor:
        """Features seen (P, n, n_in) -> slots (P, n_slots, width)."""
        seen = self.enter(seen)
        key, value = self.key(seen), self.value(seen)
        slots = self.start.expand(len(seen), -1, -1)
        for _ in range(ROUNDS):
            asked = self.ask(self.between(slots))
            odds = torch.einsum("psw,pnw->psn", asked, key) / asked.shape[-1] ** 0.5
            share = odds.softmax(1) + 1e-6  # over slots: they compete for cells
            share = share / share.sum(2, keepdim=True)
            told = torch.einsum("psn,pnw->psw", share, value)
            slots = self.update(told.flatten(0, 1), slots.flatten(0, 1)).view_as(slots)
            slots = slots + self.think(self.after(slots))
        return slots


class CrossModal(nn.Module):
    """Multi-head cross-attention from appearance slots (queries) to driving signals (keys, values).

    Each driving number is a token: a learned embedding plus the number times a second one.  If all
    numbers shared one token, attention would have nothing to choose between.
    """

    def __init__(self, n_numbers: int, n_slots: int, width: int, n_out: int) -> None:
        super().__init__()
        self.what = nn.Parameter(torch.randn(n_numbers, width) / width**0.5)
        self.much = nn.Parameter(torch.randn(n_numbers, width) / width**0.5)
        self.attend = nn.MultiheadAttention(width, N_HEADS, batch_first=True)
        self.last = nn.Linear(n_slots * width, n_out)

    def forward(self, slots: Tensor, driving: Tensor) -> Tensor:
        """slots (n_slots, width), driving (T, n_numbers) -> features (T, n_out)."""
        tokens = self.what + driving[..., None] * self.much
        asked = slots.expand(len(driving), -1, -1)
        heard, _ = self.attend(asked, tokens, tokens, need_weights=False)
        return self.last((asked + heard).flatten(1))
