"""More tiny models exported with the real exporters: one export for each family of architectures.

As ``exports.py``, which says how; here every family has one or two exports, and fewer tests run on them. The weights
are random, the sizes tiny, the code is that of timm and transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from tests.models.exports import (
    VOCABULARY,
    WIDTH,
    Axes,
    Exports,
    Model,
    _causal_axes,
    _causal_inputs,
    _causal_model,
    _ids,
    _image_inputs,
    _padding,
    _randomize,
    _rotary_options,
    _tensor_output,
    _timm,
    _timm_attention,
    register,
)

if TYPE_CHECKING:
    import torch
    from torch import nn

FAMILIES: Exports = {}

_register = functools.partial(register, into=FAMILIES, source=__file__)
_BATCH = {0: "batch"}


# ---------------------------------------------------------------------------------------------------------------------
# timm


def _image_model(module: nn.Module, size: int) -> Model:
    _randomize(module)
    return Model(module, _image_inputs(size), "logits", {"x": _BATCH, "logits": _BATCH})


def _of_timm(attention: str, module: str, name: str, size: int, **options: Any) -> Model:
    with _timm_attention(attention):
        built = getattr(_timm(f"timm.models.{module}"), name)(num_classes=10, **options)
    return _image_model(built, size)


@_register("ts17_sdpa", "timm")
def _build_deit(attention: str) -> Model:
    return _of_timm(
        attention,
        "deit",
        "VisionTransformerDistilled",
        32,
        img_size=32,
        patch_size=8,
        embed_dim=WIDTH,
        depth=2,
        num_heads=3,
    )


@_register("ts17", "timm")
def _build_beit(attention: str) -> Model:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3}
    return _of_timm(
        attention, "beit", "Beit", 32, **sizes, use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.1
    )


@_register("ts17", "timm")
def _build_swinv2(attention: str) -> Model:
    """Cosine attention with a learned scale, and a bias table that a small network makes."""
    sizes = {"img_size": 32, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    return _of_timm(attention, "swin_transformer_v2", "SwinTransformerV2", 32, **sizes)


@_register("ts17", "timm")
def _build_maxvit(attention: str) -> Model:
    """Depthwise convolutions with squeeze and excitation, then attention in windows and over a grid."""
    maxxvit = _timm("timm.models.maxxvit")
    config = maxxvit.MaxxVitCfg(
        embed_dim=(16, 32),
        depths=(1, 1),
        block_type=("M", "M"),
        stem_width=16,
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(dim_head=8, window_size=(4, 4), grid_size=(4, 4)),
    )
    with _timm_attention(attention):
        return _image_model(maxxvit.MaxxVit(config, img_size=32, num_classes=10), 32)


@_register("ts17", "timm")
def _build_mvit(attention: str) -> Model:
    """Depthwise convolutions and norms on the heads of query, key and value; relative positions of rows and columns."""
    mvitv2 = _timm("timm.models.mvitv2")
    config = mvitv2.MultiScaleVitCfg(
        depths=(1, 1), embed_dim=24, num_heads=2, mlp_ratio=2.0, stride_q=((1, 1), (2, 2)), stride_kv_adaptive=(2, 2)
    )
    return _image_model(mvitv2.MultiScaleVit(config, img_size=32, num_classes=10), 32)


@_register("ts17 dyn20", "timm")
def _build_cait(attention: str) -> Model:
    """Heads are mixed before and after the softmax, and the last layers have one query."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "depth_token_only": 1}
    return _of_timm(attention, "cait", "Cait", 32, **sizes, init_values=0.5)


@_register("ts17 dyn20_sdpa", "timm")
def _build_xcit(attention: str) -> Model:
    """Cross-covariance: query and key meet over tokens, and their width is that of the score matrix."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 4, "cls_attn_layers": 1}
    return _of_timm(attention, "xcit", "Xcit", 32, **sizes)


@_register("ts17 dyn20", "timm")
def _build_levit(attention: str) -> Model:
    sizes = {"embed_dim": (32, 48), "key_dim": 8, "depth": (1, 1), "num_heads": (2, 3), "attn_ratio": (2.0, 2.0)}
    return _of_timm(attention, "levit", "Levit", 64, img_size=64, **sizes)


@_register("ts17", "timm")
def _build_efficientformer(attention: str) -> Model:
    sizes = {"depths": (1, 1, 1, 2), "embed_dims": (8, 16, 24, 32), "num_vit": 1}
    return _of_timm(attention, "efficientformer_v2", "EfficientFormerV2", 64, img_size=64, **sizes)


@_register("dyn20_sdpa", "timm")
def _build_pvt(attention: str) -> Model:
    """Keys and values from a strided convolution."""
    sizes = {"depths": (1, 1, 1, 1), "embed_dims": (8, 16, 16, 24), "num_heads": (1, 2, 2, 3)}
    ratios = {"sr_ratios": (8, 4, 2, 1), "mlp_ratios": (2.0, 2.0, 2.0, 2.0)}
    return _of_timm(attention, "pvt_v2", "PyramidVisionTransformerV2", 64, **sizes, **ratios)


@_register("ts17", "timm")
def _build_twins(attention: str) -> Model:
    sizes = {"embed_dims": (16, 32), "num_heads": (1, 2), "depths": (2, 2), "sr_ratios": (4, 2), "mlp_ratios": (2, 2)}
    return _of_timm(attention, "twins", "Twins", 32, img_size=32, wss=(4, 4), **sizes)


@_register("ts17 dyn20_sdpa", "timm")
def _build_eva02(attention: str) -> Model:
    """Rotary positions by constant tables, a gated MLP with a norm in its middle."""
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 3}
    rotary = {"use_rot_pos_emb": True, "ref_feat_shape": (4, 4), "rope_rotate_half": attention == "sdpa"}
    return _of_timm(attention, "eva", "Eva", 32, **sizes, swiglu_mlp=True, scale_mlp=True, mlp_ratio=2.0, **rotary)


@_register("ts17", "timm")
def _build_efficientvit(attention: str) -> Model:
    """ReLU linear attention on convolutions in groups."""
    sizes = {"widths": (8, 8, 16, 16, 32), "depths": (1, 1, 1, 1, 1), "head_dim": 8, "head_widths": (48, 32)}
    return _of_timm(attention, "efficientvit_mit", "EfficientVit", 64, **sizes)


@_register("ts17", "timm")
def _build_mobilevit(attention: str) -> Model:
    with _timm_attention(attention):
        return _image_model(_timm("timm").create_model("mobilevit_xxs", num_classes=10), 64)


@_register("dyn20_sdpa", "timm")
def _build_mobilevitv2(attention: str) -> Model:
    """Separable attention: one query channel, and norms over all channels of a picture."""
    with _timm_attention(attention):
        return _image_model(_timm("timm").create_model("mobilevitv2_050", num_classes=10), 64)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: vision and speech


_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def _picture_model(model: nn.Module, size: int, output: str, name: str = "pixel_values") -> Model:
    _randomize(model)
    return Model(
        _tensor_output(model, [name], output), _image_inputs(size, name), output, {name: _BATCH, output: _BATCH}
    )


def _vision(attention: str, config: str, model: str, output: str, size: int = 32, **options: Any) -> Model:
    import transformers

    made = getattr(transformers, config)(attn_implementation=attention, **options)
    return _picture_model(getattr(transformers, model)(made), size, output)


@_register("ts17_sdpa", "transformers")
def _build_segformer(attention: str) -> Model:
    """Depthwise convolutions within the MLP, keys and values from strided convolutions, a convolutional decoder."""
    sizes: dict[str, Any] = {
        "depths": [1, 1],
        "hidden_sizes": [16, 32],
        "num_attention_heads": [1, 2],
        "sr_ratios": [4, 2],
    }
    more: dict[str, Any] = {
        "num_encoder_blocks": 2,
        "patch_sizes": [7, 3],
        "strides": [4, 2],
        "mlp_ratios": [2, 2],
        "num_labels": 5,
    }
    return _vision(
        attention,
        "SegformerConfig",
        "SegformerForSemanticSegmentation",
        "logits",
        **sizes,
        **more,
        decoder_hidden_size=24,
    )


@_register("dyn20_sdpa", "transformers")
def _build_dinov2(attention: str) -> Model:
    sizes = {k: v for k, v in _SIZES.items() if k != "intermediate_size"}
    options = {"image_size": 32, "patch_size": 8, "num_labels": 10, "mlp_ratio": 2, "use_swiglu_ffn": True}
    return _vision(attention, "Dinov2Config", "Dinov2ForImageClassification", "logits", **sizes, **options)


@_register("ts17_sdpa", "transformers")
def _build_dinov3(attention: str) -> Model:
    options = {"image_size": 32, "patch_size": 8, "num_register_tokens": 2}
    return _vision(attention, "DINOv3ViTConfig", "DINOv3ViTModel", "pooler_output", **_SIZES, **options)


@_register("dyn20_sdpa", "transformers")
def _build_sam(attention: str) -> Model:
    """Windows with padding, decomposed relative positions, one layer with attention over all tokens."""
    options = {"image_size": 64, "patch_size": 8, "window_size": 3, "global_attn_indexes": [1], "output_channels": 16}
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_dim": 96}
    return _vision(attention, "SamVisionConfig", "SamVisionModel", "last_hidden_state", 64, **options, **sizes)


@_register("ts17", "transformers")
def _build_clip(attention: str) -> Model:
    options = {"image_size": 32, "patch_size": 8, "projection_dim": 24}
    return _vision(attention, "CLIPVisionConfig", "CLIPVisionModelWithProjection", "image_embeds", **_SIZES, **options)


@_register("ts17_sdpa", "transformers")
def _build_siglip(attention: str) -> Model:
    """A learned probe attends to all tokens at the end."""
    return _vision(
        attention, "SiglipVisionConfig", "SiglipVisionModel", "pooler_output", **_SIZES, image_size=32, patch_size=8
    )


def _small_resnet(kind: str = "") -> Any:
    import transformers

    sizes = {"embedding_size": 16, "hidden_sizes": [16, 24, 32, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
    config = transformers.RTDetrResNetConfig if kind else transformers.ResNetConfig
    return config(**sizes, out_features=["stage2", "stage3", "stage4"] if kind else ["stage4"])


@_register("ts17", "transformers")
def _build_detr(attention: str) -> Model:
    """Object queries: constants that the exporter folds into the first layer of the decoder."""
    sizes = {"d_model": WIDTH, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5, "num_labels": 4}
    backbone = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    return _vision(
        attention, "DetrConfig", "DetrForObjectDetection", "logits", 64, **sizes, **heads, **backbone,
        backbone_config=_small_resnet(),
    )  # fmt: skip


@_register("ts17", "transformers")
def _build_rtdetr(attention: str) -> Model:
    """Deformable attention, which samples where the data say, behind a hybrid encoder."""
    sizes = {"d_model": 32, "encoder_hidden_dim": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5, "num_labels": 4}
    inputs = {"encoder_in_channels": [24, 32, 32], "decoder_in_channels": [32, 32, 32], "num_denoising": 0}
    return _vision(
        attention, "RTDetrConfig", "RTDetrForObjectDetection", "logits", 64, **sizes, **heads, **inputs,
        backbone_config=_small_resnet("rt"), anchor_image_size=[64, 64],
    )  # fmt: skip


def _audio_inputs(samples: int) -> Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]:
    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {"input_values": torch.randn(batch, samples, generator=generator)}

    return inputs


@_register("ts17", "transformers")
def _build_wav2vec2(attention: str) -> Model:
    """A stack of strided convolutions, and a wide convolution in groups for positions."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **_SIZES, vocab_size=VOCABULARY, conv_dim=(16, 24), conv_stride=(5, 2), conv_kernel=(10, 3),
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4, attn_implementation=attention,
        num_feat_extract_layers=2,
    )  # fmt: skip
    model = Wav2Vec2ForCTC(config)
    _randomize(model)
    axes = {"input_values": _BATCH, "logits": _BATCH}
    return Model(_tensor_output(model, ["input_values"], "logits"), _audio_inputs(200), "logits", axes)


@_register("dyn20_sdpa", "transformers")
def _build_whisper(attention: str) -> Model:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY, num_mel_bins=8, d_model=WIDTH, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=96,
        encoder_attention_heads=4, decoder_attention_heads=4, decoder_ffn_dim=96, max_source_positions=10,
        max_target_positions=16, use_cache=False, attn_implementation=attention, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config)
    _randomize(model)

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        features = torch.randn(batch, 8, 20, generator=generator)
        return {"input_features": features, "decoder_input_ids": _ids(batch, 5, generator)}

    axes: Axes = {"input_features": _BATCH, "decoder_input_ids": _BATCH, "logits": _BATCH}
    return Model(_tensor_output(model, list(axes)[:2], "logits"), inputs, "logits", axes)


# ---------------------------------------------------------------------------------------------------------------------
# transformers: text


_TEXT_SIZES = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0}


def _encoder(config: Any, model: str) -> Model:
    import transformers

    made = getattr(transformers, model)(config)
    _randomize(made)
    arguments = ["input_ids", "attention_mask"]
    return Model(_tensor_output(made, arguments, "logits"), _causal_inputs, "logits", _causal_axes("logits"))


def _text(attention: str, config: str, model: str, **options: Any) -> Model:
    import transformers

    return _encoder(getattr(transformers, config)(attn_implementation=attention, **options), model)


@_register("dyn20_sdpa", "transformers")
def _build_roberta(attention: str) -> Model:
    return _text(attention, "RobertaConfig", "RobertaForMaskedLM", **_TEXT_SIZES, type_vocab_size=1)


@_register("ts17", "transformers")
def _build_distilbert(attention: str) -> Model:
    sizes = {"vocab_size": VOCABULARY, "dim": WIDTH, "n_layers": 2, "n_heads": 4, "hidden_dim": 96}
    return _text(attention, "DistilBertConfig", "DistilBertForMaskedLM", **sizes, max_position_embeddings=32)


@_register("ts17 dyn20", "transformers")
def _build_deberta(attention: str) -> Model:
    """Scores of contents and of positions, whose projections are those of the contents."""
    options = {"relative_attention": True, "position_buckets": 4, "norm_rel_ebd": "layer_norm", "share_att_key": True}
    more = {"pos_att_type": ["c2p", "p2c"], "position_biased_input": False, "type_vocab_size": 0}
    return _text(attention, "DebertaV2Config", "DebertaV2ForMaskedLM", **_TEXT_SIZES, **options, **more)


@_register("dyn20_sdpa", "transformers")
def _build_modernbert(attention: str) -> Model:
    """Packed projections, rotary tables for two kinds of layers, a gated MLP with one weight for both halves."""
    options = {
        "global_attn_every_n_layers": 2,
        "local_attention": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "cls_token_id": 1,
    }
    return _text(attention, "ModernBertConfig", "ModernBertForMaskedLM", **_TEXT_SIZES, **options, sep_token_id=2)


def _decoder(attention: str, config: str, model: str, **options: Any) -> Model:
    import transformers

    return _causal_model(
        getattr(transformers, model)(getattr(transformers, config)(**_rotary_options(attention) | options))
    )


@_register("dyn20_sdpa", "transformers")
def _build_qwen2(attention: str) -> Model:
    return _decoder(attention, "Qwen2Config", "Qwen2ForCausalLM")


@_register("ts17", "transformers")
def _build_mistral(attention: str) -> Model:
    return _decoder(attention, "MistralConfig", "MistralForCausalLM", sliding_window=4)


@_register("ts17 dyn20_sdpa", "transformers")
def _build_gemma(attention: str) -> Model:
    """Gains are one plus a weight, embeddings are scaled, one key head for all."""
    return _decoder(attention, "GemmaConfig", "GemmaForCausalLM", num_key_value_heads=1, pad_token_id=0)


@_register("dyn20", "transformers")
def _build_gemma2(attention: str) -> Model:
    """Scores pass through a tanh, norms before and after."""
    return _decoder(attention, "Gemma2Config", "Gemma2ForCausalLM", sliding_window=4, query_pre_attn_scalar=12)


@_register("ts17 dyn20_sdpa", "transformers")
def _build_phi(attention: str) -> Model:
    """Half of each head is rotated."""
    return _decoder(attention, "PhiConfig", "PhiForCausalLM", num_key_value_heads=4, partial_rotary_factor=0.5)


@_register("ts17", "transformers")
def _build_stablelm(attention: str) -> Model:
    """A norm of its own for each head of query and key, half of which turns."""
    options = {"qk_layernorm": True, "partial_rotary_factor": 0.5}
    return _decoder(attention, "StableLmConfig", "StableLmForCausalLM", **options)


@_register("ts17", "transformers")
def _build_falcon(attention: str) -> Model:
    """One key head behind the query heads in one weight, read by all without being repeated."""
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, ffn_hidden_size=96, num_hidden_layers=2, num_attention_heads=4,
        multi_query=True, alibi=False, attn_implementation=attention,
    )  # fmt: skip
    return _causal_model(FalconForCausalLM(config))


@_register("ts17", "transformers")
def _build_neox(attention: str) -> Model:
    """Query, key and value lie head by head in one weight; a quarter is rotated; MLP beside attention."""
    options = {"rotary_pct": 0.34, "num_key_value_heads": None, "head_dim": None, "use_parallel_residual": True}
    return _decoder(attention, "GPTNeoXConfig", "GPTNeoXForCausalLM", **options)


@_register("ts17 dyn20")
def _build_moe(attention: str) -> Model:
    """Experts as three-axis weights, all computed, mixed by a router."""
    import torch
    from torch import nn

    class Experts(nn.Module):
        def __init__(self, width: int, hidden: int, experts: int) -> None:
            super().__init__()
            self.router = nn.Linear(width, experts)
            self.up = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
            self.gate = nn.Parameter(torch.randn(experts, width, hidden) * width**-0.5)
            self.down = nn.Parameter(torch.randn(experts, hidden, width) * hidden**-0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            share = self.router(x).softmax(-1)
            tokens = x.unsqueeze(1)
            hidden = nn.functional.silu(tokens @ self.gate) * (tokens @ self.up)
            each = hidden @ self.down
            result: torch.Tensor = (each * share.transpose(1, 2).unsqueeze(-1)).sum(1)
            return result

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.experts = nn.LayerNorm(WIDTH), Experts(WIDTH, 40, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = x + self.experts(self.norm(x))
            return result

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(batch, length, 20, generator=generator)}

    module = nn.Sequential(nn.Linear(20, WIDTH), Block(), Block(), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))
    axes: Axes = {"x": {0: "batch", 1: "sequence"}, "logits": {0: "batch", 1: "sequence"}}
    return Model(module, inputs, "logits", axes)


__all__ = ["FAMILIES", "_padding"]
