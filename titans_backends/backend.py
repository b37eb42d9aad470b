"""What a backend declares: a manifest that costs nothing to read, and the candidates that its modules offer.

A backend is a folder. Its `__init__.py` holds one `BACKEND = Backend(...)` and imports nothing heavy. For each op,
`ops[name]` names a module with

    supports(signature, machine) -> Verdict              cheap, pure, every reason
    candidates(signature, machine) -> list[Candidate]    the first is the default
    run(call, candidate) -> tuple[Tensor | None, ...]    the contract's outputs, on the current stream, without synchronising,
                                                         aliasing no input; then, if `saves_states`, the chunk-start states or the tensors
                                                         of its `residual`

and, where it can train,

    backward_candidates(signature, machine) -> list[Candidate]
    run_backward(call, grads, states, needs, candidate) -> tuple[Tensor | None, ...]

where `grads` follows the contract's outputs (None: no gradient arrives there), `needs` names the inputs that want a
gradient, and the result follows `contract.differentiable`, None for what `needs` leaves out. Both run below autograd: torch.autograd
records nothing there. The states lie on the grid of `contract.grid(call)`; of a residual they are the tuple of its tensors.

A module whose kernels take long to compile may also have

    compile_ahead(call, candidate, machine) -> None      compiles what running the candidate on such a call would launch, for the machine,
                                                         into the backend's own cache on disk, and launches nothing

The tuner calls it in processes that see no GPU, with tensors on "meta" or on the CPU; what it raises decides nothing. And one whose `run` costs
more on the host than its kernels on the device

    remember(call, candidate) -> (outputs, again)        `run`, and what repeats it for another call of the same facts, or None:
                                                         again(call) -> outputs
    remember_backward(call, grads, states, needs,        the same of `run_backward`, for the same needs and gradients of the same facts:
                      candidate) -> (gradients, again)   again(call, grads, states) -> gradients
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    import torch

    from titans_backends.machine import Machine
    from titans_backends.signature import Signature
    from titans_backends.verdict import Verdict

    Outputs = tuple[torch.Tensor | None, ...]

__all__ = [
    "CONTRACT_VERSION",
    "AheadOpModule",
    "Backend",
    "Candidate",
    "OpModule",
    "Param",
    "RememberingBackwardOpModule",
    "RememberingOpModule",
    "TrainableOpModule",
]

CONTRACT_VERSION = 1
"""Grows when a contract's signature or the interface above changes in a way that breaks backends."""

Param = int | float | str | bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run one direction of one op: a backend's variant with its parameters.

    `saves_states`: a forward that also returns the state at each chunk's start, `[B, M, H, K, V]` on the grid of `contract.grid(call)`; a backward that
    needs them. With a `residual`, a name, these are instead tensors of the backend's own, one or more, of any dtype and shape, aliasing no input, which
    backwards with that residual alone are handed, as a tuple. `deterministic`: the same bits twice. `batch_invariant`: neither its parameters nor its
    order of summation depend on the batch size or the length. `sources`: modules beside its own whose code it runs, and for other people's code a
    distribution at its version, as `tilelang==0.1.15`.
    """

    backend: str
    variant: str
    params: tuple[tuple[str, Param], ...] = ()
    direction: Literal["forward", "backward"] = "forward"
    saves_states: bool = False
    deterministic: bool = True
    batch_invariant: bool = True
    sources: tuple[str, ...] = ()
    residual: str = ""

    def __post_init__(self) -> None:
        if self.residual and not self.saves_states:
            raise ValueError(f"{self.label} names a residual, {self.residual!r}, without saves_states=True: nothing would be handed on")

    @property
    def name(self) -> str:
        """`backend/variant`, as the cache file writes it."""
        return f"{self.backend}/{self.variant}"

    @property
    def label(self) -> str:
        """The name with its parameters, for people: `eager/chunked chunk_size=64`."""
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.params)])

    def param(self, name: str) -> Param:
        """One parameter by name; KeyError lists what there is."""
        for key, value in self.params:
            if key == name:
                return value
        raise KeyError(f"{self.label} has no parameter {name!r}")

    def agrees(self, other: Candidate) -> bool:
        """Whether what one direction hands on is what the other one takes."""
        return (self.saves_states, self.residual) == (other.saves_states, other.residual)


@dataclass(frozen=True, slots=True)
class Backend:
    """A backend's manifest.

    `ops` maps op name to module. `requires` are the packages whose absence disables it (checked without importing them).
    `simplicity` orders ties (0 is simplest); `rank` per device kind orders untuned defaults, a kind left out is not served.
    `backward` names the modules that only backwards run: a forward's row of a tuned table does not go stale with them.
    `probe` names a module with `probe(machine) -> Verdict` that compiles and runs the smallest case; `doctor` and the tuner
    call it, a call of an op never does. `quick` says whether `tune --quick` races it. `tables` names a folder beside the manifest with tables that
    ship with the backend: their rows speak for its own candidates alone (docs/cache.md). The registry makes it a whole path, and fills in `origin`.
    """

    name: str
    summary: str
    contract_version: int
    ops: Mapping[str, str]
    simplicity: int
    rank: Mapping[str, int]
    requires: tuple[str, ...] = ()
    install: str = ""
    probe: str | None = None
    quick: bool = True
    origin: str = field(default="built in", compare=False)
    backward: tuple[str, ...] = ()
    tables: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.backward, str) or not all("." in name for name in self.backward):
            raise TypeError(
                f"backend {self.name!r}: backward must be a tuple of full module names, as ('my_backend.gradients',), got {self.backward!r}"
            )
        object.__setattr__(self, "ops", MappingProxyType(dict(self.ops)))
        object.__setattr__(self, "rank", MappingProxyType(dict(self.rank)))


class OpModule(Protocol):
    """The functions that a module named in `Backend.ops` has."""

    def supports(self, signature: Signature, machine: Machine, /) -> Verdict: ...

    def candidates(self, signature: Signature, machine: Machine, /) -> Sequence[Candidate]: ...

    def run(self, call: object, candidate: Candidate, /) -> Outputs: ...


class TrainableOpModule(OpModule, Protocol):
    """An op module that has a backward too."""

    def backward_candidates(self, signature: Signature, machine: Machine, /) -> Sequence[Candidate]: ...

    def run_backward(
        self,
        call: object,
        grads: Outputs,
        states: Any,
        needs: frozenset[str],
        candidate: Candidate,
        /,
    ) -> Outputs: ...


class AheadOpModule(OpModule, Protocol):
    """An op module that can compile without a GPU, for a candidate of either direction."""

    def compile_ahead(self, call: object, candidate: Candidate, machine: Machine, /) -> None: ...


class RememberingOpModule(OpModule, Protocol):
    """An op module that can repeat a call: same shapes, strides, dtypes, device, 16-byte alignment and options, other tensors.

    What repeats it takes the later call's values, in the order of the op's parameters. `titans_backends.launching` makes it from launches on tape.
    """

    def remember(self, call: object, candidate: Candidate, /) -> tuple[Outputs, Callable[[tuple[object, ...]], Outputs] | None]: ...


class RememberingBackwardOpModule(TrainableOpModule, Protocol):
    """One that can repeat a backward: facts as above, of the gradients that arrive and the saved states too, and the same needs."""

    def remember_backward(
        self, call: object, grads: Outputs, states: Any, needs: frozenset[str], candidate: Candidate, /
    ) -> tuple[Outputs, Callable[[tuple[object, ...], Outputs, Any], Outputs] | None]: ...
