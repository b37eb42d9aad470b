from dataclasses import dataclass
from typing import Any


@dataclass
class CPCache:
    h0: Any = None
    mt: Any = None
    m_first: Any = None
    fallback_bwd: Any = None
    num_warmup_bwd: Any = None
