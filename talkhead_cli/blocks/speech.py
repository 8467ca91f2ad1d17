"""From a window of speech features to the shape of the mouth."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SpeechEncoder(nn.Module):
    """Speech window -> coordinates of the mouth: a linear map beside small convolution nets.

    The linear map is ridge regression in closed form (`solve`); the nets are trained on
    noisy features and stopped early.  A few hundred frames of one person are too little
    for a net alone and too much for a line: the mean of both beat either in block
    cross-validation on the clips it was tried on.
    """

    LINEAR_SHARE = 0.3

    def __init__(
        self, n_steps: int, n_features: int, n_out: int, width: int = 32, n_nets: int = 3
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(n_steps * n_features, n_out)
        self.linear.requires_grad_(False)
        self.nets = nn.ModuleList(_net(n_steps, n_features, n_out, width) for _ in range(n_nets))

    def forward(self, audio: Tensor) -> Tensor:
        """audio (T, W, A) -> coordinates (T, K)."""
        share = self.LINEAR_SHARE
        return share * self.linear(audio.flatten(1)) + (1 - share) * self.votes(audio).mean(0)

    def votes(self, audio: Tensor) -> Tensor:
        """What each net says: audio (T, W, A) -> (n_nets, T, K); in training, of noisy copies."""
        heard = audio.transpose(1, 2)
        return torch.stack(
            [net(_disturbed(heard) if self.training else heard) for net in self.nets]
        )

    @torch.no_grad()
    def retarget(self, change: Tensor) -> None:
        """Say other shapes from now on: new coordinates (T, K) = old ones @ change (K, K)."""
        for net in self.nets:
            last = net[-1]  # type: ignore[index]
            assert isinstance(last, nn.Linear)
            last.weight.copy_(change.T @ last.weight)
            last.bias.copy_(last.bias @ change)

    @torch.no_grad()
    def solve(self, audio: Tensor, told: Tensor, ridge: float) -> None:
        """Set the linear map to the ridge solution of audio (T, W, A) -> told (T, K)."""
        weight, bias = ridge_map(audio.flatten(1), told, ridge)
        self.linear.weight.copy_(weight.T)
        self.linear.bias.copy_(bias)


def _net(n_steps: int, n_features: int, n_out: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv1d(n_features, width, 5, padding=2),
        nn.GELU(),
        nn.Conv1d(width, width, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Dropout(0.3),
        nn.Conv1d(width, width, 5, stride=2, padding=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(width * ((n_steps + 3) // 4), n_out),
    )


def _disturbed(heard: Tensor) -> Tensor:
    """Standardised features (T, A, W) with noise as large as they are, and a microphone's tilt."""
    tilt = 0.15 * torch.randn_like(heard[:, :, :1])
    return heard + torch.randn_like(heard) + tilt


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression in its dual form: x (n, d), y (n, k) -> weight (d, k), bias (k,)."""
    x64, y64 = x.double(), y.double()
    x_mean, y_mean = x64.mean(0), y64.mean(0)
    centred = x64 - x_mean
    gram = centred @ centred.T
    gram.diagonal().add_(ridge)
    weight = centred.T @ torch.linalg.solve(gram, y64 - y_mean)
    return weight.to(x), (y_mean - x_mean @ weight).to(x)


def ridge_by_blocks(
    x: Tensor, y: Tensor, ridges: tuple[float, ...], n_blocks: int = 5, gap: int = 15
) -> tuple[float, Tensor]:
    """The ridge that predicts best across contiguous blocks, and its predictions there.

    x (n, d), y (n, k), rows in time order; `gap` rows either side of a block are left out of
    its fit, since windows overlap.  Returns (ridge, out-of-block predictions (n, k)).
    """
    n = len(x)
    rows = torch.arange(n)
    edges = [i * n // n_blocks for i in range(n_blocks + 1)]
    best: tuple[float, float, Tensor] | None = None
    for ridge in ridges:
        guess = torch.zeros_like(y)
        for a, b in zip(edges[:-1], edges[1:], strict=True):
            outside = (rows < a - gap) | (rows >= b + gap)
            weight, bias = ridge_map(x[outside], y[outside], ridge)
            guess[a:b] = x[a:b] @ weight + bias
        error = float((guess - y).square().mean())
        if best is None or error < best[0]:
            best = (error, ridge, guess)
    assert best is not None
    return best[1], best[2]
