"""Weights and settings from and to the Reformer of `transformers` 5, which is imported when a model is converted."""

from megabase.models.huggingface.convert import from_huggingface, to_huggingface

__all__ = ["from_huggingface", "to_huggingface"]
