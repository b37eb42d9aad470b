"""What a choice depends on beside the call: the backend asked for, the policy, whether gradients are wanted. Decides nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from titans_backends import registry, scope, switches
from titans_backends.dispatch import Forced
from titans_backends.errors import SwitchError
from titans_backends.signature import Launch

__all__ = ["PLAIN", "Request", "asking", "asks_gradient", "request"]


@dataclass(frozen=True, slots=True)
class Request:
    """What a choice depends on beside the call. `must_save`: what a backward was handed, so its pair saves that; see `dispatch.choose`."""

    backend: str | None = None
    by: str = "backend="
    batch_invariant: bool = False
    training: bool = False
    may_save: bool = True
    must_save: str | None = None
    tune_budget_s: float | None = None
    launch: Launch | None = None

    @property
    def forced(self) -> Forced | None:
        """The backend asked for by name."""
        return None if self.backend is None else Forced(self.backend, self.by)


PLAIN = Request()


@functools.lru_cache(maxsize=64)
def asking(
    backend: str | None,
    by: str = "backend=",
    batch_invariant: bool = False,
    training: bool = False,
    may_save: bool = True,
    must_save: str | None = None,
    tune_budget_s: float | None = None,
    launch: Launch | None = None,
) -> Request:
    """A request with these fields, in their order: one object, so that two calls' settings compare by identity."""
    return Request(backend, by, batch_invariant, training, may_save, must_save, tune_budget_s, launch)


def request(backend: str | None, *, training: bool, may_save: bool = True) -> Request:
    """The request of a call: its own `backend=`, then `use_backend`, then the switch; and the scoped policy."""
    scoped, force = scope.current(), switches.current().force
    if not training and scoped is scope.DEFAULT and (backend is not None or force is None):
        return PLAIN if backend is None else asking(backend)
    by = "backend="
    if backend is None and scoped.forced is not None:
        backend, by = scoped.forced, "use_backend"
    if backend is None and force is not None:
        backend, by = force, f"{switches.PREFIX}FORCE"
        if force not in registry.known() and force not in registry.broken():
            raise SwitchError(f"{by} names an unknown backend {force!r}; known: {', '.join(sorted(registry.known()))}")
    return asking(backend, by, scoped.batch_invariant, training, may_save, None, scoped.tune_budget_s, scoped.launch)


def asks_gradient(tensors: tuple[object, ...]) -> bool:
    """Whether gradients are on and one of these wants its own."""
    if torch.is_grad_enabled():
        for value in tensors:
            if isinstance(value, Tensor) and value.requires_grad:
                return True
    return False
