"""Canaries: what `torch_internals.py` relies on still holds in this PyTorch."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from maml_pipeline import TaskBatch, torch_internals


def changed(what: str) -> str:
    return f"PyTorch {torch.__version__} changed {what}: see maml_pipeline/torch_internals.py"


def test_cpu_allocations() -> None:
    torch.empty(1)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        x = torch.empty(1000)
        del x
    sizes = [a.size for a in torch_internals.cpu_allocations(profiler) if abs(a.size) >= 4000]
    assert sizes == [4000, -4000], changed("the profiler's events of allocations")


def test_is_transformed() -> None:
    seen = []

    def call(x: Tensor) -> Tensor:
        seen.append(torch_internals.is_transformed())
        return x

    x = torch.ones(2, requires_grad=True)
    call(x).sum().backward()  # type: ignore[no-untyped-call]
    torch.func.vmap(call)(x)
    torch.func.grad(lambda x: call(x).sum())(x)
    call(x)
    assert seen == [False, True, True, False], changed("the stack of torch.func's transforms")


def test_add_in_place() -> None:
    sums, addends = [torch.ones(2), torch.zeros(1)], [torch.rand(2), torch.rand(1)]
    expected = [one + other for one, other in zip(sums, addends, strict=True)]
    torch_internals.add_in_place(sums, addends)
    assert all(map(torch.equal, sums, expected)), changed("torch._foreach_add_")
    torch_internals.add_in_place([], [])  # no parameter is used


def test_copy_each() -> None:
    targets, sources = [torch.ones(2), torch.zeros(1).long()], [torch.rand(2), torch.tensor([3])]
    torch_internals.copy_each(targets, sources)
    assert all(map(torch.equal, targets, sources)), changed("torch._foreach_copy_")
    torch_internals.copy_each([], [])


def test_without_attention_fast_path() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True).eval()
    with torch.no_grad(), torch_internals.without_attention_fast_path():
        kernels = profiled_kernels(layer, torch.rand(2, 3, 4))
    message = changed("the switch of the transformer's fast path")
    assert not any("_transformer_encoder_layer_fwd" in kernel for kernel in kernels), message
    with torch.no_grad():  # and the switch is needed and restored
        kernels = profiled_kernels(layer, torch.rand(2, 3, 4))
    assert any("_transformer_encoder_layer_fwd" in kernel for kernel in kernels), message


def profiled_kernels(layer: nn.Module, x: Tensor) -> set[str]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        layer(x)
    return {event.key for event in profiler.key_averages()}


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_uses_weight_normalization(wrap: Any) -> None:
    network = nn.Sequential(nn.Linear(2, 2), wrap(nn.Linear(2, 2)))
    message = changed("how weight normalisation is registered")
    assert any(map(torch_internals.uses_weight_normalization, network.modules())), message
    assert not any(map(torch_internals.uses_weight_normalization, nn.Linear(2, 2).modules())), message


def test_weight_normalization_still_has_a_wrong_second_derivative() -> None:
    v, g = torch.rand(2, 3).double().requires_grad_(), torch.rand(2, 1).double().requires_grad_()

    def second_derivative_is_right() -> bool:
        normalized = lambda v, g: torch._weight_norm(v, g)  # noqa: E731
        return torch.autograd.gradgradcheck(normalized, (v, g), raise_exception=False)

    assert not second_derivative_is_right(), (
        f"PyTorch {torch.__version__}fixed weight normalisation: remove check_twice_differentiable in "
        "maml_pipeline/meta_gradient/exactness/layers.py"
    )


def test_is_spectral_normalization() -> None:
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))
    found = [*map(torch_internals.is_spectral_normalization, layer.modules())]
    assert any(found) and not all(found), changed("the class of spectral normalisation")


def test_is_batch_or_instance_normalization() -> None:
    is_one = torch_internals.is_batch_or_instance_normalization
    layers = nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.InstanceNorm2d(2)
    assert all(map(is_one, layers)), changed("the base class of batch normalisation")
    assert not is_one(nn.LayerNorm(2)), changed("the base class of batch normalisation")


def test_was_changed_in_place() -> None:
    x = torch.zeros(2)
    assert not torch_internals.was_changed_in_place(x), changed("a tensor's version counter")
    x[0] += 1
    assert torch_internals.was_changed_in_place(x), changed("a tensor's version counter")
    before = torch_internals.version(x)
    x.zero_()
    assert torch_internals.version(x) == before + 1, changed("a tensor's version counter")


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_uses_activation_checkpointing(use_reentrant: bool) -> None:
    x = torch.ones(2, requires_grad=True)
    found = torch_internals.uses_activation_checkpointing(
        lambda: checkpoint(torch.tanh, x, use_reentrant=use_reentrant)
    )
    assert found, changed("the file of torch.utils.checkpoint")
    assert not torch_internals.uses_activation_checkpointing(lambda: torch.tanh(x))


def test_messages_of_reentrant_checkpointing() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint(torch.tanh, torch.ones(2), use_reentrant=True)
    message = changed("the warning of reentrant torch.utils.checkpoint")
    assert any(torch_internals.REENTRANT_CHECKPOINT_WARNING in str(w.message) for w in caught), message

    x = torch.ones(2, requires_grad=True)
    y = checkpoint(torch.tanh, x, use_reentrant=True).sum()
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(y, x)
    assert torch_internals.is_reentrant_checkpoint_error(str(error.value)), changed(
        "the error of reentrant torch.utils.checkpoint"
    )


def test_message_of_a_missing_derivative() -> None:
    x = torch.rand(1, 1, 4, 8, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        y = scaled_dot_product_attention(x, x, x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    with pytest.raises(RuntimeError) as error:
        torch.autograd.grad(slope.square().sum(), x)
    assert torch_internals.is_missing_derivative_error(str(error.value)), changed(
        "the error for a missing derivative"
    )


def test_operation_watch() -> None:
    x, weight = torch.rand(1, 1, 4, 8, requires_grad=True), torch.rand(3, 2, requires_grad=True)
    with torch_internals.OperationWatch() as attention:
        scaled_dot_product_attention(x, x, x)
    assert attention.fused_attention, changed("the name of the fused attention kernels")
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        torch_internals.OperationWatch() as math,
    ):
        scaled_dot_product_attention(x, x, x)
    assert not math.fused_attention, changed("the name of the math attention kernel")
    for padding, expected in ((None, False), (1, True)):
        with torch_internals.OperationWatch() as embedding:
            nn.functional.embedding(torch.tensor([0, 1]), weight, padding_idx=padding)
        assert embedding.has_padding is expected, changed("the arguments of aten.embedding")
        assert not embedding.without_gradient
    with torch_internals.OperationWatch() as stopped, torch.no_grad():
        weight * 2
    assert stopped.without_gradient, changed("torch.utils._python_dispatch")


def test_detach_watch() -> None:
    x = torch.ones(2, requires_grad=True)
    detaching: list[Callable[[], object]] = [x.detach, lambda: (x * 2).detach_(), lambda: x.data]
    for detach in detaching:
        with torch_internals.DetachWatch() as watch:
            detach()
        assert watch.found, changed("how detach and .data are dispatched")
    with torch_internals.DetachWatch() as watch:
        (x * 2).sum()
    assert not watch.found


def test_module_registries() -> None:
    for registry in torch_internals.MODULE_REGISTRIES:
        assert isinstance(vars(nn.Linear(2, 2))[registry], dict), changed("what nn.Module registers")


def test_convolution_backward() -> None:
    # networks/convolution.py calls this ATen operator by its signature.
    x, weight = torch.rand(2, 1, 5, 5, requires_grad=True), torch.rand(3, 1, 3, 3, requires_grad=True)
    y = torch.conv2d(x, weight)
    expected = torch.autograd.grad(y.sum(), (x, weight))
    actual = torch.ops.aten.convolution_backward(
        *(torch.ones_like(y), x, weight, None, [1, 1], [0, 0], [1, 1], False, [0, 0], 1),
        [True, True, False],
    )
    message = (
        f"PyTorch {torch.__version__} changed aten.convolution_backward: see networks/convolution.py"
    )
    for g, e in zip(actual[:2], expected, strict=True):
        torch.testing.assert_close(g, e, msg=message)


def test_has_hooks() -> None:
    assert not torch_internals.has_hooks(nn.Linear(1, 1))
    registrations = [
        name for name in dir(nn.Module) if name.startswith("register_") and name.endswith("hook")
    ]
    assert len(registrations) >= 8, changed("the names of the methods that register hooks")
    for name in registrations:
        module = nn.Linear(1, 1)
        getattr(module, name)(lambda *arguments: None)
        assert torch_internals.has_hooks(module), changed(f"where {name} keeps hooks")


def test_has_gradient_hooks() -> None:
    for register in ("register_hook", "register_post_accumulate_grad_hook"):
        x = torch.ones(1, requires_grad=True)
        assert not torch_internals.has_gradient_hooks(x)
        handle = getattr(x, register)(lambda tensor: None)
        assert torch_internals.has_gradient_hooks(x), changed(f"where {register} keeps hooks")
        handle.remove()
        assert not torch_internals.has_gradient_hooks(x)
    assert not torch_internals.has_gradient_hooks(x * 2)


def test_source_of_quotient() -> None:
    dividend = torch.ones(1, requires_grad=True).exp()
    for divisor in (1, 2.0):
        source = torch_internals.source_of_quotient(dividend / divisor)
        assert source is dividend.grad_fn, changed("the name of the node of a division")
    for other in (dividend, dividend * 2, dividend + 1, torch.ones(1), 1 / dividend):
        assert torch_internals.source_of_quotient(other) is not dividend.grad_fn


def test_flattened_tensors_are_views_again() -> None:
    tensors = [torch.randn(2, 3), torch.randn(4)]
    flat = torch_internals.flatten(tensors)
    assert torch.equal(flat, torch.cat([t.reshape(-1) for t in tensors])), changed("flattening")
    parts = torch_internals.unflatten(flat, tensors)
    assert all(map(torch.equal, parts, tensors)), changed("flattening")
    flat.zero_()
    assert not parts[0].any(), changed("flattening")


def test_tensors_in_containers_are_replaced() -> None:
    batch = TaskBatch(*(torch.rand(n) for n in range(4)))
    tree = batch, {"b": torch.zeros(2), "a": torch.rand(3)}, [torch.ones(1)]
    tensors, form = torch_internals.tensors_of(tree)
    assert len(tensors) == 7, changed("flattening of trees")
    assert form == torch_internals.tensors_of(tree)[1], changed("flattening of trees")
    others = [t + 1 for t in tensors]
    one, two, three = torch_internals.with_tensors(form, others)
    assert type(one) is TaskBatch and [*two] == ["b", "a"], changed("flattening of trees")
    assert all(map(torch.equal, [*one, *two.values(), *three], others)), changed("flattening of trees")
