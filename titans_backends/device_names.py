"""Under which slug a GPU's tables stand: one physical kind of card has one, whatever a driver calls it, and a slice of a card has its own.

Names are joined only where the card behind them is the same. An H100 PCIe, NVL and SXM differ in clocks, memory and power, and so do an H200 and an
H200 NVL: they keep slugs of their own and meet, if at all, as relatives (`tables`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

__all__ = ["ALIASES", "canonical", "is_slice", "slug_of", "slugify"]

ALIASES: Mapping[str, str] = {
    "nvidia_a100_sxm_80gb": "nvidia_a100_sxm4_80gb",
    "nvidia_pg509_210": "nvidia_a100_sxm4_80gb",  # the board's number, which some drivers report
    "nvidia_h100_sxm5_80gb": "nvidia_h100_80gb_hbm3",
    "nvidia_h100_sxm_80gb": "nvidia_h100_80gb_hbm3",
}
"""Other slugs of a card, with the one that its tables have."""

_SLICE = "_mig_"
_WITHOUT_MAKER = re.compile(r"(?:tesla|geforce|quadro|titan|rtx|gtx|pg\d{3}|[abhltv]\d{1,3}[a-z]?|g[bh]\d{3})(?=_|$)")


def slugify(name: str) -> str:
    """A device name as a file name: lower case, every run of other characters one underscore."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def slug_of(name: str) -> str:
    """The slug of a GPU that calls itself `name`, as torch.cuda.get_device_properties has it."""
    return canonical(slugify(name))


def canonical(slug: str) -> str:
    """The one slug of a card: with the maker's name, which drivers before 465 left out, and with its aliases resolved, for a slice those of its card."""
    card, mark, profile = slug.partition(_SLICE)
    if _WITHOUT_MAKER.match(card):
        card = f"nvidia_{card}"
    return ALIASES.get(card, card) + mark + profile


def is_slice(slug: str) -> bool:
    """Whether it is a part of a card (MIG), which has part of its processors, caches and bandwidth."""
    return _SLICE in slug
