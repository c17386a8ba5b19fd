"""Tiny language models with mixtures of experts, as exporters write them.

Of transformers' own models every token gathers the stacked weights of the experts that it is sent to. Exporters that
unroll a loop over experts (optimum, of models with a list of experts) mark each expert's tokens with NonZero, gather
them, and scatter what the expert makes of them.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from tests.models.exports import Exports, Model, _causal_inputs, _causal_model, _rotary_options, register

if TYPE_CHECKING:
    import torch
    from torch import nn

EXPERTS: Exports = {}
COUNT = 6
CHOSEN = 2
HIDDEN = 20

_register = functools.partial(register, into=EXPERTS, source=__file__)


def _options(attention: str, **more: Any) -> dict[str, Any]:
    return {**_rotary_options(attention), "num_experts_per_tok": CHOSEN, **more}


def _model(model: Any) -> Model:
    """Experts are gathered token by token, the one form that both exporters take; weights are of order 1/sqrt(fan)."""
    import torch

    model.set_experts_implementation("batched_mm")
    made = _causal_model(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 3:
                parameter.mul_(2 * max(parameter.shape[1:]) ** -0.5)
            elif "experts" in name and "bias" in name:
                parameter.mul_(0.3)
    return made


@_register("ts17 dyn20", "transformers")
def _build_qwen3moe(attention: str) -> Model:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = _options(attention, num_experts=COUNT, moe_intermediate_size=HIDDEN, norm_topk_prob=True)
    return _model(Qwen3MoeForCausalLM(Qwen3MoeConfig(**options)))


@_register("dyn20", "transformers")
def _build_mixtral(attention: str) -> Model:
    from transformers import MixtralConfig, MixtralForCausalLM

    options = _options(attention, num_local_experts=COUNT, intermediate_size=HIDDEN)
    return _model(MixtralForCausalLM(MixtralConfig(**options)))


@_register("ts17", "transformers")
def _build_olmoe(attention: str) -> Model:
    """The shares of the experts that are chosen do not add up to one."""
    from transformers import OlmoeConfig, OlmoeForCausalLM

    options = _options(attention, num_experts=COUNT, intermediate_size=HIDDEN)
    del options["head_dim"]
    return _model(OlmoeForCausalLM(OlmoeConfig(**options)))


@_register("ts17 dyn20", "transformers")
def _build_gptoss(attention: str) -> Model:
    """Biases in router and experts, the two halves of the gated layer interleaved, shares made after the choice."""
    from transformers import GptOssConfig, GptOssForCausalLM

    options = _options(attention, num_local_experts=COUNT, intermediate_size=HIDDEN, sliding_window=8)
    options |= {"eos_token_id": 0, "pad_token_id": 0}
    return _model(GptOssForCausalLM(GptOssConfig(**options)))


@_register("ts17", "transformers")
def _build_qwen2moe(attention: str) -> Model:
    """An expert that all tokens take, beside those that are chosen."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    options = _options(attention, num_experts=COUNT, moe_intermediate_size=HIDDEN, shared_expert_intermediate_size=28)
    del options["head_dim"]
    return _model(Qwen2MoeForCausalLM(Qwen2MoeConfig(**options)))


@_register("dyn20", "transformers")
def _build_deepseek(attention: str) -> Model:
    """Groups of experts, of which some are chosen first, and a correction in the choice."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    options = _options(attention, n_routed_experts=8, moe_intermediate_size=HIDDEN, n_shared_experts=1)
    options |= {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 4}
    options |= {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12}
    del options["head_dim"]
    return _model(DeepseekV3ForCausalLM(DeepseekV3Config(**options)))


def _unrolled(layer: Any) -> nn.Module:
    """A layer of experts as transformers 4 has it, a module each, in the loop that optimum writes."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Expert(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = (nn.Linear(width, HIDDEN, bias=False) for _ in range(2))
            self.down_proj = nn.Linear(HIDDEN, width, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))  # type: ignore[no-any-return]

    class Layer(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.gate = nn.Linear(width, COUNT, bias=False)
            self.experts = nn.ModuleList([Expert(width) for _ in range(COUNT)])

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            tokens = hidden.reshape(-1, hidden.shape[-1])
            shares, chosen = torch.topk(functional.softmax(self.gate(tokens), dim=1), CHOSEN, dim=-1)
            shares = shares / shares.sum(dim=-1, keepdim=True)
            out = torch.zeros_like(tokens)
            mask = functional.one_hot(chosen, num_classes=len(self.experts)).permute(2, 1, 0)
            for number, expert in enumerate(self.experts):
                place, token = torch.where(mask[number])
                made = expert(tokens[None, token].reshape(-1, tokens.shape[-1])) * shares[token, place, None]
                out.index_add_(0, token, made)
            return out.reshape(hidden.shape)

    return Layer(layer.gate.weight.shape[1])


@_register("ts17 ts18", "transformers")
def _build_unrolled(attention: str) -> Model:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    options = _options(attention, num_experts=COUNT, moe_intermediate_size=HIDDEN)
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**options))
    for layer in model.model.layers:
        layer.mlp = _unrolled(layer.mlp)
    return _causal_model(model)


def longer_feeds() -> dict[str, Any]:
    """Inputs of another batch and length than those of the exports."""
    import torch

    feeds = _causal_inputs(2, 17, torch.Generator().manual_seed(5))
    return {name: value.numpy() for name, value in feeds.items()}


def fused_model(activation: str, seed: int = 0, width: int = 12, hidden: int = HIDDEN) -> Any:
    """x [tokens, 8] -> a layer -> com.microsoft.MoE with a router in front -> a layer -> y [tokens, 8]."""
    import numpy as np
    from onnx import helper, numpy_helper

    rng = np.random.default_rng(seed)
    rows = 2 * hidden if activation == "swiglu" else hidden
    shapes = {"enter": (8, width), "router": (width, COUNT), "router_bias": (COUNT,), "leave": (width, 8)}
    shapes |= {"inner": (COUNT, rows, width), "inner_bias": (COUNT, rows)}
    shapes |= {"outer": (COUNT, width, hidden), "outer_bias": (COUNT, width)}
    fusion: dict[str, Any] = {"swiglu_fusion": 1} if activation == "swiglu" else {}
    nodes = [
        helper.make_node("MatMul", ["x", "enter"], ["h"], "enter"),
        helper.make_node("MatMul", ["h", "router"], ["scores"], "router"),
        helper.make_node("Add", ["scores", "router_bias"], ["logits"], "router_bias"),
        helper.make_node(
            "MoE",
            ["h", "logits", "inner", "inner_bias", "outer", "outer_bias"],
            ["made"],
            "experts",
            domain="com.microsoft",
            k=CHOSEN,
            activation_type=activation,
            normalize_routing_weights=1,
            **fusion,
        ),
        helper.make_node("MatMul", ["made", "leave"], ["y"], "leave"),
    ]
    held = [numpy_helper.from_array(rng.normal(size=s).astype(np.float32), name) for name, s in shapes.items()]
    ends = [helper.make_tensor_value_info(name, 1, ["tokens", 8]) for name in "xy"]
    graph = helper.make_graph(nodes, "experts", ends[:1], ends[1:], held)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def quantized_experts(model: Any, bits: int, block: int = 0, zero_points: bool = False) -> Any:
    """``fused_model`` with QMoE: codes of so many bits, a scale per row, or per ``block`` along it."""
    import numpy as np
    from onnx import helper, numpy_helper

    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    (node,) = (node for node in model.graph.node if node.op_type == "MoE")
    center, parts = 1 << (bits - 1), dict[str, Any]()
    for name in ("inner", "outer"):
        weights = held[name].reshape(*held[name].shape[:2], -1, block or held[name].shape[2])
        scale = (np.abs(weights).max(-1, keepdims=True) / (center - 1)).astype(np.float32)
        zero = np.full(scale.shape, center) - (np.arange(scale.size).reshape(scale.shape) % 3 if zero_points else 0)
        codes = np.clip(np.rint(weights / scale) + zero, 0, 2 * center - 1).reshape(held[name].shape)
        flat = scale.shape[:3] if block else scale.shape[:2]
        parts |= {name: packed(codes, bits), f"{name}_scale": scale.reshape(flat)}
        if zero_points:
            parts[f"{name}_zero"] = packed(zero.reshape(flat), bits)
    zeros = [f"{name}_zero" if zero_points else "" for name in ("inner", "outer")]
    inputs = ["h", "logits", "inner", "inner_scale", "inner_bias", "outer", "outer_scale", "outer_bias", "", "", ""]
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    attributes |= {"expert_weight_bits": bits, **({"block_size": block} if block else {})}
    node.CopyFrom(helper.make_node("QMoE", inputs + zeros, ["made"], "experts", domain="com.microsoft", **attributes))
    stored = {**held, **parts}
    del model.graph.initializer[:]
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in stored.items())
    return model


def packed(codes: Any, bits: int) -> Any:
    """Bytes of codes along the last axis, lowest bits first."""
    import numpy as np

    flat = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, bitorder="little")[..., :bits]
    flat = flat.reshape(*codes.shape[:-1], -1)
    return np.packbits(flat, axis=-1, bitorder="little")
