"""A backend whose hook `compile_ahead` leaves a file for every call that it is given: tests copy this folder or put its parent on the path.

FORESIGHT_VARIANTS says which candidates there are, FORESIGHT_MARKS where the files go; both reach every process.
"""

from titans_backends import CONTRACT_VERSION, Backend

BACKEND = Backend(
    name="foresight",
    summary="compiles nothing, and says so",
    contract_version=CONTRACT_VERSION,
    ops={"gated_delta_rule": "foresight.gated_delta_rule"},
    simplicity=9,
    rank={"cpu": -1},
)
