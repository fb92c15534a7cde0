"""The factored linear layer: gradients against the dense formulas, and the bytes that it keeps."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import reference
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    QUICK,
    SEEDS,
    FactorSizes,
    TuckerSizes,
    decaying,
    factor_sizes,
    factors,
    normal,
    orthonormal,
    relative_error,
    tucker_sizes,
    with_singular_values,
)
from torch import Tensor, nn

from wasi_peft.linalg.spectra import factorize_weight
from wasi_peft.linalg.tucker import Bases, CompressionRule, Tucker, compress, expand
from wasi_peft.updates.factored import factored_linear, product_gradient


def leaf(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    """A copy that collects a gradient."""
    return tensor.detach().clone().requires_grad_(requires_grad)


def random_form(sizes: TuckerSizes, seed: int) -> Tucker:
    """A compressed activation of the given ranks: random core, orthonormal bases."""
    full = {"batch": sizes.batch, "token": sizes.tokens, "feature": sizes.features}
    core = normal(*(sizes.ranks.get(mode, full[mode]) for mode in ("batch", "token", "feature")), seed=seed)
    bases = {mode: orthonormal(full[mode], rank, seed + 1) for mode, rank in sizes.ranks.items()}
    return Tucker(core, bases["feature"], bases.get("token"), bases.get("batch"))


def full_factors(linear: nn.Linear) -> tuple[Tensor, Tensor]:
    """Factors of full rank, as leaves."""
    L, R, _ = factorize_weight(linear.weight.detach(), lambda energies: energies.numel())
    return leaf(L), leaf(R)


# -------------------------------------------------------------------------------- compressed inputs


@QUICK
@given(tucker_sizes(), st.integers(1, 9), st.data(), SEEDS)
def test_compressed_gradients_are_those_of_the_reconstructed_input(
    sizes: TuckerSizes, out_features: int, data: st.DataObject, seed: int
) -> None:
    """At any ranks: the factors see the reconstruction, the input gets its exact gradient."""
    rank = data.draw(st.integers(1, min(out_features, sizes.features)), label="K")
    form = random_form(sizes, seed)
    bases = {mode: getattr(form, mode).numpy() for mode in sizes.ranks}
    reconstructed = torch.from_numpy(reference.tucker_reconstruct(form.core.numpy(), bases))
    x = normal(*reconstructed.shape, seed=seed + 2)  # need not resemble the form
    dY = normal(*x.shape[:-1], out_features, seed=seed + 3)
    L0, R0 = factors(out_features, sizes.features, rank, seed + 4)
    bias0 = normal(out_features, seed=seed + 5)

    dense_L, dense_R = leaf(L0), leaf(R0)
    ((reconstructed @ dense_R.T) @ dense_L.T * dY).sum().backward()
    G = torch.einsum("bno,bni->oi", dY, reconstructed)
    assert dense_L.grad is not None and dense_R.grad is not None
    scale = 1e-10 * (1 + float(G.norm()))

    for tangent, expected_L in ((False, dense_L.grad), (True, reference.tangent_gradient(L0, R0, G))):
        inputs, L, R, bias = leaf(x), leaf(L0), leaf(R0), leaf(bias0)
        y = factored_linear(inputs, L, R, bias, form, tangent)
        expected_y = reference.linear_forward(x.numpy(), (L0 @ R0).numpy(), bias0.numpy())
        assert relative_error(y, torch.from_numpy(expected_y)) < 1e-12
        y.backward(dY)
        expected_x, _, expected_bias = reference.linear_backward(x.numpy(), (L0 @ R0).numpy(), dY.numpy())
        assert L.grad is not None and R.grad is not None and inputs.grad is not None and bias.grad is not None
        assert float((L.grad - expected_L).norm()) < scale
        assert float((R.grad - dense_R.grad).norm()) < scale
        assert float((inputs.grad - torch.from_numpy(expected_x)).norm()) < scale + 1e-10
        assert float((bias.grad - torch.from_numpy(expected_bias)).norm()) < scale + 1e-10


@pytest.mark.parametrize("modes", [("feature",), ("feature", "token"), ("feature", "token", "batch")])
@pytest.mark.parametrize("threshold", [0.6, 0.99])
def test_gradients_through_compress(modes: tuple[str, ...], threshold: float) -> None:
    """The whole path: a real input, its compressed form, gradients of the expansion of that form."""
    x = decaying(6, 7, 16, seed=1)
    result = compress(x, CompressionRule.from_options(modes, threshold, None), Bases())
    assert result is not None
    L0, R0 = factors(9, 16, 5, seed=2)
    dY = normal(6, 7, 9, seed=3)
    L, R = leaf(L0), leaf(R0)
    factored_linear(x, L, R, None, result[0], False).backward(dY)
    G = torch.einsum("bno,bni->oi", dY, expand(result[0]))
    assert L.grad is not None and R.grad is not None
    assert relative_error(L.grad, G @ R0.T) < 1e-12
    assert relative_error(R.grad, L0.T @ G) < 1e-12
    exact = torch.einsum("bno,bni->oi", dY, x)
    assert relative_error(G, exact) > 1e-3  # the form is an approximation, or the test shows nothing


@pytest.mark.parametrize("modes", [("feature", "height", "width"), ("feature", "height", "width", "batch")])
def test_gradients_through_a_compressed_map(modes: tuple[str, ...]) -> None:
    """Exact for the expansion of the form, and as near to those of the dense layer as that is to the input."""
    x = decaying(6, 20, 16, seed=1).reshape(6, 5, 4, 16)
    result = compress(x, CompressionRule.from_options(modes, 0.9, None), Bases())
    assert result is not None
    L0, R0 = factors(9, 16, 5, seed=2)
    dY = normal(6, 5, 4, 9, seed=3)
    L, R, inputs = leaf(L0), leaf(R0), leaf(x)
    factored_linear(inputs, L, R, None, result[0], False).backward(dY)
    G, exact = (torch.einsum("bhwo,bhwi->oi", dY, form) for form in (expand(result[0]), x))
    assert L.grad is not None and R.grad is not None and inputs.grad is not None
    assert relative_error(L.grad, G @ R0.T) < 1e-12
    assert relative_error(R.grad, L0.T @ G) < 1e-12
    assert relative_error(inputs.grad, dY @ L0 @ R0) < 1e-12
    missed = float((expand(result[0]) - x).norm() * dY.norm())
    assert 0 < float((G - exact).norm()) <= missed


@pytest.mark.parametrize("compress_input", [False, True])
def test_product_gradient_and_sink(compress_input: bool) -> None:
    form = random_form(TuckerSizes(3, 4, 6, {"feature": 2, "token": 3}), seed=4)
    x, dY = normal(3, 4, 6, seed=5), normal(3, 4, 5, seed=6)
    L, R = factors(5, 6, 3, seed=7)
    collected: list[tuple[Tensor, Tensor]] = []
    compressed = form if compress_input else None
    y = factored_linear(
        x, leaf(L), leaf(R), None, compressed, True, lambda left, right: collected.append((left, right))
    )
    y.backward(dY)
    G = torch.einsum("bno,bni->oi", dY, expand(form) if compress_input else x)
    ((left, right),) = collected
    assert relative_error(left @ right, G) < 1e-12
    assert left.shape[1] == (2 if compress_input else 12)
    direct = product_gradient(dY.reshape(-1, 5), x.reshape(-1, 6), compressed)
    assert relative_error(direct[0] @ direct[1], G) < 1e-12


# -------------------------------------------------------------------------------- parity with nn.Linear

WIDTHS = [(7, 13), (13, 7), (9, 9), (1, 5), (5, 1), (33, 17)]
LEADING = [(6,), (3, 5), (2, 3, 4), (1, 1, 1), (1,), ()]


def well_conditioned(out_features: int, in_features: int, bias: bool, seed: int) -> nn.Linear:
    """A float32 layer whose smallest singular value is not tiny: the tangent gradient divides by its square."""
    linear = nn.Linear(in_features, out_features, bias=bias)
    spectrum = torch.linspace(2, 0.5, min(out_features, in_features))
    with torch.no_grad():
        linear.weight.copy_(with_singular_values(out_features, in_features, spectrum, seed))
        if bias:
            linear.bias.copy_(normal(out_features, seed=seed))
    return linear


@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize(("out_features", "in_features"), WIDTHS)
def test_full_rank_equals_nn_linear(
    out_features: int, in_features: int, leading: tuple[int, ...], bias: bool, tangent: bool
) -> None:
    linear = well_conditioned(out_features, in_features, bias, seed=8)
    L, R = full_factors(linear)
    own_bias = leaf(linear.bias) if bias else None
    x0 = normal(*leading, in_features, seed=9, dtype=torch.float32)
    dY = normal(*leading, out_features, seed=10, dtype=torch.float32)
    x, dense_x = leaf(x0), leaf(x0)
    y, dense_y = factored_linear(x, L, R, own_bias, tangent=tangent), linear(dense_x)
    y.backward(dY)
    dense_y.backward(dY)
    assert relative_error(y, dense_y) < 1e-5
    assert x.grad is not None and dense_x.grad is not None and L.grad is not None and R.grad is not None
    assert relative_error(x.grad, dense_x.grad) < 1e-5
    if own_bias is not None:
        assert own_bias.grad is not None and linear.bias.grad is not None
        assert relative_error(own_bias.grad, linear.bias.grad) < 1e-5
    assert linear.weight.grad is not None
    G = linear.weight.grad
    if tangent:
        # first-order change of the product: the whole dense gradient, because the tangent space is everything
        assert relative_error(L.grad @ R + L @ R.grad, G) < 1e-5
    else:
        assert relative_error(L.grad, G @ R.T) < 1e-5
        assert relative_error(R.grad, L.T @ G) < 1e-5


@QUICK
@given(factor_sizes(), st.integers(1, 9), SEEDS)
def test_exact_input_below_full_rank(sizes: FactorSizes, rows: int, seed: int) -> None:
    """The first-order change of the product is the projection of the dense gradient on the tangent space."""
    L0, R0 = factors(*sizes, seed)
    x, dY = normal(rows, sizes.in_features, seed=seed + 1), normal(rows, sizes.out_features, seed=seed + 2)
    _, weight_grad, _ = reference.linear_backward(x.numpy(), (L0 @ R0).numpy(), dY.numpy())
    G = torch.from_numpy(weight_grad)
    L, R = leaf(L0), leaf(R0)
    factored_linear(x, L, R).backward(dY)
    row_space = torch.linalg.pinv(R0) @ R0
    projected = L0 @ (L0.T @ G) + (G - L0 @ (L0.T @ G)) @ row_space
    assert L.grad is not None and R.grad is not None
    assert float((L.grad @ R0 + L0 @ R.grad - projected).norm()) < 1e-10 * (1 + float(G.norm()))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "sliced"])
def test_strided_inputs_and_gradients(kind: str) -> None:
    """`y.sum()` sends back a gradient without memory of its own; inputs may be views."""
    L0, R0 = factors(5, 6, 3, seed=11)
    base = normal(4, 6, 8, seed=12)
    x0 = {"expanded": base[:, :, 0].expand(3, 4, 6), "transposed": base.transpose(1, 2), "sliced": base[:, ::2, 1:7]}[
        kind
    ]
    weight = leaf(L0 @ R0)
    x, dense_x = x0.detach().requires_grad_(), leaf(x0)
    L, R = leaf(L0), leaf(R0)
    factored_linear(x, L, R, tangent=False).sum().backward()
    (dense_x @ weight.T).sum().backward()
    assert x.grad is not None and dense_x.grad is not None and weight.grad is not None
    assert L.grad is not None and R.grad is not None
    assert relative_error(x.grad, dense_x.grad) < 1e-12
    assert relative_error(L.grad, weight.grad @ R0.T) < 1e-12
    assert relative_error(R.grad, L0.T @ weight.grad) < 1e-12


@pytest.mark.parametrize("tangent", [False, True])
def test_input_without_rows(tangent: bool) -> None:
    L, R, bias = leaf(orthonormal(5, 3, 13)), leaf(normal(3, 6, seed=14)), leaf(normal(5, seed=15))
    x = leaf(torch.zeros(2, 0, 6, dtype=torch.float64))
    y = factored_linear(x, L, R, bias, tangent=tangent)
    assert y.shape == (2, 0, 5)
    y.sum().backward()
    for tensor in (x, L, R, bias):
        assert tensor.grad is not None and tensor.grad.shape == tensor.shape
        assert not bool(tensor.grad.abs().any())


# -------------------------------------------------------------------------------- what is kept

PATTERNS = [pattern for pattern in itertools.product([False, True], repeat=4) if any(pattern)]
SHAPE = (4, 6, 20)
OUT, RANK = 11, 5
FORMS = {
    "exact": None,
    "feature": TuckerSizes(*SHAPE, {"feature": 3}),
    "all modes": TuckerSizes(*SHAPE, {"feature": 3, "token": 2, "batch": 3}),
}


@pytest.mark.parametrize("form_name", FORMS)
@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda p: "".join(n for n, on in zip("xLRb", p, strict=True) if on))
def test_gradients_and_saved_bytes_for_each_requires_grad_pattern(
    form_name: str, pattern: tuple[bool, bool, bool, bool]
) -> None:
    needs_x, needs_L, needs_R, _ = pattern
    x0 = normal(*SHAPE, seed=16, dtype=torch.float32)
    L0, R0 = (part.float() for part in factors(OUT, SHAPE[-1], RANK, seed=17))
    bias0 = normal(OUT, seed=18, dtype=torch.float32)
    dY = normal(*SHAPE[:-1], OUT, seed=19, dtype=torch.float32)
    sizes = FORMS[form_name]
    form = None if sizes is None else Tucker(*[None if p is None else p.float() for p in random_form(sizes, seed=20)])
    x, L, R, bias = (leaf(t, needed) for t, needed in zip((x0, L0, R0, bias0), pattern, strict=True))

    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = factored_linear(x, L, R, bias, form, tangent=False)

    expected = 0
    if needs_x or needs_L or needs_R:
        expected += 4 * RANK * (OUT + SHAPE[-1])  # L and R themselves, no copies
        assert {L.untyped_storage().data_ptr(), R.untyped_storage().data_ptr()} <= set(saved)
    if needs_R:
        expected += 4 * (x0.numel() if form is None else sum(part.numel() for part in form if part is not None))
    elif needs_L:
        expected += 4 * (x0.numel() // SHAPE[-1]) * RANK  # the K-wide intermediate is exact and small
    assert sum(saved.values()) == expected

    y.backward(dY)
    seen = x0 if form is None or not needs_R else expand(form)  # only L trains: its gradient is exact
    _, G, bias_grad = reference.linear_backward(seen.double().numpy(), np.zeros((OUT, SHAPE[-1])), dY.double().numpy())
    x_grad, _, _ = reference.linear_backward(
        x0.double().numpy(), (L0.double() @ R0.double()).numpy(), dY.double().numpy()
    )
    weight_grad = torch.from_numpy(G)
    expected_grads = (
        torch.from_numpy(x_grad),
        weight_grad @ R0.double().T,
        L0.double().T @ weight_grad,
        torch.from_numpy(bias_grad),
    )
    for tensor, gradient, needed in zip((x, L, R, bias), expected_grads, pattern, strict=True):
        assert (tensor.grad is not None) == needed
        if tensor.grad is not None:
            assert tensor.grad.dtype == tensor.dtype
            assert relative_error(tensor.grad, gradient) < 1e-5


def test_nothing_is_kept_without_gradients() -> None:
    saved: list[Tensor] = []
    L, R = factors(5, 6, 3, seed=21)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        y = factored_linear(normal(4, 6, seed=22), L, R)
        with torch.no_grad():
            factored_linear(normal(4, 6, seed=22), leaf(L), leaf(R))
    assert not y.requires_grad and saved == []


def test_only_L_trains_and_its_gradient_is_exact_with_a_compressed_input() -> None:
    form = random_form(TuckerSizes(*SHAPE, {"feature": 2}), seed=23)
    x, dY = normal(*SHAPE, seed=24), normal(*SHAPE[:-1], OUT, seed=25)
    L0, R0 = factors(OUT, SHAPE[-1], RANK, seed=26)
    L = leaf(L0)
    factored_linear(x, L, R0, None, form, tangent=False).backward(dY)
    assert L.grad is not None
    assert relative_error(L.grad, torch.einsum("bno,bni->oi", dY, x) @ R0.T) < 1e-12


# -------------------------------------------------------------------------------- autograd's own checks


@pytest.mark.parametrize("leading", [(4,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("bias", [False, True])
def test_gradcheck(leading: tuple[int, ...], bias: bool) -> None:
    L, R = factors(4, 5, 3, seed=27)
    x = leaf(normal(*leading, 5, seed=28))
    arguments = (x, leaf(L), leaf(R), leaf(normal(4, seed=29)) if bias else None)
    assert torch.autograd.gradcheck(lambda *args: factored_linear(*args, tangent=False), arguments)


def test_double_backward_raises() -> None:
    L, R = (leaf(part) for part in factors(4, 5, 3, seed=30))
    x = leaf(normal(6, 5, seed=31))
    (gradient,) = torch.autograd.grad(factored_linear(x, L, R).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("factors_in_float32", [False, True])
@pytest.mark.parametrize("tangent", [False, True])
@pytest.mark.parametrize("compress_input", [False, True])
def test_low_precision(
    dtype: torch.dtype, tolerance: float, factors_in_float32: bool, tangent: bool, compress_input: bool
) -> None:
    """Computation runs in the dtype of the input; gradients come in the dtype of their tensor."""
    linear = well_conditioned(12, 16, bias=True, seed=32)
    exact_L, exact_R = factors(12, 16, 6, seed=33)
    x0, dY = normal(5, 9, 16, seed=34), normal(5, 9, 12, seed=35)
    form = random_form(TuckerSizes(5, 9, 16, {"feature": 7, "token": 6}), seed=36) if compress_input else None
    results = []
    for low in (False, True):
        factor_dtype = dtype if low and not factors_in_float32 else torch.float32 if low else torch.float64
        x = leaf(x0.to(dtype) if low else x0)
        L, R, bias = (leaf(part.to(factor_dtype)) for part in (exact_L, exact_R, linear.bias))
        parts = None if form is None else Tucker(*[None if p is None else p.to(x.dtype) for p in form])
        y = factored_linear(x, L, R, bias, parts, tangent)
        assert y.dtype == x.dtype
        y.backward(dY.to(y.dtype))
        for tensor in (x, L, R, bias):
            assert tensor.grad is not None and tensor.grad.dtype == tensor.dtype
        results.append([y, *(tensor.grad for tensor in (x, L, R, bias))])
    for exact, low_result in zip(*results, strict=True):
        assert exact is not None and low_result is not None
        assert relative_error(low_result, exact) < tolerance


def test_backward_inside_autocast_keeps_the_tangent_gradient_in_float32() -> None:
    L0, R0 = (part.float() for part in factors(12, 16, 6, seed=37))
    x, dY = normal(40, 16, seed=38, dtype=torch.float32), normal(40, 12, seed=39, dtype=torch.float32)
    gradients = []
    for autocast in (False, True):
        L, R = leaf(L0), leaf(R0)
        with torch.autocast("cpu", torch.bfloat16, enabled=False):
            y = factored_linear(x, L, R)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y.backward(dY)
        assert L.grad is not None
        gradients.append(L.grad)
    # products with dY may run in bfloat16 there, the solve must not
    assert relative_error(gradients[1], gradients[0]) < 2e-2
    assert float((L0.T @ gradients[1]).norm()) < 2e-2 * float(gradients[1].norm())


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (2, 3, 5, 4)], ids=len)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
def test_what_a_layer_answers_may_be_changed_in_place(shape: tuple[int, ...], bias: bool, contiguous: bool) -> None:
    x = torch.randn(shape) if contiguous else torch.randn(*shape, 2)[..., 0]
    L, R, b = torch.randn(6, 2, requires_grad=True), torch.randn(2, 4), torch.randn(6) if bias else None
    y = factored_linear(x, L, R, b)
    y += 1
    y.sum().backward()
    assert torch.allclose(y - 1, torch.nn.functional.linear(x, L @ R, b), atol=1e-5)
