"""The reversible Reformer (Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451) in plain torch.

    from megabase.models import Reformer, ReformerConfig, Seeds

Nothing here knows of Lightning, DeepSpeed, files or configs on disk: a config is a dataclass, a model is an
``nn.Module``, and all chance comes in with the call. (One module reads files: `pretrained`, for exported models.)
"""

from megabase.models.chance import Seeds
from megabase.models.config import (
    ConfigError,
    FeedForwardConfig,
    LinformerConfig,
    LocalConfig,
    LSHConfig,
    PerformerConfig,
    ReformerConfig,
)
from megabase.models.encoder_decoder import EncoderDecoder
from megabase.models.generation import generate
from megabase.models.reformer import Reformer, ReformerClassifier

__all__ = [
    "ConfigError",
    "EncoderDecoder",
    "FeedForwardConfig",
    "LSHConfig",
    "LinformerConfig",
    "LocalConfig",
    "PerformerConfig",
    "Reformer",
    "ReformerClassifier",
    "ReformerConfig",
    "Seeds",
    "generate",
]
