"""What the first batch makes of a factor, in runs of several processes, until it is in the parameter for good.

FSDP2 gathers the parameters of a block before it runs and drops them after, so what a forward pass writes into one is
lost. The factor as it became is kept here until an optimizer is about to step; then each process writes its shard.
DeepSpeed's ZeRO, whose optimizers step copies, is given the factor at once instead (:func:`shards.write_through`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..forms.factored import FactoredLinear
from ..forms.shards import write_shard


class MetFactor:
    """R of a form that has met data.

    A hook of all optimizers waits for the one that is about to move the form, for as long as this object lives.

    Args:
        form: The form, its parameters gathered.
    """

    def __init__(self, form: FactoredLinear) -> None:
        self.form = form
        self.value: Tensor | None = form.R.detach().clone()
        reference = weakref.ref(self)

        def before_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            met = reference()
            if met is not None:
                met.write(optimizer)

        handle = register_optimizer_step_pre_hook(before_step)
        weakref.finalize(self, handle.remove)

    def restore(self) -> bool:
        """Put the value into parameters that were gathered anew; whether that is still called for."""
        if self.value is None or bool(self.form.L.any()):  # a step has been taken, by whatever took it
            self.value = None
            return False
        R = self.form.R
        if not torch.equal(R, self.value):
            R.data.copy_(self.value)  # autograd must not see it: L is zero, so no gradient depends on R yet
        return True

    def write(self, optimizer: torch.optim.Optimizer) -> None:
        """Write the shard of this process, if this optimizer moves the form."""
        moved = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if self.value is None or not any(id(parameter) in moved for parameter in self.form.parameters()):
            return
        write_shard(self.form.R, self.value)
        self.value = None
