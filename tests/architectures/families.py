"""The architectures of the matrix, each a tiny model and a batch, one line where sizes by name are enough."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as tf
from tiny import (
    LABELS,
    LENGTH,
    VOCABULARY,
    Batch,
    MakeBatch,
    build,
    image,
    image_and_text,
    integers,
    plain,
    text,
    values,
    video,
    with_lively_weights,
)
from torch import Tensor, nn


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: Unique.
        group: What it is listed under.
        title: What is built: the class, and the package that it is from unless that is transformers.
        make: Builds the tiny model with the initial weights of its class.
        make_batch: A batch of a number of samples.
        needs: Packages that may be absent.
        endless: Checks that never end for the dense model either.
        input_gradients: Whether blocks need a gradient to go back to where all before them is frozen, as for LoRA.
    """

    name: str
    group: str
    title: str
    make: Callable[[], nn.Module]
    make_batch: MakeBatch
    needs: tuple[str, ...] = ()
    endless: tuple[str, ...] = ()
    input_gradients: bool = False

    @property
    def missing(self) -> list[str]:
        return [package for package in self.needs if importlib.util.find_spec(package) is None]

    def model(self, seed: int = 0) -> nn.Module:
        """In eval mode, with weights that make every part matter."""
        torch.manual_seed(seed)
        return with_lively_weights(self.make())

    def batch(self, samples: int = 3, seed: int = 1) -> Batch:
        return self.make_batch(samples, torch.Generator().manual_seed(seed))


FAMILIES: dict[str, Family] = {}


def _add(name: str, group: str, title: str, make: Callable[[], nn.Module], batch: MakeBatch, *needs: str) -> None:
    assert name not in FAMILIES, name
    FAMILIES[name] = Family(name, group, title, make, batch, needs)


def _of(group: str, class_name: str, batch: MakeBatch, name: str = "", **sizes: Any) -> None:
    name = name or re.sub(r"(For[A-Z]|Model|LMHeadModel|MTModel).*$", "", class_name)
    _add(name, group, class_name, lambda: build(class_name, **sizes), batch)


def _encoder(stem: str, batch: MakeBatch | None = None, head: str = "ForSequenceClassification", **sizes: Any) -> None:
    _of("text encoders", stem + head, batch or text(), **sizes)


def _decoder(stem: str, head: str = "ForCausalLM", **sizes: Any) -> None:
    _of("decoders", stem + head, text("same"), **sizes)


def _experts(stem: str, head: str = "ForCausalLM", **sizes: Any) -> None:
    _of("decoders with experts", stem + head, text("same"), **sizes)


def _states(stem: str, head: str = "ForCausalLM", **sizes: Any) -> None:
    _of("state-space models and hybrids", stem + head, text("same"), **sizes)


def _seq2seq(stem: str, head: str = "ForConditionalGeneration", batch: MakeBatch | None = None, **sizes: Any) -> None:
    _of("encoder-decoders", stem + head, batch or text("decoder"), **sizes)


def _speech(class_name: str, batch: MakeBatch, **sizes: Any) -> None:
    _of("speech and sound", class_name, batch, **sizes)


def _vision(stem: str, batch: MakeBatch | None = None, head: str = "ForImageClassification", **sizes: Any) -> None:
    _of("images and video", stem + head, batch or image(), **sizes)


def _dense(class_name: str, batch: MakeBatch | None = None, **sizes: Any) -> None:
    _of("detection, segmentation, depth", class_name, batch or image(labels=None), **sizes)


def _pair(class_name: str, batch: MakeBatch, **sizes: Any) -> None:
    _of("text with images", class_name, batch, **sizes)


def _series(class_name: str, batch: MakeBatch, **sizes: Any) -> None:
    _of("time series", class_name, batch, **sizes)


# ---------------------------------------------------------------- text encoders


def _boxes(samples: int, generator: torch.Generator) -> Tensor:
    """Of the words on a page: left, top, right, bottom."""
    low = integers(generator, samples, LENGTH, 2, high=40)
    return torch.cat([low, low + 20], -1)


for _stem in (
    *("Bert", "Roberta", "DistilBert", "Electra", "Deberta", "DebertaV2", "MPNet", "XLMRoberta", "XLMRobertaXL"),
    *("ModernBert", "NomicBert", "Ernie", "RemBert", "RobertaPreLayerNorm", "MegatronBert", "Data2VecText", "IBert"),
    *("Albert", "RoFormer", "LayoutLM", "Nystromformer", "Yoso", "FNet", "EuroBert", "JinaEmbeddingsV3"),
    *("Camembert",),
):
    _encoder(_stem)
_encoder("MobileBert", true_hidden_size=16, intra_bottleneck_size=16, embedding_size=32)
_encoder("SqueezeBert")
_encoder("Esm", vocab_size=VOCABULARY, pad_token_id=1, mask_token_id=4)
_encoder("ConvBert")
_encoder("Funnel", block_sizes=[1, 1], d_head=8)
_encoder("BigBird", attention_type="original_full")
_encoder("Longformer", text(length=16), attention_window=8)
_encoder("Canine", local_transformer_stride=8, num_hash_buckets=99, downsampling_rate=2)
_encoder("XLNet", d_head=8)
_encoder("XLM")
_encoder("Flaubert")
_encoder("Luke", entity_vocab_size=20, entity_emb_size=16)
_encoder(
    "Lilt",
    text(bbox=_boxes),
    channel_shrink_ratio=2,
    hidden_size=48,
)
_encoder(
    "LayoutLMv3",
    text(
        bbox=_boxes,
        pixel_values=lambda samples, generator: torch.randn(samples, 3, 32, 32, generator=generator),
    ),
    hidden_size=36,
    coordinate_size=6,
    shape_size=6,
    input_size=32,
    patch_size=16,
    max_2d_position_embeddings=99,
)

# ---------------------------------------------------------------- decoders

for _stem in (
    *("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi", "Phi3", "Cohere", "Cohere2", "Olmo", "Olmo2"),
    *("Olmo3", "Granite", "Starcoder2", "StableLm", "Persimmon", "Glm", "Glm4", "Exaone4", "SmolLM3"),
    *("GPTNeoX", "GPTBigCode", "Bloom", "BioGpt", "Helium", "BitNet", "Arcee", "Apertus"),
    *("SeedOss", "DiffLlama", "Ernie4_5", "VaultGemma", "ModernBertDecoder", "Cwm"),
):
    _decoder(_stem)
_decoder("GPT2", "LMHeadModel")
_decoder("CodeGen", rotary_dim=8)
_decoder("Nemotron", num_key_value_heads=2)
_decoder("HunYuanDenseV1", head_dim=8)
_decoder("Ministral", head_dim=8)
_decoder("GPTJ", rotary_dim=8)
_decoder("GPTNeo", attention_types=[[["global", "local"], 1]], window_size=8)
_decoder("OPT")
_decoder("Falcon")
_decoder("Mpt")
_decoder("Gemma3", layer_types=["sliding_attention", "full_attention"])
_decoder(
    "Gemma3n",
    num_hidden_layers=4,
    num_kv_shared_layers=2,
    vocab_size_per_layer_input=VOCABULARY,
    hidden_size_per_layer_input=8,
    intermediate_size=48,
    laurel_rank=8,
    layer_types=["sliding_attention", "full_attention"] * 2,
    activation_sparsity_pattern=[0.0] * 4,
)
_decoder("XGLM")
_decoder("OpenAIGPT", "LMHeadModel")
_decoder("CTRL", "LMHeadModel", dff=48)
_decoder("Doge")
_decoder("Reformer", "ModelWithLMHead", is_decoder=True, feed_forward_size=48, attn_layers=["local", "lsh"],
         local_attn_chunk_length=4, lsh_attn_chunk_length=4, axial_pos_embds=False,
         num_buckets=4, hash_seed=0)  # fmt: skip

for _stem in (
    *("Mixtral", "Qwen3Moe", "Olmoe", "GptOss", "Phimoe", "JetMoe", "GraniteMoe", "GraniteMoeShared", "FlexOlmo"),
    *("MiniMaxM2", "Glm4Moe", "Ernie4_5_Moe"),
):
    _experts(_stem)
_experts("Qwen2Moe")
_experts("DeepseekV2", num_experts_per_tok=2, num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1)
_experts("DeepseekV3", num_key_value_heads=4, n_group=2, topk_group=1, first_k_dense_replace=1)
_experts("Dots1", n_group=1, topk_group=1, first_k_dense_replace=1, n_routed_experts=4, n_shared_experts=1,
         num_experts_per_tok=2)  # fmt: skip
_experts("Llama4", num_experts_per_tok=1, interleave_moe_layer_step=1)
_experts("HunYuanMoEV1", head_dim=8)
_experts("Afmoe")
_experts(
    "LongcatFlash", num_key_value_heads=4, ffn_hidden_size=48, expert_ffn_hidden_size=16, zero_expert_num=2, moe_topk=2
)

_states("Mamba")
_states("Mamba2", num_heads=8, head_dim=8, n_groups=2, chunk_size=8)
_states("FalconMamba")
_states("Jamba", attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
_states("Bamba", mamba_n_heads=8, mamba_d_head=8, mamba_chunk_size=8, attn_layer_indices=[1])
_states("Zamba", num_hidden_layers=5, layers_block_type=["mamba", "mamba", "hybrid", "mamba", "hybrid"],
        use_mamba_kernels=False, attention_hidden_size=64, attention_head_dim=16, num_key_value_heads=4)  # fmt: skip
_states("Zamba2", layers_block_type=["mamba", "hybrid"], num_mem_blocks=1, chunk_size=8, mamba_headdim=8,
        n_mamba_heads=8, use_mamba_kernels=False, num_key_value_heads=4)  # fmt: skip
_states("RecurrentGemma", num_hidden_layers=3, attention_window_size=8, lru_width=32)
_states("Rwkv", attention_hidden_size=32, rescale_every=1)
_states("FalconH1", mamba_n_heads=8, mamba_d_head=8, mamba_d_ssm=64, mamba_chunk_size=8)
_states("NemotronH", layers_block_type=["mamba", "moe", "attention", "mamba"], mamba_num_heads=8, mamba_head_dim=8,
        ssm_state_size=16, n_groups=2, chunk_size=8, use_mamba_kernels=False)  # fmt: skip
_states("Lfm2", layer_types=["conv", "full_attention"])
_states("GraniteMoeHybrid", layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=8, mamba_chunk_size=8)
_states("MiniMax", layer_types=["linear_attention", "full_attention"], block_size=8)
_states("Qwen3Next", layer_types=["linear_attention", "full_attention"], linear_key_head_dim=8,
        linear_value_head_dim=8, linear_num_key_heads=2, linear_num_value_heads=4)  # fmt: skip

# ---------------------------------------------------------------- encoder-decoders

for _stem in ("T5", "UMT5", "MT5", "Bart", "MBart", "Pegasus", "PegasusX", "Blenderbot", "BlenderbotSmall",
              "M2M100", "PLBart", "Mvp"):  # fmt: skip
    _seq2seq(_stem, **({"decoder_start_token_id": 0} if "T5" in _stem else {}))
_seq2seq("Marian", "MTModel", pad_token_id=1, decoder_start_token_id=1)
_seq2seq("LongT5", decoder_start_token_id=0, local_radius=4)
_seq2seq("SwitchTransformers", decoder_start_token_id=0, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1,
         expert_capacity=64)  # fmt: skip
_seq2seq("NllbMoe", encoder_sparse_step=2, decoder_sparse_step=2, expert_capacity=64)
_seq2seq("LED", attention_window=4, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64)
_seq2seq("BigBirdPegasus", attention_type="original_full")
_seq2seq("ProphetNet", num_encoder_attention_heads=4, num_decoder_attention_heads=4)
_seq2seq("FSMT", batch=text("same"), src_vocab_size=VOCABULARY, tgt_vocab_size=VOCABULARY)
_seq2seq("T5Gemma", encoder={}, decoder={}, decoder_start_token_id=0, pad_token_id=0)
_of("encoder-decoders", "BartForCausalLM", text("same"), name="bart decoder alone")

# ---------------------------------------------------------------- speech and sound

_CONVOLUTIONS = {"conv_dim": (16, 16), "conv_kernel": (8, 4), "conv_stride": (8, 4), "num_feat_extract_layers": 2,
                 "num_conv_pos_embedding_groups": 2, "layerdrop": 0.0}  # fmt: skip
_wave = values(1600, key="input_values", labels="class")
for _stem in ("Wav2Vec2", "Hubert", "WavLM", "UniSpeech", "UniSpeechSat", "Data2VecAudio", "Wav2Vec2Conformer"):
    _speech(f"{_stem}ForSequenceClassification", _wave, **_CONVOLUTIONS)
_speech("SEWForSequenceClassification", _wave, **_CONVOLUTIONS, squeeze_factor=2)
_speech("SEWDForSequenceClassification", _wave, **_CONVOLUTIONS, squeeze_factor=2)
_speech("Wav2Vec2BertForSequenceClassification", values(20, 16, key="input_features", labels="class"),
        feature_projection_input_dim=16)  # fmt: skip
_speech("WhisperForConditionalGeneration", values(16, 128, key="input_features", labels="decoder"), pad_token_id=0,
        decoder_start_token_id=1, eos_token_id=2, bos_token_id=1, begin_suppress_tokens=None)  # fmt: skip
_speech("Speech2TextForConditionalGeneration", values(40, 16, key="input_features", labels="decoder"),
        input_feat_per_channel=16, conv_channels=16)  # fmt: skip
_speech("MoonshineForConditionalGeneration", values(4000, key="input_values", labels="decoder"), pad_token_id=0,
        decoder_start_token_id=1)  # fmt: skip
_speech("ASTForAudioClassification", values(32, 16, key="input_values", labels="class"), max_length=32,
        frequency_stride=8, time_stride=8)  # fmt: skip
_speech("ClapModel", values(1, 64, 64, key="input_features", input_ids=lambda s, g: integers(g, s, LENGTH),
                            is_longer=lambda s, g: torch.zeros(s, 1, dtype=torch.bool)),
        audio_config={"depths": [1, 1], "num_attention_heads": [2, 4], "num_hidden_layers": 2, "spec_size": 64,
                      "num_mel_bins": 64, "patch_embeds_hidden_size": 16, "patch_size": 4, "window_size": 4,
                      "hidden_size": 32})  # fmt: skip
_speech("ParakeetForCTC", values(64, 16, key="input_features", labels="decoder",
                                 attention_mask=lambda s, g: torch.ones(s, 64, dtype=torch.long)),
        encoder_config={"subsampling_conv_channels": 16})  # fmt: skip

# ---------------------------------------------------------------- images and video

for _stem in ("ViT", "DeiT", "Beit", "Data2VecVision", "Dinov2", "Dinov2WithRegisters", "IJepa", "ViTMSN"):
    _vision(_stem)
_vision("DINOv3ViT", head="Model")
_SWIN = {"patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4}
_vision("Swin", **_SWIN)
_vision("Swinv2", **_SWIN, pretrained_window_sizes=[0, 0])
_vision("DonutSwin", **_SWIN)
_vision("Hiera", image_size=[32, 32], embed_dim=16, depths=[1, 1], num_heads=[2, 4], patch_size=[3, 3],
        patch_stride=[2, 2], patch_padding=[1, 1], masked_unit_size=[4, 4], masked_unit_attention=[True, False],
        num_query_pool=1, num_layers=2)  # fmt: skip
_PYRAMID = {"num_encoder_blocks": 2, "depths": [1, 1], "hidden_sizes": [16, 32], "patch_sizes": [4, 2],
            "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}  # fmt: skip
_vision("Segformer", **_PYRAMID, sr_ratios=[2, 1])
_vision("Pvt", **_PYRAMID, sequence_reduction_ratios=[2, 1])
_vision("PvtV2", **{**_PYRAMID, "patch_sizes": [7, 3]}, sr_ratios=[2, 1])
_vision("Cvt", embed_dim=[16, 32], depth=[1, 2], num_heads=[2, 2], patch_sizes=[7, 3], patch_stride=[4, 2],
        patch_padding=[2, 1], mlp_ratio=[2.0, 2.0], qkv_bias=[True, True], cls_token=[False, True],
        qkv_projection_method=["dw_bn", "dw_bn"], kernel_qkv=[3, 3], padding_kv=[1, 1], stride_kv=[2, 2],
        padding_q=[1, 1], stride_q=[1, 1], attention_drop_rate=[0.0] * 2, drop_rate=[0.0] * 2,
        drop_path_rate=[0.0] * 2)  # fmt: skip
_vision("Levit", image(64), image_size=64, patch_size=16, hidden_sizes=[32, 32], num_attention_heads=[2, 2],
        depths=[1, 1], key_dim=[8, 8], mlp_ratio=[2, 2], attention_ratio=[2, 2],
        down_ops=[["Subsample", 8, 2, 2, 2, 2], [""]])  # fmt: skip
_vision("MobileViT", image(64), image_size=64, patch_size=2, hidden_sizes=[16, 24, 32],
        neck_hidden_sizes=[4, 8, 8, 16, 16, 16, 32])  # fmt: skip
_vision("MobileViTV2", image(64), image_size=64, patch_size=2, base_attn_unit_dims=[16, 24, 32],
        n_attn_blocks=[1, 1, 1], width_multiplier=0.25)  # fmt: skip
_vision("SwiftFormer", image(64), image_size=64, depths=[1, 1], embed_dims=[16, 32], downsamples=[True, True])
_vision("FocalNet", embed_dim=16, patch_size=4, hidden_sizes=[16, 32], depths=[1, 1], focal_levels=[1, 1],
        focal_windows=[3, 3])  # fmt: skip
_vision("PoolFormer", num_encoder_blocks=2, depths=[1, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3],
        strides=[4, 2], padding=[2, 1])  # fmt: skip
_vision("ConvNext", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4)
_vision("ConvNextV2", num_stages=2, hidden_sizes=[16, 32], depths=[1, 1], patch_size=4)
_vision("ImageGPT", text(), vocab_size=VOCABULARY)
_vision("ViTMAE", image(labels=None), head="ForPreTraining", decoder_hidden_size=32, decoder_intermediate_size=48,
        decoder_num_attention_heads=4, decoder_num_hidden_layers=2)  # fmt: skip
_vision("Aimv2Vision", image(labels=None), head="Model")
_vision("MLCDVision", image(labels=None), head="Model")
_vision("VideoMAE", video(), head="ForVideoClassification", num_frames=2)
_vision("Vivit", video(), head="ForVideoClassification", num_frames=2, tubelet_size=[2, 8, 8])
_vision("Timesformer", video(), head="ForVideoClassification", num_frames=2)
_vision("VJEPA2", video(key="pixel_values_videos", labels=False), head="Model", crop_size=32, frames_per_clip=2,
        pred_hidden_size=32, pred_num_attention_heads=4, pred_num_hidden_layers=2)  # fmt: skip

# ---------------------------------------------------------------- detection, segmentation, depth

_RESNET = {"kind": "ResNetConfig", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16], "depths": [1, 1, 1, 1],
           "layer_type": "basic", "out_features": ["stage2", "stage3", "stage4"]}  # fmt: skip
_LAST = {**_RESNET, "out_features": ["stage4"]}
_SWIN_BACKBONE = {"kind": "SwinConfig", "image_size": 64, "patch_size": 2, "embed_dim": 8, "depths": [1, 1, 1, 1],
                  "num_heads": [2, 2, 2, 2], "window_size": 4,
                  "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
_DINO_BACKBONE = {"kind": "Dinov2Config", "image_size": 28, "patch_size": 14, "num_hidden_layers": 4,
                  "reshape_hidden_states": False,
                  "out_features": ["stage1", "stage2", "stage3", "stage4"]}  # fmt: skip
_dense("DetrForObjectDetection", image(64, labels=None), num_queries=5, backbone_config=_LAST)
_dense("ConditionalDetrForObjectDetection", image(64, labels=None), num_queries=5, backbone_config=_LAST)
_dense("TableTransformerForObjectDetection", image(64, labels=None), num_queries=5, backbone_config=_LAST)
_dense("DabDetrForObjectDetection", image(64, labels=None), num_queries=5, backbone_config=_LAST)
_dense("DeformableDetrForObjectDetection", image(64, labels=None), num_queries=5, backbone_config=_RESNET,
       num_feature_levels=3, disable_custom_kernels=True)  # fmt: skip
_RT = {"num_queries": 5, "encoder_hidden_dim": 32, "encoder_in_channels": [16, 16, 16], "num_denoising": 0,
       "decoder_in_channels": [32, 32, 32], "freeze_backbone_batch_norms": False}  # fmt: skip
_dense("RTDetrForObjectDetection", image(64, labels=None), **_RT,
       backbone_config={**_RESNET, "kind": "RTDetrResNetConfig"})  # fmt: skip
_dense("YolosForObjectDetection", image_size=[32, 32], num_detection_tokens=5)
_dense("OwlViTForObjectDetection", image_and_text(labels=False, length=8), projection_dim=32)
_dense("Owlv2ForObjectDetection", image_and_text(labels=False, length=8), projection_dim=32)
_dense("SegformerForSemanticSegmentation", image(labels="map"), name="segformer for maps", **_PYRAMID,
       sr_ratios=[2, 1], decoder_hidden_size=16, num_labels=LABELS)  # fmt: skip
_dense("BeitForSemanticSegmentation", image(labels=None), name="beit for maps", out_indices=[1, 2, 3, 4],
       num_hidden_layers=4, pool_scales=[1, 2])  # fmt: skip
_dense("UperNetForSemanticSegmentation", image(64, labels="map"), backbone_config=_SWIN_BACKBONE, pool_scales=[1, 2],
       auxiliary_channels=16, num_labels=LABELS)  # fmt: skip
_dense("MaskFormerModel", image(64, labels=None), backbone_config=_SWIN_BACKBONE,
       fpn_feature_size=32, mask_feature_size=32,
       decoder_config={"kind": "DetrConfig", "num_queries": 5, "backbone_config": _LAST})  # fmt: skip
_dense("Mask2FormerModel", image(64, labels=None), backbone_config=_SWIN_BACKBONE,
       feature_size=32, mask_feature_size=32, num_queries=5, hidden_dim=32, encoder_feedforward_dim=24,
       dim_feedforward=24, decoder_layers=3)  # fmt: skip
_dense("SamModel", image(labels=None, input_points=lambda s, g: torch.rand(s, 1, 2, 2, generator=g) * 32),
       vision_config={"output_channels": 16, "patch_size": 4, "window_size": 4, "num_pos_feats": 8,
                      "global_attn_indexes": [1]},
       prompt_encoder_config={"hidden_size": 16, "patch_size": 4, "image_embedding_size": 8, "mask_input_channels": 4},
       mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "iou_head_hidden_dim": 16})  # fmt: skip
_dense("DPTForDepthEstimation", num_hidden_layers=4, backbone_out_indices=[0, 1, 2, 3],
       neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=32)  # fmt: skip
_dense("GLPNForDepthEstimation", image(64, labels=None),
       **{**_PYRAMID, "num_encoder_blocks": 4, "depths": [1] * 4, "hidden_sizes": [8, 16, 16, 32],
          "patch_sizes": [7, 3, 3, 3], "strides": [4, 2, 2, 2], "num_attention_heads": [2] * 4, "mlp_ratios": [2] * 4},
       sr_ratios=[2, 1, 1, 1], decoder_hidden_size=16)  # fmt: skip
_dense("DepthAnythingForDepthEstimation", image(28, labels=None), backbone_config=_DINO_BACKBONE, patch_size=14,
       reassemble_hidden_size=32, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16,
       head_hidden_size=8)  # fmt: skip
_dense("VitDetModel", image_size=32, pretrain_image_size=32)
_dense("VitPoseForPoseEstimation", image(32, labels=None),
       backbone_config={"kind": "VitPoseBackboneConfig", "image_size": [32, 32], "patch_size": [8, 8],
                        "num_experts": 1, "out_features": ["stage2"]}, num_labels=2)  # fmt: skip
_dense("Swin2SRForImageSuperResolution", image_size=32, patch_size=1, embed_dim=16, depths=[1, 1], num_heads=[2, 2],
       window_size=4)  # fmt: skip

# ---------------------------------------------------------------- text with images

_both = image_and_text(labels=False, return_loss=True)
for _stem in ("CLIP", "ChineseCLIP", "Siglip", "AltCLIP", "GroupViT"):
    _sizes = {"text_config": {"eos_token_id": 2}, "vision_config": {}}
    if _stem == "AltCLIP":
        _sizes["text_config"] = {"project_dim": 16}
    if _stem == "GroupViT":
        _sizes["vision_config"] = {"depths": [1, 1], "num_group_tokens": [4, 2], "num_output_groups": [4, 2]}
    _pair(f"{_stem}Model", _both, **_sizes)
_pair("CLIPVisionModelWithProjection", image(labels=None), name="clip vision")
_pair("CLIPSegForImageSegmentation", image_and_text(labels=False), extract_layers=[1], reduce_dim=16,
      text_config={"eos_token_id": 2}, decoder_intermediate_size=48)  # fmt: skip
_pair("Siglip2Model", text(None, pixel_values=lambda s, g: torch.randn(s, 16, 192, generator=g),
                           pixel_attention_mask=lambda s, g: torch.ones(s, 16, dtype=torch.long),
                           spatial_shapes=lambda s, g: torch.tensor([[4, 4]] * s), return_loss=True),
      vision_config={"num_patches": 16})  # fmt: skip
_pair("XCLIPModel", text(None, pixel_values=lambda s, g: torch.randn(s, 2, 3, 32, 32, generator=g), return_loss=True),
      text_config={"eos_token_id": 2}, vision_config={"num_frames": 2, "mit_hidden_size": 32,
      "mit_intermediate_size": 48, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 4},
      prompt_layers=1, prompt_num_attention_heads=4, projection_dim=32)  # fmt: skip
_pair("ViltForQuestionAnswering",
      image_and_text(labels=False), num_labels=LABELS)  # fmt: skip
_pair("VisualBertModel", text(None, visual_embeds=lambda s, g: torch.randn(s, 4, 16, generator=g)),
      visual_embedding_dim=16)  # fmt: skip
_pair("LxmertModel", text(None, visual_feats=lambda s, g: torch.randn(s, 4, 16, generator=g),
                          visual_pos=lambda s, g: torch.rand(s, 4, 4, generator=g)),
      visual_feat_dim=16, l_layers=2, x_layers=1, r_layers=1)  # fmt: skip
_pair("BlipForConditionalGeneration", image_and_text(), text_config={"encoder_hidden_size": 32}, vision_config={},
      image_text_hidden_size=16)  # fmt: skip
_pair("BridgeTowerModel", image_and_text(labels=False), hidden_size=64, vision_config={"hidden_size": 64},
      text_config={"hidden_size": 64})  # fmt: skip
_pair("FlavaModel", image_and_text(labels=False))
_pair("GitForCausalLM", image_and_text(), vision_config={})
_pair("Kosmos2ForConditionalGeneration",
      image_and_text(image_embeds_position_mask=lambda s, g: (torch.arange(LENGTH) < 4).long().expand(s, -1)),
      latent_query_num=4, text_config={"embed_dim": 32}, vision_config={})  # fmt: skip
_LLAMA_PART = {"kind": "LlamaConfig"}
_CLIP_PART = {"kind": "CLIPVisionConfig"}
_SIGLIP_PART = {"kind": "SiglipVisionConfig"}
_pair("LlavaForConditionalGeneration", image_and_text(16), vision_config=_CLIP_PART, text_config=_LLAMA_PART,
      image_seq_length=16)  # fmt: skip
_pair("VipLlavaForConditionalGeneration", image_and_text(16), vision_config={**_CLIP_PART, "num_hidden_layers": 3},
      text_config=_LLAMA_PART, vision_feature_layers=[-1, -2], image_seq_length=16)  # fmt: skip
_pair("PaliGemmaForConditionalGeneration",
      image_and_text(16, token_type_ids=lambda s, g: torch.zeros(s, 16 + LENGTH, dtype=torch.long)),
      text_config={"kind": "GemmaConfig", "num_key_value_heads": 2}, vision_config=_SIGLIP_PART,
      projection_dim=32)  # fmt: skip
_pair("AyaVisionForConditionalGeneration", image_and_text(4), text_config={"kind": "Cohere2Config"},
      vision_config=_SIGLIP_PART, vision_feature_layer=-1)  # fmt: skip
_pair("Idefics3ForConditionalGeneration",
      image_and_text(4, pixel_values=lambda s, g: torch.randn(s, 1, 3, 32, 32, generator=g)),
      text_config=_LLAMA_PART, vision_config={}, image_token_id=98)  # fmt: skip
_pair("SmolVLMForConditionalGeneration",
      image_and_text(4, pixel_values=lambda s, g: torch.randn(s, 1, 3, 32, 32, generator=g)),
      text_config=_LLAMA_PART, vision_config={}, image_token_id=98)  # fmt: skip
_QWEN_GRID = {"pixel_values": lambda s, g: torch.randn(16 * s, 3 * 2 * 8 * 8, generator=g),
              "image_grid_thw": lambda s, g: torch.tensor([[1, 4, 4]] * s),
              "mm_token_type_ids": lambda s, g: (torch.arange(4 + LENGTH) < 4).long().expand(s, -1)}  # fmt: skip
_MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}}
_pair("Qwen2VLForConditionalGeneration", image_and_text(4, **_QWEN_GRID),
      vision_config={"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2}, text_config=_MROPE)  # fmt: skip
_pair("Qwen2_5_VLForConditionalGeneration", image_and_text(4, **_QWEN_GRID),
      vision_config={"out_hidden_size": 32, "window_size": 16, "fullatt_block_indexes": [1]},
      text_config=_MROPE)  # fmt: skip
_pair("Qwen3VLForConditionalGeneration", image_and_text(4, **_QWEN_GRID),
      vision_config={"out_hidden_size": 32, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
      text_config=_MROPE)  # fmt: skip
_pair("InternVLForConditionalGeneration", image_and_text(4), text_config={"kind": "Qwen2Config"},
      vision_config={"image_size": [32, 32], "patch_size": [8, 8]}, image_seq_length=4)  # fmt: skip
_pair("Gemma3ForConditionalGeneration",
      image_and_text(4, token_type_ids=lambda s, g: (torch.arange(4 + LENGTH) < 4).long().expand(s, -1)),
      name="gemma3 with images", text_config={"layer_types": ["sliding_attention", "full_attention"]},
      vision_config=_SIGLIP_PART, mm_tokens_per_image=4)  # fmt: skip
_pair("MllamaForConditionalGeneration",
      image_and_text(0, pixel_values=lambda s, g: torch.randn(s, 1, 4, 3, 32, 32, generator=g),
                     aspect_ratio_ids=lambda s, g: torch.ones(s, 1, dtype=torch.long),
                     aspect_ratio_mask=lambda s, g: torch.ones(s, 1, 4, dtype=torch.long),
                     cross_attention_mask=lambda s, g: torch.ones(s, LENGTH, 1, 4, dtype=torch.long)),
      text_config={"cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
      vision_config={"num_global_layers": 1, "vision_output_dim": 64,
                     "intermediate_layers_indices": [0]})  # fmt: skip
_pair("Florence2ForConditionalGeneration", image_and_text(17), image_token_id=98, is_encoder_decoder=True,
      text_config={"kind": "BartConfig"},
      vision_config={"depths": [1, 1], "patch_size": [7, 3], "patch_stride": [4, 2], "patch_padding": [3, 1],
                     "patch_prenorm": [False, True], "embed_dim": [16, 32], "num_heads": [2, 2], "num_groups": [2, 2],
                     "window_size": 4, "projection_dim": 32})  # fmt: skip
_BLIP2 = {"vision_config": {}, "qformer_config": {"encoder_hidden_size": 32}, "text_config": {"kind": "OPTConfig"},
          "num_query_tokens": 4, "image_token_index": 98, "image_text_hidden_size": 16}  # fmt: skip
_pair("Blip2ForConditionalGeneration", image_and_text(4), **_BLIP2)
_pair("InstructBlipForConditionalGeneration",
      image_and_text(4, qformer_input_ids=lambda s, g: integers(g, s, 6)),
      **{key: value for key, value in _BLIP2.items() if key != "image_text_hidden_size"})  # fmt: skip


def _donut() -> nn.Module:
    encoder = build("ViTModel")
    decoder = build("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    model = tf.VisionEncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model


_add("vision-encoder-decoder", "text with images", "VisionEncoderDecoderModel", _donut,
     values(3, 32, 32, key="pixel_values", labels="decoder"))  # fmt: skip

# ---------------------------------------------------------------- time series

_past = values(32, 1, key="past_values")
_series("PatchTSTForPrediction", _past, context_length=32, patch_length=8, patch_stride=8, prediction_length=4)
_series("PatchTSMixerForPrediction", _past, context_length=32, d_model=8, num_targets=1, prediction_length=4)
_series("DecisionTransformerModel",
        values(4, 17, key="states", actions=lambda s, g: torch.randn(s, 4, 4, generator=g),
               rewards=lambda s, g: torch.randn(s, 4, 1, generator=g),
               returns_to_go=lambda s, g: torch.randn(s, 4, 1, generator=g),
               timesteps=lambda s, g: torch.arange(4).expand(s, -1),
               attention_mask=lambda s, g: torch.ones(s, 4)), n_head=4, max_ep_len=64)  # fmt: skip
_LAGS = {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1}
_series("TimeSeriesTransformerForPrediction",
        values(10, key="past_values", past_time_features=lambda s, g: torch.randn(s, 10, 1, generator=g),
               past_observed_mask=lambda s, g: torch.ones(s, 10),
               future_values=lambda s, g: torch.randn(s, 4, generator=g),
               future_time_features=lambda s, g: torch.randn(s, 4, 1, generator=g)),
        **_LAGS, d_model=32)  # fmt: skip

# ---------------------------------------------------------------- plain torch, and other packages


class Encoder(nn.Module):
    """torch's own encoder, and a head."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


class Seq2Seq(nn.Module):
    """torch's own encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(32, 4, 2, 2, 48, dropout=0.0, batch_first=True)
        self.head = nn.Linear(32, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.transformer(x, x.flip(1)))


_add("nn.TransformerEncoder", "plain torch", "torch.nn.TransformerEncoder", Encoder, plain(LENGTH, 32))
_add("nn.Transformer", "plain torch", "torch.nn.Transformer", Seq2Seq, plain(LENGTH, 32))


def _timm(name: str, **sizes: Any) -> None:
    def make() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=LABELS, **sizes)

    _add(f"timm {name}", "timm and torchvision", f"timm {name}", make, plain(3, 32, 32), "timm", "torchvision")


_flat = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
for _name in ("vit_base_patch16_224", "deit_base_patch16_224", "beit_base_patch16_224", "eva02_tiny_patch14_224",
              "cait_s24_224", "vit_small_patch14_dinov2"):  # fmt: skip
    _timm(_name, **_flat)
_timm("swin_tiny_patch4_window7_224", img_size=32, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2),
      window_size=4, drop_path_rate=0.0)  # fmt: skip
_timm("swinv2_tiny_window8_256", img_size=32, patch_size=2, embed_dim=16, depths=(1, 1), num_heads=(2, 2),
      window_size=4, drop_path_rate=0.0)  # fmt: skip


def _torchvision(name: str, make: Callable[[Any], nn.Module]) -> None:
    def made() -> nn.Module:
        import torchvision.models

        return make(torchvision.models)

    _add(f"torchvision {name}", "timm and torchvision", f"torchvision {name}", made, plain(3, 32, 32), "torchvision")


_torchvision("VisionTransformer", lambda models: models.VisionTransformer(32, 8, 2, 4, 32, 48, num_classes=LABELS))
_torchvision(
    "SwinTransformer",
    lambda models: models.SwinTransformer([2, 2], 16, [1, 1], [2, 2], [4, 4], 2.0, 0.0, 0.0, 0.0, LABELS),
)

FAMILIES["Reformer"] = replace(FAMILIES["Reformer"], input_gradients=True)  # its layers are reversible
FAMILIES["WavLM"] = replace(FAMILIES["WavLM"], endless=("reentrant",))  # all layers share one position bias
