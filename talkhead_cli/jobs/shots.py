"""Draws training rays: which frames, which pixels, and what they should look like."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from talkhead_cli.contracts import Shot
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Stage
from talkhead_cli.march import picture_rays, pixel_rays

# Shares of random rays by region.  Mouth and eyes cover a hundredth of the picture: drawn
# evenly they would hardly ever be seen, and blinks would not be learnt at all.
SHARES = {"mouth": 0.18, "eyes": 0.12, "face": 0.32, "all": 0.38}
ALIKE = 0.05  # between eyes that count as open alike


def draw(
    footage: Footage, stage: Stage, n_rays: int, aabb: Tensor, rng: torch.Generator,
    magnification: int = 1,
) -> Shot:  # fmt: skip
    """One person's share of a training step; whole pictures march `magnification` times smaller."""
    if stage.rays == "none":
        rows = footage.train[footage.heard[footage.train]]
        rows = _in_sequence(rows, stage.batch, stage.in_sequence, rng)
        signals = footage.signals[_sent(rows, footage.device)]
        if not stage.shown:
            return Shot(signals)
        seen = torch.from_numpy(footage.pictures[rows.numpy()]).float() / 255
        return Shot(signals, target=seen)
    n_frames = min(stage.n_frames, max(1, n_rays // 16))
    if stage.rays == "patch":
        n_frames = max(1, min(n_frames, n_rays // stage.patch_px**2))
    if stage.rays == "picture":
        n_frames = stage.n_frames
    rows = _pick(footage.train, n_frames, rng)
    if stage.in_sequence > 1:
        heard = footage.train[footage.heard[footage.train]]
        rows = _in_sequence(heard, n_frames, min(stage.in_sequence, n_frames), rng)
        n_frames = len(rows)
    if stage.rare:
        n_rare = int((torch.rand(len(rows), generator=rng) < stage.rare).sum())
        rows = torch.cat([_pick(footage.rare, n_rare, rng), rows])[: len(rows)]
    lids = _by_lids(footage, stage, len(rows), rng)
    kept = len(rows) - (0 if stage.rays == "random" else len(lids))
    rows = torch.cat([rows[:kept], lids])
    at = _sent(rows, footage.device)
    signals = footage.signals[at]
    if footage.said is not None:
        # rows that follow each other are all of one kind: lips do not jump
        n_draws = len(rows) if stage.in_sequence == 1 else 1
        mouths = _rand(n_draws, 1, 1, rng=rng, on=signals.pose) < stage.listen
        signals = signals.with_(landmarks=torch.where(mouths, footage.said[at], signals.landmarks))
    others = None
    if stage.portraits:
        others = footage.portrait(_pick(footage.train, stage.portraits, rng))
    if stage.rays == "picture":
        camera = signals.camera.smaller(magnification)
        rays = picture_rays(camera, torch.arange(n_frames, device=footage.device), aabb)
        return with_truth(footage, at, Shot(signals, rays, portrait=others))
    if stage.rays == "patch":
        row, pixel = _patches(footage, at, stage, rng)
        layout = (n_frames, stage.patch_px, stage.patch_px)
    else:
        row, pixel = _pixels(footage, at, n_rays, rng, len(lids), stage.lids)
        layout = None
    rays = pixel_rays(signals.camera, row, pixel, aabb, layout=layout)
    return with_truth(footage, at, Shot(signals, rays, portrait=others))


def with_truth(footage: Footage, rows: Tensor, shot: Shot) -> Shot:
    """The shot with true colours, labels and the background behind each ray, or of every pixel of
    the finished pictures where the rays are whole ones."""
    rays = shot.rays
    assert rays is not None
    if rays.whole:  # slices: picking pixels one by one takes a hundred times as long
        plate = footage.plate.reshape(-1, 3).repeat(len(rows), 1)
        seen = _whole_from_disk(footage, rows) if footage.near is None else _whole(footage, rows)
    else:
        column, line = rays.pixel.long().unbind(1)
        plate = footage.plate[line, column]
        frame = rows[rays.row]
        pick = _pick_from_disk if footage.near is None else _pick_pixels
        seen = pick(footage, frame, line, column)
    target, labels = (part.float() / 255 for part in seen)
    return replace(shot, target=target, labels=labels, plate=plate)


def _whole(footage: Footage, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Colours and labels of every pixel of whole frames, uint8, where training is."""
    near = footage.near
    assert near is not None
    side = _labelled(footage, torch.arange(footage.size_px, device=rows.device))
    labels = near.labels[rows][:, side][:, :, side]
    return near.pictures[rows].view(-1, 3), labels.reshape(-1, labels.shape[-1])


def _whole_from_disk(footage: Footage, rows: Tensor) -> tuple[Tensor, Tensor]:
    frames = rows.numpy()
    side = _labelled(footage, torch.arange(footage.size_px)).numpy()
    labels = footage.labels[frames].transpose(0, 2, 3, 1)[:, side][:, :, side]
    colours = footage.pictures[frames].reshape(-1, 3)
    return torch.from_numpy(colours), torch.from_numpy(labels.reshape(-1, labels.shape[-1]))


def _pick_pixels(
    footage: Footage, frame: Tensor, line: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    """Colours and labels of single pixels (R,), uint8, where training is."""
    near = footage.near
    assert near is not None
    at = (frame, _labelled(footage, line), _labelled(footage, column))
    return near.pictures[frame, line, column], near.labels[at]


def _pick_from_disk(
    footage: Footage, frame: Tensor, line: Tensor, column: Tensor
) -> tuple[Tensor, Tensor]:
    y, x = (_labelled(footage, at).numpy() for at in (line, column))
    colours = footage.pictures[frame.numpy(), line.numpy(), column.numpy()]
    return torch.from_numpy(colours), torch.from_numpy(footage.labels[frame.numpy(), :, y, x])


def _labelled(footage: Footage, pixel: Tensor) -> Tensor:
    """Lines or columns of pictures -> those of label maps."""
    scale = footage.labels.shape[-1] / footage.size_px
    return ((pixel + 0.5) * scale).floor().long()


def _pick(rows: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """n rows, none twice where there are more of them."""
    if n >= len(rows):
        return rows[torch.randint(len(rows), (n,), generator=rng)]
    return rows[torch.randperm(len(rows), generator=rng)[:n]]


def _by_lids(footage: Footage, stage: Stage, n_rows: int, rng: torch.Generator) -> Tensor:
    """Training rows whose eyes are open by amounts drawn evenly between the least and the most:
    somebody who blinks for two frames of four hundred would hardly learn to.  Beside rows whose
    rays are random, a few; else their share of the rows."""
    if not stage.lids:
        return footage.train[:0]
    n = max(1, n_rows // 8)
    if stage.rays != "random":
        n = int((torch.rand(n_rows, generator=rng) < stage.lids).sum())
    opened = footage.opened
    level = opened.min() + torch.rand(n, 1, generator=rng) * (opened.max() - opened.min())
    among = ALIKE * torch.rand(n, len(opened), generator=rng)  # any of those that are alike
    return footage.train[((opened - level).abs() + among).argmin(1)]


def _in_sequence(rows: Tensor, n: int, length: int, rng: torch.Generator) -> Tensor:
    """n of the rows, in runs of `length` that begin anywhere."""
    length = min(length, len(rows))
    if length == 1:
        return _pick(rows, n, rng)
    n_runs = max(1, n // length)
    begins = torch.arange(len(rows) - length + 1)
    whole = begins[rows[begins + length - 1] - rows[begins] == length - 1]
    begins = whole if len(whole) else begins  # else runs that leap over what cannot be used
    first = begins[torch.randint(len(begins), (n_runs, 1), generator=rng)]
    return rows[(first + torch.arange(length)).flatten()]


def _pixels(
    footage: Footage, rows: Tensor, n_rays: int, rng: torch.Generator, n_lids: int = 0,
    lids: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Random pixels by region, row after row: row (R,), pixel centres (R, 2).  Of the last `n_lids`
    rows eyes alone, which are the share `lids` of what is drawn of eyes."""
    n_whole = len(rows) - n_lids
    per_row = max(4, n_rays // n_whole)
    places, number = [], torch.arange(len(rows), device=rows.device)[:, None]
    for region, share in SHARES.items():
        taken = share * (1 - lids) if region == "eyes" else share
        n = max(1, round(taken * per_row))
        places.append(_places(footage, rows[:n_whole], region, n, rng))
    at = torch.cat(places, 1)
    row = number[:n_whole].expand(at.shape[:2])
    at, row = at.flatten(0, 1), row.flatten()
    if n_lids:
        n = max(1, round(SHARES["eyes"] * lids * per_row * n_whole / n_lids))
        shut = _places(footage, rows[n_whole:], "eyes", n, rng)
        at = torch.cat([at, shut.flatten(0, 1)])
        row = torch.cat([row, number[n_whole:].expand(shut.shape[:2]).flatten()])
    size = footage.size_px
    return row, (at * size).floor().clamp(0, size - 1) + 0.5


def _places(footage: Footage, rows: Tensor, region: str, n: int, rng: torch.Generator) -> Tensor:
    """n random places in a region of each row (T, n, 2), in shares of the side."""
    at = _rand(len(rows), n, 2, rng=rng, on=rows)
    if region == "all":
        return at
    centre, half = _region(footage, rows, region, rng)
    return centre[:, None] + (2 * at - 1) * half[:, None]


def _patches(
    footage: Footage, rows: Tensor, stage: Stage, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One square patch per row, in raster order: row (R,), pixel centres (R, 2)."""
    size, side = footage.size_px, stage.patch_px
    if stage.region == "all":
        centre = _rand(len(rows), 2, rng=rng, on=rows)
    else:
        name = {"lips": "mouth", "eyes": "eyes"}[stage.region]
        centre, half = _region(footage, rows, name, rng)
        centre = centre + (_rand(len(rows), 2, rng=rng, on=rows) - 0.5) * half
    corner = (centre * size - side / 2).round().clamp(0, size - side)
    along = torch.arange(side, device=rows.device)
    line, column = torch.meshgrid(along, along, indexing="ij")
    offset = torch.stack([column, line], -1).flatten(0, 1) + 0.5
    pixel = (corner[:, None] + offset).flatten(0, 1)
    row = torch.arange(len(rows), device=rows.device)[:, None].expand(-1, side * side)
    return row.flatten(), pixel


def _region(
    footage: Footage, rows: Tensor, region: str, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Centre and half-size (T, 2) of a region's box, in shares of the side; one of the two eyes at
    random."""
    if region == "eyes":
        which = _rand(len(rows), 1, 1, rng=rng, on=rows) < 0.5
        left, right = (footage.regions[eye][rows] for eye in ("left eye", "right eye"))
        box = torch.where(which, left, right)
    else:
        box = footage.regions[region][rows]
    return box[:, 0], box[:, 1]


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Rows where training is; a GPU fetches them in its own time, from memory where it can."""
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def _rand(*shape: int, rng: torch.Generator, on: Tensor) -> Tensor:
    """Random numbers beside a tensor; drawn on the CPU, so that they are the same everywhere, and
    in memory from which a GPU fetches them in its own time."""
    drawn = torch.rand(shape, generator=rng, pin_memory=on.is_cuda)
    return drawn.to(on.device, non_blocking=True)
