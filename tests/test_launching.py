"""Calls that are remembered: what a later call launches, with which addresses, and what is never remembered. No GPU: launches are written down."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts import CONTRACTS
from titans_backends.contracts.case import Case, build
from titans_backends.contracts.fused_uw import FusedUW
from titans_backends.launching.ahead import arriving
from titans_backends.launching.remember import Remember, Run, remembering, remembering_backward
from titans_backends.launching.scratch import places as placed
from titans_backends.launching.tape import Taped, Taping
from titans_backends.tuning.suite import chunk_starts

ANY = Candidate("any", "any")
Three = tuple[Tensor, Tensor, Tensor]


@dataclass
class Device:
    """A kernel that writes its arguments down, and the tape that it is launched on."""

    launched: list[tuple[object, ...]] = field(default_factory=list)
    taping: Taping[str] = field(default_factory=lambda: Taping(lambda: lambda index: 3))

    def __call__(self, *args: Tensor | int) -> None:
        tape = self.taping.current
        if tape is not None and tape.forms is not None:
            tape.forms[f"{len(args)} arguments"] = None
        elif tape is not None:
            tape.launches.append(Taped(lambda stream, given: self.launched.append((stream, *given)), args))

    def remembering(self, run: Run) -> Remember:
        return remembering(self.taping, run)


@pytest.fixture
def device() -> Device:
    return Device()


def three() -> Three:
    x, y, z = (torch.randn(4, 4) for _ in range(3))
    return x, y, z


def doing(device: Device, more: Callable[[FusedUW], object] = lambda call: None) -> Run:
    """Takes an output and scratch, launches twice, the second time on a view of the scratch."""

    def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
        o = torch.empty(4, 4)
        scratch = torch.empty(2, 8)
        more(call)
        device(call.attn_const, call.v_beta, 5, scratch)
        device(scratch[1], call.k_beta, o)
        return o, None

    return run


def test_a_later_call_launches_the_same_with_its_own_addresses(device: Device) -> None:
    outputs, again = device.remembering(doing(device))(FusedUW(*three()), ANY)
    assert outputs[1] is None
    assert again is not None
    for _ in range(2):
        x, y, z = three()
        device.launched.clear()
        o, nothing = again((x, y, z))
        first, second = device.launched
        assert nothing is None
        assert first[:4] == (3, x.data_ptr(), y.data_ptr(), 5)
        assert second[1] == first[4] + 8 * 4  # the second row of the scratch
        assert second[2:4] == (z.data_ptr(), o.data_ptr())
        assert (o.shape, o.dtype) == ((4, 4), torch.float32)


def test_every_number_and_every_place_in_the_scratch_is_its_own(device: Device) -> None:
    def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
        o, scratch = torch.empty(4, 4), torch.empty(8, 8)
        device(call.attn_const, 5, 7, scratch, 9, 5)
        device(scratch[1], 11, scratch[3], call.v_beta, scratch[6], o)
        return o, None

    _, again = device.remembering(run)(FusedUW(*three()), ANY)
    assert again is not None
    device.launched.clear()
    x, y, z = three()
    o = again((x, y, z))[0]
    first, second = device.launched
    (scratch,) = first[4:5]
    assert isinstance(scratch, int)
    assert first == (3, x.data_ptr(), 5, 7, scratch, 9, 5)
    assert second == (3, scratch + 32, 11, scratch + 96, y.data_ptr(), scratch + 192, o.data_ptr())


def test_scratch_that_is_needed_one_after_the_other_shares_its_place(device: Device) -> None:
    def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
        o, first, second, third = torch.empty(4, 4), torch.empty(64), torch.empty(64), torch.empty(64)
        device(first, second)
        device(second, third)
        device(third, o)
        return o, None

    _, again = device.remembering(run)(FusedUW(*three()), ANY)
    device.launched.clear()
    again(three())
    (_, first, second, *_), (_, also_second, third, *_), (_, also_third, *_) = device.launched
    assert (second, third) == (also_second, also_third)
    assert first == third
    assert abs(second - first) == 256


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 9), st.integers(1, 4)), max_size=9))
def test_pieces_that_are_needed_together_never_overlap(pieces: list[tuple[int, int, int]]) -> None:
    sizes, spans = [size for size, _, _ in pieces], [range(begin, begin + count) for _, begin, count in pieces]
    places, end = placed(sizes, spans)
    assert end <= sum(-(-size // 256) * 256 for size in sizes)
    assert all(place % 256 == 0 and place + size <= end for place, size in zip(places, sizes, strict=True))
    for one, other in itertools.combinations(range(len(pieces)), 2):
        if set(spans[one]) & set(spans[other]):
            assert places[one] + sizes[one] <= places[other] or places[other] + sizes[other] <= places[one]


def test_outputs_of_two_calls_are_different_memory(device: Device) -> None:
    _, again = device.remembering(doing(device))(FusedUW(*three()), ANY)
    values = three()
    first, second = again(values)[0], again(values)[0]
    assert first.data_ptr() != second.data_ptr()


def test_a_call_that_does_more_than_launch_is_not_remembered(device: Device) -> None:
    outputs, again = device.remembering(doing(device, lambda call: call.attn_const.clone()))(FusedUW(*three()), ANY)
    assert again is None
    assert outputs[0] is not None


def test_a_call_with_one_tensor_for_two_inputs_is_not_remembered(device: Device) -> None:
    x, y, _ = three()
    remember = device.remembering(doing(device))
    assert remember(FusedUW(x, x, y), ANY)[1] is None
    _, again = remember(FusedUW(*three()), ANY)
    again((x, x, y))  # recorded from three, it serves two
    assert device.launched[-2][1:3] == (x.data_ptr(), x.data_ptr())


def test_views_of_one_tensor_keep_their_own_addresses(device: Device) -> None:
    both = torch.randn(2, 4, 4)
    _, again = device.remembering(doing(device))(FusedUW(both[0], both[1], torch.randn(4, 4)), ANY)
    x, y, z = three()
    again((x, y, z))
    assert device.launched[0][1:3] == (x.data_ptr(), y.data_ptr())


@pytest.mark.parametrize(
    "seen",
    [lambda made: made, lambda made: made[1], lambda made: made.view(8, 4), lambda made: made.transpose(1, 2), lambda made: made[:, :, :2]],
    ids=["whole", "a row", "reshaped", "transposed", "narrowed"],
)
def test_a_later_output_is_the_same_view_of_its_own_memory(device: Device, seen: Callable[[Tensor], Tensor]) -> None:
    def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
        made = torch.empty(2, 4, 4)
        device(call.attn_const, made)
        return seen(made), None

    outputs, again = device.remembering(run)(FusedUW(*three()), ANY)
    assert outputs[0] is not None
    later = again(three())[0]
    assert (later.shape, later.stride(), later.storage_offset()) == (outputs[0].shape, outputs[0].stride(), outputs[0].storage_offset())
    assert device.launched[-1][2] == later.untyped_storage().data_ptr() != outputs[0].untyped_storage().data_ptr()


def test_an_output_of_another_dtype_than_its_memory_is_not_remembered(device: Device) -> None:
    def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor | None, ...]:
        made = torch.empty(4, 4)
        device(call.attn_const, made)
        return made.view(torch.int32), None

    assert device.remembering(run)(FusedUW(*three()), ANY)[1] is None


def test_what_launches_nothing_is_not_remembered(device: Device) -> None:
    assert device.remembering(lambda call, candidate: (torch.empty(0), None))(FusedUW(*three()), ANY)[1] is None


def test_a_later_backward_reads_its_own_gradients_and_states(device: Device) -> None:
    def run_backward(
        call: FusedUW, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
    ) -> tuple[Tensor | None, ...]:
        d_v = torch.empty(4, 4)
        device(call.v_beta, grads[0], states, d_v)
        return None, d_v, None

    x, y, z = three()
    remember = remembering_backward(device.taping, run_backward)
    _, again = remember(FusedUW(x, y, z), (torch.randn(4, 4), None), torch.randn(3), frozenset({"v_beta"}), ANY)
    assert again is not None
    (x, y, z), d_u, states = three(), torch.randn(4, 4), torch.randn(3)
    nothing, d_v, also = again((x, y, z), (d_u, None), states)
    assert device.launched[-1][1:5] == (y.data_ptr(), d_u.data_ptr(), states.data_ptr(), d_v.data_ptr())
    assert nothing is None
    assert also is None


def test_a_backward_with_one_tensor_for_two_is_not_remembered(device: Device) -> None:
    def run_backward(*arguments: object) -> tuple[Tensor | None, ...]:
        o = torch.empty(4, 4)
        device(o)
        return None, o, None

    x, y, z = three()
    remember = remembering_backward(device.taping, run_backward)
    assert remember(FusedUW(x, y, z), (y, None), None, frozenset({"v_beta"}), ANY)[1] is None
    assert remember(FusedUW(x, y, z), (torch.randn(4, 4), None), None, frozenset({"v_beta"}), ANY)[1] is not None


def test_what_is_collected_is_neither_launched_nor_remembered(device: Device) -> None:
    with device.taping.collecting() as forms:
        _, again = device.remembering(doing(device))(FusedUW(*three()), ANY)
    assert again is None
    assert not device.launched
    assert list(forms) == ["4 arguments", "3 arguments"]
    assert device.taping.current is None


@pytest.mark.parametrize("op", [name for name, made in CONTRACTS.items() if made.differentiable])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_backward_is_compiled_for_is_what_arrives(op: str, dtype: torch.dtype) -> None:
    made = CONTRACTS[op]
    first = made.variants[0]
    call = build(made, Case("any", T=made.max_tokens or 70, options=first.options, given=first.given, dtype=dtype))
    found, states, needs = arriving(op, call, Candidate("any", "any", direction="backward"))
    assert states is None
    assert needs == frozenset(made.differentiable) & set(made.tensors(call))
    for output, got, want in zip(made.outputs, found, made.reference(call), strict=True):
        assert (got is None) == (want is None), output.name
        if got is not None and want is not None:
            assert (got.shape, got.dtype) == (want.shape, dtype if output.like else torch.float32), output.name


@pytest.mark.parametrize("op", ["slow_core", "gated_delta_rule"])
def test_the_saved_states_that_arrive_have_a_place_for_every_chunk(op: str) -> None:
    made = CONTRACTS[op]
    call = build(made, Case("any", B=2, T=70, H=4, K=16, V=32))
    states = arriving(op, call, Candidate("any", "any", direction="backward", saves_states=True))[1]
    starts = chunk_starts(made, made.to(call, torch.float64))
    assert states is not None
    assert starts is not None
    assert states.shape == starts.shape == (2, 2, 4, 16, 32)
    assert (
        arriving("fused_uw", build(CONTRACTS["fused_uw"], Case("any")), Candidate("any", "any", direction="backward", saves_states=True))[1] is None
    )
