"""Lip-sync expert: embeds lip crops and speech windows, close if they are in sync; sync losses.

The idea is SyncNet's (Chung and Zisserman 2016), with the cosine of Wav2Lip's expert (Prajwal et
al. 2020) and a softmax over other frames of the same video in place of a margin.  The weights are
trained here, on the people available, so its scores do not compare with published ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.contracts import CHIN, LIPS, NOSE, Signals

N_FRAMES = 5  # lip crops per embedding
CROP_PX = 32
REACH = 0.8  # half a crop's side over the distance from the nose's base to the chin
TEMPERATURE = 0.07
GREY = (0.299, 0.587, 0.114)


class SyncExpert(nn.Module):
    """Encoder of lip crops and speech windows to unit vectors, with high cosine if in sync."""

    def __init__(self, n_steps: int, n_features: int, width: int = 32, n_out: int = 64) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(2 * N_FRAMES - 1, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(2 * width, 2 * width, 3, stride=2, padding=1),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(2 * width * (CROP_PX // 8) ** 2, n_out),
        )
        self.hear = nn.Sequential(
            nn.Conv1d(n_features, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(width * ((n_steps + 3) // 4), n_out),
        )

    def embed_lips(self, crops: Tensor) -> Tensor:
        """Embed grey crops (N, N_FRAMES, CROP_PX, CROP_PX): (N, n_out).

        Crops are standardised, and differences of frames are added as input, so that the embedding
        depends on lip shape and motion and less on the person's identity.
        """
        middle = crops.mean((1, 2, 3), keepdim=True)
        crops = (crops - middle) / crops.std((1, 2, 3), keepdim=True).clamp_min(0.02)
        return F.normalize(self.look(torch.cat([crops, 4 * crops.diff(dim=1)], 1)), dim=1)

    def embed_sound(self, audio: Tensor) -> Tensor:
        """Embed standardised windows of speech (N, W, A) around the middle frame: (N, n_out)."""
        audio = audio.transpose(1, 2)
        if self.training:
            audio = audio + 0.5 * torch.randn_like(audio) + 0.15 * torch.randn_like(audio[..., :1])
        return F.normalize(self.hear(audio), dim=1)


def lip_boxes(marks_2d: Tensor) -> Tensor:
    """Return lip boxes (T, 3), centre x, y and half the side, from landmarks (T, 68, 2), all in
    [0, 1]."""
    nose, chin = marks_2d[:, NOSE], marks_2d[:, CHIN]
    lips = marks_2d[:, LIPS].mean(1)
    return torch.cat([lips, REACH * (chin - nose).norm(dim=1, keepdim=True)], 1)


def lip_crops(pictures: Tensor, boxes: Tensor) -> Tensor:
    """pictures (T, H, W, 3), boxes (T, 3) -> grey crops (T, CROP_PX, CROP_PX)."""
    grey = (pictures * pictures.new_tensor(GREY)).sum(-1)[:, None]
    # large pictures are averaged down first, against aliasing
    height, width = grey.shape[-2:]
    finer = max(1, int(2 * float(boxes[:, 2].mean()) * width / CROP_PX))
    grey = F.avg_pool2d(grey, finer)
    # sides that `finer` does not divide lose their last pixels
    left = boxes.new_tensor([width // finer * finer / width, height // finer * finer / height])
    line = (torch.arange(CROP_PX, device=boxes.device) + 0.5) * 2 / CROP_PX - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    at = boxes[:, None, None, :2] + boxes[:, None, None, 2:] * torch.stack([x, y], -1)
    return F.grid_sample(grey, 2 * at / left - 1, padding_mode="border", align_corners=False)[:, 0]


def runs_of(crops: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
    """Crops (T, s, s) with frame numbers `moments` (T,) -> all runs of N_FRAMES consecutive frames
    (N, N_FRAMES, s, s), and the index of each run's middle row (N,)."""
    half = N_FRAMES // 2
    if len(crops) < N_FRAMES:
        return crops.new_zeros(0, N_FRAMES, *crops.shape[1:]), moments.new_zeros(0)
    runs = crops.unfold(0, N_FRAMES, 1).movedim(-1, 1)
    whole = moments[N_FRAMES - 1 :] - moments[: 1 - N_FRAMES] == N_FRAMES - 1
    middle = torch.arange(half, len(crops) - half, device=crops.device)
    return runs[whole], middle[whole]


def sync_losses(
    loss_networks: Sequence[nn.Module], pictures: Tensor, signals: Signals
) -> dict[str, Tensor]:
    """Return {"sync": 1 - mean cosine} of the lips in whole pictures (T, H, W, 3) and their speech,
    by the frozen `SyncExpert`s among `loss_networks`; empty without one, or if no N_FRAMES rows are
    consecutive."""
    experts = [judge for judge in loss_networks if isinstance(judge, SyncExpert)]
    if not experts or len(pictures) < N_FRAMES:
        return {}
    crops = lip_crops(pictures.float(), lip_boxes(signals.landmarks_2d))
    runs, middle = runs_of(crops, signals.moment)
    if not len(runs):
        return {}
    heard = [(e.embed_lips(runs) * e.embed_sound(signals.audio[middle])).sum(1) for e in experts]
    return {"sync": 1 - torch.stack(heard).mean()}


def agreement(seen: Tensor, heard: Tensor, moments: Tensor, near: int = 2) -> dict[str, Tensor]:
    """Contrastive loss and accuracy of lip and speech embeddings (N, D) of one video.

    moments (N,) frame numbers · contrast: symmetric cross-entropy · found: share of wrong pairs
    whose cosine is below that of the lips' true speech.  Other frames within `near` are ignored.
    """
    odds = seen @ heard.T
    apart = (moments[:, None] - moments).abs() > near
    own = odds.diagonal()
    masked = (odds / TEMPERATURE).masked_fill(
        ~apart & ~torch.eye(len(odds)).bool().to(odds.device), -torch.inf
    )
    target = torch.arange(len(odds), device=odds.device)
    contrast = (F.cross_entropy(masked, target) + F.cross_entropy(masked.T, target)) / 2
    found = (own[:, None] > odds)[apart].float()
    return {"contrast": contrast, "found": found.mean() if len(found) else own.new_tensor(0.5)}


def offset_of(seen: Tensor, heard: Tensor, moments: Tensor, reach: int = 15) -> tuple[float, float]:
    """Return by how many frames the sound lags behind the lips, and the confidence.

    seen, heard (N, D) at moments (N,), ascending.  The offset is the peak, refined by a parabola,
    of the mean cosine over shifts in [-reach, reach] that pair at least half of the moments; the
    confidence is the peak minus the median.
    """
    at = torch.full((int(moments[-1] - moments[0]) + 1 + 2 * reach,), -1, device=moments.device)
    at[moments - moments[0] + reach] = torch.arange(len(moments), device=moments.device)
    shifts, means = [], []
    for d in range(-reach, reach + 1):
        other = at[moments - moments[0] + reach + d]
        paired = other >= 0
        if 2 * int(paired.sum()) >= len(moments):
            shifts.append(d)
            means.append((seen[paired] * heard[other[paired]]).sum(1).mean())
    scores = torch.stack(means)
    peak = int(scores.argmax())
    best = float(shifts[peak])
    if 0 < peak < len(scores) - 1:
        a, b, c = (float(s) for s in scores[peak - 1 : peak + 2])
        best += 0.5 * (a - c) / min(a - 2 * b + c, -1e-9)
    return best, float(scores.max() - scores.median())
