"""Export decoders with caches of many families, prune their folders by the default command, and print a table.

    python benchmarks/decoder_families.py FOLDER [--exporter ts] [--only TEXT ...] [--reuse] [--json FILE]

Each family has random weights, two layers and 64 wide streams, and is exported by torch as optimum's and torch's users
do: ``input_ids``, ``attention_mask`` and ``past_key_values.N.key`` and ``.value`` go in, ``logits`` and ``present.N.*``
come out. ``dynamo`` is the torch.export based exporter at opset 20, ``ts`` TorchScript at opset 17. Each file is then
cut in a process of its own:

    snpc prune FOLDER/NAME -o FOLDER/NAME_pruned --prune-kv-cache --ratio 0.5

The table is made of what that command's ``--json`` says, and of decoding with both files. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np

LAYERS, WIDTH, HEADS, KEY_HEADS, FFN, VOCABULARY = 2, 64, 4, 2, 128, 99
COMMON = {"num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "pad_token_id": 0, "max_position_embeddings": 64}
PLAIN = {**COMMON, "hidden_size": WIDTH, "num_attention_heads": HEADS, "intermediate_size": FFN}
GROUPED = {**PLAIN, "num_key_value_heads": KEY_HEADS}
HEAD_WIDTH = {**GROUPED, "head_dim": 16}
OLDER = {"n_embd": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}

FAMILIES: dict[str, dict[str, Any]] = {
    "Bloom": {"hidden_size": WIDTH, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY},
    "CodeGen": {**OLDER, "rotary_dim": 8},
    "Cohere": GROUPED,
    "Falcon": {k: v for k, v in PLAIN.items() if k != "intermediate_size"},
    "GPT2": {**OLDER, "n_positions": 64},
    "GPTJ": {**OLDER, "rotary_dim": 8},
    "GPTNeo": {
        "hidden_size": WIDTH, "num_layers": LAYERS, "num_heads": HEADS, "vocab_size": VOCABULARY,
        "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64,
    },
    "GPTNeoX": {**PLAIN, "rotary_pct": 0.25},
    "Gemma": HEAD_WIDTH,
    "Gemma2": {**HEAD_WIDTH, "sliding_window": 32},
    "Gemma3Text": {**HEAD_WIDTH, "sliding_window": 32},
    "GptOss": {**HEAD_WIDTH, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 32},
    "Granite": GROUPED,
    "Llama": GROUPED,
    "Mistral": {**HEAD_WIDTH, "sliding_window": None},
    "Mixtral": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "Mpt": {"d_model": WIDTH, "n_layers": LAYERS, "n_heads": HEADS, "vocab_size": VOCABULARY, "expansion_ratio": 2},
    "Nemotron": HEAD_WIDTH,
    "OPT": {**COMMON, "hidden_size": WIDTH, "num_attention_heads": HEADS, "ffn_dim": FFN, "word_embed_proj_dim": WIDTH},
    "Olmo": GROUPED,
    "Olmo2": GROUPED,
    "Phi": PLAIN,
    "Phi3": {**GROUPED, "eos_token_id": 1, "bos_token_id": 2},
    "Qwen2": GROUPED,
    "Qwen3": HEAD_WIDTH,
    "Qwen3Moe": {**HEAD_WIDTH, **EXPERTS},
    "SmolLM3": GROUPED,
    "StableLm": GROUPED,
    "Starcoder2": GROUPED,
}  # fmt: skip
"""Name of the family, as its classes begin: what its configuration is made with."""


def model_of(family: str) -> Any:
    """The model with random weights."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family])
    name = family.removesuffix("Text")
    classes = (f"{name}ForCausalLM", f"{name}LMHeadModel")
    made = next(getattr(transformers, c) for c in classes if hasattr(transformers, c))
    try:
        config._attn_implementation = "sdpa"
        model = made(config)
    except ValueError:
        config._attn_implementation = "eager"
        model = made(config)
    if any("experts" in name for name, _ in model.named_modules()):
        model.set_experts_implementation("batched_mm")  # what the exporters can write
    for weights in model.parameters():
        weights.data += 0.05 * torch.randn_like(weights)  # also what starts as zeros and ones
    return model.eval()


def with_flat_caches(model: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """The model with two caches per layer that go in and come out as tensors, and the shapes of empty ones."""
    import torch
    from transformers import DynamicCache

    ids = torch.ones(1, 3, dtype=torch.int64)
    layers = model(ids, use_cache=True).past_key_values.layers
    shapes = [tuple(tensor.shape) for layer in layers for tensor in (layer.keys, layer.values)]

    class FlatCaches(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, *caches: Any) -> Any:
            past = DynamicCache(list(zip(caches[::2], caches[1::2], strict=True)))
            given = self.model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=past, use_cache=True)
            return (given.logits, *(t for layer in given.past_key_values.layers for t in (layer.keys, layer.values)))

    return FlatCaches(), shapes


def export(family: str, folder: Path, exporter: str) -> None:
    """Write ``model.onnx`` and ``config.json`` of a family into a folder."""
    import torch

    model = model_of(family)
    module, shapes = with_flat_caches(model)
    caches = [f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in ("key", "value")]
    names = ["input_ids", "attention_mask", *caches]
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in caches)]
    past, new = 5, 7
    example = (
        torch.randint(3, VOCABULARY, (2, new)),
        torch.ones(2, past + new, dtype=torch.int64),
        *(torch.randn(2, heads, past, width) for _, heads, _, width in shapes),
    )
    axes = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    axes |= {name: {0: "batch", 2: "past"} for name in caches}
    folder.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"input_names": names, "output_names": outputs}
    if exporter == "dynamo":
        dynamic = (axes["input_ids"], axes["attention_mask"], tuple(axes[name] for name in caches))
        options |= {"dynamo": True, "opset_version": 20, "dynamic_shapes": dynamic, "verbose": False, "verify": False}
    else:
        axes |= {"logits": {0: "batch", 1: "sequence"}} | {name: {0: "batch", 2: "total"} for name in outputs[1:]}
        options |= {"dynamo": False, "opset_version": 17, "dynamic_axes": axes}
    torch.onnx.export(module, example, str(folder / "model.onnx"), **options)
    model.config.save_pretrained(folder)


def prune(folder: Path, out: Path) -> tuple[dict[str, Any], str]:
    """What the command says with ``--json``, and its last line of errors where it fails."""
    command = ["prune", folder, "-o", out, "--prune-kv-cache", "--ratio", "0.5", "--json", "-"]
    ran = subprocess.run([sys.executable, "-m", "snpc.cli", *map(str, command)], capture_output=True, text=True)
    if ran.returncode:
        return {}, (ran.stderr.strip().splitlines() or ["nothing was said"])[-1]
    return json.loads(ran.stdout), ""


def decoding_error(path: Path) -> float:
    """The largest relative difference of the logits of 12 tokens read at once, and 7 and then one by one through the
    file's own caches."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    ids = np.random.default_rng(0).integers(3, VOCABULARY, (1, 12))
    inputs = {i.name: i for i in session.get_inputs()}
    caches = [name for name in inputs if name.startswith("past")]
    empty = {name: np.zeros((1, inputs[name].shape[1], 0, inputs[name].shape[3]), np.float32) for name in caches}

    def logits_of(part: Any, past: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        length = part.shape[1] + next(iter(past.values())).shape[2]
        feeds = {"input_ids": part, "attention_mask": np.ones((1, length), np.int64), **past}
        found = session.run(None, {name: value for name, value in feeds.items() if name in inputs})
        return found[0], dict(zip(caches, found[1:], strict=True))

    whole, _ = logits_of(ids, empty)
    past, steps = empty, []
    for part in (ids[:, :7], *np.split(ids[:, 7:], 5, 1)):
        logits, past = logits_of(part, past)
        steps.append(logits)
    return float(np.linalg.norm(np.concatenate(steps, 1) - whole) / np.linalg.norm(whole))


def row_of(family: str, folder: Path, exporter: str, reuse: bool) -> dict[str, Any]:
    """One family, exported and pruned."""
    source, out = folder / family, folder / f"{family}_pruned"
    if not (reuse and (source / "model.onnx").exists()):
        try:
            export(family, source, exporter)
        except Exception as error:  # exporters raise whatever they like
            return {"family": family, "failed": f"not exported: {str(error).strip().splitlines()[0][:100]}"}
    for old in sorted(out.glob("*")) if out.is_dir() else ():
        old.unlink()
    report, error = prune(source, out)
    if error:
        return {"family": family, "failed": re.sub(r"\S*/", "", error)[:200]}
    cut = {g["role"] for g in report["groups"] if g["kept"] < g["size"]}
    cache = report["cache_bytes_per_token"]
    return {
        "family": family,
        "cut": [role for role in ("qk", "vo", "ffn", "experts") if role in cut],
        "params": report["params"]["after"] / report["params"]["before"],
        "macs": report["macs"]["after"] / report["macs"]["before"],
        "cache": cache["after"] / cache["before"] if cache["before"] else 1.0,
        "masked": max((d["relative"] for d in report["verify"]["equals_mask"]), default=float("nan")),
        "decoding": decoding_error(out / "model.onnx"),
        "decoding_before": decoding_error(source / "model.onnx"),
    }


def as_markdown(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| family | what is cut | parameters | MACs | cache per token | against masked | step by step |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['family']} | {row['failed']} | | | | | |")
            continue
        cells = [f"{row[key]:.2f}" for key in ("params", "macs", "cache")]
        cells += [f"{row[key]:.0e}" for key in ("masked", "decoding")]
        lines.append(f"| {row['family']} | {', '.join(row['cut']) or 'nothing'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--exporter", choices=["ts", "dynamo"], default="dynamo")
    parser.add_argument("--only", nargs="*", default=[], help="families whose names contain one of these")
    parser.add_argument("--reuse", action="store_true", help="do not export again what is in the folder")
    parser.add_argument("--json", type=Path, help="write the rows to this file too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    rows = []
    for family in FAMILIES:
        if options.only and not any(text in family for text in options.only):
            continue
        rows.append(row_of(family, options.folder, options.exporter, options.reuse))
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(as_markdown(rows))


if __name__ == "__main__":
    main()
