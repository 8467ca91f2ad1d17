"""Draw training rays: which frames, which pixels, and their target colours."""

from __future__ import annotations

import torch
from torch import Tensor

from talkhead_cli.contracts import RayBundle, RayShot, Shot, SpeechShot, Truth
from talkhead_cli.jobs.footage import Footage
from talkhead_cli.jobs.preset import Stage
from talkhead_cli.march import picture_rays, pixel_rays

# Shares of random rays by region.  Mouth and eyes cover a hundredth of the picture: uniform
# sampling would rarely hit them, and blinks would not be learnt at all.
SHARES = {"mouth": 0.18, "eyes": 0.12, "face": 0.32, "all": 0.38}
# Shares of the rays that are drawn over eye openness.  Without those around the eyes, brows would
# be free to go anywhere in blinks, which few of the other rays show.
LID_SHARES = {"eyes": 2 / 3, "around eyes": 1 / 3}
RAYS_PER_FRAME = 16  # at least: each frame is conditioned on anew
ALIKE = 0.05  # eye openness; smaller differences count as none


def draw(
    footage: Footage,
    stage: Stage,
    n_rays: int,
    aabb: Tensor,
    rng: torch.Generator,
    magnification: int = 1,
) -> Shot:
    """Draw one person's shot; whole pictures are marched `magnification` times smaller."""
    if stage.rays == "none":
        return _speech_shot(footage, stage, rng)
    rows, n_lids = _rows(footage, stage, n_rays, rng)
    at = _sent(rows, footage.device)
    signals = footage.signals[at]
    if footage.said is not None:
        # one draw for all consecutive rows, so that lips do not jump
        n_draws = len(rows) if stage.in_sequence == 1 else 1
        mouths = _rand(n_draws, 1, 1, rng=rng, on=signals.pose) < stage.listen
        signals = signals.with_(landmarks=torch.where(mouths, footage.said[at], signals.landmarks))
    portrait = None
    if stage.portraits:
        portrait = footage.portrait(_pick(footage.train, stage.portraits, rng))
    if stage.rays == "picture":
        number = torch.arange(len(rows), device=footage.device)
        rays = picture_rays(signals.camera.smaller(magnification), number, aabb)
    elif stage.rays == "patch":
        row, pixel = _patches(footage, at, stage, rng)
        layout = (len(rows), stage.patch_px, stage.patch_px)
        rays = pixel_rays(signals.camera, row, pixel, aabb, layout=layout)
    else:
        row, pixel = _pixels(footage, at, n_rays, rng, n_lids, stage.lids)
        rays = pixel_rays(signals.camera, row, pixel, aabb)
    return RayShot(signals, rays, truth_of(footage, at, rays), portrait)


def _speech_shot(footage: Footage, stage: Stage, rng: torch.Generator) -> SpeechShot:
    rows = _in_sequence(footage.speaking, stage.batch, stage.in_sequence, rng)
    signals = footage.signals[_sent(rows, footage.device)]
    if not stage.shown:
        return SpeechShot(signals)
    return SpeechShot(signals, torch.from_numpy(footage.pictures[rows.numpy()]).float() / 255)


def _rows(footage: Footage, stage: Stage, n_rays: int, rng: torch.Generator) -> tuple[Tensor, int]:
    """Draw the rows (T,) of a step with rays; the last so many are drawn over eye openness."""
    n_frames = min(stage.n_frames, max(1, n_rays // RAYS_PER_FRAME))
    if stage.rays == "patch":
        n_frames = max(1, min(n_frames, n_rays // stage.patch_px**2))
    if stage.rays == "picture":
        n_frames = stage.n_frames
    rows = _pick(footage.train, n_frames, rng)
    if stage.in_sequence > 1:
        rows = _in_sequence(footage.speaking, n_frames, min(stage.in_sequence, n_frames), rng)
    if stage.rare:
        n_rare = int((torch.rand(len(rows), generator=rng) < stage.rare).sum())
        rows = torch.cat([_pick(footage.rare, n_rare, rng), rows])[: len(rows)]
    lids = _by_lids(footage, stage, len(rows), rng)
    kept = len(rows) - (0 if stage.rays == "random" else len(lids))
    return torch.cat([rows[:kept], lids]), len(lids)


def truth_of(footage: Footage, rows: Tensor, rays: RayBundle) -> Truth:
    """Return what rays of these rows (T,) of the footage should show."""
    if rays.whole:  # slicing; picking pixels one by one takes a hundred times as long
        colour, labels = footage.pixels.whole(rows)
        return Truth(colour, labels, footage.plate.reshape(-1, 3).repeat(len(rows), 1))
    column, line = rays.pixel.long().unbind(1)
    colour, labels = footage.pixels.at(rows[rays.row], line, column)
    return Truth(colour, labels, footage.plate[line, column])


def _pick(rows: Tensor, n: int, rng: torch.Generator) -> Tensor:
    """Draw n rows, without replacement if there are more than n."""
    if n >= len(rows):
        return rows[torch.randint(len(rows), (n,), generator=rng)]
    return rows[torch.randperm(len(rows), generator=rng)[:n]]


def _by_lids(footage: Footage, stage: Stage, n_rows: int, rng: torch.Generator) -> Tensor:
    """Draw training rows uniformly over eye openness, from the least to the greatest: blinks that
    last two frames of four hundred would hardly be learnt otherwise.  For random rays they are a
    few extra rows, else a share `stage.lids` of n_rows."""
    if not stage.lids:
        return footage.train[:0]
    n = max(1, n_rows // 8)
    if stage.rays != "random":
        n = int((torch.rand(n_rows, generator=rng) < stage.lids).sum())
    opened = footage.opened
    level = opened.min() + torch.rand(n, 1, generator=rng) * (opened.max() - opened.min())
    among = ALIKE * torch.rand(n, len(opened), generator=rng)  # random among those equally open
    return footage.train[((opened - level).abs() + among).argmin(1)]


def _in_sequence(rows: Tensor, n: int, length: int, rng: torch.Generator) -> Tensor:
    """Draw about n of the rows, in runs of `length` consecutive ones with random starts."""
    length = min(length, len(rows))
    if length == 1:
        return _pick(rows, n, rng)
    n_runs = max(1, n // length)
    begins = torch.arange(len(rows) - length + 1)
    whole = begins[rows[begins + length - 1] - rows[begins] == length - 1]
    begins = whole if len(whole) else begins  # else runs with gaps of unusable rows
    first = begins[torch.randint(len(begins), (n_runs, 1), generator=rng)]
    return rows[(first + torch.arange(length)).flatten()]


def _pixels(
    footage: Footage,
    rows: Tensor,
    n_rays: int,
    rng: torch.Generator,
    n_lids: int = 0,
    lids: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Draw random pixels by region, row after row: row (R,), pixel centres (R, 2).  The last
    `n_lids` rows get pixels at and around eyes only, a share `lids` of all eye pixels."""
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
        per_lid = SHARES["eyes"] * lids * per_row * n_whole / n_lids
        for region, share in LID_SHARES.items():
            shut = _places(footage, rows[n_whole:], region, max(1, round(share * per_lid)), rng)
            at = torch.cat([at, shut.flatten(0, 1)])
            row = torch.cat([row, number[n_whole:].expand(shut.shape[:2]).flatten()])
    size = footage.size_px
    return row, (at * size).floor().clamp(0, size - 1) + 0.5


def _places(footage: Footage, rows: Tensor, region: str, n: int, rng: torch.Generator) -> Tensor:
    """Draw n random positions in a region of each row (T, n, 2), in shares of the side."""
    at = _rand(len(rows), n, 2, rng=rng, on=rows)
    if region == "all":
        return at
    centre, half = _region(footage, rows, region, rng)
    return centre[:, None] + (2 * at - 1) * half[:, None]


def _patches(
    footage: Footage, rows: Tensor, stage: Stage, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw one square patch per row, in raster order: row (R,), pixel centres (R, 2)."""
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
    """Return centre and half-size (T, 2) of a region's box, in shares of the side; of several boxes
    one at random."""
    boxes = footage.regions[region][rows]
    n = boxes.shape[1]
    if n > 1:
        which = (n * _rand(len(rows), 1, 1, 1, rng=rng, on=rows)).long()
        boxes = boxes.take_along_dim(which, 1)
    return boxes[:, 0, 0], boxes[:, 0, 1]


def _sent(rows: Tensor, device: torch.device) -> Tensor:
    """Send rows to the training device; to a GPU asynchronously, from pinned memory."""
    return (rows.pin_memory() if device.type == "cuda" else rows).to(device, non_blocking=True)


def _rand(*shape: int, rng: torch.Generator, on: Tensor) -> Tensor:
    """Return uniform random numbers on the device of `on`; drawn on the CPU, so that they do not
    depend on the device, in pinned memory, from which a GPU copies them asynchronously."""
    drawn = torch.rand(shape, generator=rng, pin_memory=on.is_cuda)
    return drawn.to(on.device, non_blocking=True)
