"""Tiny models of seven architectures, built from their configurations, with batches that carry labels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from peft import get_peft_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from wasi_peft import WasiConfig
from wasi_peft.forms.residual import RESIDUALS
from wasi_peft.updates import UPDATES

Batch = dict[str, Tensor]

LABELS = 3
VOCABULARY = 23


def _vit() -> nn.Module:
    return tf.ViTForImageClassification(
        tf.ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            image_size=8,
            patch_size=4,
            num_labels=LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _dinov2() -> nn.Module:
    return tf.Dinov2ForImageClassification(
        tf.Dinov2Config(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            mlp_ratio=2,
            image_size=8,
            patch_size=4,
            num_labels=LABELS,
            layerscale_value=0.5,
        )
    )


def _swin() -> nn.Module:
    return tf.SwinForImageClassification(
        tf.SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=8,
            depths=[1, 1],
            num_heads=[2, 2],
            window_size=4,
            mlp_ratio=2,
            num_labels=LABELS,
            drop_path_rate=0.0,
        )
    )


def _bert() -> nn.Module:
    return tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=12,
            num_labels=LABELS,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def _gpt2() -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_inner=24,
            n_positions=12,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=1,
        )
    )


def _llama(tied: bool) -> nn.Module:
    return tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            max_position_embeddings=12,
            tie_word_embeddings=tied,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY,
            d_model=16,
            d_kv=8,
            d_ff=24,
            num_layers=2,
            num_decoder_layers=1,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


def _image_batch(size: int) -> Callable[[int, int], Batch]:
    def batch(samples: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(samples, 3, size, size, generator=generator),
            "labels": torch.randint(LABELS, (samples,), generator=generator),
        }

    return batch


def _text_batch(labels: str) -> Callable[[int, int], Batch]:
    def batch(samples: int, seed: int) -> Batch:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, VOCABULARY, (samples, 7), generator=generator)
        result = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if labels == "class":
            result["labels"] = torch.randint(LABELS, (samples,), generator=generator)
        elif labels == "same":
            result["labels"] = tokens.clone()
        else:
            result["labels"] = torch.randint(3, VOCABULARY, (samples, 5), generator=generator)
        return result

    return batch


@dataclass(frozen=True)
class Architecture:
    """One tiny model.

    Attributes:
        name: For test ids.
        build: Builds the model with the initial weights of its class.
        make_batch: Batch with labels, of a number of samples, from a seed.
        auto_class: Name of PEFT's auto class that loads an adapter with its base model.
        dense: Names of the Linear layers that are no part of a block and stay dense by default.
        target_count: Number of Linear and Conv1D layers inside the blocks.
        example: End of the name of one layer kind in every block, for explicit targets.
        layers_pattern: Name of the module list that holds the blocks.
        vectors: Parts of names; a parameter outside the targets trains with `train_vectors` if its name has one.
    """

    name: str
    build: Callable[[], nn.Module]
    make_batch: Callable[[int, int], Batch]
    auto_class: str
    dense: frozenset[str]
    target_count: int
    example: str
    layers_pattern: str
    vectors: tuple[str, ...]

    def model(self, seed: int = 0) -> Any:
        """The model in eval mode, its weights larger than the usual initial ones.

        At the usual standard deviation of 0.02 the blocks hardly change the output, and a broken one would not show.
        """
        torch.manual_seed(seed)
        model = self.build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 2:
                    parameter.normal_(0.0, 0.3)
                elif name.endswith("bias"):
                    parameter.normal_(0.0, 0.1)
        return model

    def batch(self, samples: int = 4, seed: int = 1, dtype: torch.dtype = torch.float32) -> Batch:
        """Inputs and labels; `dtype` is that of the images, if there are any."""
        batch = self.make_batch(samples, seed)
        return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}

    def inputs(self, samples: int = 4) -> Batch:
        """A batch without labels."""
        return {key: value for key, value in self.batch(samples).items() if key != "labels"}

    def targets(self, model: nn.Module) -> set[str]:
        """Full names of the layers that are targets by default, told by their type and the list of exceptions."""
        kinds = (nn.Linear, Conv1D)
        return {name for name, module in model.named_modules() if isinstance(module, kinds)} - self.dense


ARCHITECTURES: dict[str, Architecture] = {
    architecture.name: architecture
    for architecture in (
        Architecture(
            name="vit",
            build=_vit,
            make_batch=_image_batch(8),
            auto_class="AutoPeftModel",
            dense=frozenset({"classifier"}),
            target_count=12,
            example="fc1",
            layers_pattern="layers",
            vectors=("layernorm", "cls_token", "position_embeddings"),
        ),
        Architecture(
            name="dinov2",
            build=_dinov2,
            make_batch=_image_batch(8),
            auto_class="AutoPeftModel",
            dense=frozenset({"classifier"}),
            target_count=12,
            example="fc1",
            layers_pattern="layer",
            vectors=("norm", "cls_token", "position_embeddings", "layer_scale"),
        ),
        Architecture(
            name="swin",
            build=_swin,
            make_batch=_image_batch(16),
            auto_class="AutoPeftModel",
            dense=frozenset({"classifier", "swin.encoder.layers.0.downsample.reduction"}),
            target_count=12,
            example="fc1",
            layers_pattern="layers",
            vectors=("norm", "relative_position_bias_table"),
        ),
        Architecture(
            name="bert",
            build=_bert,
            make_batch=_text_batch("class"),
            auto_class="AutoPeftModelForSequenceClassification",
            dense=frozenset({"classifier", "bert.pooler.dense"}),
            target_count=12,
            example="query",
            layers_pattern="layer",
            vectors=("LayerNorm",),
        ),
        Architecture(
            name="gpt2",
            build=_gpt2,
            make_batch=_text_batch("same"),
            auto_class="AutoPeftModelForCausalLM",
            dense=frozenset({"lm_head"}),
            target_count=8,
            example="c_attn",
            layers_pattern="h",
            vectors=("ln_",),
        ),
        Architecture(
            name="llama",
            build=lambda: _llama(tied=False),
            make_batch=_text_batch("same"),
            auto_class="AutoPeftModelForCausalLM",
            dense=frozenset({"lm_head"}),
            target_count=14,
            example="q_proj",
            layers_pattern="layers",
            vectors=("norm",),
        ),
        Architecture(
            name="llama_tied",
            build=lambda: _llama(tied=True),
            make_batch=_text_batch("same"),
            auto_class="AutoPeftModelForCausalLM",
            dense=frozenset({"lm_head"}),
            target_count=14,
            example="q_proj",
            layers_pattern="layers",
            vectors=("norm",),
        ),
        Architecture(
            name="t5",
            build=_t5,
            make_batch=_text_batch("other"),
            auto_class="AutoPeftModelForSeq2SeqLM",
            dense=frozenset({"lm_head"}),
            target_count=22,
            example="wi",
            layers_pattern="block",
            vectors=("layer_norm",),
        ),
    )
}


# updates whose factors take a weight's place; the others only add to a frozen one
FACTOR_UPDATES = tuple(name for name, update in UPDATES.items() if not update.needs_residual)
# every update alone and beside every frozen weight that it can be beside: what configurations say of it
FORMS: dict[str, dict[str, Any]] = {
    f"{name} {residual or ''}".strip(): {"update": name, "residual": residual}
    for name, update in UPDATES.items()
    for residual in (None, *RESIDUALS)
    if (update.takes_residual if residual else not update.needs_residual)
}


def form_options(form: str, **options: Any) -> dict[str, Any]:
    """Options of a configuration: of one of :data:`FORMS`, with the dense weight kept, and products exact.

    Args:
        form: Its name.
        **options: Further ones.
    """
    residual = FORMS[form]["residual"]
    kept = {"base_weight": "keep"} if residual is None else {"residual_product": "restored"}
    return {**FORMS[form], **kept, **options}


# every form with everything that it lets become of the dense weight
KEPT_BASES = [
    (form, base)
    for form, options in FORMS.items()
    for base in (("release", "cpu", "keep") if options["residual"] is None else ("release",))
]


def frozen_model(model: nn.Module, form: str, names: Iterable[str]) -> nn.Module:
    """A model whose named layers have the weights that are below the adapters of a form, dense."""
    residual = FORMS[form]["residual"]
    for name in names if residual in ("int8", "int4") else ():
        model.set_submodule(name, RESIDUALS[residual](model.get_submodule(name)).to_dense())
    return model


def wasi_model(model: nn.Module, **options: Any) -> Any:
    """PEFT model at full rank and with the exact input for backward, unless the options say otherwise."""
    return get_peft_model(model, exact_config(**options))


def moved(model: Any, size: float) -> Any:
    """A model all whose trainable parameters are off by noise of a size, always the same."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return model


def exact_config(**options: Any) -> WasiConfig:
    """Configuration that keeps everything: full rank, exact input for backward, unless the options say otherwise.

    Both factors train, by the paper's update.
    """
    exact: dict[str, Any] = {"activation_threshold": None, "update": "subspace"}
    if options.get("residual") is None:
        exact["explained_variance_threshold"] = 1.0
    return WasiConfig(**{**exact, **options})


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Output of a model in eval mode, without a graph."""
    model.eval()
    with torch.no_grad():
        return model(**batch).logits


def input_options(update: str, rank: int = 4) -> dict[str, Any]:
    """Compression of inputs to a feature rank, for the updates that keep inputs."""
    return {} if UPDATES[update].reads_input is None else {"activation_ranks": rank}


def train(model: nn.Module, batch: Batch, steps: int = 2, lr: float = 1e-2) -> list[float]:
    """A few AdamW steps on one batch; returns the loss before each."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def checkpoint_activations(model: Any, options: dict[str, Any] | None = None) -> None:
    """Turn on the model's own gradient checkpointing, by the name that this version of transformers has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
