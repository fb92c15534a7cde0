"""The paper's own update of the factors, as an optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..linalg.subspaces import paper_step
from ..tuner.layer import WasiLayer, wasi_layers
from ..updates import UPDATES
from .optimizer import check_positive, check_single_process, check_weight_decay

NOT_REDUCED = "SubspaceSGD does not reduce product gradients over processes; use another optimizer"


class _ProductGradient:
    """Collects the factors of one layer's product gradient over the backward passes of a step.

    It starts afresh whenever a new backward pass finds that R has no gradient yet, so whatever cleared the gradients
    (`optimizer.zero_grad`, `model.zero_grad`, a skipped step) has cleared it too. R, since a square L has none at all.
    """

    def __init__(self, R: nn.Parameter) -> None:
        self._R = R
        self._pass = -1
        self.left: list[Tensor] = []
        self.right: list[Tensor] = []

    def __call__(self, left: Tensor, right: Tensor) -> None:
        current = torch._C._current_graph_task_id()
        if current != self._pass and (self._R.grad is None or not bool(self._R.grad.any())):
            self.clear()
        self._pass = current
        # copies: autograd may hand dY on as a gradient that is added to, and inputs may be buffers that are refilled
        self.left.append(left.clone())
        self.right.append(right.clone())

    def clear(self) -> None:
        self.left.clear()
        self.right.clear()

    def joined(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Both factors of the whole step, (out, q) and (q, in)."""
        return torch.cat(self.left, 1).to(dtype), torch.cat(self.right, 0).to(dtype)


class SubspaceSGD(torch.optim.Optimizer):
    """The paper's update exactly: SGD on the product `L R`, then one subspace iteration (arXiv 2510.09160).

    Low-rank throughout: the gradient of the product stays in two factors. Parameters that are not WASI factors take a
    plain SGD step. No momentum, as in the paper's recipe (lr 0.05, weight decay 1e-4, clip 2.0).

    Whatever rescaled the gradients between backward and step (a gradient scaler, `clip_grad_norm_`) is read off the
    gradient of R and applied to the product's gradient as well. One process only: product gradients are not reduced
    over processes.

    Args:
        model: A model with a WASI adapter whose update hands out the gradient of the product, such as that of
            :meth:`WasiConfig.paper`.
        lr: Learning rate.
        weight_decay: `W <- (1 - lr * weight_decay) W` before the step.
        max_grad_norm: Clip the norm of all gradients together, those of the products themselves included
            (`clip_grad_norm_` knows only the gradients of the factors).

    Raises:
        ValueError: If the model has no trainable factors, or uses another update; or a value is out of range.
        RuntimeError: In a distributed run, or in `step` after another SubspaceSGD took the layers over.
    """

    retracts = True  # the step itself returns orthonormal factors

    def __init__(
        self, model: nn.Module, lr: float = 0.05, weight_decay: float = 0.0, max_grad_norm: float | None = None
    ) -> None:
        check_positive("lr", lr)
        check_weight_decay(weight_decay)
        if max_grad_norm is not None:
            check_positive("max_grad_norm", max_grad_norm)
        check_single_process(NOT_REDUCED)
        self._layers: list[tuple[WasiLayer, nn.Parameter, nn.Parameter, _ProductGradient]] = []
        for name, layer in wasi_layers(model):
            active = layer.active_name
            if active is None or not any(p.requires_grad for p in map(layer.form.part, layer.update.trained)):
                continue
            if not layer.update.hands_out_product:
                able = " or ".join(repr(key) for key, update in UPDATES.items() if update.hands_out_product)
                raise ValueError(f"{name}: SubspaceSGD needs update={able}, got {layer.update.name!r}.")
            frozen = [part for part in layer.update.trained if not layer.form.part(part).requires_grad]
            if frozen:
                raise ValueError(f"{name}: SubspaceSGD needs both factors to train, but {frozen[0]} is frozen.")
            L, R = layer.form.L, layer.form.R
            self._layers.append((layer, L, R, _ProductGradient(R)))
        if not self._layers:
            raise ValueError("SubspaceSGD needs a model with trainable WASI factors, got none.")
        for layer, _, _, gradient in self._layers:
            layer.record_product_gradient(gradient)
        self.max_grad_norm = max_grad_norm
        parameters: Iterable[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        check_single_process(NOT_REDUCED)
        rates = {id(p): (g["lr"], g["weight_decay"]) for g in self.param_groups for p in g["params"]}
        factors = {id(p) for _, L, R, _ in self._layers for p in (L, R)}
        others = [p for g in self.param_groups for p in g["params"] if id(p) not in factors and p.grad is not None]
        products = [(each[1], each[2], *self._product(*each)) for each in self._layers if each[2].grad is not None]
        scale = self._clip_scale(others, products)
        for parameter in others:
            lr, decay = rates[id(parameter)]
            parameter.mul_(1 - lr * decay).add_(parameter.grad, alpha=-lr * scale)
        for L, R, left, right in products:
            lr, decay = rates[id(L)]
            new_L, new_R = paper_step(L, R * (1 - lr * decay), left, right, lr * scale)
            L.copy_(new_L)
            R.copy_(new_R)
        for *_, gradient in self._layers:
            gradient.clear()
        return loss

    @staticmethod
    def _product(layer: WasiLayer, L: Tensor, R: Tensor, gradient: _ProductGradient) -> tuple[Tensor, Tensor]:
        """The product's gradient as two factors, rescaled as R's gradient was since backward."""
        if not gradient.left or layer.product_gradient_sink(layer.active_name or "") is not gradient:
            raise RuntimeError("another SubspaceSGD was created for this model; only the newest one can step.")
        left, right = gradient.joined(L.dtype)
        recorded = (L.T @ left) @ right  # R's gradient as backward computed it
        size = recorded.square().sum()
        assert R.grad is not None
        ratio = (recorded * R.grad).sum() / size if float(size) > 0 else size.new_ones(())
        return left * ratio, right

    def _clip_scale(self, others: list[Tensor], products: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> float:
        if self.max_grad_norm is None:
            return 1.0
        squares = [p.grad.square().sum() for p in others if p.grad is not None]
        # ||left right||_F^2 from the thin sides
        squares += [((left.T @ left) * (right @ right.T)).sum() for _, _, left, right in products]
        norm = float(torch.stack([square.double() for square in squares]).sum().sqrt()) if squares else 0.0
        return min(1.0, self.max_grad_norm / (norm + 1e-6))
