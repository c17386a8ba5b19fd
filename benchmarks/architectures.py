"""Export many architectures of timm and transformers with random weights: a folder for ``benchmarks/zoo.py``.

    python benchmarks/architectures.py FOLDER [--exporter dynamo] [--only TEXT ...]
    python benchmarks/zoo.py FOLDER --closed --ratio 0.3 --markdown

None of them is in the tests, and snpc was not written by looking at them. Models of timm are as they are, those of
transformers have two layers; ``ts`` is torch's TorchScript exporter at opset 17 (timm's always), ``dynamo`` the
torch.export based one at opset 23. What does not export is said and left out. Needs torch, timm and transformers.
"""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

TIMM = """
    botnet26t_256 caformer_s18 cait_xxs24_224 coat_tiny coatnet_nano_rw_224 convformer_s18 convit_tiny crossvit_9_240
    davit_tiny deit3_small_patch16_224 edgenext_xx_small efficientvit_m0 fastvit_t8 flexivit_small focalnet_tiny_srf
    gcvit_xxtiny gmixer_12_224 hiera_tiny_224 inception_next_atto lambda_resnet26t maxxvit_rmlp_nano_rw_256
    mixer_s16_224 mvitv2_tiny nest_tiny pit_ti_224 poolformer_s12 rdnet_tiny repvit_m0_9 resmlp_12_224 sequencer2d_s
    shvit_s1 swiftformer_xs swin_s3_tiny_224 swinv2_cr_tiny_ns_224 test_vit test_vit2 test_vit3 tiny_vit_5m_224
    tnt_s_legacy_patch16_224 visformer_tiny vit_relpos_small_patch16_224 vit_small_r26_s32_224
    vit_srelpos_small_patch16_224 vit_wee_patch16_reg1_gap_256 vitamin_small_224
"""

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
TEXT = {**SIZES, "vocab_size": 99}
GROUPED = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0}
OLDER = {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}
PATCHES = {**SIZES, "image_size": 32, "patch_size": 8}
LAYERS = {"encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4, "decoder_attention_heads": 4}
PAIR = {**LAYERS, "d_model": 64, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 99}
WAVES = {
    **SIZES, "conv_dim": [16, 16], "conv_stride": [4, 4], "conv_kernel": [8, 4], "num_feat_extract_layers": 2,
    "num_conv_pos_embedding_groups": 4, "num_conv_pos_embeddings": 8,
}  # fmt: skip

# class of the model: (class of its configuration, what it is made with, what enters)
TRANSFORMERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "ASTForAudioClassification": ("AST", {**SIZES, "max_length": 64, "num_mel_bins": 32}, "spectrum"),
    "BigBirdModel": ("BigBird", {**TEXT, "attention_type": "original_full"}, "text"),
    "BioGptForCausalLM": ("BioGpt", TEXT, "text"),
    "BlipVisionModel": ("BlipVision", PATCHES, "image"),
    "BloomForCausalLM": ("Bloom", {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 99}, "text"),
    "CodeGenForCausalLM": ("CodeGen", {**OLDER, "rotary_dim": 8}, "text"),
    "ConvBertModel": ("ConvBert", {**TEXT, "embedding_size": 64}, "text"),
    "DPTModel": ("DPT", {**PATCHES, "backbone_out_indices": [0, 1, 1, 1]}, "image"),
    "Data2VecVisionForImageClassification": (
        "Data2VecVision", {**PATCHES, "use_relative_position_bias": True}, "image",
    ),
    "ElectraModel": ("Electra", {**TEXT, "embedding_size": 32}, "text"),
    "ErnieModel": ("Ernie", TEXT, "text"),
    "EsmModel": ("Esm", {**TEXT, "position_embedding_type": "rotary", "pad_token_id": 1}, "text"),
    "FalconForCausalLM": ("Falcon", {k: v for k, v in TEXT.items() if k != "intermediate_size"}, "text"),
    "FlaubertModel": ("Flaubert", {"emb_dim": 64, "n_layers": 2, "n_heads": 4, "n_words": 99}, "text"),
    "FocalNetForImageClassification": (
        "FocalNet",
        {"image_size": 32, "embed_dim": 16, "depths": [1, 1], "focal_levels": [1, 1], "focal_windows": [3, 3]},
        "image",
    ),
    "FunnelBaseModel": (
        "Funnel",
        {"vocab_size": 99, "block_sizes": [1, 1], "d_model": 64, "n_head": 4, "d_head": 16, "d_inner": 128},
        "text",
    ),
    "GPTBigCodeForCausalLM": ("GPTBigCode", OLDER, "text"),
    "GPTJForCausalLM": ("GPTJ", {**OLDER, "rotary_dim": 8}, "text"),
    "Gemma3ForCausalLM": ("Gemma3Text", {**GROUPED, "head_dim": 16}, "text"),
    "GraniteForCausalLM": ("Granite", GROUPED, "text"),
    "GroupViTVisionModel": (
        "GroupViTVision",
        {
            "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32, "patch_size": 4,
            "depths": [1, 1, 1], "num_group_tokens": [8, 4, 0], "num_output_groups": [8, 4, 0],
        },
        "image",
    ),
    "HieraForImageClassification": (
        "Hiera", {"embed_dim": 16, "image_size": [64, 64], "depths": [1] * 4, "num_heads": [1, 1, 2, 2]}, "picture",
    ),
    "HubertModel": ("Hubert", WAVES, "sound"),
    "IBertModel": ("IBert", TEXT, "text"),
    "IJepaModel": ("IJepa", PATCHES, "image"),
    "LevitForImageClassification": (
        "Levit",
        {
            "image_size": 64, "hidden_sizes": [16, 32, 48], "num_attention_heads": [1, 2, 3], "depths": [1, 1, 1],
            "key_dim": [8, 8, 8],
        },
        "picture",
    ),
    "M2M100Model": ("M2M100", PAIR, "pair"),
    "MPNetModel": ("MPNet", TEXT, "text"),
    "MobileBertModel": (
        "MobileBert",
        {
            **TEXT, "embedding_size": 32, "intra_bottleneck_size": 32, "true_hidden_size": 32,
            "num_feedforward_networks": 2,
        },
        "text",
    ),
    "MptForCausalLM": (
        "Mpt",
        {"d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 99, "expansion_ratio": 2, "max_seq_len": 64},
        "text",
    ),
    "NemotronForCausalLM": ("Nemotron", {**GROUPED, "head_dim": 16}, "text"),
    "OPTForCausalLM": ("OPT", {**SIZES, "ffn_dim": 128, "vocab_size": 99, "word_embed_proj_dim": 64}, "text"),
    "Olmo2ForCausalLM": ("Olmo2", GROUPED, "text"),
    "OwlViTVisionModel": ("OwlViTVision", PATCHES, "image"),
    "PegasusModel": ("Pegasus", PAIR, "pair"),
    "PerceiverModel": (
        "Perceiver",
        {
            "num_latents": 8, "d_latents": 32, "d_model": 32, "num_blocks": 1, "num_self_attends_per_block": 2,
            "num_self_attention_heads": 4, "num_cross_attention_heads": 4,
        },
        "rows",
    ),
    "Phi3ForCausalLM": ("Phi3", GROUPED, "text"),
    "PvtV2ForImageClassification": (
        "PvtV2", {"hidden_sizes": [16, 32, 32, 64], "depths": [1] * 4, "num_attention_heads": [1, 2, 2, 4]}, "picture",
    ),
    "RemBertModel": ("RemBert", {**TEXT, "input_embedding_size": 32}, "text"),
    "RoFormerModel": ("RoFormer", {**TEXT, "embedding_size": 64}, "text"),
    "SmolLM3ForCausalLM": ("SmolLM3", GROUPED, "text"),
    "SplinterModel": ("Splinter", TEXT, "text"),
    "SqueezeBertModel": ("SqueezeBert", {**TEXT, "embedding_size": 64}, "text"),
    "StableLmForCausalLM": ("StableLm", GROUPED, "text"),
    "Starcoder2ForCausalLM": ("Starcoder2", GROUPED, "text"),
    "Swin2SRForImageSuperResolution": (
        "Swin2SR", {"image_size": 32, "embed_dim": 32, "depths": [2], "num_heads": [2], "window_size": 8}, "image",
    ),
    "TimesformerForVideoClassification": ("Timesformer", {**PATCHES, "num_frames": 4}, "film"),
    "ViTMSNModel": ("ViTMSN", PATCHES, "image"),
    "VideoMAEForVideoClassification": ("VideoMAE", {**PATCHES, "num_frames": 4, "tubelet_size": 2}, "film"),
    "VivitForVideoClassification": (
        "Vivit", {**SIZES, "image_size": 32, "num_frames": 4, "tubelet_size": [2, 8, 8]}, "film",
    ),
    "WavLMModel": ("WavLM", WAVES, "sound"),
    "XGLMForCausalLM": (
        "XGLM", {"d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 128, "vocab_size": 99}, "text",
    ),
    "XLNetModel": ("XLNet", {"d_model": 64, "n_layer": 2, "n_head": 4, "d_inner": 128, "vocab_size": 99}, "text"),
    "YolosForObjectDetection": ("Yolos", {**PATCHES, "image_size": [32, 32], "num_detection_tokens": 5}, "image"),
}  # fmt: skip


def entering(kind: str) -> dict[str, Any]:
    import torch

    text = {"input_ids": torch.randint(3, 90, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    return {
        "text": text,
        "pair": {**text, "decoder_input_ids": torch.randint(3, 90, (2, 9))},
        "image": {"pixel_values": torch.randn(2, 3, 32, 32)},
        "picture": {"pixel_values": torch.randn(2, 3, 64, 64)},
        "film": {"pixel_values": torch.randn(2, 4, 3, 32, 32)},
        "spectrum": {"input_values": torch.randn(2, 64, 32)},
        "sound": {"input_values": torch.randn(2, 800)},
        "rows": {"inputs": torch.randn(2, 16, 32)},
    }[kind]


def of_transformers(name: str) -> tuple[Any, dict[str, Any]]:
    import torch
    import transformers

    of, options, kind = TRANSFORMERS[name]
    config = getattr(transformers, f"{of}Config")(**options)
    try:
        config._attn_implementation = "sdpa"
        made = getattr(transformers, name)(config)
    except ValueError:
        config._attn_implementation = "eager"
        made = getattr(transformers, name)(config)
    feeds = entering(kind)

    class First(torch.nn.Module):
        """The logits, or what else comes first."""

        def __init__(self) -> None:
            super().__init__()
            self.model = made

        def forward(self, *inputs: Any) -> Any:
            options = {"use_cache": False} if hasattr(made.config, "use_cache") else {}
            given = made(**dict(zip(feeds, inputs, strict=True)), **options, return_dict=True)
            wanted = ("logits", "reconstruction", "last_hidden_state")
            return next(found for key in wanted if (found := getattr(given, key, None)) is not None)

    return First(), feeds


def of_timm(name: str) -> tuple[Any, dict[str, Any]]:
    import timm
    import torch

    made = timm.create_model(name, pretrained=False)
    return made, {"x": torch.randn(2, *made.default_cfg["input_size"])}


def export(name: str, path: Path, exporter: str) -> None:
    import torch

    torch.manual_seed(0)
    made, feeds = of_transformers(name) if name in TRANSFORMERS else of_timm(name)
    for weights in made.parameters():
        weights.data += 0.05 * torch.randn_like(weights)  # also what starts as zeros and ones
    made.eval()
    names = list(feeds)
    given: dict[str, Any] = {"input_names": names, "output_names": ["y"]}
    if exporter == "dynamo" and name in TRANSFORMERS:
        batch = torch.export.Dim("batch", min=1, max=64)
        given |= {"dynamo": True, "opset_version": 23, "verbose": False, "verify": False}
        given["dynamic_shapes"] = {"inputs": tuple({0: batch} for _ in names)}
    else:
        given |= {"dynamo": False, "opset_version": 17, "dynamic_axes": {n: {0: "batch"} for n in names}}
    torch.onnx.export(made, tuple(feeds.values()), str(path), **given)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exporter", choices=["ts", "dynamo"], default="ts")
    parser.add_argument("--only", nargs="*", default=[], help="names that contain one of these")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    warnings.simplefilter("ignore")
    for name in [*TRANSFORMERS, *(TIMM.split() if options.exporter == "ts" else [])]:
        if options.only and not any(text in name for text in options.only):
            continue
        try:
            export(name, options.folder / f"{name}.onnx", options.exporter)
            print(f"{name}: exported", flush=True)
        except Exception as error:  # exporters raise whatever they like
            print(f"{name}: not exported: {str(error).splitlines()[0][:120]}", flush=True)


if __name__ == "__main__":
    main()
