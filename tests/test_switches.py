"""The environment switches are parsed strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from titans_backends.errors import SwitchError
from titans_backends.switches import SWITCHES, Switches, parse


def test_no_switch_is_the_default() -> None:
    assert parse({"PATH": "/bin", "TITANS_BACKENDS_FORCE": ""}) == Switches()


def test_every_switch() -> None:
    values = {"FORCE": "eager", "CACHE": "/x/y.yaml", "DISABLE": "a, b", "PLUGINS": "m.n", "CHECK": "1"}
    assert set(values) == set(SWITCHES)
    parsed = parse({f"TITANS_BACKENDS_{name}": value for name, value in values.items()})
    assert parsed == Switches("eager", Path("/x/y.yaml"), ("a", "b"), ("m.n",), True)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("FROCE", "eager", "unknown switch TITANS_BACKENDS_FROCE; did you mean TITANS_BACKENDS_FORCE?; known: TITANS_BACKENDS_FORCE, "),
        ("FOO", "1", "unknown switch TITANS_BACKENDS_FOO; known: TITANS_BACKENDS_FORCE, "),
        ("CHECK", "yes", "TITANS_BACKENDS_CHECK must be 0 or 1, got 'yes'"),
        ("DISABLE", "a,,b", "TITANS_BACKENDS_DISABLE must be names separated by commas, got 'a,,b'"),
    ],
)
def test_what_is_not_understood_is_an_error(name: str, value: str, message: str) -> None:
    with pytest.raises(SwitchError) as error:
        parse({f"TITANS_BACKENDS_{name}": value})
    assert message in str(error.value)
