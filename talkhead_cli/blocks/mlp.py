"""Small multi-layer perceptrons."""

from __future__ import annotations

from torch import Tensor, nn


class Mlp(nn.Sequential):
    """Linear layers with ReLU between; `last_scale` shrinks the last layer's initial weights."""

    def __init__(
        self, n_in: int, width: int, n_out: int, n_layers: int = 2, *, last_scale: float = 1.0
    ) -> None:
        layers: list[nn.Module] = []
        for index in range(n_layers):
            first, last = index == 0, index == n_layers - 1
            layers.append(nn.Linear(n_in if first else width, n_out if last else width))
            if not last:
                layers.append(nn.ReLU(inplace=True))
        super().__init__(*layers)
        final = layers[-1]
        assert isinstance(final, nn.Linear)
        final.weight.data.mul_(last_scale)
        nn.init.zeros_(final.bias)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)
