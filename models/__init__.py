"""The reversible Reformer (Kitaev, Kaiser & Levskaya 2020, arXiv 2001.04451) in plain torch.

    from models import Reformer, ReformerConfig, Seeds

Nothing here knows of Lightning, DeepSpeed, files or configs on disk: a config is a dataclass, a model is an
``nn.Module``, and all chance comes in with the call. (One module reads files: `pretrained`, for exported models.)
"""

from models.chance import Seeds
from models.config import (
    ConfigError,
    FeedForwardConfig,
    LinformerConfig,
    LocalConfig,
    LSHConfig,
    PerformerConfig,
    ReformerConfig,
)
from models.encoder_decoder import EncoderDecoder
from models.generation import generate
from models.reformer import Reformer, ReformerClassifier

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
