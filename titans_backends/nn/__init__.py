"""Layers on the ops: torch modules that hold the parameters of the original LAM model and call the registry for what is costly.

`import titans_backends` does not import this; `titans_backends.nn` does, when it is first named.
"""

from __future__ import annotations

from titans_backends.nn.dual_core import TitansDualCore
from titans_backends.nn.encoder import EncoderOutput, TitansEncoder, TitansEncoderConfig
from titans_backends.nn.level import Level
from titans_backends.nn.streaming import DualCoreCache

__all__ = ["DualCoreCache", "EncoderOutput", "Level", "TitansDualCore", "TitansEncoder", "TitansEncoderConfig"]
