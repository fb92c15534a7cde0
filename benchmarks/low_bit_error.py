"""What few bits do to products, gradients and whole models, with the inputs and gradients of real models.

DINOv2-small on 32 images at 56 px and SmolLM2-135M on 4 mails of 128 tokens, by their own losses. In every layer that
WASI takes, the input x and the output gradient dY of a backward pass of the dense model are caught, and products and
gradients of the residual form are compared with float64 ones of the dense weight: relative errors (Frobenius norm) of
y = x Q^T, dX = dY Q, and of the gradients of x, L and R, by how Q is kept and multiplied. The median of each kind of
layer is shown, and the worst layers by name. "own error" is against the weight as it was rounded: that of the product
alone. One table has the product with 0 to 16 columns of x that are multiplied as they are. What makes rows hard to
round is their largest entry over their root mean square, also shown. SmolLM2 was published in groups of 4 bits of the
same kind, so int4 loses nothing of this copy of it: that row says nothing.

Rounding of dY is compared with stochastic rounding: the error of one product, that of the mean of 16 draws (which
stochastic rounding lowers and nearest rounding cannot), that of the sum of all rows over the norm of dX (as large as
that of one product where the rows' errors are independent), and the bias along dX, <dX', dX> / <dX, dX> - 1.

Whole models with each kind of weight and product, untrained: accuracy of a probe on 1,000 test images, perplexity of
192 mails. Results: docs/benchmarks/low_bit_error.json; minutes, and no timing::

    python benchmarks/low_bit_error.py
    python benchmarks/low_bit_error.py --models smollm2 --no-models
"""

import argparse
import copy
import re
import statistics
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

import wasi_peft
from common import RESULTS_FOLDER, environment, read_json, write_json
from initial_factors import TASKS
from wasi_peft.forms import products
from wasi_peft.forms.products import PRODUCTS, IntegerProduct, ProductChoice, WeightOnlyProduct
from wasi_peft.forms.residual import RESIDUALS, Residual
from wasi_peft.linalg.coordinates import addition_basis
from wasi_peft.linalg.low_bit import LARGEST_CODE, quantize_rows
from wasi_peft.tuner.config import RESIDUAL_RANK
from wasi_peft.tuner.targets import default_target_names
from wasi_peft.updates.addition import addition_linear
from workloads import WORKLOADS, fashion_images

RESULTS = RESULTS_FOLDER / "low_bit_error.json"
WAYS = {  # how the weight is kept, and by which product
    "int8, rows rounded": ("int8", "int8"),
    "int8 weight alone": ("int8", "restored"),
    "int8 weight, bfloat16 rows": ("int8", "bfloat16"),
    "int4": ("int4", None),
}
ROUNDING, OUTLIERS = "rounding of dY", "largest over root mean square"
COLUMNS = "rows rounded, but for the largest columns"
DRAWS, WORST, KEPT = 16, 5, (0, 4, 8, 16)


def batch_of(model: str) -> dict[str, Tensor]:
    """The batch that a backward pass is run on, labels included."""
    if model == "dinov2":
        return dict(fashion_images(32, 56))
    return {name: tensor[:4] for name, tensor in WORKLOADS["smollm2"].batch().items()}


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the difference over that of the reference."""
    return float((value.double() - reference).norm() / reference.norm().clamp_min(torch.finfo(torch.float64).tiny))


def catch(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[nn.Linear, Tensor, Tensor]]:
    """Layers by name, each with the rows of its input and of its output gradient in one backward pass."""
    caught: dict[str, tuple[nn.Linear, Tensor, Tensor]] = {}
    handles = []
    for name in default_target_names(model, wasi_peft.WasiConfig()):

        def hook(layer: Any, inputs: Any, output: Tensor, name: str = name) -> None:
            x = inputs[0].detach().flatten(0, -2)
            output.register_hook(lambda dY: caught.update({name: (layer, x, dY.flatten(0, -2))}))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    model.train()
    model(**batch).loss.backward()
    for handle in handles:
        handle.remove()
    return dict(sorted(caught.items()))


def layer_errors(layer: nn.Linear, x: Tensor, dY: Tensor) -> dict[str, dict[str, float]]:
    """Relative errors of one layer by how its weight is kept and multiplied."""
    weight = layer.weight.detach()
    rank = min(RESIDUAL_RANK, *weight.shape)
    R = addition_basis(weight, rank)
    L = torch.randn(len(weight), rank, generator=torch.Generator().manual_seed(0)) * weight.std() / rank
    exact = gradients(weight, L, R, x, dY)
    errors: dict[str, dict[str, float]] = {}
    for name, (kind, product) in WAYS.items():
        residual = RESIDUALS[kind](layer, ProductChoice(product))
        rounded = gradients(residual.dense_weight(), L, R, x, dY)
        x_leaf, L_leaf, R_leaf = (tensor.clone().requires_grad_() for tensor in (x, L, R))
        y = addition_linear(x_leaf, residual, L_leaf, R_leaf, None, quantize_rows(x, products.OUTLIERS))
        y.backward(dY)
        found = (residual.product(x), residual.transposed_product(dY), x_leaf.grad, L_leaf.grad, R_leaf.grad)
        kinds = ("product", "transposed product", "gradient of x", "gradient of L", "gradient of R")
        errors[name] = {kind: relative(value, true) for kind, value, true in zip(kinds, found, exact, strict=True)}
        for kind, value, own in zip(kinds[:2], found, rounded, strict=False):
            errors[name][f"{kind}, own error"] = relative(value, own)
        errors[name]["weight"] = relative(residual.dense_weight(), weight.double())
    errors[ROUNDING] = stochastic_errors(RESIDUALS["int8"](layer), dY)
    errors[OUTLIERS] = {"x": outliers(x), "dY": outliers(dY)}
    residual = RESIDUALS["int8"](layer, ProductChoice("int8"))
    errors[COLUMNS] = {
        f"{count} columns": relative(residual.product(x, quantize_rows(x, count)), exact[0]) for count in KEPT
    }
    return errors


def outliers(rows: Tensor) -> float:
    """Median over rows of the largest entry over the root mean square."""
    return float((rows.abs().amax(1) / rows.square().mean(1).sqrt().clamp_min(1e-30)).median())


def gradients(weight: Tensor, L: Tensor, R: Tensor, x: Tensor, dY: Tensor) -> tuple[Tensor, ...]:
    """x Q^T, dY Q and the gradients of x, L and R, in float64."""
    weight, L, R, x, dY = (tensor.double() for tensor in (weight, L, R, x, dY))
    back = dY @ weight
    return x @ weight.T, back, back + dY @ L @ R, dY.T @ (x @ R.T), (dY @ L).T @ x


def stochastic_errors(residual: Residual, dY: Tensor) -> dict[str, float]:
    """Errors of dY Q by how the rows of dY are rounded, against the same int8 weight."""
    codes, scale = residual.codes, residual.scale
    exact = dY.double() @ residual.dense_weight().double()
    scaled = dY * scale.t()
    row_scale = (scaled.abs().amax(1, keepdim=True) / LARGEST_CODE).clamp_min(torch.finfo(torch.float32).tiny)
    generator = torch.Generator().manual_seed(0)
    draws = []
    for _ in range(DRAWS):
        noise = torch.rand(scaled.shape, generator=generator)
        rows = (scaled / row_scale + noise).floor_().clamp_(-LARGEST_CODE, LARGEST_CODE).to(torch.int8)
        draws.append(torch._int_mm(rows, codes).double() * row_scale)
    nearest = IntegerProduct.transposed(dY, codes, scale)
    result = {}
    for name, one, mean in (("nearest", nearest, nearest), ("stochastic", draws[0], torch.stack(draws).mean(0))):
        result[f"{name}: one product"] = relative(one, exact)
        result[f"{name}: mean of {DRAWS}"] = relative(mean, exact)
        result[f"{name}: sum of the rows"] = float((one.double() - exact).sum(0).norm() / exact.norm())
        result[f"{name}: bias along dX"] = float((one.double() * exact).sum() / exact.square().sum() - 1)
    return result


def whole_models(model: str) -> dict[str, float]:
    """Quality of the untrained model with each kind of weight and product."""
    dense, _, evaluate = TASKS[model](0)
    (metric,) = evaluate(dense).items()
    results = {"dense": metric[1]}
    for name, (kind, product) in WAYS.items():
        config = wasi_peft.WasiConfig(residual=kind, residual_product=product)
        rounded = peft.get_peft_model(copy.deepcopy(dense), config)
        results[name] = evaluate(rounded)[metric[0]]
        print(f"{model}, {name}: {metric[0]} {results[name]:.4f}, dense {metric[1]:.4f}", flush=True)
    return results


def kind_of(name: str) -> str:
    """What layers of all blocks are called."""
    return re.sub(r"^.*\.\d+\.", "", name)


def table(layers: dict[str, dict[str, dict[str, float]]], way: str) -> str:
    """Formats the median of each kind of layer, and the layers whose first error is largest."""
    quantities, scale = list(next(iter(layers.values()))[way]), 1 if way == OUTLIERS else 100
    lines = [
        f"| {way}{', %' if scale == 100 else ''} | {' | '.join(quantities)} |",
        f"|{(1 + len(quantities)) * ' --- |'}",
    ]
    kinds: dict[str, list[dict[str, float]]] = {}
    for name, ways in layers.items():
        kinds.setdefault(kind_of(name), []).append(ways[way])
    worst = sorted(layers, key=lambda name: layers[name][way][quantities[0]], reverse=True)[:WORST]
    rows = [(f"{kind} ({len(found)})", found) for kind, found in kinds.items()]
    for title, found in [*rows, *((f"worst: {name}", [layers[name][way]]) for name in worst)]:
        cells = [f"{scale * statistics.median(errors[quantity] for errors in found):.3f}" for quantity in quantities]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures the models asked for and prints tables; those measured before stay in the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("dinov2", "smollm2"), default=["dinov2", "smollm2"])
    parser.add_argument("--layers", type=int, help="only that many layers (default: all)")
    parser.add_argument("--no-models", action="store_true", help="leave the quality of whole models out")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", message=".*head")
    # the product of few rows rounds them as "bfloat16" does
    assert {product for _, product in WAYS.values()} - {None} == set(PRODUCTS) - {WeightOnlyProduct.name}
    content = read_json(args.results)
    for model in args.models:
        caught = list(catch(WORKLOADS[model].load(), batch_of(model)).items())[: args.layers]
        layers = {name: layer_errors(*found) for name, found in caught}
        entry: dict[str, Any] = {"layers": layers, "environment": environment()}
        for way in (*WAYS, COLUMNS, ROUNDING, OUTLIERS):
            print(f"\n{model}\n\n{table(layers, way)}", flush=True)
        if not args.no_models:
            entry["quality"] = whole_models(model)
        content[model] = entry
        write_json(args.results, content)
    return content


if __name__ == "__main__":
    main()
