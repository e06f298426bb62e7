"""A Reformer that classifies sequences."""

from __future__ import annotations

from torch import Tensor, nn

from megabase.models.chance import Purpose, Seeds, dropout
from megabase.models.config import ReformerConfig
from megabase.models.layers import Linear
from megabase.models.reformer import Body


class ReformerClassifier(nn.Module):
    """Classifies sequences, by the mean over real tokens or by the first token (config.classifier).

    Args:
        config: the settings.
        classes: number of classes.

    Raises:
        ConfigError: a setting cannot work.
    """

    def __init__(self, config: ReformerConfig, classes: int) -> None:
        super().__init__()
        self.body = Body(config)
        first = config.classifier == "first"
        self.head = FirstTokenHead(config, classes) if first else Linear(2 * config.dim, classes, bias=True)

    def forward(self, tokens: Tensor, *, seeds: Seeds | None = None, mask: Tensor | None = None) -> Tensor:
        """Logits (batch, classes). The arguments are those of Reformer."""
        hidden = self.body(tokens, seeds=seeds, mask=mask)
        if isinstance(self.head, FirstTokenHead):
            return self.head(hidden[:, 0], Seeds() if seeds is None else seeds)
        if mask is None:
            return self.head(hidden.mean(dim=1))
        real = mask[..., None].to(hidden.dtype)
        return self.head((hidden * real).sum(dim=1) / real.sum(dim=1).clamp_min(1.0))


class FirstTokenHead(nn.Module):
    """Classes from the first token, which must be real: dropout, dense, tanh, dropout, linear."""

    def __init__(self, config: ReformerConfig, classes: int) -> None:
        super().__init__()
        self.rate = config.dropout
        self.dense = Linear(2 * config.dim, config.dim, bias=True)
        self.output = Linear(config.dim, classes, bias=True)

    def forward(self, hidden: Tensor, seeds: Seeds) -> Tensor:
        """The first token's hidden state (batch, 2·dim) -> logits (batch, classes)."""
        hidden = self.dense(self._dropout(hidden, 0, seeds)).tanh()
        return self.output(self._dropout(hidden, 1, seeds))

    def _dropout(self, x: Tensor, number: int, seeds: Seeds) -> Tensor:
        """Dropout number 0 or 1 of this head."""
        if not (self.training and self.rate):
            return x
        return dropout(x, self.rate, seeds.keys(Purpose.CLASSIFIER, number, x.shape[0], x.device))
