"""transformers' gated delta layers, known to `accelerate`: `convert` says which and why not, `forward` what they become. Imports nothing of transformers."""

from titans_backends.integrations.transformers.convert import LAYER

__all__ = ["LAYER"]
