"""Plain multilayer perceptrons."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn


def mlp(widths: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU,
        norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    """Linear layers of (…, widths[0]) → … → (…, widths[-1]).

    After each but the last stand `norm(width)`, where one is given (nn.BatchNorm1d, nn.LayerNorm),
    and `activation()`.
    """
    layers: list[nn.Module] = []
    last = len(widths) - 2
    for i, (inside, outside) in enumerate(pairwise(widths)):
        layers.append(nn.Linear(inside, outside))
        if i < last:
            layers += [*([norm(outside)] if norm else []), activation()]
    return nn.Sequential(*layers)
