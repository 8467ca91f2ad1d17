"""Speech encoder: from windows of speech features to mouth coordinates, and ridge regression."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from talkhead_cli.contracts import Signals

RIDGES = (3e2, 1e3, 3e3, 1e4, 3e4, 1e5, 1e6)
N_TRUSTED = 200  # rows of a person's own speech at which own and prior encoder weigh the same


class SpeechEncoder(nn.Module):
    """Predictor of mouth coordinates from speech: a linear map averaged with small networks.

    The linear map is ridge regression in closed form (`solve`); the networks are trained on noisy
    features with early stopping.  A few hundred frames of one person are too few for a network
    alone and more than a linear map can use: in block cross-validation on the clips tried, the
    weighted mean of both beat either.

    When fine-tuned from a prior (`freeze_as_prior`), a frozen copy of its encoder is kept in
    `known`.  The linear map is then fitted to its residual, and own and prior predictions are
    blended by `trust` (), which grows with the amount of the person's speech: an encoder fitted to
    seconds of speech generalises badly to minutes.
    """

    trust: Tensor
    known: SpeechEncoder | None

    def __init__(self, n_inputs: int, nets: Sequence[nn.Module], linear_share: float) -> None:
        """n_inputs: size of a flattened window of speech · nets: networks, each with a linear layer
        `last` at its end · linear_share: weight of the linear map against their mean"""
        super().__init__()
        self.linear_share = linear_share
        self.linear = nn.Linear(n_inputs, _last(nets[0]).out_features)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)
            parameter.requires_grad_(False)
        self.nets = nn.ModuleList(nets)
        self.known = None
        self.register_buffer("trust", torch.ones(()))

    @classmethod
    def of_windows(
        cls, n_steps: int, n_features: int, n_out: int, width: int = 32, n_nets: int = 3
    ) -> SpeechEncoder:
        """Build with `WindowNet`s: convolutions over each row's window, rows independent."""
        nets = [WindowNet(n_steps, n_features, n_out, width) for _ in range(n_nets)]
        return cls(n_steps * n_features, nets, linear_share=0.5)

    @classmethod
    def of_sequences(
        cls, n_steps: int, n_features: int, n_out: int, width: int = 32, n_people: int = 1
    ) -> SpeechEncoder:
        """Build with a `SpeechTransformer` over the windows of consecutive rows."""
        net = SpeechTransformer(n_steps, n_features, n_out, width, n_people)
        return cls(n_steps * n_features, [net], linear_share=0.3)

    @property
    def past(self) -> int:
        """Number of previous rows that a row's prediction depends on."""
        net = self.nets[0]
        return net.past if isinstance(net, SpeechTransformer) else 0

    def forward(self, signals: Signals) -> Tensor:
        """Predict mouth coordinates of each row: (T, K)."""
        said: Tensor = self.linear(signals.audio.flatten(1))
        known = None if self.known is None else self.known(signals)
        if known is not None:
            said = known + said
        own = torch.lerp(self.net_predictions(signals).mean(0), said, self.linear_share)
        return own if known is None else torch.lerp(known, own, self.trust)

    def net_predictions(self, signals: Signals) -> Tensor:
        """Return each network's predictions (n_nets, T, K); in training, from noisy features."""
        heard = signals.audio.transpose(1, 2)
        if not self.training:
            return torch.stack([net(heard, signals) for net in self.nets])
        # Drawing normal noise costs more than the networks: it is drawn once, and each network gets
        # it rolled by another number of rows.
        noise = torch.randn_like(heard)
        return torch.stack(
            [
                net(_disturbed(heard, noise.roll(index, 0)), signals)
                for index, net in enumerate(self.nets)
            ]
        )

    @torch.no_grad()
    def change_basis(self, change: Tensor) -> None:
        """Change basis of the outputs: new coordinates (T, K) = old ones @ change (K, K)."""
        for last in (self.linear, *map(_last, self.nets)):
            last.weight.copy_(change.T @ last.weight)
            last.bias.copy_(last.bias @ change)

    @torch.no_grad()
    def freeze_as_prior(self) -> None:
        """Freeze a copy as the prior `known` and reset the linear map; fine-tuning starts here."""
        assert self.known is None
        self.known = copy.deepcopy(self).requires_grad_(False)
        for parameter in self.linear.parameters():
            parameter.zero_()

    @torch.no_grad()
    def solve(self, people: Sequence[tuple[Signals, Tensor]], at_most: int = 4000) -> None:
        """Fit the linear map by ridge regression to the targets told (T, K) minus predictions of
        `known`, all people's rows together, evenly subsampled to about `at_most`; set `trust`."""
        self.eval()
        n = sum(len(told) for _, told in people)
        share = min(1.0, at_most / n)
        audio, lacks = [], []
        for signals, told in people:
            some = torch.linspace(0, len(told) - 1, max(1, round(share * len(told)))).long()
            audio.append(signals.audio[some].flatten(1))
            known = 0.0 if self.known is None else self.known(signals)[some]
            lacks.append(told[some] - known)
        x, y = torch.cat(audio), torch.cat(lacks)
        ridge, _ = ridge_by_blocks(x, y, RIDGES)
        weight, bias = ridge_map(x, y, ridge)
        self.linear.weight.copy_(weight.T)
        self.linear.bias.copy_(bias)
        self.trust.fill_(1.0 if self.known is None else _trust(n))

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        """Create `known` if the state contains it, before loading."""
        if self.known is None and any(name.startswith(f"{prefix}known.") for name in state):
            self.known = copy.deepcopy(self).requires_grad_(False)
        super()._load_from_state_dict(state, prefix, *args)


def _trust(n_rows: int) -> float:
    """Return the weight in [0, 1] of the person's own encoder against the prior's."""
    return n_rows**2 / (n_rows**2 + N_TRUSTED**2)


def _last(net: nn.Module) -> nn.Linear:
    last = net.last
    assert isinstance(last, nn.Linear)
    return last


class WindowNet(nn.Module):
    """Convolutions over one row's window of speech."""

    def __init__(self, n_steps: int, n_features: int, n_out: int, width: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv1d(n_features, width, 5, padding=2),
            nn.GELU(),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Conv1d(width, width, 5, stride=2, padding=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Dropout(0.3),
        )
        self.last = nn.Linear(width * ((n_steps + 3) // 4), n_out)

    def forward(self, heard: Tensor, signals: Signals) -> Tensor:
        """Audio features heard (T, A, W) -> (T, n_out); signals only for a common interface."""
        del signals
        return self.last(self.trunk(heard))


class SpeechTransformer(nn.Module):
    """Causal transformer over rows: each row's window features plus attention to previous rows.

    Tokens are rows; each attends to itself and at most REACH - 1 rows before it, with a linear
    distance bias (as in ALiBi and FaceFormer).  It is not autoregressive, so it neither drifts nor
    has to run row by row, and a row's output is the same from any stretch that includes the `past`
    rows before it.

    styles (P, WIDTH): learned speaking style of each person, relative to the mean if P > 1, so that
    an unknown person gets the average style.
    """

    REACH, N_LAYERS, N_HEADS, WIDTH = 12, 1, 4, 32

    def __init__(
        self, n_steps: int, n_features: int, n_out: int, width: int, n_people: int = 1
    ) -> None:
        super().__init__()
        self.window = WindowNet(n_steps, n_features, n_out, width)
        self.styles = nn.Parameter(torch.zeros(n_people, self.WIDTH))
        n_hidden = self.window.last.in_features
        self.token = nn.Linear(n_hidden, self.WIDTH)
        self.layers = nn.ModuleList(
            _Attention(self.WIDTH, self.N_HEADS, self.REACH) for _ in range(self.N_LAYERS)
        )
        # one layer for window features and attention output; the latter's weights start at zero
        self.last = nn.Linear(n_hidden + self.WIDTH, n_out)
        self.last.weight.data[:, n_hidden:] = 0
        del self.window.last

    @property
    def past(self) -> int:
        """Number of previous rows that a row's output depends on."""
        return self.N_LAYERS * (self.REACH - 1)

    def forward(self, heard: Tensor, signals: Signals) -> Tensor:
        """Audio features heard (T, A, W) of rows in time order -> (T, n_out)."""
        own = self.window.trunk(heard)
        styles = self.styles - self.styles.mean(0) if len(self.styles) > 1 else self.styles
        who = signals.person if len(styles) > 1 else torch.zeros_like(signals.person)
        x = self.token(own) + styles.index_select(0, who)
        for layer in self.layers:
            x = layer(x, signals.moment)
        return self.last(torch.cat([own, x], 1))


class _Attention(nn.Module):
    """Transformer layer: causal self-attention with ALiBi bias, feed-forward, both residual."""

    slope: Tensor

    def __init__(self, width: int, n_heads: int, reach: int) -> None:
        super().__init__()
        self.n_heads, self.reach = n_heads, reach
        self.before, self.between = nn.LayerNorm(width), nn.LayerNorm(width)
        self.ask = nn.Linear(width, 3 * width)
        self.answer = nn.Linear(width, width)
        self.think = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(0.4),
            nn.Linear(2 * width, width),
            nn.Dropout(0.4),
        )
        # ALiBi's slopes: the first head is the most local
        self.register_buffer("slope", 2.0 ** (-8 * torch.arange(1, n_heads + 1) / n_heads))

    def forward(self, x: Tensor, moment: Tensor) -> Tensor:
        """x (T, width), moment (T,) -> (T, width)."""
        t, width = x.shape
        ask, key, value = self.ask(self.before(x)).view(t, 3, self.n_heads, -1).unbind(1)
        keys, values = (self._past_of(part) for part in (key, value))  # (T, heads, C, reach)
        back = torch.arange(self.reach - 1, -1, -1, device=x.device)
        # rows of other stretches stand nearby in the batch, but not in time
        then = F.pad(moment, (self.reach - 1, 0), value=-self.reach).unfold(0, self.reach, 1)
        near = (moment[:, None] - then == back)[:, None]
        score = torch.einsum("thc,thcr->thr", ask, keys) / ask.shape[-1] ** 0.5
        score = (score - back * self.slope[:, None]).masked_fill(~near, -torch.inf)
        heads = torch.einsum("thr,thcr->thc", score.softmax(-1).to(values), values)
        x = x + self.answer(heads.reshape(t, width))
        return x + self.think(self.between(x))

    def _past_of(self, part: Tensor) -> Tensor:
        """Each row's last `reach` rows: (T, heads, C) -> (T, heads, C, reach)."""
        return F.pad(part, (0, 0, 0, 0, self.reach - 1, 0)).unfold(0, self.reach, 1)


def _disturbed(heard: Tensor, noise: Tensor) -> Tensor:
    """Add unit noise and an offset per feature (a microphone's tilt) to features (T, A, W)."""
    tilt = 0.15 * torch.randn_like(heard[:, :, :1])
    return heard + noise + tilt


def ridge_map(x: Tensor, y: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """Ridge regression: x (n, d), y (n, k) -> weight (d, k), bias (k,).

    Solved in the smaller of its two forms, primal (d, d) or dual (n, n).
    """
    x64, y64 = x.double(), y.double()
    x_mean, y_mean = x64.mean(0), y64.mean(0)
    centred, wanted = x64 - x_mean, y64 - y_mean
    n, d = x.shape
    gram = centred.T @ centred if d < n else centred @ centred.T
    gram.diagonal().add_(ridge)
    if d < n:
        weight = torch.linalg.solve(gram, centred.T @ wanted)
    else:
        weight = centred.T @ torch.linalg.solve(gram, wanted)
    return weight.to(x), (y_mean - x_mean @ weight).to(x)


def ridge_by_blocks(
    x: Tensor, y: Tensor, ridges: tuple[float, ...], n_blocks: int = 5, gap: int = 15
) -> tuple[float, Tensor]:
    """Choose the ridge by cross-validation over contiguous blocks.

    x (n, d), y (n, k), rows in time order; `gap` rows on either side of a held-out block are left
    out of its fit, since windows overlap; of few rows, fewer.  Returns (ridge, held-out predictions
    (n, k)).
    """
    n = len(x)
    gap = min(gap, n // n_blocks)
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
