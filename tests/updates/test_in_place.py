"""What a layer answers in training may be changed in place, as models do, with every update and form."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from wasi_peft import WasiConfig
from wasi_peft.forms.residual import RESIDUALS
from wasi_peft.updates import UPDATES

CASES: list[dict[str, Any]] = [
    *({"update": name, "residual": None} for name, update in UPDATES.items() if not update.needs_residual),
    *({"update": name, "residual": None, "frozen_dtype": "int8"} for name in ("frozen_basis", "core", "low_rank")),
    *({"update": name, "residual": form} for name, u in UPDATES.items() if u.takes_residual for form in RESIDUALS),
]


class Halved(nn.Module):
    """Answers half of what its layer does, as Longformer scales its queries."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 12)

    def forward(self, x: Tensor, in_place: bool) -> Tensor:
        y = self.layer(x)
        if in_place:
            y /= 2
            return y
        return y / 2


@pytest.mark.parametrize("options", CASES, ids=str)
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 5, 16), (2, 3, 5, 16)], ids=len)
def test_what_a_layer_answers_may_be_changed_in_place(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    config = WasiConfig(target_modules=["layer"], weight_rank=4, activation_threshold=None, **options)
    model = get_peft_model(Halved(), config).train()
    model(torch.randn(7, 16), False)  # an addition meets data first
    x, gradients = torch.randn(shape), []
    for in_place in (False, True):
        model.zero_grad()
        rows = x.clone().requires_grad_()
        model(rows, in_place).square().sum().backward()
        trained = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        gradients.append([rows.grad, *trained])
    assert len(gradients[0]) > 1
    torch.testing.assert_close(*gradients)
