"""What calibration sums up over the data for one layer, and what the sums say of its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..forms.dense import dense_weight, is_quantized
from ..forms.residual import Int4Residual, Int8Residual
from ..linalg.row_sums import RowSums
from ..linalg.spectra import WeightSpectrum, weighed_error, weight_spectrum
from ..linalg.tucker import canonical
from ..models.calls import real_rows

_SKETCH = 32  # random output directions in which the token mode's gradient error is estimated
MOST_TOKENS = 2048  # of an input whose token mode is looked at: it is decomposed, tokens x tokens


@dataclass
class InputStatistics:
    """Sums over the rows of one input, and per module that reads it over the gradients of its output.

    **Shape**
        - sums: of `x x^T`, (in, in), float32
        - total: (in,), float32, sum of `x`
        - tokens: every number of tokens that was seen
        - output_moments: per module (out, out), float32, sum of `g g^T`
        - gradient_energies: per module and mode, energies of the weight's gradient; `sum(e[r:])` is the squared error
          of the gradient when the input is kept at rank r in that mode
    """

    sums: RowSums
    total: Tensor
    rows: int = 0
    tokens: set[int] = field(default_factory=set)
    modules: list[str] = field(default_factory=list)
    output_moments: dict[str, Tensor] = field(default_factory=dict)
    gradient_energies: dict[str, dict[str, Tensor]] = field(default_factory=dict)

    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Add the rows of a batch, shape (..., in), without padding."""
        self.tokens.add(canonical(x).shape[1])
        rows = real_rows(x.detach(), mask).to(self.total)
        self.sums.add(rows)
        self.total += rows.sum(0)
        self.rows += rows.shape[0]

    def update_output(self, name: str, gradient: Tensor) -> None:
        """Add the gradients of a module's output, shape (..., out)."""
        rows = gradient.detach().reshape(-1, gradient.shape[-1]).to(self.total)
        if name not in self.output_moments:
            self.output_moments[name] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self.output_moments[name].addmm_(rows.T, rows)

    def update_errors(self, name: str, mode: str, energies: Tensor) -> None:
        """Add the gradient energies of one batch, unless it has another number of tokens than the first."""
        known = self.gradient_energies.setdefault(name, {})
        if known.setdefault(mode, torch.zeros_like(energies)).shape == energies.shape:
            known[mode] = known[mode] + energies

    @classmethod
    def empty(cls, name: str, module: nn.Module) -> InputStatistics:
        """Of a layer that has seen nothing yet."""
        weight = dense_weight(module)
        return cls.of_width(name, weight.shape[1], weight.device)

    @classmethod
    def of_width(cls, name: str, width: int, device: torch.device | None = None) -> InputStatistics:
        """Of an input of a size, read by a module, before the first rows."""
        total = torch.zeros(width, dtype=torch.float32, device=device)
        return cls(RowSums(width, total.device), total, modules=[name])

    def moments(self) -> tuple[Tensor, Tensor]:
        """`E[x x^T]` (in, in) and `E[x]` (in,), float64; those of white inputs where no row was seen."""
        if not self.rows:
            return torch.eye(len(self.total)).to(self.total).double(), self.total.double()
        return self.sums.total().double() / self.rows, self.mean

    @property
    def mean(self) -> Tensor:
        """`E[x]`, (in,), float64; zero where no row was seen."""
        return self.total.double() / max(1, self.rows)

    @property
    def mean_square(self) -> float:
        """Of the entries of x; that of white inputs where no row was seen."""
        return self.sums.trace / (self.rows * self.sums.width) if self.rows else 1.0

    def times(self, columns: Tensor) -> Tensor:
        """`E[x x^T]` times columns, (in, k), in their dtype; as :meth:`moments`, without the matrix."""
        return self.sums.times(columns) / self.rows if self.rows else columns

    def output_moment(self, name: str) -> Tensor | None:
        """Sum of `g g^T` of a module, (out, out), float64; None where nothing downstream depends on it.

        A sum, not a mean: where layers see different numbers of rows (Swin's stages, an encoder and a decoder), it is
        the error of all of them together that makes energies comparable.
        """
        moment = self.output_moments.get(name)
        return moment.double() if moment is not None and bool(moment.any()) else None

    def spectrum(self, name: str, weight: Tensor, bias: Tensor | None) -> WeightSpectrum:
        """The spectrum of a module's weight, (out, in)."""
        second_moment, mean = self.moments()
        if bias is not None:
            second_moment = second_moment - torch.outer(mean, mean)
        output = self.output_moment(name)
        return weight_spectrum(
            weight, second_moment.to(weight.device), None if output is None else output.to(weight.device)
        )

    @torch.no_grad()
    def rounding_errors(self, name: str, module: nn.Module) -> dict[str, float]:
        """What a module's weight loses when it is rounded, by residual; none of one that cannot be rounded.

        In the unit of the energies of :meth:`spectrum`. Nothing makes good for the mean input, as a bias does for what
        factors drop of it, so the second moment itself weighs the error.
        """
        weight = dense_weight(module)
        if is_quantized(module):
            return {}
        second_moment, output = self.moments()[0].to(weight.device), self.output_moment(name)
        output = None if output is None else output.to(weight.device)
        errors = {}
        for residual in (Int8Residual, Int4Residual):
            lost = weight.double() - residual(module).dense_weight().double()
            error = weighed_error(lost, second_moment, output)
            if math.isfinite(error):
                errors[residual.name] = error
        return errors


@torch.no_grad()
def feature_gradient_energies(x: Tensor, gradient: Tensor) -> Tensor:
    """Energy of `G = dY^T X` along the right singular vectors of X, (in,), zero past the rank of X.

    The squared error of the gradient from the rows compressed to r features, `||G - G U_r U_r^T||_F^2`, is the sum of
    all entries from r on: the paper's `activation_perplexity` at every rank at once (arXiv 2510.09160, section 3.4).

    **Shape**
        - x: (..., in), gradient: (..., out)
    """
    rows = x.reshape(-1, x.shape[-1]).float()
    dY = gradient.reshape(-1, gradient.shape[-1]).float()
    energies = rows.new_zeros(rows.shape[1])
    if rows.shape[0] >= rows.shape[1]:
        basis = torch.linalg.eigh(rows.T @ rows).eigenvectors.flip(1)
        energies.copy_((dY.T @ (rows @ basis)).square().sum(0))
    else:  # G u_j = s_j dY^T v_j with X X^T = V S^2 V^T
        values, vectors = torch.linalg.eigh(rows @ rows.T)
        squares = values.flip(0).clamp_min(0) * (dY.T @ vectors.flip(1)).square().sum(0)
        energies[: len(squares)] = squares
    return energies


@torch.no_grad()
def token_gradient_energies(x: Tensor, gradient: Tensor, generator: torch.Generator) -> Tensor:
    """The same for the token mode, (N,), estimated.

    The gradient is a sum over token directions whose parts are not orthogonal to each other, so its tails are
    measured, in `_SKETCH` random output directions.

    **Shape**
        - x: (B, N, in), gradient: (B, N, out)
    """
    x, gradient = x.float(), gradient.float()
    gram = torch.einsum("bni,bmi->nm", x, x)
    basis = torch.linalg.eigh(gram).eigenvectors.flip(1)  # (N, N)
    sketch = torch.randint(0, 2, (gradient.shape[-1], _SKETCH), generator=generator).to(x) * 2 - 1
    sketched = torch.einsum("nj,bns->jbs", basis, gradient @ sketch)
    inputs = torch.einsum("nj,bni->jbi", basis, x)
    tails, total = [], x.new_zeros(_SKETCH, x.shape[-1])
    for direction in range(x.shape[1] - 1, -1, -1):
        total = total + sketched[direction].T @ inputs[direction]
        tails.append(total.square().sum() / _SKETCH)
    errors = torch.stack(tails).cummax(0).values.flip(0)  # errors[r]: rank r keeps directions 0 to r - 1
    return errors - torch.cat([errors[1:], errors.new_zeros(1)])


def add_gradient_energies(
    statistics: InputStatistics, name: str, x: Tensor, gradient: Tensor, sketch_seed: int
) -> None:
    """Add what compressed inputs do to the gradient of a module's weight, for one call of it.

    Nothing is said of the token mode of inputs with more than :data:`MOST_TOKENS`.

    **Shape**
        - x: (..., in), gradient: (..., out)
    """
    if not bool(torch.isfinite(x).all() & torch.isfinite(gradient).all()):
        return  # the sums say so too
    statistics.update_errors(name, "feature", feature_gradient_energies(x, gradient))
    rows, gradients = canonical(x), canonical(gradient)
    if rows.shape[0] > 1 and 1 < rows.shape[1] <= MOST_TOKENS:
        generator = torch.Generator().manual_seed(sketch_seed)
        statistics.update_errors(name, "token", token_gradient_energies(rows, gradients, generator))


def backpropagate_signs(features: Tensor, mask: Tensor | None, generator: torch.Generator) -> None:
    """Backpropagate a random +-1 projection of a model's features, those of padded tokens left out."""
    if not features.requires_grad:
        return
    signs = torch.randint(0, 2, features.shape, generator=generator).to(features) * 2 - 1
    if mask is not None and mask.shape == features.shape[:-1]:
        signs = signs * mask.to(features.device).bool()[..., None]
    features.backward(signs)
