"""What is asked of every architecture in every form. A check returns nothing, or raises a sentence of what is wrong.

Each works on a copy of the dense model, and compares with that model itself: with the weights rounded in place where
the form rounds them.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from families import Family
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.pytorch_utils import Conv1D

import wasi_peft
from wasi_peft import WasiConfig, preprocess_wasi
from wasi_peft.cost.estimate import estimate_peak
from wasi_peft.forms.attention import PROJECTIONS
from wasi_peft.memory import modes
from wasi_peft.memory.loss import ChunkedLoss
from wasi_peft.memory.pieces import ChunkedMLPs, SlicedBlocks
from wasi_peft.memory.recompute import RecomputedBlocks
from wasi_peft.memory.saved import LowBitBlocks
from wasi_peft.models.calls import call_arguments, features_of, loss_of
from wasi_peft.models.experts import packed_parameters
from wasi_peft.tuner.layer import WasiLayer, wasi_layers

PACKAGE = Path(wasi_peft.__file__).parent

# what a configuration says of each form: as users write it, and so that nothing is lost but what the form rounds
FORMS: dict[str, dict[str, Any]] = {
    "int8": {},
    "factors": {"weight_rank": 4, "residual": None},
    "exact": {"residual": "exact"},
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "int8": {"residual_product": "restored"},
    "factors": {"explained_variance_threshold": 1.0},
    "exact": {"residual": "exact"},
}
# Slices so short that tiny batches have several. Inputs of recomputed blocks are exact there, and gradients with them;
# as the mode itself rounds them, the gradients of tiny random models can change by much.
_IN_SLICES = {
    "fast": (SlicedBlocks(16, mlp_rows=8), LowBitBlocks("int8", 64, low_bit_activations=True), ChunkedLoss()),
    "small": (RecomputedBlocks("exact"), SlicedBlocks(16, drop_caches=True), ChunkedMLPs(8), ChunkedLoss()),
}
_TOLERANCE = {("fast", False): 0.15, ("fast", True): 0.15, ("small", False): 1.0, ("small", True): 0.01}


class Absent(Exception):
    """What is asked for is nothing that the dense model can do."""


class Wrong(Exception):
    """The model answers something else than it should."""


@dataclass
class Case:
    """An architecture in a form."""

    family: Family
    form: str
    dense: nn.Module

    @functools.cached_property
    def targets(self) -> list[str]:
        """Packed experts and the projections of PyTorch's attention are layers of the adapted model alone."""
        return sorted(name for name, _ in wasi_layers(self.adapted().base_model.model))

    @functools.cached_property
    def batch(self) -> Any:
        return self.family.batch()

    def config(self, lossless: bool = False, **options: Any) -> WasiConfig:
        return WasiConfig(**{**(LOSSLESS if lossless else FORMS)[self.form], **options})

    def adapted(self, lossless: bool = False, dense: nn.Module | None = None, **options: Any) -> PeftModel:
        model = copy.deepcopy(self.dense if dense is None else dense)
        torch.manual_seed(0)
        adapted = get_peft_model(model, self.config(lossless, **options)).eval()
        if self.family.input_gradients:
            adapted.enable_input_require_grads()
        return adapted

    @property
    def linear_targets(self) -> list[str]:
        """Those that are modules of the dense model."""
        modules = dict(self.dense.named_modules())
        return [name for name in self.targets if name in modules]

    @functools.cached_property
    def expected(self) -> nn.Module:
        """The dense model, its weights rounded where the form rounds them."""
        model = copy.deepcopy(self.dense)
        if self.form == "int8":
            for name in self.targets:
                rows = weight_of(model, name).rows(lambda weight: weight.data)
                scales = rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny) / 127
                rows.copy_((rows / scales).round().clamp_(-127, 127) * scales)
        return model

    @functools.cached_property
    def expected_gradients(self) -> Gradients:
        return dense_gradients(copy.deepcopy(self.expected), self)


class Weight(NamedTuple):
    """Where the weight of a target is in the dense model: a parameter, or some rows of one."""

    parameter: nn.Parameter
    transposed: bool = False
    part: slice = slice(None)

    def rows(self, of: Callable[[nn.Parameter], Tensor]) -> Tensor:
        """(out, in), of packed experts (E, out, in), of something of the parameter's shape."""
        value = of(self.parameter)[self.part]
        return value.mT if self.transposed else value

    def gradient(self) -> Tensor:
        return self.rows(lambda weight: torch.zeros_like(weight) if weight.grad is None else weight.grad)


def weight_of(model: nn.Module, name: str) -> Weight:
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    if last in packed_parameters(module):
        return Weight(getattr(module, last), packed_parameters(module)[last])
    if isinstance(module, nn.MultiheadAttention) and last in PROJECTIONS:
        if module.in_proj_weight is None:
            return Weight(getattr(module, f"{last}_weight"))
        start = PROJECTIONS.index(last) * module.embed_dim
        return Weight(module.in_proj_weight, part=slice(start, start + module.embed_dim))
    layer = model.get_submodule(name)
    return Weight(layer.weight, isinstance(layer, Conv1D))


# ---------------------------------------------------------------- what models answer


def run(model: nn.Module, batch: Any, seed: int = 0) -> Any:
    arguments = call_arguments(batch)
    torch.manual_seed(seed)
    return model(*arguments.positional, **arguments.named)


@torch.no_grad()
def answer(model: nn.Module, batch: Any) -> Tensor:
    features = features_of(run(model.eval(), batch)).float()
    if not bool(features.isfinite().all()):
        raise Wrong("the output holds NaN or Inf.")
    return features


def distance(ours: Tensor, theirs: Tensor) -> float:
    if ours.shape != theirs.shape:
        raise Wrong(f"the shape is {tuple(ours.shape)}, that of the dense model {tuple(theirs.shape)}.")
    return float((ours - theirs).norm() / theirs.norm().clamp_min(1e-12))


def loss(output: Any) -> Tensor:
    """The model's own, or its features weighed at random, so that norms do not cancel."""
    own = loss_of(output)
    if own is not None:
        return own.mean()
    features = features_of(output).float()
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(5))
    return (features * weights).mean()


@dataclass
class Gradients:
    """A loss, and the gradient of the weight of each target, (out, in), or of its L."""

    loss: float
    by_layer: dict[str, Tensor]


def dense_gradients(model: nn.Module, case: Case) -> Gradients:
    value = loss(run(model.train(), case.batch))
    if not value.requires_grad:
        raise Absent("the dense model's loss has no gradient.")
    value.backward()
    return Gradients(float(value), {name: weight_of(model, name).gradient() for name in case.targets})


def compare_gradients(model: Any, case: Case, tolerance: float) -> None:
    """L's gradients must be those of the dense weight times R, and the loss the dense one."""
    value = loss(run(model.train(), case.batch))
    expected = case.expected_gradients
    if abs(float(value) - expected.loss) > 1e-2 * max(abs(expected.loss), 1e-3) + 1e-4:
        raise Wrong(f"the loss is {float(value):.4g}, that of the dense model {expected.loss:.4g}.")
    value.backward()
    ours, theirs = [], []
    for name, layer in wasi_layers(model.base_model.model):
        form = layer.form
        theirs.append((expected.by_layer[name] @ form.R.detach().float().mT).flatten())
        gradient = form.L.grad
        ours.append(torch.zeros_like(theirs[-1]) if gradient is None else gradient.flatten())
    error = distance(torch.cat(ours), torch.cat(theirs))
    if not error <= tolerance:
        raise Wrong(f"gradients are {error:.2g} of their norm away from the dense model's.")


# ---------------------------------------------------------------- checks


def targets(case: Case) -> str:
    """What is found, and its share of the weights."""
    model = case.adapted()
    layers = list(wasi_layers(model))
    elements = sum(layer.experts * layer.in_features * layer.out_features for _, layer in layers)
    return f"{len(layers)} layers, {elements / sum(p.numel() for p in case.dense.parameters()):.0%}"


def output(case: Case) -> None:
    """At full rank the dense model's, and nothing else of the model is different."""
    error = distance(answer(case.adapted(lossless=True), case.batch), answer(case.expected, case.batch))
    if error > 1e-3:
        raise Wrong(f"at full rank the output is {error:.2g} of its norm away from the dense model's.")


def gradients(case: Case) -> None:
    """At full rank the dense model's."""
    compare_gradients(case.adapted(lossless=True), case, 1e-2)


def step(case: Case) -> None:
    """One step of AdamW moves the layers that the dense model's gradients reach, and leaves no NaN."""
    model = case.adapted().train()
    torch.manual_seed(0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        value = loss(run(model, case.batch))
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    if not bool(value.isfinite()) or not all(bool(p.isfinite().all()) for p in model.parameters()):
        raise Wrong("a step leaves NaN or Inf.")
    still = [
        name
        for name, layer in wasi_layers(model.base_model.model)
        if bool(case.expected_gradients.by_layer[name].any())
        and all(
            torch.equal(parameter, before[f"base_model.model.{name}.{key}"])
            for key, parameter in layer.named_parameters()
            if parameter.requires_grad
        )
    ]
    if still:
        raise Wrong(f"{still[0]} does not move in a step ({len(still)} layers in all).")


def memory_mode(case: Case, mode: str, in_slices: bool = False) -> None:
    """Outputs and gradients of a mode."""
    with short_slices() if in_slices else nullcontext():
        model = case.adapted(lossless=True, memory_mode=mode)
        compare_gradients(model, case, _TOLERANCE[mode, in_slices])


@contextmanager
def short_slices() -> Iterator[None]:
    before = modes.MODES
    modes.MODES = {**before, **_IN_SLICES}
    try:
        yield
    finally:
        modes.MODES = before


def estimate(case: Case) -> None:
    """A figure without running the model."""
    if estimate_peak(case.dense, case.config(), batch=case.batch) <= 0:
        raise Wrong("the estimate of the peak is 0.")


def preparation(case: Case) -> None:
    """`preprocess_wasi`, and an injection that takes what it made."""
    model, config = copy.deepcopy(case.dense), case.config()
    batches = [case.family.batch(seed=seed) for seed in (3, 4)]
    preprocess_wasi(model, config, batches, repair_steps=2 if case.form == "factors" else None, progress_bar=False)
    answer(get_peft_model(model, config), case.batch)


def checkpointing(case: Case, use_reentrant: bool) -> None:
    """The model's own gradient checkpointing."""
    if not getattr(case.dense, "supports_gradient_checkpointing", False):
        raise Absent("the model has no gradient checkpointing.")

    def enable(model: Any) -> None:
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})

    def dense_step() -> None:
        model = copy.deepcopy(case.expected)
        enable(model)
        found = dense_gradients(model, case)
        for name, gradient in found.by_layer.items():
            if distance(gradient, case.expected_gradients.by_layer[name]) > 1e-2:
                raise Absent(f"the dense model's gradients change by it, in {name}.")

    only_if_dense_does(dense_step)
    model = case.adapted(lossless=True)
    enable(model)
    if use_reentrant:
        only_if_dense_does(model.enable_input_require_grads)
    only_if_dense_does(functools.partial(lora_gradients, case, enable, use_reentrant))
    compare_gradients(model, case, 1e-2)


def lora_gradients(case: Case, enable: Callable[[Any], None], use_reentrant: bool) -> None:
    """Raises what hinders LoRA under the model's checkpointing."""
    gradients = []
    for prepare in (lambda _: None, enable):
        torch.manual_seed(0)
        model: Any = get_peft_model(copy.deepcopy(case.dense), LoraConfig(r=2, target_modules=case.linear_targets))
        prepare(model)
        if use_reentrant:
            model.enable_input_require_grads()
        loss(run(model.train(), case.batch)).backward()
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained]))
    if distance(*gradients) > 1e-2:
        raise Absent("LoRA loses gradients by it too.")


def autocast(case: Case) -> None:
    """A training pass in bfloat16: finite, and as near as the dense model comes."""

    def value_of(model: nn.Module) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return loss(run(model.train(), case.batch))

    only_if_dense_does(lambda: value_of(copy.deepcopy(case.expected)).backward())
    dense = copy.deepcopy(case.expected)
    value_of(dense).backward()
    model = case.adapted(lossless=True)
    value_of(model).backward()
    expected = case.expected_gradients
    ours, theirs, own = [], [], []
    for name, layer in wasi_layers(model.base_model.model):
        R = layer.form.R.detach().float().mT
        rounded = weight_of(dense, name).gradient()
        theirs.append((expected.by_layer[name] @ R).flatten())
        own.append((rounded.float() @ R).flatten())
        ours.append(torch.zeros_like(theirs[-1]) if layer.form.L.grad is None else layer.form.L.grad.flatten())
    error, allowed = distance(torch.cat(ours), torch.cat(theirs)), distance(torch.cat(own), torch.cat(theirs))
    if not error <= 0.1 + 3 * allowed:
        raise Wrong(f"under autocast gradients are {error:.2g} of their norm away, the dense model's {allowed:.2g}.")


def trained(model: Any, case: Case) -> Any:
    """Off by a little noise in everything that trains."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def saving(case: Case) -> None:
    """A loaded adapter answers as the saved one, bit for bit."""
    model = trained(case.adapted(), case)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = PeftModel.from_pretrained(copy.deepcopy(case.dense), folder).eval()
    ours, theirs = answer(loaded, case.batch), answer(model, case.batch)
    if not torch.equal(ours, theirs) and distance(ours, theirs) > 1e-6:
        raise Wrong(f"a loaded adapter answers {distance(ours, theirs):.2g} of the norm away from the saved one.")


def merging(case: Case) -> None:
    """The merged model is of plain layers, and answers the same."""
    model = trained(case.adapted(residual_product="restored") if case.form == "int8" else case.adapted(), case)
    expected = answer(model, case.batch)
    merged = model.merge_and_unload()
    if any(isinstance(module, WasiLayer) for module in merged.modules()):
        raise Wrong("the merged model still has tuner layers.")
    error = distance(answer(merged, case.batch), expected)
    if error > 1e-3:
        raise Wrong(f"merged, the output is {error:.2g} of its norm away.")


def generation(case: Case, padded: bool = False) -> None:
    """The same tokens with a cache as the dense model, with padding on the left too."""
    if not isinstance(case.dense, GenerationMixin) or not case.dense.can_generate():
        raise Absent("the model does not generate.")
    named = {key: value for key, value in call_arguments(case.batch).named.items() if key != "labels"}
    if padded:
        if case.dense.config.is_encoder_decoder or set(named) != {"input_ids", "attention_mask"}:
            raise Absent("padding on the left is for decoders of text.")
        named["attention_mask"] = named["attention_mask"].clone()
        named["attention_mask"][0, :3] = 0
    options = {"max_new_tokens": 4, "do_sample": False, "use_cache": True, "num_beams": 1}

    def tokens(model: Any) -> Tensor:
        torch.manual_seed(0)
        result: Tensor = model.eval().generate(**named, **options)
        return result

    only_if_dense_does(lambda: tokens(copy.deepcopy(case.expected)))
    expected = tokens(copy.deepcopy(case.expected))
    ours = tokens(case.adapted(lossless=True))
    if ours.shape != expected.shape or not torch.equal(ours, expected):
        raise Wrong("it generates other tokens than the dense model.")


CHECKS: Mapping[str, Callable[[Case], str | None]] = {
    "targets": targets,
    "output": output,
    "gradients": gradients,
    "step": step,
    "fast": functools.partial(memory_mode, mode="fast"),
    "fast, slices": functools.partial(memory_mode, mode="fast", in_slices=True),
    "small": functools.partial(memory_mode, mode="small"),
    "small, slices": functools.partial(memory_mode, mode="small", in_slices=True),
    "estimate": estimate,
    "prepare": preparation,
    "checkpointing": functools.partial(checkpointing, use_reentrant=False),
    "reentrant": functools.partial(checkpointing, use_reentrant=True),
    "bf16": autocast,
    "save": saving,
    "merge": merging,
    "generate": generation,
    "left padding": functools.partial(generation, padded=True),
}


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class Result:
    """What came of a check: "works", "absent" (of the dense model too), "refused" in a sentence, or "fails"."""

    status: str
    text: str = ""
    trace: str = ""


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if type(error) in (Wrong, Absent, ValueError) else f"{type(error).__name__}: {text}"


def only_if_dense_does(function: Callable[[], Any]) -> None:
    try:
        function()
    except Absent:
        raise
    except Exception as error:
        raise Absent(f"the dense model cannot: {one_line(error)}") from None


def _is_refusal(error: Exception) -> bool:
    """Whether this package raised it on purpose: its own raise, of a kind that it refuses with."""
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    raised_here = Path(last.filename).is_relative_to(PACKAGE) and (last.line or "").lstrip().startswith("raise")
    return raised_here and isinstance(error, (ValueError, TypeError, NotImplementedError))


def check(case: Case, name: str) -> Result:
    """Runs one check and tells what came of it."""
    if name in case.family.endless:
        return Result("absent", "it never ends for the dense model.")
    try:
        return Result("works", CHECKS[name](case) or "")
    except Absent as error:
        return Result("absent", one_line(error))
    except Exception as error:
        status = "refused" if _is_refusal(error) else "fails"
        return Result(status, one_line(error), traceback.format_exc(limit=-6))
