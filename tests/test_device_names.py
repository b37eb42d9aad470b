"""One physical kind of card has one slug, whatever a driver calls it; different cards and slices of a card never share one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titans_backends.cache.schema import Device
from titans_backends.device_names import ALIASES, canonical, is_slice, slug_of
from titans_backends.tables import _lends

H100 = Device("cuda", "nvidia_h100_80gb_hbm3", "NVIDIA H100 80GB HBM3", sm=90, sms=132)


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),
        ("H100 80GB HBM3", "nvidia_h100_80gb_hbm3"),  # a driver before 465 leaves the maker out
        ("NVIDIA A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"),
        ("A100-SXM4-80GB", "nvidia_a100_sxm4_80gb"),
        ("A100-SXM-80GB", "nvidia_a100_sxm4_80gb"),
        ("PG509-210", "nvidia_a100_sxm4_80gb"),
        ("GeForce RTX 3090", "nvidia_geforce_rtx_3090"),
        ("NVIDIA GeForce RTX 3090", "nvidia_geforce_rtx_3090"),
        ("Tesla T4", "nvidia_tesla_t4"),
        ("GH200 480GB", "nvidia_gh200_480gb"),
        ("A100-SXM-80GB MIG 1g.10gb", "nvidia_a100_sxm4_80gb_mig_1g_10gb"),
        ("NVIDIA H100 80GB HBM3 MIG 1c.3g.40gb", "nvidia_h100_80gb_hbm3_mig_1c_3g_40gb"),
        ("AMD Instinct MI300X", "amd_instinct_mi300x"),
        ("Titanium Graphics", "titanium_graphics"),  # no NVIDIA name begins so
    ],
)
def test_a_name_becomes_the_cards_slug(name: str, slug: str) -> None:
    assert slug_of(name) == slug
    assert canonical(slug) == slug


def test_different_cards_keep_different_slugs() -> None:
    names = ["NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA H200", "NVIDIA H200 NVL", "NVIDIA H20", "NVIDIA H20-3e"]
    names += ["NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-80GB", "NVIDIA A100 80GB PCIe", "NVIDIA A100-PCIE-40GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"]
    assert len({slug_of(name) for name in names}) == len(names)


def test_an_alias_leads_to_a_slug_that_is_none() -> None:
    assert all(target not in ALIASES and canonical(alias) == target for alias, target in ALIASES.items())


def test_a_device_is_the_same_under_its_aliases_and_never_its_slice() -> None:
    a100 = Device("cuda", "nvidia_a100_sxm4_80gb", "NVIDIA A100-SXM4-80GB", sm=80, sms=108)
    assert a100.same(replace(a100, slug="a100_sxm_80gb"))
    assert not a100.same(replace(a100, slug="a100_sxm_80gb_mig_1g_10gb"))
    assert not a100.same(replace(a100, kind="cpu"))


def test_a_table_is_lent_between_whole_cards_of_a_size_alone() -> None:
    h200 = Device("cuda", "nvidia_h200", "NVIDIA H200", sm=90, sms=132)
    small = Device("cuda", "nvidia_h100_80gb_hbm3_mig_1g_10gb", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", sm=90, sms=16)
    half = replace(small, slug="nvidia_h100_80gb_hbm3_mig_4g_40gb", sms=66)
    assert _lends(H100, h200)
    assert _lends(H100, replace(h200, slug="nvidia_h20", sms=78))
    assert not _lends(H100, H100)  # that is its own table
    assert not _lends(H100, small)
    assert not _lends(H100, half)
    assert not _lends(half, h200)
    assert not _lends(H100, replace(h200, slug="some_slice_by_another_name", sms=60))
    assert not _lends(H100, replace(h200, sm=80))
    assert is_slice(small.slug)
    assert not is_slice(H100.slug)
