"""From a dense checkpoint to a compressed one in bounded memory: one transformer block at a time.

The result is what :func:`compressed.compress` and `save_pretrained` write. Every part of it, the tensors of a block or
some of those around the blocks, is a file of its own, written as soon as it is known; in the end they are joined. With
data, blocks run on hidden states that are kept in files (:mod:`sweeps`): beside a weight in few bits one sweep gives
the additions; factors take a sweep forward, one back for the gradients of outputs, and, once the ranks of all layers
are known, one that writes.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import convert_file_size_to_int

from ..factors.additions import ADDITION_BATCHES, prepared_addition
from ..factors.calibration import Calibration, save_layer
from ..factors.collecting import Gradients, log_unreached
from ..factors.data import batch_checksum, check_repeatable, describe_data, limited
from ..factors.folder import new_index, read_index, write_index
from ..factors.prepare import prepared_factors, resolve_ranks
from ..factors.statistics import InputStatistics
from ..files.folders import check_apart
from ..files.headers import read_header
from ..files.joining import join_files
from ..files.objects import read_object
from ..forms.compressed import CompressedLinear
from ..forms.compressed_stack import CompressedStack
from ..forms.compressing import compressed
from ..forms.dense import dense_weight
from ..forms.products import ProductChoice
from ..forms.residual import RESIDUALS
from ..forms.stored import STORABLE, key_of
from ..models.experts import ExpertStack, conceal_experts, expose_experts
from ..tuner.config import WasiConfig
from ..tuner.prepared import PreparedLayer
from ..tuner.targets import check_targets, check_weight, log_left_dense, resolve_targets, selected_modules
from .checkpoint import checkpoint_dtype, checkpoint_folder, stored_tensors_of
from .packed import RANKS_STEP, ExpertPreparation
from .settings import write_settings
from .skeleton import Skeleton
from .sweeps import BlockSweeps, Keep
from .working import WorkingFolder, check_output, write_json, write_tensors

SHARD_SIZE = "5GB"
_PARTS = "parts"  # in the working folder
PART_BYTES = 2**26  # of tensors outside of blocks that are written together
SUMS_WORK = 16  # how many times as long as writing a block it takes about to find out what the data say of it
Prepare = Callable[[str, nn.Module], PreparedLayer]


def prepare_checkpoint(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str],
    config: WasiConfig | None = None,
    data: Iterable[Any] | None = None,
    *,
    gradients: Gradients | None = "features",
    max_batches: int | None = None,
    max_memory_bytes: int = 2**30,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    overwrite: bool = False,
    progress_bar: bool = True,
) -> Path:
    """Write a compressed checkpoint of a dense one that need not fit into memory.

    The folder is one that [`compress`] and `save_pretrained` would write, with a model card, and is loaded in the same
    way. Tensors of the checkpoint that the model does not have, such as another head, are left out, as transformers
    does; one line of a log names them.
    At any time there are the dense weights of one transformer block, or a tensor outside of the blocks, and what is
    computed of them; with data, for a while, those before the first block and behind the last. Hidden states of the
    samples are kept in files, beside the output.

    Layers are what they become in memory, without the repair that follows there: factors lose more here, so prefer
    [`compress`] for models that fit. Packed experts are read from a checkpoint that holds them one by one, too.

    An interrupted run leaves a folder `output + ".partial"`; the same call goes on from there.

    Args:
        model: Folder or hub id of a dense checkpoint of transformers, in safetensors files.
        output: Folder to write. It appears when it is complete.
        config: Which form, as for [`compress`], and which layers; by default 8 bits.
        data: Calibration batches without labels, always the same, in the same order: what factors need, and what
            improves weights in few bits, which need none.
        gradients: For factors: "features" weighs the errors of outputs by what they do to the model's features, as
            [`calibrate_wasi`] does; None counts them as they are, and leaves out a sweep.
        max_batches: Use the first so many; by default 8 beside weights in few bits, and all for factors.
        max_memory_bytes: Bound on the memory for sums over the data, bytes; a block runs again for those above it.
        dtype: Of the model; by default what its configuration says, else that of the checkpoint.
        revision: Of a hub id.
        max_shard_size: Of a file of the result, bytes or a text such as "2GB"; a block is never parted.
        overwrite: Whether a folder that is there may be replaced, when the new one is complete.
        progress_bar: Show a progress bar.

    Returns:
        The output folder.

    Raises:
        ValueError: If the checkpoint is damaged, does not fit its configuration, or is not in safetensors files; the
            configuration asks for something that it does not allow, or for factors without data; data are empty, a
            function or can be iterated only once; blocks of the model cannot be run one after the other with data; the
            output exists; or an interrupted preparation with other arguments is in the way. Nothing has been written
            then.
        OSError: If a file cannot be read or written, or the hub not be reached.

    Example:
        >>> from transformers import AutoModel, ViTConfig, ViTModel
        >>> folder = getfixture("tmp_path")
        >>> vit = ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
        >>> ViTModel(vit).save_pretrained(folder / "dense")
        >>> small = prepare_checkpoint(folder / "dense", folder / "small", progress_bar=False)
        >>> AutoModel.from_pretrained(small).layers[0].mlp.fc1.form_name
        'int8'
    """
    if not isinstance(config, (WasiConfig, type(None))):
        raise TypeError(f"config must be a WasiConfig, got {type(config).__name__}.")
    config = WasiConfig() if config is None else copy.copy(config)
    if config.residual == "exact":
        raise ValueError("residual='exact' keeps the dense weights; choose 'int8', 'int4' or factors.")
    if gradients not in ("features", None):
        raise ValueError(f"gradients must be 'features' or None, got {gradients!r}.")
    if callable(data):
        raise ValueError(
            "data must be batches here, since no model is there that a function could run; got a function."
        )
    if data is not None:
        check_repeatable(data)
    shard_bytes = convert_file_size_to_int(max_shard_size)
    check_output(os.fspath(output), overwrite)
    folder = checkpoint_folder(model, revision)
    check_apart(output, {"the dense checkpoint": folder})
    loaded = _read_config(folder)
    stored = stored_tensors_of(folder)
    dtype = dtype or loaded.dtype or checkpoint_dtype(stored)
    skeleton = Skeleton(loaded, dtype, stored, runs=data is not None)
    targets = _targets(skeleton.model, config)
    if not targets:
        raise ValueError(f"target_modules must match at least one module, got {config.target_modules!r}.")
    makes_factors = _makes_factors(targets, config, data)
    batches: list[Any] = []
    if data is not None:
        count = ADDITION_BATCHES if max_batches is None and not makes_factors else max_batches
        batches = list(limited(data, count, None))
    skeleton.model.name_or_path = os.fspath(model)
    fingerprint = {
        "checkpoint": skeleton.checkpoint.identity,
        "model": {key: value for key, value in loaded.to_dict().items() if key != "_name_or_path"},
        "config": _plain(config),
        "data": [batch_checksum(batch) for batch in batches],
        "gradients": gradients if makes_factors else None,
        "dtype": str(dtype),
        "max_shard_size": shard_bytes,
    }
    linear = {name: module for name, module in targets.items() if not isinstance(module, ExpertStack)}
    sweeps = BlockSweeps(skeleton, batches, linear, max_memory_bytes) if batches else None
    work = WorkingFolder(output, fingerprint, overwrite)
    preparation = _Preparation(skeleton, config, targets, work, progress_bar)
    if sweeps is None:
        preparation.write_rounded()
    else:
        sweeps.begin(work)
        if makes_factors and linear:
            preparation.write_factors(sweeps, gradients)
        elif makes_factors:
            preparation.write_experts(sweeps)
        else:
            preparation.write_additions(sweeps)
    preparation.write_rest(folder, shard_bytes)
    work.publish()
    return Path(output)


class _Preparation:
    """One preparation: the parts of its result, and what is done to get them.

    Args:
        skeleton: Of the dense model.
        config: With targets resolved.
        targets: Layers and packed experts to compress, by name.
        work: Where the result is made.
        progress_bar: Whether to show one.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        config: WasiConfig,
        targets: dict[str, nn.Module],
        work: WorkingFolder,
        progress_bar: bool,
    ) -> None:
        self.skeleton, self.config, self.targets, self.work = skeleton, config, targets, work
        self.experts = ExpertPreparation(skeleton, config, targets, work)
        self.parts = [skeleton.inside(block) for block in skeleton.blocks] + list(_packed(skeleton))
        self.progress_bar = progress_bar
        self._work: dict[str, int] = {}  # of each step, for the progress bar

    # ---------------------------------------------------------------- the ways

    def write_rounded(self) -> None:
        """Weights in few bits, without data."""
        self._begin(part=1)
        for part in range(len(self.parts)):
            self._step(f"part {part}", self._write_part, part)

    def write_additions(self, sweeps: BlockSweeps) -> None:
        """Weights in few bits, and additions that make good for what rounding loses."""
        self._begin(part=1 + SUMS_WORK)
        count, unreached = len(sweeps.blocks), list[str]()

        def write(part: int) -> dict[str, Any]:
            additions: dict[str, PreparedLayer] = {}

            def keep(name: str, module: nn.Module, statistics: InputStatistics) -> None:
                check_weight(name, dense_weight(module), self.config)
                unreached.extend([] if statistics.rows else [name])
                additions[name] = prepared_addition(name, module, self.config, statistics)

            if part < count:
                sweeps.forward(part, keep)
            return self._write_part(part, lambda name, module: additions[name])

        for part in range(len(self.parts)):
            self._step(f"part {part}", write, part)
            sweeps.forget("hidden", part)
        log_unreached(unreached)

    def write_experts(self, sweeps: BlockSweeps) -> None:
        """Factors in place of packed experts alone."""
        self._begin(experts=SUMS_WORK, forward=1, part=1)
        self._step(RANKS_STEP, self.experts.ranks)
        for block in range(len(sweeps.blocks)):
            self._step(f"experts {block}", sweeps.experts, block, self.experts.stacks, self.experts.keep)
            self._step(f"forward {block}", sweeps.forward, block)
            sweeps.forget("hidden", block)
        for part in range(len(self.parts)):
            self._step(f"part {part}", self._write_part, part)

    def write_factors(self, sweeps: BlockSweeps, gradients: Gradients | None) -> None:
        """Factors in place of the weights: spectra of all layers, then their ranks, then the factors."""
        kinds = {"forward": SUMS_WORK} if gradients is None else {"forward": 1, "backward": SUMS_WORK}
        self._begin(**({"experts": SUMS_WORK} if self.experts.stacks else {}), **kinds, part=1)
        folder, settings = self.work.at("calibration"), {"gradients": gradients, "seed": sweeps.seed}
        os.makedirs(folder, exist_ok=True)
        linear = {name: module for name, module in self.targets.items() if name not in self.experts.stacks}
        index = read_index(folder) or new_index(linear, settings, describe_data(sweeps.batches, None))

        def collect(block: int, run: Callable[[int, Keep], None]) -> None:
            for name in [name for name in index["layers"] if name.startswith(f"{sweeps.blocks[block]}.")]:
                del index["layers"][name]  # of a run that ended just before it was noted that the block is done

            def keep(name: str, module: nn.Module, statistics: InputStatistics) -> None:
                check_weight(name, dense_weight(module), self.config)
                save_layer(folder, index, name, module, statistics, rounding=False)

            run(block, keep)
            write_index(folder, index)

        order = range(len(sweeps.blocks))
        if self.experts.stacks:
            self._step(RANKS_STEP, self.experts.ranks)
        for block in order:
            if self.experts.stacks:
                self._step(f"experts {block}", sweeps.experts, block, self.experts.stacks, self.experts.keep)
            if gradients is None:
                self._step(f"forward {block}", collect, block, sweeps.forward)
                sweeps.forget("hidden", block)
            else:
                self._step(f"forward {block}", sweeps.forward, block)
        if gradients is not None:
            self._step("features", sweeps.features)
            for block in reversed(order):
                self._step(f"backward {block}", collect, block, sweeps.backward)
                sweeps.forget("hidden", block + 1)
                sweeps.forget("gradient", block + 1)
        log_unreached([name for name, entry in index["layers"].items() if not entry["rows"]])
        calibration = Calibration(folder, index)
        resolve_ranks(self.config, calibration, linear)

        def prepare(name: str, module: nn.Module) -> PreparedLayer:
            return prepared_factors(name, module, self.config, calibration)

        for part in range(len(self.parts)):
            self._step(f"part {part}", self._write_part, part, prepare)

    # ---------------------------------------------------------------- steps

    def _begin(self, **work: int) -> None:
        """Show how much is to be done, and how much was done before.

        Args:
            **work: By kind of step, how many times as long as writing a block it takes for each.
        """
        blocks, sizes = len(self.skeleton.blocks), map(self.skeleton.checkpoint.total_bytes, self.parts)
        for part, size in enumerate(sizes):
            for kind, times in work.items():
                if part < blocks or kind == "part":
                    self._work[f"{kind} {part}"] = size * (times if part < blocks else 1)
        done = sum(size for step, size in self._work.items() if step in self.work.steps)
        total, form = sum(self._work.values()), "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        self.bar = tqdm(
            desc="WASI preparation", total=total, initial=done, bar_format=form, disable=not self.progress_bar
        )

    def _step(self, step: str, run: Callable[..., Any], *arguments: Any) -> None:
        """A step, unless it was done before."""
        if step not in self.work.steps:
            self.work.finish(step, run(*arguments))
            self.bar.update(self._work.get(step, 0))

    def _write_part(self, part: int, prepare: Prepare | None = None) -> dict[str, Any]:
        """A part of the result; returns what the config says of its layers, and its bytes."""
        skeleton, tensors, layers = self.skeleton, dict[str, Tensor](), dict[str, Any]()
        for name in self.parts[part]:
            owner = name.rpartition(".")[0]
            if name in self.experts.stacks:
                stack = self.experts.compressed(name)
                if isinstance(stack, CompressedStack):
                    layers[name] = stack.stored_form.entry()
                    tensors |= {key_of(name, part, packed=True): tensor for part, tensor in stack.stored().items()}
                else:
                    tensors[name] = stack.weight
            elif owner not in self.targets:
                tensors[name] = skeleton.checkpoint.read(name)
            elif f"{owner}.weight" == name:
                module = self.targets[owner]
                with skeleton.filled([f"{owner}.{leaf}" for leaf in module.state_dict()]):
                    layer = self._compressed(owner, module, prepare)
                    if isinstance(layer, CompressedLinear):
                        layers[owner] = layer.stored_form.entry()
                    stored = layer.stored() if isinstance(layer, CompressedLinear) else layer.state_dict()
                    tensors |= {f"{owner}.{leaf}": tensor.detach() for leaf, tensor in stored.items()}
        os.makedirs(self.work.at(_PARTS), exist_ok=True)
        write_tensors(self._file(part), tensors)
        return {"layers": layers, "bytes": sum(tensor.nbytes for tensor in tensors.values())}

    def _file(self, part: int) -> str:
        return self.work.at(_PARTS, f"{part:05d}.safetensors")

    @torch.no_grad()
    def _compressed(self, name: str, module: nn.Module, prepare: Prepare | None) -> nn.Module:
        """What becomes of a layer; a dense one where no form would be smaller."""
        config, weight = self.config, dense_weight(module)
        check_weight(name, weight, config)
        residual = config.residual_of(name)
        if residual is not None and residual not in STORABLE:
            return module
        frozen = None if residual is None else RESIDUALS[residual](module)
        if prepare is None:
            assert frozen is not None
            return CompressedLinear(frozen)
        prepared = prepare(name, module)
        initial = dataclasses.replace(prepared.initial, residual=frozen)
        update = config.update_of(name)
        form = update.form_of(initial, prepared.rank, type(module))
        update.store(form, ProductChoice(config.residual_product))
        return compressed(form, weight.dtype) or form.to_dense().to(weight.dtype)

    # ---------------------------------------------------------------- what is beside the weights

    def write_rest(self, folder: str, shard_bytes: int) -> None:
        """Configurations, the card, and the files of tokenizers and processors, as they are in the dense folder.

        Args:
            folder: Of the dense checkpoint.
            shard_bytes: Largest size of a file with several parts.
        """
        result, parts = self.work.result, [self.work.steps[f"part {part}"] for part in range(len(self.parts))]
        layers = {name: entry for part in parts for name, entry in part["layers"].items()}
        self._write_shards([part["bytes"] for part in parts], shard_bytes)
        entries = {name: layers[name] for name in self.targets if name in layers}
        write_settings(self.skeleton.model, folder, result, entries, self.targets)
        self.bar.close()

    def _write_shards(self, sizes: list[int], shard_bytes: int) -> None:
        """The files of weights: as many parts in each as may be together, and an index where there are several."""
        shards: list[list[int]] = [[]]
        for part, size in enumerate(sizes):
            if shards[-1] and sum(sizes[other] for other in shards[-1]) + size > shard_bytes:
                shards.append([])
            shards[-1].append(part)
        count, names = len(shards), [SAFE_WEIGHTS_NAME]
        if count > 1:
            names = [f"model-{shard + 1:05d}-of-{count:05d}.safetensors" for shard in range(count)]
        paths = [os.path.join(self.work.result, name) for name in names]
        for path, shard in zip(paths, shards, strict=True):
            files, step = [self._file(part) for part in shard], f"shard {shard[0]}"
            if step in self.work.steps and not os.path.isfile(path):
                raise ValueError(f"{path} must be there, since it has been written. Remove {self.work.path!r}.")
            self._step(step, join_files, files, path)
            for file in files:
                with suppress(FileNotFoundError):
                    os.remove(file)
        if count > 1:
            weight_map = {key: name for path, name in zip(paths, names, strict=True) for key in read_header(path)}
            index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
            write_json(os.path.join(self.work.result, SAFE_WEIGHTS_INDEX_NAME), index)


# ---------------------------------------------------------------- what is asked for


def _targets(model: nn.Module, config: WasiConfig) -> dict[str, nn.Module]:
    """Layers and packed experts that a configuration selects in a skeleton, checked, by name."""
    expose_experts(model)
    try:
        log_left_dense(resolve_targets(model, config), config)
        check_targets(model, config, skeleton=True)
        return dict(selected_modules(model, config))
    finally:
        conceal_experts(model)


def _read_config(folder: str) -> PretrainedConfig:
    path = os.path.join(folder, CONFIG_NAME)
    if not os.path.isfile(path):
        raise ValueError(f"{folder!r}: a checkpoint must have a {CONFIG_NAME}, got none.")
    read_object(path)  # which names it where it is none
    config: PretrainedConfig = AutoConfig.from_pretrained(folder)
    known = getattr(config, "quantization_config", None)
    if known is not None:
        method = known.get("quant_method") if isinstance(known, dict) else known.quant_method
        raise ValueError(f"{folder!r}: the checkpoint must be dense, got one that is quantized by {method!r}.")
    return config


def _makes_factors(targets: Iterable[str], config: WasiConfig, data: Any) -> bool:
    """Whether weights are replaced by factors, rather than kept in few bits.

    Raises:
        ValueError: If both, or factors without data.
    """
    kinds = {config.residual_of(name) is None for name in targets}
    if len(kinds) > 1:
        raise ValueError(
            "a plan must make all its layers factors, or none, to be prepared block by block; got one with both. Use "
            "compress."
        )
    if True in kinds and data is None:
        raise ValueError("factors in the weights' place are prepared from data, got none.")
    return True in kinds


def _plain(config: WasiConfig) -> dict[str, Any]:
    """A configuration as JSON has it, sets in order."""
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return {key: getattr(value, "value", value) for key, value in fields.items()}


def _packed(skeleton: Skeleton) -> Iterable[list[str]]:
    """Tensors that are in no block, in groups of about :data:`PART_BYTES`, large ones alone."""
    group: list[str] = []
    for name in skeleton.outside:
        if group and skeleton.checkpoint.total_bytes([*group, name]) > PART_BYTES:
            yield group
            group = []
        group.append(name)
    if group:
        yield group
