"""The charts' colours can be told apart, by red-blind and green-blind eyes too, on a light page and on a dark one; every mark differs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from titans_backends.reporting.palette import INKS, PALETTE, style_of, styles

# Machado, Oliveira and Fernandes 2009, at full severity, for linear sRGB
EYES = {
    "usual": np.eye(3),
    "red-blind": np.array([[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]),
    "green-blind": np.array([[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]),
}
KINDS = {"cuda": [name for name in PALETTE if name != "numba_cpu"], "cpu": ["eager", "inductor", "numba_cpu"]}


def linear(colour: str) -> np.ndarray:
    sent = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(sent <= 0.04045, sent / 12.92, ((sent + 0.055) / 1.055) ** 2.4)


def lab(seen: np.ndarray) -> np.ndarray:
    """CIELAB of linear sRGB under D65."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    x, y, z = (np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in to_xyz @ np.clip(seen, 0, 1) / np.array([0.95047, 1, 1.08883]))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def contrast(one: str, other: str) -> float:
    low, high = sorted(float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("eyes", EYES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_backends_of_one_kind_of_device_keep_their_distance(theme: str, kind: str, eyes: str) -> None:
    seen = {name: lab(EYES[eyes] @ linear(getattr(PALETTE[name], theme))) for name in KINDS[kind]}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 15, f"{one} and {other} look alike to {eyes} eyes on a {theme} page"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_lines_and_text_stand_out_from_the_page(theme: str) -> None:
    paper = getattr(INKS["paper"], theme)
    for style in styles():
        if style.role not in ("grid", "paper"):
            assert contrast(getattr(style, theme), paper) > (4.5 if style.role in ("ink", "muted") else 3.0), style.role


def test_every_backend_has_a_mark_and_a_colour_of_its_own() -> None:
    assert len({style.mark for style in PALETTE.values()}) == len(PALETTE)
    assert len({style.light for style in styles()}) == len(styles()) == len({style.role for style in styles()})


def test_a_backend_that_nobody_knows_keeps_its_colour() -> None:
    assert style_of("somebodys_plugin") == style_of("somebodys_plugin")
    assert style_of("somebodys_plugin") not in PALETTE.values()
