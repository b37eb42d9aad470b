"""A backend of candidates that go wrong, each in its own way: tests copy this folder to where they may change it.

FAULTY_VARIANTS, which a child process inherits, says which candidates are offered.
"""

from titans_backends import CONTRACT_VERSION, Backend

BACKEND = Backend(
    name="faulty",
    summary="candidates that raise, lie, hang and die",
    contract_version=CONTRACT_VERSION,
    ops={op: f"faulty.{op}" for op in ("gated_delta_rule", "fast_core")},
    simplicity=9,
    rank={"cpu": -1},
)
