"""One product for several projections: it reads every parameter as it is now, whatever has happened to it, and calls what is more than a product."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from titans_backends.nn import TitansDualCore, TitansEncoder, TitansEncoderConfig

X = torch.randn(2, 9, 24, generator=torch.Generator().manual_seed(0))


def layer_of(seed: int = 0, **more: object) -> TitansDualCore:
    torch.manual_seed(seed)
    return TitansDualCore(24, 2, **more)


class Launches(TorchDispatchMode):
    """What a call would launch, by name: ops that only look at memory another way are none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        if not func.is_view and name not in ("detach", "_unsafe_view", "empty", "split_with_sizes"):
            self.names.append(name)
        return found


def launches(module: nn.Module, *args: Tensor) -> list[str]:
    with torch.no_grad(), Launches() as counted:
        module(*args)
    return counted.names


@pytest.mark.parametrize(("mode", "most"), [("flat", 6), ("recurrent", 9), ("dual", 13), ("loop", 21)])
def test_a_layer_is_few_launches_in_inference(mode: str, most: int) -> None:
    found = launches(layer_of(mode=mode, chunk_size=3), X)
    assert len(found) <= most, found
    assert found.count("mm") == 2
    encoder = TitansEncoder(TitansEncoderConfig(0, 24, 1, 2, 32, mode, chunk_size=3, pooling="last", normalize=False))
    with torch.no_grad(), Launches() as counted:
        encoder(inputs_embeds=X)
    assert len(counted.names) <= most + 7, counted.names


def as_apart(layer: TitansDualCore, x: Tensor) -> Tensor:
    """y with every projection's weight where it can be no other's neighbour."""
    apart = copy.deepcopy(layer)
    for module in apart.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().clone())
    with torch.no_grad():
        assert launches(apart, x)[0] == "cat"
        return apart(x)


def saved_and_loaded(layer: TitansDualCore) -> TitansDualCore:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "change",
    [
        copy.deepcopy,
        saved_and_loaded,
        lambda layer: layer.double().float(),
        lambda layer: (layer.load_state_dict(layer_of(1).state_dict()), layer)[1],
        lambda layer: (layer.load_state_dict(layer_of(1).state_dict(), assign=True), layer)[1],
        lambda layer: (layer.k_proj.weight.data.mul_(2), layer)[1],
        lambda layer: (
            layer.to("meta").to_empty(device="cpu").requires_grad_(False).apply(lambda m: [p.normal_() for p in m.parameters(recurse=False)])
        ),
    ],
    ids=["copied", "saved", "cast", "loaded", "assigned", "written to", "from meta"],
)
def test_inference_sees_the_parameters_of_now_in_one_product(change) -> None:  # type: ignore[no-untyped-def]
    layer = layer_of()
    layer(X)
    layer = change(layer)
    with torch.no_grad():
        torch.testing.assert_close(layer(X), as_apart(layer, X))
    assert launches(layer, X)[0] == "mm"


def test_a_parameter_that_was_replaced_counts() -> None:
    layer = layer_of()
    layer.v_proj.weight = nn.Parameter(torch.randn_like(layer.v_proj.weight))
    with torch.no_grad():
        torch.testing.assert_close(layer(X), as_apart(layer, X))


def test_training_and_inference_agree_and_an_optimizer_moves_both() -> None:
    layer = layer_of()
    optimizer = torch.optim.AdamW(layer.parameters(), 1e-2)
    for _ in range(2):
        y = layer(X)
        with torch.no_grad():
            torch.testing.assert_close(layer(X), y)
        y.square().sum().backward()
        optimizer.step()
    assert layer.b_proj.weight.grad is not None


@pytest.mark.parametrize("heads", [2, 3])
def test_the_products_rows_are_of_sixteen_bytes_in_sixteen_bits(heads: int) -> None:
    layer = layer_of(mode="flat") if heads == 2 else TitansDualCore(24, 3, mode="flat")
    for context in (torch.no_grad(), torch.enable_grad()):
        with context:
            found = layer._projections(X, layer._names(return_states=False, gate=True))
            assert found["q_proj"].stride(1) % 8 == 0
            torch.testing.assert_close(found["b_proj"][..., :heads], layer.b_proj(X))


def test_a_projection_that_is_more_than_its_product_is_called() -> None:
    class Doubled(nn.Module):
        def __init__(self, inner: nn.Linear) -> None:
            super().__init__()
            self.inner, self.out_features, self.bias = inner, inner.out_features, inner.bias

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.inner(x)

    adapted, doubled, hooked, seen = layer_of(), layer_of(), layer_of(), []
    adapted.v_proj = Doubled(adapted.v_proj)
    doubled.v_proj.weight.data.mul_(2)
    hooked.v_proj.register_forward_hook(lambda module, args, y: 2 * y)
    with torch.no_grad():
        for layer in (adapted, hooked):
            torch.testing.assert_close(layer(X), doubled(X))
    hooked.k_proj.register_full_backward_hook(lambda module, inputs, outputs: seen.append(module))
    hooked(X.clone().requires_grad_()).sum().backward()
    assert seen == [hooked.k_proj]


def test_parameters_can_be_swapped() -> None:
    layer, other = layer_of(), layer_of(1)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        other.double().float().load_state_dict(layer.state_dict())
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        assert torch.equal(other(X), layer(X))


def test_every_weight_has_a_storage_of_its_own_for_whatever_saves_it(tmp_path: Path) -> None:
    layer, other = layer_of(), layer_of(1)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(layer, tmp_path / "layer")  # refuses views of a larger storage
    safetensors.load_model(other, tmp_path / "layer")
    with torch.no_grad():
        assert torch.equal(layer(X), other(X))
    for weight in layer.parameters():
        assert weight.untyped_storage().nbytes() == weight.nbytes
    assert len({weight.untyped_storage().data_ptr() for weight in layer.parameters()}) == len(list(layer.parameters()))


def test_the_memory_is_let_go_where_the_weights_have_left_it() -> None:
    replaced, moved, shared = layer_of(), layer_of(), layer_of()
    for projection in (module for module in replaced.modules() if isinstance(module, nn.Linear)):
        projection.weight = nn.Parameter(projection.weight.detach().clone())  # as sharding does
    replaced(X)
    assert replaced._standing.joint is None
    for weight in moved.parameters():
        weight.data = weight.data.clone()
    moved(X)
    assert moved._standing.joint is None
    assert launches(copy.copy(shared), X)[0] == launches(shared, X)[0] == "mm"


def test_what_is_no_plain_weight_is_multiplied_by_its_own_class() -> None:
    class Halved(Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            assert function is not torch.cat
            found = super().__torch_function__(function, types, args, kwargs)
            return found.as_subclass(Tensor) / 2 if function is nn.functional.linear else found

    layer, halved = layer_of(), layer_of()
    layer.v_proj.weight.data.div_(2)
    halved.v_proj.weight = nn.Parameter(halved.v_proj.weight.detach().as_subclass(Halved))
    with torch.no_grad():
        torch.testing.assert_close(halved(X), layer(X))


def test_other_parameters_by_functional_call_and_its_gradient() -> None:
    layer = layer_of()
    other = {name: p.detach() for name, p in layer_of(1).named_parameters()}
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(layer, other, (X,)), layer_of(1)(X))
    found = torch.func.grad(lambda given: torch.func.functional_call(layer, given, (X,)).square().sum())(other)
    same = layer_of(1)
    same(X).square().sum().backward()
    torch.testing.assert_close(found["v_proj.weight"], same.v_proj.weight.grad)


def test_shared_weights_stay_shared() -> None:
    layer = TitansDualCore(24, 2).share_memory()
    assert all(parameter.is_shared() for parameter in layer.parameters())


def test_a_frozen_layer_sees_a_weight_that_changes_before_its_backward() -> None:
    layer = TitansDualCore(24, 2).requires_grad_(False)
    x = torch.randn(1, 5, 24, requires_grad=True)
    y = layer(x)
    layer.k_proj.weight.mul_(2)
    (found,) = torch.autograd.grad(y.sum(), x)
    layer.k_proj.weight.div_(2)
    (wanted,) = torch.autograd.grad(layer(x).sum(), x)
    torch.testing.assert_close(found, wanted)


def test_a_projection_with_a_bias_is_refused() -> None:
    layer = TitansDualCore(24, 2)
    layer.q_proj = torch.nn.Linear(24, 24)
    with pytest.raises(ValueError, match="q_proj has a bias"):
        layer(torch.randn(1, 5, 24))
