"""Packed experts on their way from a dense checkpoint to a compressed one: one packed weight at a time."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from safetensors.torch import load_file
from torch import nn

from ..factors.expert_factors import ExpertInputs, prepared_stack
from ..forms.compressed_stack import CompressedStack
from ..forms.compressing import compressed
from ..forms.stacked import FactoredStack, residual_of
from ..forms.stored import STORABLE
from ..models.experts import ExpertStack
from ..ranks.allocate import allocate_ranks
from ..tuner.config import WasiConfig
from ..tuner.model import plain_spectrum
from ..tuner.targets import check_weight
from .skeleton import Skeleton
from .working import WorkingFolder, write_tensors

RANKS_STEP = "ranks of experts"
_FACTORS = "experts"  # in the working folder


class ExpertPreparation:
    """What becomes of the packed experts among the targets of a preparation.

    Args:
        skeleton: Of the dense model.
        config: With targets resolved.
        targets: Linear layers too, by name.
        work: Keeps their factors, and the ranks that :meth:`ranks` gave, under :data:`RANKS_STEP`.

    Attributes:
        stacks: Those that are packed experts, without numbers, by name of the parameter.
    """

    def __init__(
        self, skeleton: Skeleton, config: WasiConfig, targets: Mapping[str, nn.Module], work: WorkingFolder
    ) -> None:
        self.skeleton, self.config, self.work = skeleton, config, work
        self.stacks = {name: module for name, module in targets.items() if isinstance(module, ExpertStack)}

    def ranks(self) -> dict[str, int]:
        """Their ranks under a budget, which they keep among themselves; none where there is no budget."""
        share, update = self.config.weight_share, self.config.layer_update
        if share is None or not self.stacks:
            return {}
        spectra = [plain_spectrum(name, self._dense(name).matrices(), update) for name in self.stacks]
        return allocate_ranks(spectra, share)

    def keep(self, name: str, inputs: ExpertInputs) -> None:
        """Write the factors that suit what the experts have seen."""
        config = copy.copy(self.config)
        if config.weight_share is not None:
            config.resolved_ranks = self.work.steps[RANKS_STEP]
        initial = prepared_stack(name, inputs, config).initial
        dtype = torch.promote_types(inputs.stack.weight.dtype, torch.float32)
        os.makedirs(self.work.at(_FACTORS), exist_ok=True)
        write_tensors(self._file(name), {"L": initial.L.to(dtype), "R": initial.R.to(dtype)})

    @torch.no_grad()
    def compressed(self, name: str) -> ExpertStack:
        """What becomes of a packed weight; a dense one where no form would be smaller."""
        stack, residual = self._dense(name), self.config.residual_of(name)
        if residual is not None:
            if residual not in STORABLE:
                return stack
            return CompressedStack(residual_of(stack, residual, None), stack.experts, stack.transposed)
        dtype = stack.weight.dtype
        parts = {part: tensor.to(dtype) for part, tensor in load_file(self._file(name)).items()}
        form = FactoredStack.around(parts, stack.transposed)
        small = compressed(form, dtype) or form.to_dense()
        assert isinstance(small, ExpertStack)
        return small

    def _dense(self, name: str) -> ExpertStack:
        """A packed weight, with its numbers."""
        weight = nn.Parameter(self.skeleton.checkpoint.read(name), requires_grad=False)
        for matrix in weight:  # one at a time, as a check takes as much memory as what it looks at
            check_weight(name, matrix, self.config)
        return ExpertStack(weight, self.stacks[name].transposed)

    def _file(self, name: str) -> str:
        return self.work.at(_FACTORS, f"{list(self.stacks).index(name):05d}.safetensors")
