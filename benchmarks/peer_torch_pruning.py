"""Torch-Pruning on a ViT whose weights come from an ONNX file, one shot, judged on the same pictures as snpc.

    python benchmarks/peer_torch_pruning.py vit_tiny.onnx --calib images/ --calib-labels labels.csv
        --eval held-out/ --labels labels.csv --image-mean 0.5,0.5,0.5 --image-std 0.5,0.5,0.5

Needs torch, timm and torch-pruning. Torch-Pruning prunes torch modules, so the weights are put into timm's model of
that name; initializers have the names of its parameters. Head widths and hidden layers are narrowed (``inner``), or the
residual stream too (``all``), until the share of the MACs that ``--targets`` asks for is left. Scores are
``magnitude``, which needs no data, and ``taylor``, whose gradients are those of the cross-entropy with the labels of
``--calib``: more than snpc gets. ``global`` ranks units over all layers, ``isomorphic`` over layers of one kind,
``local`` removes the same share of each. The scale of the attention stays that of the dense model. Nothing is trained.
Each row is added to ``results/alternatives.json`` as soon as it is measured: a run that was stopped goes on with what
is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import timm
import torch
import torch_pruning as tp
from quality import evaluation, numbers
from timm.models.vision_transformer import Attention, VisionTransformer
from torch.nn import functional

import snpc
from snpc.runtime.calibration import read_picture_labels

RESULTS = Path(__file__).with_name("results") / "alternatives.json"
SETTINGS = tuple(
    {"scores": scores, "widths": widths, "ranking": ranking}
    for widths, ranking in (("inner", "local"), ("inner", "global"), ("inner", "isomorphic"), ("all", "local"))
    for scores in ("magnitude", "taylor")
)
STEPS = 6  # of the search for the ratio that leaves the wanted MACs
BATCH = 20


def attend(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """timm's attention [B, T, C] -> [B, T, C], for heads of any width."""
    packed = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key, value = packed.unbind(0)
    found = functional.scaled_dot_product_attention(query, key, value, scale=self.scale)
    return self.proj(found.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


def load_vit(path: Path, architecture: str) -> VisionTransformer:
    """timm's model with the weights of the file. Matrices of MatMul nodes have no such name: they come in order."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    module = timm.create_model(architecture, pretrained=False)
    state = module.state_dict()
    products = (arrays[n.input[1]].T for n in graph.node if n.op_type == "MatMul" and n.input[1] in arrays)
    found = {name: arrays[name] if name in arrays else next(products) for name in state}
    module.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in found.items()})
    for part in module.modules():
        if isinstance(part, Attention):
            part.forward = attend.__get__(part)
    return module.eval()


def count_macs(module: VisionTransformer, pixels: int) -> int:
    """Of one picture [3, pixels, pixels]: products with weights, and those of the attention."""
    total = 0

    def count(part: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal total
        if isinstance(part, Attention):
            tokens, width = inputs[0].shape[1], part.qkv.out_features // 3
            total += 2 * tokens * tokens * width
        else:
            total += output.numel() * part.weight[0].numel()  # type: ignore[operator,union-attr]

    kinds = (torch.nn.Linear, torch.nn.Conv2d, Attention)
    hooks = [part.register_forward_hook(count) for part in module.modules() if isinstance(part, kinds)]
    with torch.no_grad():
        module(torch.zeros(1, 3, pixels, pixels))
    for hook in hooks:
        hook.remove()
    return total


def prune(
    module: VisionTransformer, setting: Mapping[str, str], ratio: float, data: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """``module`` without this share of its units, by Torch-Pruning's scores."""
    taylor = setting["scores"] == "taylor"
    attentions = [part for part in module.modules() if isinstance(part, Attention)]
    kept: list[torch.nn.Module] = [module.head]
    if setting["widths"] == "inner":
        kept += [layer for block in module.blocks for layer in (block.attn.proj, block.mlp.fc2)]
        kept.append(module.patch_embed.proj)
    pruner = tp.pruner.BasePruner(
        module,
        data[0][:1],
        importance=tp.importance.GroupTaylorImportance() if taylor else tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=setting["ranking"] != "local",
        isomorphic=setting["ranking"] == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=kept,
        num_heads={part.qkv: part.num_heads for part in attentions},
        prune_head_dims=True,
    )
    if taylor:
        module.zero_grad()
        for pictures, labels in zip(data[0].split(BATCH), data[1].split(BATCH), strict=True):
            (functional.cross_entropy(module(pictures), labels) / len(data[0].split(BATCH))).backward()
    pruner.step()
    for part in attentions:
        part.head_dim = part.qkv.out_features // 3 // part.num_heads


def top1(module: VisionTransformer, pictures: torch.Tensor, labels: torch.Tensor) -> float:
    with torch.no_grad():
        found = torch.cat([module(part).argmax(1) for part in pictures.split(BATCH)])
    return 100 * float((found == labels).float().mean())


def pruned_to(
    options: argparse.Namespace, setting: Mapping[str, str], share: float, data: tuple[torch.Tensor, torch.Tensor]
) -> tuple[VisionTransformer, float]:
    """The model with at most this share of the MACs, by bisection over the ratio, and the share that it has."""
    pixels = data[0].shape[-1]
    dense = count_macs(load_vit(options.model, options.architecture), pixels)
    low, high, best = 0.0, 0.95, None
    for _ in range(STEPS):
        ratio = (low + high) / 2
        module = load_vit(options.model, options.architecture)
        prune(module, setting, ratio, data)
        left = count_macs(module, pixels) / dense
        low, high = (ratio, high) if left > share else (low, ratio)
        if left <= share and (best is None or left > best[1]):
            best = (module, left)
    assert best is not None, f"no ratio leaves {share} of the MACs"
    return best


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--architecture", default="vit_tiny_patch16_224", help="of timm")
    parser.add_argument("--calib", type=Path, required=True)
    parser.add_argument("--calib-labels", type=Path, required=True, help="CSV of file name and class")
    parser.add_argument("--calib-samples", type=int, default=128)
    parser.add_argument("--eval", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True, help="CSV of file name and class")
    parser.add_argument("--image-mean", default="0.485,0.456,0.406")
    parser.add_argument("--image-std", default="0.229,0.224,0.225")
    parser.add_argument("--targets", default="0.7,0.5,0.35")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    model = snpc.load(options.model)
    images = snpc.ImageOptions(mean=numbers(options.image_mean), std=numbers(options.image_std))
    calibration = snpc.load_calibration(str(options.calib), model.inputs, samples=1 << 30, images=images, held_out=0)
    name = model.inputs[0].name
    pictures = np.concatenate([feeds[name] for feeds in calibration.batches()])[: options.calib_samples]
    labels = read_picture_labels(options.calib, options.calib_labels)[: len(pictures)]
    data = torch.from_numpy(pictures), torch.from_numpy(labels)
    feeds, classes = evaluation(options, model)
    judged = torch.from_numpy(feeds[name]), torch.from_numpy(np.asarray(classes))
    dense = top1(load_vit(options.model, options.architecture), *judged)
    print(f"dense: {dense:.2f} % on {len(judged[1])} pictures", flush=True)
    for share in map(float, options.targets.split(",")):
        for setting in SETTINGS:
            if not any({**setting, "target": share}.items() <= row.items() for row in stored(options)["rows"]):
                module, left = pruned_to(options, setting, share, data)
                row = {**setting, "target": share, "macs": round(left, 4), "quality": round(top1(module, *judged), 3)}
                print(json.dumps(row), flush=True)
                found = {"version": version("torch-pruning"), "dense": round(dense, 3)}
                store({**found, "rows": [*stored(options)["rows"], row]}, options)


def stored(options: argparse.Namespace) -> dict[str, Any]:
    """What the results have of this tool."""
    return dict(json.loads(options.results.read_text()).get("torch_pruning", {"rows": []}))


def store(found: Mapping[str, Any], options: argparse.Namespace) -> None:
    results = json.loads(options.results.read_text())
    options.results.write_text(json.dumps({**results, "torch_pruning": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
