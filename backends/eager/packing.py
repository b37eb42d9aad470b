"""Whether a packed call can be served: the host must read cu_seqlens, which a captured graph cannot do."""

from __future__ import annotations

from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict, refused

__all__ = ["refuse_packed_graph"]


def refuse_packed_graph(signature: Signature) -> Verdict:
    """Refuses a packed call under graph capture."""
    if signature.launch == "graph" and signature.packed:
        return refused("a packed call reads cu_seqlens on the host, which a captured graph cannot")
    return ACCEPTED
