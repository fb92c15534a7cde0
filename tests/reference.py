"""Slow, obvious references. Nothing here comes from the package, only torch and numpy.

Symbols as in docs/method.md: W out x in, L out x K with orthonormal columns, R K x in, C second moment of the input,
G gradient of the loss with respect to the product `L R`.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# -------------------------------------------------------------------------------- weights


def smallest_rank(energies: list[float], threshold: float) -> int:
    """Smallest k whose leading energies reach the share `threshold`, by trying every k."""
    for k in range(1, len(energies) + 1):
        if sum(energies[:k]) >= threshold * sum(energies):
            return k
    return len(energies)


def truncated_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`L = U_K`, `R = S_K V_K^T`."""
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    return U[:, :rank], S[:rank, None] * Vh[:rank]


def whitened_svd(
    weight: Tensor, second_moment: Tensor, rank: int, jitter: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """METHOD section 1 to the letter: `C = T T^T`, `W T = U S V^T`, `L = U_K`, `R = S_K V_K^T T^-1`, and `S^2`."""
    identity = torch.eye(weight.shape[1], dtype=weight.dtype)
    T = torch.linalg.cholesky(second_moment + jitter * identity)
    U, S, Vh = torch.linalg.svd(weight @ T, full_matrices=False)
    return U[:, :rank], (S[:rank, None] * Vh[:rank]) @ torch.linalg.inv(T), S.square()


def damped(moment: Tensor, damping: float = 0.01) -> Tensor:
    """A second moment with a share of the mean of its diagonal added to the diagonal."""
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def two_sided_svd(weight: Tensor, input_moment: Tensor, output_moment: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`C = T_C T_C^T`, `S = T_S T_S^T`, `T_S^T W T_C = U E V^T`: `T_S^-T U_K E_K V_K^T T_C^-1` and `E^2`."""
    T_C, T_S = torch.linalg.cholesky(input_moment), torch.linalg.cholesky(output_moment)
    U, E, Vh = torch.linalg.svd(T_S.T @ weight @ T_C, full_matrices=False)
    product = torch.linalg.inv(T_S.T) @ U[:, :rank] @ torch.diag(E[:rank]) @ Vh[:rank] @ torch.linalg.inv(T_C)
    return product, E.square()


def two_sided_error(difference: Tensor, input_moment: Tensor, output_moment: Tensor) -> float:
    """`tr(S D C D^T)`."""
    return float(torch.trace(output_moment @ difference @ input_moment @ difference.T))


def polar(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`A = Q H`: the nearest orthonormal matrix Q and the symmetric H, from an SVD."""
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U @ Vh, Vh.T @ torch.diag(S) @ Vh


def subspace_step(weight: Tensor, L: Tensor) -> tuple[Tensor, Tensor]:
    """One subspace iteration on a dense weight: `L' = orth(W (W^T L))`, `R' = L'^T W`."""
    new_L = torch.linalg.qr(weight @ (weight.T @ L)).Q
    return new_L, new_L.T @ weight


def dense_paper_step(L: Tensor, R: Tensor, G: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """SGD on the dense product, then one subspace iteration (METHOD section 3)."""
    return subspace_step(L @ R - lr * G, L)


def authors_step(L: Tensor, R: Tensor, G: Tensor, lr: float) -> tuple[Tensor, Tensor]:
    """The pairing in the authors' released code, wrong on purpose: the new L with `R = L_old^T W`."""
    weight = L @ R - lr * G
    new_L = torch.linalg.qr(weight @ (weight.T @ L)).Q
    return new_L, L.T @ weight


def tangent_gradient(L: Tensor, R: Tensor, G: Tensor) -> Tensor:
    """`(I - L L^T) G R^T (R R^T)^-1`, with the pseudo-inverse."""
    complement = torch.eye(L.shape[0], dtype=L.dtype) - L @ L.T
    return complement @ G @ R.T @ torch.linalg.pinv(R @ R.T, hermitian=True, rtol=1e-9)


# -------------------------------------------------------------------------------- linear layer


def linear_forward(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """`y = x W^T + b` over any leading dimensions."""
    y = np.einsum("...i,oi->...o", x, weight)
    return y if bias is None else y + bias


def linear_backward(x: np.ndarray, weight: np.ndarray, dY: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of x, W and b."""
    rows, grads = x.reshape(-1, x.shape[-1]), dY.reshape(-1, dY.shape[-1])
    return np.einsum("...o,oi->...i", dY, weight), np.einsum("no,ni->oi", grads, rows), grads.sum(0)


def feature_gradient_errors(x: Tensor, dY: Tensor) -> list[float]:
    """`||G - G U U^T||_F^2` for `U` the r leading right singular vectors of the rows, at r = 0, 1, ..., in."""
    rows, grads = x.reshape(-1, x.shape[-1]).double(), dY.reshape(-1, dY.shape[-1]).double()
    G, Vh = grads.T @ rows, torch.linalg.svd(rows, full_matrices=True)[2]
    bases = [Vh[:rank].T for rank in range(rows.shape[1] + 1)]
    return [float((G - G @ U @ U.T).square().sum()) for U in bases]


def token_gradient_errors(x: Tensor, dY: Tensor) -> list[float]:
    """`||G - sum_b dY_b^T U U^T X_b||_F^2` for `U` the r leading token directions, at r = 0, 1, ..., N."""
    x, dY = x.double(), dY.double()
    U = torch.linalg.svd(torch.cat(list(x.transpose(1, 2))), full_matrices=True)[2].T  # of the unfolding, (B in, N)
    G = sum(g.T @ rows for rows, g in zip(x, dY, strict=True))
    errors = []
    for rank in range(x.shape[1] + 1):
        projector = U[:, :rank] @ U[:, :rank].T
        kept = sum(g.T @ projector @ rows for rows, g in zip(x, dY, strict=True))
        errors.append(float((G - kept).square().sum()))
    return errors


# -------------------------------------------------------------------------------- tensors

AXES = {"feature": 2, "token": 1, "batch": 0}


def unfold(x: np.ndarray, axis: int) -> np.ndarray:
    """Every fiber of a tensor along one axis as a row, the other indices counting in their order."""
    others = [range(size) for position, size in enumerate(x.shape) if position != axis]
    rows = []
    for index in itertools.product(*others):
        selector: list[int | slice] = list(index)
        selector.insert(axis, slice(None))
        rows.append(x[tuple(selector)])
    return np.stack(rows)


def mode_energies(x: np.ndarray, axis: int) -> np.ndarray:
    """Squared singular values of one unfolding, descending."""
    return np.square(np.linalg.svd(unfold(x, axis), compute_uv=False))


def mode_basis(x: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Leading right singular vectors of one unfolding, (size, rank)."""
    return np.linalg.svd(unfold(x, axis), full_matrices=False)[2][:rank].T


def hosvd(x: np.ndarray, ranks: dict[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Core and bases of the plain HOSVD: every basis from the whole tensor."""
    bases = {mode: mode_basis(x, AXES[mode], rank) for mode, rank in ranks.items()}
    core = x
    for mode, basis in bases.items():
        core = contract(core, basis.T, AXES[mode])
    return core, bases


def sequential_hosvd(x: np.ndarray, ranks: dict[str, int]) -> tuple[np.ndarray, dict[str, np.ndarray], float]:
    """The same with each basis from what the modes before left; also the sum of all dropped energies."""
    core, bases, dropped = x, {}, 0.0
    for mode, rank in ranks.items():
        dropped += float(mode_energies(core, AXES[mode])[rank:].sum())
        bases[mode] = mode_basis(core, AXES[mode], rank)
        core = contract(core, bases[mode].T, AXES[mode])
    return core, bases, dropped


def contract(x: np.ndarray, matrix: np.ndarray, axis: int) -> np.ndarray:
    """Multiply a 3-way tensor by a matrix (m, n) along one axis of size n."""
    return np.einsum(["zjk,az->ajk", "izk,az->iak", "ijz,az->ija"][axis], x, matrix)


def tucker_reconstruct(core: np.ndarray, bases: dict[str, np.ndarray | None]) -> np.ndarray:
    """The tensor that a core and its bases stand for, entry by entry: a basis of None is the identity."""
    full = [
        np.eye(core.shape[AXES[mode]]) if bases.get(mode) is None else np.asarray(bases[mode])
        for mode in ("batch", "token", "feature")
    ]
    result = np.zeros([basis.shape[0] for basis in full])
    for b, n, i in np.ndindex(*result.shape):
        result[b, n, i] = np.einsum("abc,a,b,c->", core, full[0][b], full[1][n], full[2][i])
    return result


# -------------------------------------------------------------------------------- the paper's training


class PaperProduct(torch.autograd.Function):
    """`y = x W^T`, whose weight gradient is that of another input in the place of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(weight, kept)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, dY: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        weight, kept = ctx.saved_tensors
        return dY @ weight, torch.einsum("bno,bni->oi", dY, kept), None


class PaperLinear(nn.Module):
    """A dense layer with a weight of rank K and compressed inputs (B, N, I), to the letter of arXiv 2510.09160.

    Weight and inputs are kept at the smallest ranks that reach epsilon. Features first, then tokens, then samples; the
    bases of features and tokens go on from those of before by one subspace iteration, samples have no order to go on
    from. Where the compressed form is not smaller, the input is kept.
    """

    def __init__(self, linear: nn.Linear, epsilon: float) -> None:
        super().__init__()
        weight = linear.weight.detach()
        energies = torch.linalg.svdvals(weight).square().tolist()
        self.epsilon, self.bases = epsilon, {}
        self.L, R = truncated_svd(weight, smallest_rank(energies, epsilon))
        self.weight, self.bias = nn.Parameter(self.L @ R), nn.Parameter(linear.bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = PaperProduct.apply(x, self.weight, self.compressed(x.detach()) if self.training else x)
        return product + self.bias

    def compressed(self, x: Tensor) -> Tensor:
        core, bases, elements = x.numpy(), {}, 0
        for mode, axis in AXES.items():
            A = unfold(core, axis)
            if mode in self.bases:
                bases[mode] = np.linalg.qr(A.T @ (A @ self.bases[mode])).Q
            else:
                bases[mode] = mode_basis(core, axis, smallest_rank(list(mode_energies(core, axis)), self.epsilon))
            core = contract(core, bases[mode].T, axis)
            elements += bases[mode].size
        if elements + core.size >= x.numel():
            return x
        self.bases = {mode: bases[mode] for mode in ("feature", "token")}
        for mode, axis in AXES.items():
            core = contract(core, bases[mode], axis)
        return torch.from_numpy(core)


def paper_step(net: nn.Module, lr: float, weight_decay: float, max_grad_norm: float) -> float:
    """Clip, SGD, and one subspace iteration of every :class:`PaperLinear`; the norm of the gradients."""
    parameters = [parameter for parameter in net.parameters() if parameter.requires_grad]
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    torch.optim.SGD(parameters, lr=lr, weight_decay=weight_decay).step()
    for layer in net.modules():
        if isinstance(layer, PaperLinear):
            layer.L, R = subspace_step(layer.weight.detach(), layer.L)
            layer.weight.data = layer.L @ R
    net.zero_grad()
    return float(norm)


# -------------------------------------------------------------------------------- a dense model


class TinyBlock(nn.Module):
    """A transformer block: q, k and v read one tensor."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=bias) for _ in range(4))
        self.fc1, self.fc2 = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        attention = torch.softmax(self.q(normed) @ self.k(normed).transpose(-1, -2), -1)
        x = x + self.o(attention @ self.v(normed))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class TinyNet(nn.Module):
    """Embedding, numbered blocks and a head, on inputs (batch, tokens, width)."""

    def __init__(self, width: int = 8, hidden: int = 12, depth: int = 2, classes: int = 3, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.position = nn.Parameter(0.1 * torch.randn(1, 1, width))
        self.blocks = nn.ModuleList(TinyBlock(width, hidden, bias) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def tiny_net(seed: int, dtype: torch.dtype = torch.float32, **sizes: int | bool) -> TinyNet:
    """A :class:`TinyNet` from a seed, with norms and biases away from their trivial start."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = TinyNet(**sizes)  # type: ignore[arg-type]
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return net.to(dtype)
