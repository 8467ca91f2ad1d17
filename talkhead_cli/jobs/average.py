"""The averaged weights that training returns."""

from __future__ import annotations

from typing import Any

import torch

from talkhead_cli.avatars.base import Avatar


class Average:
    """Exponential moving average (EMA) of the avatar's weights.  So that it never lags, the decay
    warms up, by steps per weight, since parts of the avatar begin in different stages."""

    def __init__(self, avatar: Avatar, decay: float) -> None:
        self.decay = decay
        self.weights = {k: v.detach().clone() for k, v in avatar.named_parameters()}
        self.counts = dict.fromkeys(self.weights, 0)

    @torch.no_grad()
    def update(self, avatar: Avatar) -> None:
        means, news, shares = [], [], []
        for name, parameter in avatar.named_parameters():
            if parameter.requires_grad:
                self.counts[name] = count = self.counts[name] + 1
                means.append(self.weights[name])
                news.append(parameter.to(means[-1].device))
                shares.append(1 - min(self.decay, (1 + count) / (10 + count)))
        for share in set(shares):  # few values: parts of a stage have similar step counts
            at = [i for i, s in enumerate(shares) if s == share]
            torch._foreach_lerp_([means[i] for i in at], [news[i] for i in at], share)

    def restart(self, avatar: Avatar) -> None:
        """Restart the average of the trainable weights at their present values; keep the others."""
        for name, parameter in avatar.named_parameters():
            if parameter.requires_grad:
                self.counts[name] = 0
                self.weights[name].copy_(parameter.detach())

    @torch.no_grad()
    def give(self, avatar: Avatar) -> None:
        for name, parameter in avatar.named_parameters():
            parameter.copy_(self.weights[name])

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts, "weights": self.weights}

    def load(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]
        for name, value in state["weights"].items():
            self.weights[name].copy_(value)
