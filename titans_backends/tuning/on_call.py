"""What a call inside `with titans_backends.autotune():` does: measures its bucket, or, in a job of many ranks, takes what rank 0 measures."""

from __future__ import annotations

from titans_backends.contracts.contract import Call, Contract
from titans_backends.signature import Signature
from titans_backends.tuning import ranks
from titans_backends.tuning.run import tune_call

__all__ = ["shared", "tune"]


def shared(device: str) -> bool:
    """Takes rank 0's tables, once per process group; whether the choice may be another one now. RanksError where the ranks cannot choose alike."""
    return ranks.first_share(device)


def tune(made: Contract, call: Call, signature: Signature, budget_s: float) -> None:
    """Gives the call's bucket a row, if a candidate passes."""
    together = ranks.group()
    if together is None:
        tune_call(made, call, signature, budget_s)
    else:
        ranks.tune_call(together, call, made, signature, budget_s)
