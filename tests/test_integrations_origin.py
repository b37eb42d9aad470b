"""Which of a layer's methods a swap passes by, and whose they must be."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from torch import nn

from titans_backends.integrations.origin import names_used, strangers


def theirs(function: Any) -> Any:
    """As if it stood in a package called `theirs`."""
    function.__module__ = "theirs.layers"
    return function


class Layer(nn.Module):
    """A forward that reaches `_inputs`, which reaches `_scaled` and a property; nothing reaches `_unused`."""

    @theirs
    def forward(self, x: Any) -> Any:
        return self._inputs(x).to(x.dtype)

    @theirs
    def _inputs(self, x: Any) -> Any:
        return self._scaled(x) * self._rate

    @staticmethod
    @theirs
    def _scaled(x: Any) -> Any:
        return 2 * x

    @property
    @theirs
    def _rate(self) -> float:
        return 0.5

    @theirs
    def _unused(self, x: Any) -> Any:
        return self._inputs(x)


Layer.__module__ = "theirs.layers"


def test_a_class_of_the_packages_own_code_has_no_strangers() -> None:
    assert strangers(Layer, "theirs") == strangers(Layer(), "theirs") == ()
    assert strangers(type("Same", (Layer,), {}), "theirs") == ()


@pytest.mark.parametrize("name", ["forward", "_inputs", "_scaled", "_rate"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["overridden", "wrapped"])
def test_whatever_the_forward_reaches_must_be_the_packages(name: str, wrapped: bool) -> None:
    own = getattr(vars(Layer)[name], "__func__", vars(Layer)[name])

    def mine(*args: Any) -> Any:
        return None

    made = functools.wraps(getattr(own, "fget", own))(mine) if wrapped else mine
    kind = type("Mine", (Layer,), {name: property(made) if name == "_rate" else staticmethod(made) if name == "_scaled" else made})
    (told,) = strangers(kind, "theirs")
    assert told.startswith(f"Mine.{name} is {'wrapped by' if wrapped else 'from'} {__name__}, whose code a swap would pass by")


def test_what_the_forward_does_not_reach_is_free_also_where_it_names_a_method_of_torch() -> None:
    assert strangers(type("Mine", (Layer,), {"_unused": lambda self, x: x, "to": lambda self, *args: self, "mine": lambda self: 1}), "theirs") == ()


def test_a_method_held_by_the_instance_counts_and_a_patched_class_too(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Layer()
    layer._inputs = lambda x: x
    assert strangers(layer, "theirs") == ("its instance holds a _inputs of its own, which a swap would pass by; take it off: del layer._inputs",)
    monkeypatch.setattr(Layer, "_inputs", lambda self, x: x)
    assert f"Layer._inputs is from {__name__}" in strangers(Layer, "theirs")[0]


def test_the_names_of_a_function_are_those_below_its_decorators_and_in_it() -> None:
    def outer(x: Any) -> Any:
        return [y.first for y in x.second(lambda z: z.third)]

    assert names_used(functools.wraps(outer)(lambda: len(""))) == {"first", "second", "third"}
