"""Decoders in two files, as optimum writes them: one reads a prompt, and one goes on from its caches.

``decoder_model.onnx`` makes ``present.N.*`` of all tokens, ``decoder_with_past_model.onnx`` takes them as
``past_key_values.N.*``. With an encoder, its states make the keys and values of a cross attention once: the second
decoder has no weights for them, and returns no cache of theirs. All biases of the output projections are zero, so that
their contents do not tell layers apart.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
from onnx import TensorProto, compose, helper, numpy_helper

from snpc.temporary import TemporaryFolder
from tests.models.exports import quiet_export

if TYPE_CHECKING:
    import torch

VOCABULARY, CONTEXT, LAYERS, WIDTH, HEADS, HEAD_WIDTH, HIDDEN = 40, 48, 2, 24, 3, 8, 32
PROMPT = 4  # tokens that are read at once
ENCODER = "encoder_model.onnx"
FIRST, SECOND, MERGED = "decoder_model.onnx", "decoder_with_past_model.onnx", "decoder_model_merged.onnx"


@functools.cache
def pair_folder(cross: bool = True) -> TemporaryFolder:
    """A folder with both decoders, exported once; ``cross``: they read the states of an encoder."""
    folder = TemporaryFolder()
    write_pair(folder.path, cross)
    return folder


def pair_paths(cross: bool = True) -> tuple[Path, Path]:
    folder = pair_folder(cross).path
    return folder / FIRST, folder / SECOND


def pair_data(samples: int = 16, cross: bool = True) -> dict[str, npt.NDArray[Any]]:
    """Inputs of the first decoder."""
    rng = np.random.default_rng(0)
    ids = {"input_ids": rng.integers(0, VOCABULARY, (samples, 10))}
    if not cross:
        return ids
    states = rng.standard_normal((samples, 7, WIDTH)).astype(np.float32)
    return {**ids, "encoder_hidden_states": states, "encoder_attention_mask": np.ones((samples, 7), np.int64)}


def write_pair(folder: Path, cross: bool = True) -> None:
    """Export both decoders by TorchScript."""
    import torch

    torch.manual_seed(0)
    layers = [decoder_layer(cross) for _ in range(LAYERS)]
    embedding, positions = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Embedding(CONTEXT, WIDTH)
    head = torch.nn.Linear(WIDTH, VOCABULARY, bias=False)
    model = torch.nn.ModuleDict(
        {"embedding": embedding, "positions": positions, "layers": torch.nn.ModuleList(layers), "head": head}
    ).eval()
    kinds = ("decoder", "encoder") if cross else ("decoder",)
    names = [f"{layer}.{kind}.{part}" for layer in range(LAYERS) for kind in kinds for part in ("key", "value")]
    export = PairExport(folder, model, cross, names)
    export.write(FIRST, past=False)
    export.write(SECOND, past=True)


def decoder_layer(cross: bool) -> torch.nn.Module:
    import torch

    def attention() -> torch.nn.ModuleDict:
        inner = HEADS * HEAD_WIDTH
        parts = {name: torch.nn.Linear(WIDTH, inner, bias=name != "k_proj") for name in ("q_proj", "k_proj", "v_proj")}
        parts["out_proj"] = torch.nn.Linear(inner, WIDTH)
        torch.nn.init.zeros_(parts["out_proj"].bias)
        return torch.nn.ModuleDict({**parts, "norm": torch.nn.LayerNorm(WIDTH)})

    parts = {"self_attn": attention(), **({"encoder_attn": attention()} if cross else {})}
    parts["mlp"] = torch.nn.ModuleDict(
        {
            "norm": torch.nn.LayerNorm(WIDTH),
            "fc1": torch.nn.Linear(WIDTH, HIDDEN),
            "fc2": torch.nn.Linear(HIDDEN, WIDTH),
        }
    )
    return torch.nn.ModuleDict(parts)


@functools.cache
def encoder_folder() -> TemporaryFolder:
    """A folder with an encoder whose states the decoders read, exported once."""
    import torch

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(VOCABULARY, WIDTH)
            self.layers = torch.nn.ModuleList(decoder_layer(cross=False) for _ in range(LAYERS))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x: torch.Tensor = self.embedding(ids)
            hidden = (1.0 - mask[:, None, None, :].to(torch.float32)) * -1e9
            layers: Any = self.layers
            for layer in layers:
                part = layer["self_attn"]
                y = part["norm"](x)
                x = x + attend(part, y, split_heads(part["k_proj"](y)), split_heads(part["v_proj"](y)), hidden)
                x = x + feed_forward(layer["mlp"], x)
            return x

    torch.manual_seed(1)
    folder = TemporaryFolder()
    ids = torch.zeros(2, 7, dtype=torch.int64)
    with quiet_export():
        torch.onnx.export(
            Encoder().eval(),
            (ids, torch.ones_like(ids)),
            str(folder.path / ENCODER),
            dynamo=False,
            opset_version=17,
            input_names=["input_ids", "attention_mask"],
            output_names=["last_hidden_state"],
            dynamic_axes={
                name: {0: "batch", 1: "frames"} for name in ("input_ids", "attention_mask", "last_hidden_state")
            },
        )
    return folder


def whole_data(samples: int = 16) -> dict[str, npt.NDArray[Any]]:
    """Inputs of the encoder and the decoder's token ids; padding differs from sample to sample."""
    rng = np.random.default_rng(0)
    return {
        "input_ids": rng.integers(0, VOCABULARY, (samples, 7)),
        "attention_mask": (np.arange(7) < rng.integers(4, 8, (samples, 1))).astype(np.int64),
        "decoder_input_ids": rng.integers(0, VOCABULARY, (samples, 10)),
    }


@dataclass(frozen=True)
class PairExport:
    """How a pair is written: ``caches`` are the names behind ``present.`` and ``past_key_values.``."""

    folder: Path
    model: torch.nn.ModuleDict
    cross: bool
    caches: list[str]

    def write(self, name: str, past: bool) -> None:
        import torch

        states = {"encoder_hidden_states": torch.randn(2, 7, WIDTH)} if self.cross and not past else {}
        mask = {"encoder_attention_mask": torch.ones(2, 7, dtype=torch.int64)} if self.cross else {}
        lengths = {cache: 7 if "encoder" in cache else 4 for cache in self.caches}
        pasts = {
            f"past_key_values.{cache}": torch.randn(2, HEADS, lengths[cache], HEAD_WIDTH)
            for cache in (self.caches if past else [])
        }
        inputs = {"input_ids": torch.zeros(2, 1 if past else 5, dtype=torch.int64), **mask, **states, **pasts}
        presents = [f"present.{cache}" for cache in self.caches if not (past and "encoder" in cache)]
        with quiet_export():
            torch.onnx.export(
                decoder_module(self.model, list(inputs)),
                tuple(inputs.values()),
                str(self.folder / name),
                dynamo=False,
                opset_version=17,
                input_names=list(inputs),
                output_names=["logits", *presents],
                dynamic_axes={key: self.dynamic_axes(key) for key in (*inputs, "logits", *presents)},
            )

    @staticmethod
    def dynamic_axes(name: str) -> dict[int, str]:
        if name.startswith("past"):
            return {0: "batch", 2: "frames" if "encoder" in name else "past"}
        if name.startswith("present"):
            return {0: "batch", 2: "frames" if "encoder" in name else "total"}
        return {0: "batch", 1: "frames" if name.startswith("encoder") else "tokens"}


def decoder_module(model: torch.nn.ModuleDict, inputs: list[str]) -> torch.nn.Module:
    """A module that takes ``inputs`` in order, and returns logits and caches."""
    import torch

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
            feeds = dict(zip(inputs, given, strict=True))
            ids = feeds["input_ids"]
            first = next((v for k, v in feeds.items() if k.endswith("decoder.key")), None)
            start = first.shape[2] if first is not None else 0
            places = torch.arange(start, start + ids.shape[1])
            x = self.model["embedding"](ids) + self.model["positions"](places)
            total = torch.arange(start + ids.shape[1])
            causal = torch.where(total[None, :] > places[:, None], -1e9, 0.0)
            presents: list[torch.Tensor] = []
            layers: Any = self.model["layers"]
            for number, layer in enumerate(layers):
                part, past = layer["self_attn"], f"past_key_values.{number}."
                y = part["norm"](x)
                keys, values = split_heads(part["k_proj"](y)), split_heads(part["v_proj"](y))
                if first is not None:
                    keys = torch.cat([feeds[f"{past}decoder.key"], keys], 2)
                    values = torch.cat([feeds[f"{past}decoder.value"], values], 2)
                x = x + attend(part, y, keys, values, causal)
                presents += [keys, values]
                if "encoder_attention_mask" in feeds:
                    part = layer["encoder_attn"]
                    shown = (1.0 - feeds["encoder_attention_mask"][:, None, None, :].to(torch.float32)) * -1e9
                    if first is None:
                        states = feeds["encoder_hidden_states"]
                        keys, values = split_heads(part["k_proj"](states)), split_heads(part["v_proj"](states))
                        presents += [keys, values]
                    else:
                        keys, values = feeds[f"{past}encoder.key"], feeds[f"{past}encoder.value"]
                    x = x + attend(part, part["norm"](x), keys, values, shown)
                x = x + feed_forward(layer["mlp"], x)
            return (self.model["head"](x), *presents)

    return Decoder().eval()


def split_heads(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(values.shape[0], -1, HEADS, HEAD_WIDTH).transpose(1, 2)


def attend(part: Any, x: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    import torch

    query = split_heads(part["q_proj"](x)) * HEAD_WIDTH**-0.5
    weights = torch.softmax(query @ keys.transpose(2, 3) + mask, -1)
    projected: torch.Tensor = part["out_proj"](
        (weights @ values).transpose(1, 2).reshape(x.shape[0], -1, HEADS * HEAD_WIDTH)
    )
    return projected


def feed_forward(part: Any, x: torch.Tensor) -> torch.Tensor:
    import torch

    made: torch.Tensor = part["fc2"](torch.nn.functional.gelu(part["fc1"](part["norm"](x))))
    return made


# -- what they make --------------------------------------------------------------------------------------------------


def logits_at_once(path: Path, data: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["logits"], data)[0])


def logits_in_steps(first: Path, second: Path, data: dict[str, npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Of the tokens behind the prompt, which ``first`` reads; ``second`` reads the others one by one."""
    start, step = (ort.InferenceSession(path, providers=["CPUExecutionProvider"]) for path in (first, second))
    ids = data["input_ids"]
    names = [output.name for output in start.get_outputs()]
    values = dict(zip(names, start.run(names, {**data, "input_ids": ids[:, :PROMPT]}), strict=True))
    caches = {name.replace("present", "past_key_values"): value for name, value in values.items() if name != "logits"}
    rest = {k: v for k, v in data.items() if k in {i.name for i in step.get_inputs()}}
    found, names = [], [output.name for output in step.get_outputs()]
    for at in range(PROMPT, ids.shape[1]):
        values = dict(zip(names, step.run(names, {**rest, **caches, "input_ids": ids[:, at : at + 1]}), strict=True))
        caches |= {k.replace("present", "past_key_values"): v for k, v in values.items() if k != "logits"}
        found.append(values["logits"][:, -1])
    return np.stack(found, 1)


# -- merged ----------------------------------------------------------------------------------------------------------


def write_merged(path: Path, cross: bool = True) -> Path:
    """Both decoders as branches of one ``If``, as optimum merges them: weights lie outside, once."""
    first, second = (onnx.load(file) for file in pair_paths(cross))
    second = compose.add_prefix(second, "past/", rename_inputs=False, rename_outputs=False)
    weights = {tensor.name: tensor for tensor in first.graph.initializer}
    known = {content(tensor): name for name, tensor in weights.items()}
    renamed = {}
    for tensor in second.graph.initializer:
        renamed[tensor.name] = known.setdefault(content(tensor), tensor.name)
        weights.setdefault(renamed[tensor.name], tensor)
    for node in second.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    outputs = {value.name: value for value in first.graph.output}
    missing = [name for name in outputs if name not in {value.name for value in second.graph.output}]
    empty = numpy_helper.from_array(np.zeros((0, HEADS, 1, HEAD_WIDTH), np.float32))
    extra = [helper.make_node("Constant", [], [name], value=empty) for name in missing]
    branches = {
        "else_branch": helper.make_graph(first.graph.node, "first", [], list(outputs.values())),
        "then_branch": helper.make_graph([*second.graph.node, *extra], "second", [], list(outputs.values())),
    }
    inputs = {value.name: value for graph in (first.graph, second.graph) for value in graph.input}
    switch = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    node = helper.make_node("If", ["use_cache_branch"], list(outputs), **branches)
    graph = helper.make_graph(
        [node], "merged", [*inputs.values(), switch], list(outputs.values()), list(weights.values())
    )
    merged = helper.make_model(graph, opset_imports=first.opset_import, ir_version=first.ir_version)
    onnx.checker.check_model(merged)
    onnx.save(merged, path)
    return path


def content(tensor: TensorProto) -> tuple[int, Mapping[int, int] | tuple[int, ...], bytes]:
    return tensor.data_type, tuple(tensor.dims), numpy_helper.to_array(tensor).tobytes()
