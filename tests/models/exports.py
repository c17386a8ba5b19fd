"""Tiny models exported with the real exporters: the graphs the test-suite works on.

A hand-written graph only shows what its author thought of; what an exporter really emits (a packed QKV that becomes
Reshape + Transpose + Gather, masks built from Shape arithmetic, weights shared between layers, constants folded into
odd places) is what the tool has to survive. So every model here is a few layers of the original implementation (timm,
transformers, torch.nn) with seeded random weights, and `export(name)` writes it once with the named exporter:

    path = export("bert__ts17_sdpa")     # <cache>/bert__ts17_sdpa.onnx
    feeds = load_feeds("bert__ts17_sdpa")    # <cache>/bert__ts17_sdpa.npz, runs as it is

Every model has an export of each exporter and one of each kind of attention; not all combinations: which exporter wrote
a model, how its attention is spelled, its opset and whether sizes are fixed are crossed for ViT, BERT, GPT-2 and Llama.

Names are `<model>__<exporter><opset>[_sdpa][_static|_static1]`. `ts` is the TorchScript exporter and `dyn` the
torch.export based one; without `_sdpa` the attention is the eager one; `_static` has no dynamic axis (batch 2) and
`_static1` has none and batch 1.

The cache is keyed by the versions of the packages and by this file, so it never has to be cleared. Everything heavy is
imported by the builders: a run whose exports are cached does not pay for importing torch.

    python tests/models/exports.py [DIR] [NAME...]    # write all (or the named ones) and print a table
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import io
import logging
import math
import os
import re
import sys
import tempfile
import time
import types
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    import torch
    from torch import nn

Array = npt.NDArray[Any]
Axes = dict[str, dict[int, str]]

VERSIONED = ("torch", "transformers", "timm", "onnx", "onnxscript", "onnx-ir")

# The feeds differ from the example inputs in both sizes, so an exporter that baked either of them in is found out.
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 8
FEED_BATCH, FEED_LENGTH = 3, 11

VOCABULARY = 61
WIDTH = 48


# ---------------------------------------------------------------------------------------------------------------------
# What an export is


@dataclass(frozen=True)
class Model:
    """A torch module with a way to make inputs for it: `inputs(batch, length, generator)`, in calling order."""

    module: nn.Module
    inputs: Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]
    output: str
    axes: Axes
    # Traced by the TorchScript exporter, the module keeps the sequence lengths of the example.
    trace_fixes_length: bool = False


@dataclass(frozen=True)
class Built:
    """All an exporter needs, and the feeds the result is run on."""

    module: nn.Module
    example: dict[str, torch.Tensor]
    feeds: dict[str, Array]
    input_names: list[str]
    output_names: list[str]
    dynamic_axes: Axes


@dataclass(frozen=True)
class Export:
    """One model written by one exporter."""

    name: str
    model: str
    exporter: str
    opset: int
    attention: str
    static_batch: int | None
    requires: tuple[str, ...]
    builder: Builder
    source: Path
    """The file that says how it is built."""

    @property
    def dynamic(self) -> bool:
        return self.static_batch is None

    def missing(self) -> list[str]:
        """The packages that building it needs and this environment lacks."""
        return [package for package in self.requires if importlib.util.find_spec(package) is None]

    def build(self) -> Built:
        """The seeded torch module with example inputs and feeds; the same on every call."""
        import torch

        # The seed is the model's, not the export's: exports of one model have the same weights and can be compared.
        seed = zlib.crc32(self.model.encode())
        torch.manual_seed(seed)
        with quiet_export():
            model = self.builder(self.attention)
        model.module.eval().requires_grad_(False)
        fixed_length = model.trace_fixes_length and self.exporter == "ts"
        axes = {name: {0: "batch"} if fixed_length else axes for name, axes in model.axes.items()}
        feed_length = EXAMPLE_LENGTH if fixed_length or not self.dynamic else FEED_LENGTH
        example = model.inputs(
            self.static_batch or EXAMPLE_BATCH, EXAMPLE_LENGTH, torch.Generator().manual_seed(seed + 1)
        )
        feeds = model.inputs(self.static_batch or FEED_BATCH, feed_length, torch.Generator().manual_seed(seed + 2))
        return Built(
            module=model.module,
            example=example,
            feeds={name: value.numpy() for name, value in feeds.items()},
            input_names=list(example),
            output_names=[model.output],
            dynamic_axes=axes if self.dynamic else {},
        )


Builder = Callable[[str], "Model"]  # of the attention implementation
Exports = dict[str, Export]

EXPORTS: Exports = {}
"""The exports of this file, which every test runs on; see families.py for more."""

ALL: Exports = {}

_VARIANT = re.compile(r"(?P<exporter>ts|dyn)(?P<opset>\d+)(?P<sdpa>_sdpa)?(?P<static>_static1?)?")


def register(
    variants: str, *requires: str, into: Exports = EXPORTS, source: str = __file__
) -> Callable[[Builder], Builder]:
    """Register the decorated function's model, and one export of it for each of the blank-separated variants."""

    def add(build: Builder) -> Builder:
        _add(build.__name__.removeprefix("_build_"), build, variants, requires, into, Path(source))
        return build

    return add


def _add(model: str, build: Builder, variants: str, requires: Sequence[str], into: Exports, source: Path) -> None:
    for variant in variants.split():
        match = _VARIANT.fullmatch(variant)
        assert match, f"not a variant: {variant}"
        dynamo = match["exporter"] == "dyn"
        name = f"{model}__{variant}"
        into[name] = ALL[name] = Export(
            name=name,
            model=model,
            exporter=match["exporter"],
            opset=int(match["opset"]),
            attention="sdpa" if match["sdpa"] else "eager",
            static_batch={None: None, "_static": EXAMPLE_BATCH, "_static1": 1}[match["static"]],
            requires=("torch", *requires, *(["onnxscript"] if dynamo else [])),
            builder=build,
            source=source,
        )


# ---------------------------------------------------------------------------------------------------------------------
# Weights


def _randomize(module: nn.Module, *, keep_vectors: bool = False) -> None:
    """Give every parameter its own small random values, in place.

    Default initialisation leaves zero biases and unit norm weights: exporters store equal tensors once, and a pruned
    zero bias proves nothing. With `keep_vectors`, those stay as they were, for the tests that want the shared ones.
    Matrices get a spread of 1/sqrt(fan in), so normalised inputs give attention scores that vary by O(1).
    """
    import torch

    done = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if id(parameter) in done or (keep_vectors and parameter.ndim < 2):
                continue
            done.add(id(parameter))  # A tied output head comes after the embedding, whose spread is the one to have.
            mean, spread = _distribution(owner, name, parameter)
            with torch.no_grad():
                parameter.copy_(mean + spread * torch.randn(parameter.shape))


def _distribution(owner: nn.Module, name: str, parameter: torch.Tensor) -> tuple[float, float]:
    """Mean and standard deviation for a parameter of a module, by the role it plays there."""
    kind = type(owner).__name__
    if kind == "LayerScale":
        return 0.5, 0.1
    if parameter.ndim == 1:
        return (1.0, 0.1) if "Norm" in kind and name != "bias" else (0.0, 0.1)
    if "Embedding" in kind:
        return 0.0, 0.7
    if parameter.ndim == 2 or "Conv" in kind:
        # transformers' Conv1D (GPT-2) is a linear layer with the input axis first; everywhere else it is behind.
        fan_in = parameter.shape[0] if kind == "Conv1D" else math.prod(parameter.shape[1:])
        return 0.0, (0.5 if "bias_table" in name else fan_in**-0.5)
    return 0.0, 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Inputs and wrappers

_BATCH = {0: "batch"}
_TEXT = {0: "batch", 1: "sequence"}
_DECODER = {0: "batch", 1: "decoder_sequence"}


def _ids(batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """Token ids; 0 and 1 are left out, since some models take one of them for padding."""
    import torch

    return torch.randint(2, VOCABULARY, (batch, length), generator=generator)


def _padding(batch: int, length: int) -> torch.Tensor:
    """An attention mask whose samples have 0, 1, 2, ... padded positions at the end."""
    import torch

    lengths = length - torch.arange(batch)
    return (torch.arange(length)[None, :] < lengths[:, None]).long()


def _image_inputs(size: int, name: str = "x") -> Callable[[int, int, torch.Generator], dict[str, torch.Tensor]]:
    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {name: torch.randn(batch, 3, size, size, generator=generator)}

    return inputs


def _causal_inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {"input_ids": _ids(batch, length, generator), "attention_mask": _padding(batch, length)}


def _segment_inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Ids, mask and token types (the second half of each sample is the second segment)."""
    import torch

    types_ = (torch.arange(length) >= length // 2).long().expand(batch, length).contiguous()
    return {**_causal_inputs(batch, length, generator), "token_type_ids": types_}


def _seq2seq_inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        **_causal_inputs(batch, length, generator),
        "decoder_input_ids": _ids(batch, max(length - 3, 2), generator),
    }


def _causal_axes(output: str) -> Axes:
    return {"input_ids": _TEXT, "attention_mask": _TEXT, output: _TEXT}


_SEQ2SEQ_AXES: Axes = {"input_ids": _TEXT, "attention_mask": _TEXT, "decoder_input_ids": _DECODER, "logits": _DECODER}


def _tensor_output(model: nn.Module, arguments: Sequence[str], output: str) -> nn.Module:
    """A module that takes the named arguments by position and returns one field of the model's output."""
    from torch import nn

    class TensorOutput(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        # Not *args: torch.export wants one level of nesting more for those in dynamic_shapes.
        def forward(self, first: torch.Tensor, second: Any = None, third: Any = None) -> torch.Tensor:
            values = dict(zip(arguments, (first, second, third), strict=False))
            result: torch.Tensor = getattr(self.model(**values), output)
            return result

    return TensorOutput()


# ---------------------------------------------------------------------------------------------------------------------
# Vision models


class _PlaceholderType(type):
    """A class whose unknown attributes are classes like it, so that `InterpolationMode.BILINEAR` evaluates."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        placeholder = _PlaceholderType(name, (), {})
        setattr(cls, name, placeholder)
        return placeholder


class _PlaceholderModule(types.ModuleType):
    __path__ = []  # noqa: RUF012 - what makes it a package; nobody adds to it

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        placeholder = _PlaceholderType(name, (), {})
        setattr(self, name, placeholder)
        return placeholder


class _PlaceholderFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Resolves torchvision and its submodules to empty placeholders."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = fullname.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True) if ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _PlaceholderModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


@functools.cache
def _timm(module: str) -> Any:
    """Import a module of timm, with or without torchvision.

    timm imports torchvision at the top for its data pipeline and one norm class, neither of which a model here uses,
    and torchvision has to match torch's build exactly. Where it is missing, placeholders stand in during the import
    and are then taken away again, so that nobody else takes torchvision for installed.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return importlib.import_module(module)
    finder = _PlaceholderFinder()
    sys.meta_path.append(finder)
    try:
        return importlib.import_module(module)
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


@contextlib.contextmanager
def _timm_attention(attention: str) -> Iterator[None]:
    """Have timm's attention modules constructed meanwhile use the given implementation."""
    layers = _timm("timm.layers")
    before = layers.use_fused_attn(), layers.use_fused_attn(experimental=True)
    # Swin asks for the experimental level: its window attention adds a bias tensor.
    layers.set_fused_attn(attention == "sdpa", experimental=attention == "sdpa")
    try:
        yield
    finally:
        layers.set_fused_attn(*before)


def _timm_vit(attention: str, **options: Any) -> Model:
    vision_transformer = _timm("timm.models.vision_transformer")
    with _timm_attention(attention):
        module = vision_transformer.VisionTransformer(
            img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=3, num_classes=10, **options
        )
    _randomize(module)
    return Model(module, _image_inputs(32), "logits", {"x": _BATCH, "logits": _BATCH})


@register("ts17 ts17_sdpa ts17_static dyn20 dyn20_sdpa dyn23_sdpa", "timm")
def _build_vit_timm(attention: str) -> Model:
    return _timm_vit(attention)


@register("ts17 dyn20_sdpa", "timm")
def _build_vit_timm_layerscale(attention: str) -> Model:
    return _timm_vit(attention, init_values=0.5)


@register("ts17 dyn20_sdpa", "timm")
def _build_vit_timm_qknorm(attention: str) -> Model:
    return _timm_vit(attention, qk_norm=True)


@register("ts17 ts17_sdpa dyn20_sdpa", "timm")
def _build_swin_timm(attention: str) -> Model:
    """8x8 patches in windows of 4: four windows with a shift and real masks, then one window after the merge."""
    swin_transformer = _timm("timm.models.swin_transformer")
    with _timm_attention(attention):
        module = swin_transformer.SwinTransformer(
            img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(2, 2), num_heads=(2, 4), num_classes=10
        )
    _randomize(module)
    return Model(module, _image_inputs(32), "logits", {"x": _BATCH, "logits": _BATCH})


@register("ts17 ts17_sdpa dyn20", "transformers")
def _build_vit_hf(attention: str) -> Model:
    """Separate query, key and value projections."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        num_labels=10,
        attn_implementation=attention,
    )
    model = ViTForImageClassification(config)
    _randomize(model)
    module = _tensor_output(model, ["pixel_values"], "logits")
    return Model(module, _image_inputs(32, "pixel_values"), "logits", {"pixel_values": _BATCH, "logits": _BATCH})


@register("ts17 dyn20")
def _build_convnet(attention: str) -> Model:
    """Conv-BN-ReLU, with a residual block around a depthwise convolution."""
    from torch import nn

    def unit(inputs: int, outputs: int, size: int, **options: Any) -> nn.Sequential:
        convolution = nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False, **options)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    class Residual(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.depthwise = unit(width, width, 3, groups=width)
            self.pointwise = nn.Sequential(nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width))
            self.activation = nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.activation(x + self.pointwise(self.depthwise(x)))
            return result

    module = nn.Sequential(
        unit(3, 16, 3, stride=2),
        Residual(16),
        unit(16, 24, 3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(24, 10),
    )
    _randomize(module)
    return Model(module, _image_inputs(16), "logits", {"x": _BATCH, "logits": _BATCH})


@register("ts17 dyn20")
def _build_convchain(attention: str) -> Model:
    """Convolutions one behind the other: strides, dilations, a depthwise one between pointwise ones."""
    from torch import nn

    module = nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(12, 20, 3, stride=2, padding=1, bias=False),
        nn.GELU(),
        nn.Conv2d(20, 16, 3, padding=2, dilation=2),
        nn.ReLU(),
        nn.Conv2d(16, 48, 1),
        nn.SiLU(),
        nn.Conv2d(48, 48, 3, padding=1, groups=48),
        nn.ReLU(),
        nn.Conv2d(48, 14, 1, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(14, 10),
    )
    _randomize(module)
    return Model(module, _image_inputs(16), "logits", {"x": _BATCH, "logits": _BATCH})


# ---------------------------------------------------------------------------------------------------------------------
# Models on plain feature vectors


@register("ts17 dyn20")
def _build_mlp(attention: str) -> Model:
    from torch import nn

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Linear(20, WIDTH), nn.ReLU())
            self.block = nn.Sequential(nn.Linear(WIDTH, 96), nn.GELU(), nn.Linear(96, WIDTH))
            self.head = nn.Linear(WIDTH, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            result: torch.Tensor = self.head(x + self.block(x))
            return result

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {"x": torch.randn(batch, 20, generator=generator)}

    module = Mlp()
    _randomize(module)
    return Model(module, inputs, "logits", {"x": _BATCH, "logits": _BATCH})


@register("ts17 dyn20")
def _build_linear_attention(attention: str) -> Model:
    """Attention without a softmax: positive feature maps of query and key, and the key-value product taken first."""
    from torch import nn
    from torch.nn import functional

    class LinearAttention(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.heads = heads
            self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            query, key, value = (
                layer(x).reshape(batch, length, self.heads, width // self.heads).transpose(1, 2)
                for layer in (self.query, self.key, self.value)
            )
            query, key = functional.elu(query) + 1, functional.elu(key) + 1
            scale = (query * key.sum(dim=2, keepdim=True)).sum(dim=-1, keepdim=True)
            mixed = query @ (key.transpose(2, 3) @ value) / scale
            result: torch.Tensor = self.out(mixed.transpose(1, 2).reshape(batch, length, width))
            return result

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.attention = LinearAttention(width, 4)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.attention(self.norm1(x))
            result: torch.Tensor = x + self.mlp(self.norm2(x))
            return result

    def inputs(batch: int, length: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        import torch

        return {"x": torch.randn(batch, length, 20, generator=generator)}

    module = nn.Sequential(nn.Linear(20, WIDTH), Block(WIDTH), Block(WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 7))
    _randomize(module)
    return Model(module, inputs, "logits", {"x": _TEXT, "logits": _TEXT})


# ---------------------------------------------------------------------------------------------------------------------
# Text encoders


def _bert(attention: str, *, keep_vectors: bool = False) -> Model:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    # The pooler would be dead code behind the last hidden state.
    model = BertModel(config, add_pooling_layer=False)
    _randomize(model, keep_vectors=keep_vectors)
    return _segment_model(model)


def _segment_model(model: nn.Module) -> Model:
    output = "last_hidden_state"
    module = _tensor_output(model, ["input_ids", "attention_mask", "token_type_ids"], output)
    return Model(module, _segment_inputs, output, {**_causal_axes(output), "token_type_ids": _TEXT})


@register("ts17 ts17_sdpa ts17_static ts17_static1 dyn20 dyn20_sdpa dyn18_static dyn23_sdpa", "transformers")
def _build_bert(attention: str) -> Model:
    return _bert(attention)


@register("ts17 dyn20", "transformers")
def _build_bert_zero_bias(attention: str) -> Model:
    """Biases all zero and norm weights all one, as initialised: the exporter stores those tensors once for all."""
    return _bert(attention, keep_vectors=True)


@register("ts17 dyn20 dyn20_sdpa", "transformers")
def _build_albert(attention: str) -> Model:
    """Three layers that are one and the same: every weight has three consumers."""
    from transformers import AlbertConfig, AlbertModel

    config = AlbertConfig(
        vocab_size=VOCABULARY,
        embedding_size=24,
        hidden_size=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=32,
        attn_implementation=attention,
    )
    model = AlbertModel(config, add_pooling_layer=False)
    _randomize(model)
    return _segment_model(model)


# ---------------------------------------------------------------------------------------------------------------------
# Decoders


def _causal_model(model: nn.Module) -> Model:
    _randomize(model)
    module = _tensor_output(model, ["input_ids", "attention_mask"], "logits")
    return Model(module, _causal_inputs, "logits", _causal_axes("logits"))


@register("ts17 ts17_static dyn20 dyn20_sdpa dyn23_sdpa", "transformers")
def _build_gpt2(attention: str) -> Model:
    """Packed Conv1D weights, stored input axis first, and an output head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=32,
        n_embd=WIDTH,
        n_layer=2,
        n_head=4,
        use_cache=False,
        attn_implementation=attention,
    )
    return _causal_model(GPT2LMHeadModel(config))


def _rotary_options(attention: str) -> dict[str, Any]:
    """Configuration shared by the models with rotary positions, grouped key-value heads and a gated MLP."""
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "max_position_embeddings": 32,
        "use_cache": False,
        "attn_implementation": attention,
    }


# At opset 23 the exporter emits RotaryEmbedding with the caches of one sample, which takes no other batch than 1.
@register("ts17 ts17_sdpa ts17_static dyn20 dyn20_sdpa dyn23_sdpa_static1", "transformers")
def _build_llama(attention: str) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    return _causal_model(LlamaForCausalLM(LlamaConfig(**_rotary_options(attention))))


@register("ts17 dyn20 dyn20_sdpa", "transformers")
def _build_qwen3(attention: str) -> Model:
    """As Llama, with a norm on the query and the key of each head."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _causal_model(Qwen3ForCausalLM(Qwen3Config(**_rotary_options(attention))))


# ---------------------------------------------------------------------------------------------------------------------
# Encoder-decoders


def _seq2seq_model(model: nn.Module) -> Model:
    """The model, with its own weights, behind ids, mask and decoder ids."""
    module = _tensor_output(model, ["input_ids", "attention_mask", "decoder_input_ids"], "logits")
    return Model(module, _seq2seq_inputs, "logits", _SEQ2SEQ_AXES)


def _t5(attention: str, feed_forward: str) -> Model:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=12,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj=feed_forward,
        use_cache=False,
        attn_implementation=attention,
    )
    model = T5ForConditionalGeneration(config)
    _randomize(model)
    for name, parameter in model.named_parameters():
        if name.endswith(".q.weight"):  # T5 does not scale the scores: that is in the weights.
            with torch.no_grad():
                parameter.mul_(config.d_kv**-0.5)
    return _seq2seq_model(model)


@register("ts17 dyn20_sdpa", "transformers")
def _build_t5(attention: str) -> Model:
    return _t5(attention, "relu")


@register("ts17 dyn20", "transformers")
def _build_t5_gated(attention: str) -> Model:
    return _t5(attention, "gated-gelu")


@register("ts17 dyn20 dyn20_sdpa", "transformers")
def _build_bart(attention: str) -> Model:
    """Post-norm, and the embedding shared by encoder, decoder and head."""
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=96,
        decoder_ffn_dim=96,
        max_position_embeddings=32,
        use_cache=False,
        attn_implementation=attention,
    )
    model = BartForConditionalGeneration(config)
    _randomize(model)
    return _seq2seq_model(model)


@register("ts17 dyn20")
def _build_encdec(attention: str) -> Model:
    """torch.nn.Transformer, pre-norm: packed input projections, of which cross attention takes slices.

    Its attention is always the sdpa one. `multi_head_attention_forward` reads the length of the key from `k.shape[0]`,
    which a trace turns into a constant (pytorch/pytorch#135691), so that only the batch is dynamic there.
    """
    import torch
    from torch import nn

    # The fused inference path is one operator that neither exporter knows.
    torch.backends.mha.set_fastpath_enabled(False)

    class EncoderDecoder(nn.Module):
        causal: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, WIDTH)
            self.positions = nn.Embedding(32, WIDTH)
            self.transformer = nn.Transformer(WIDTH, 4, 2, 2, 96, norm_first=True, batch_first=True)
            self.head = nn.Linear(WIDTH, VOCABULARY)
            mask = nn.Transformer.generate_square_subsequent_mask(32)
            self.register_buffer("causal", mask.isinf(), persistent=False)

        def embed(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
            return result

        def forward(
            self, input_ids: torch.Tensor, attention_mask: torch.Tensor, decoder_input_ids: torch.Tensor
        ) -> torch.Tensor:
            length = decoder_input_ids.shape[1]
            padding = attention_mask == 0
            hidden = self.transformer(
                self.embed(input_ids),
                self.embed(decoder_input_ids),
                tgt_mask=self.causal[:length, :length],
                tgt_is_causal=False,
                src_key_padding_mask=padding,
                memory_key_padding_mask=padding,
            )
            result: torch.Tensor = self.head(hidden)
            return result

    module = EncoderDecoder()
    _randomize(module)
    return Model(module, _seq2seq_inputs, "logits", _SEQ2SEQ_AXES, trace_fixes_length=True)


# ---------------------------------------------------------------------------------------------------------------------
# Exporting


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep the exporters' progress lines, tracer warnings and log records off the test output."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _export_torchscript(built: Built, opset: int, path: Path) -> None:
    import torch

    torch.onnx.export(
        built.module,
        tuple(built.example.values()),
        str(path),
        dynamo=False,
        opset_version=opset,
        input_names=built.input_names,
        output_names=built.output_names,
        dynamic_axes=built.dynamic_axes or None,
    )


@functools.cache
def _keep_registries() -> None:
    """Have torch fill its table of operators once for each opset: it takes a quarter of the time of a small export."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    ONNXRegistry.from_torchlib = staticmethod(  # type: ignore[method-assign]
        functools.cache(ONNXRegistry.from_torchlib)
    )


def _export_dynamo(built: Built, opset: int, path: Path) -> None:
    import torch

    _keep_registries()
    shapes = tuple(built.dynamic_axes.get(name, {}) for name in built.input_names)
    program = torch.onnx.export(
        built.module,
        tuple(built.example.values()),
        dynamo=True,
        opset_version=opset,
        input_names=built.input_names,
        output_names=built.output_names,
        dynamic_shapes=shapes if built.dynamic_axes else None,
        verify=False,
        verbose=False,
    )
    assert program is not None
    program.save(str(path), external_data=False)


_EXPORTERS: Mapping[str, Callable[[Built, int, Path], None]] = {"ts": _export_torchscript, "dyn": _export_dynamo}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@functools.cache
def _key(*sources: Path) -> str:
    """What the content of an export depends on: this file, the one that builds it, and the packages."""
    key = hashlib.sha256(Path(__file__).read_bytes())
    for source in sources:
        key.update(source.read_bytes())
    for package in VERSIONED:
        key.update(f"{package}={_version(package)}\n".encode())
    return key.hexdigest()[:12]


def cache_dir(source: Path) -> Path:
    """Where the exports of a file are kept: below $SNPC_EXPORTS, or .cache/exports of the repository."""
    root = os.environ.get("SNPC_EXPORTS") or Path(__file__).resolve().parents[2] / ".cache" / "exports"
    return Path(root) / (_key() if source == Path(__file__) else _key(source))


def export(name: str) -> Path:
    """The named export as a file, made now unless the cache has it; its feeds lie beside it as `.npz`."""
    path = cache_dir(ALL[name].source) / f"{name}.onnx"
    if not path.exists():
        write(name, path.parent)
    return path


def write(name: str, directory: Path) -> Path:
    """Make the named export and its feeds in a directory, over any that are there."""
    spec = ALL[name]
    path = directory / f"{name}.onnx"
    directory.mkdir(parents=True, exist_ok=True)
    # Written aside and moved into place: a test process running in parallel sees the whole file or none. The model
    # comes last, as it is what tells that both are there.
    with tempfile.TemporaryDirectory(dir=directory, prefix=f".{name}.") as scratch:
        draft = Path(scratch) / path.name
        built = spec.build()
        with quiet_export():
            _EXPORTERS[spec.exporter](built, spec.opset, draft)
        np.savez(draft.with_suffix(".npz"), allow_pickle=False, **built.feeds)
        draft.with_suffix(".npz").replace(path.with_suffix(".npz"))
        draft.replace(path)
    return path


def load_feeds(name: str) -> dict[str, Array]:
    """The inputs written with the named export, by input name; the leading axis counts the samples."""
    with np.load(export(name).with_suffix(".npz")) as archive:
        return {key: archive[key] for key in archive.files}


# ---------------------------------------------------------------------------------------------------------------------
# Command line


def _report(name: str, directory: Path | None) -> float:
    """Write one export, print its row and return the seconds it took."""
    import onnx

    start = time.perf_counter()
    path = write(name, directory) if directory else export(name)
    seconds = time.perf_counter() - start
    nodes = len(onnx.load(path).graph.node)
    print(f"{name:36} {nodes:6} nodes {path.stat().st_size / 1000:8.0f} kB {seconds:7.1f} s", flush=True)
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write the exports the tests use and print a table of them.")
    parser.add_argument(
        "directory", nargs="?", type=Path, help="where to write them (default: the cache, if not there)"
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="exports to write (default: all)")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in EXPORTS]
    if unknown:
        parser.error(f"no such export: {', '.join(unknown)}")
    failures = 0
    families: dict[str, float] = {}
    for name in options.names or EXPORTS:
        missing = EXPORTS[name].missing()
        if missing:
            print(f"{name:36} skipped: not installed: {', '.join(missing)}", flush=True)
            continue
        try:
            seconds = _report(name, options.directory)
        except Exception as error:  # One that fails must not keep the others from being written.
            failures += 1
            print(f"{name:36} FAILED: {type(error).__name__}: {str(error).strip()[:200]}", flush=True)
        else:
            families[EXPORTS[name].exporter] = families.get(EXPORTS[name].exporter, 0.0) + seconds
    print(", ".join(f"{family}: {seconds:.0f} s" for family, seconds in families.items()))
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
