"""What onnxsim's structured pruning removes from exported files: ``python benchmarks/alternatives.py MODEL...``

    pip install onnxsim
    python benchmarks/alternatives.py vit_tiny.onnx bart.onnx minilm.onnx

Both of its passes that make weights smaller, at a sparsity of 0.5, on each file as it is and after
``onnxsim.simplify``. Counted are the float parameters that are left. onnxsim is the one other tool that prunes exported
ONNX files; the others of the README's table work on models of a framework, or do not prune. The numbers go to
``results/alternatives.json``.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import onnxsim
from onnxsim import pruning

RESULTS = Path(__file__).with_name("results") / "alternatives.json"
PASSES = ("apply_structured_pruning", "apply_attention_head_pruning")


def parameters(model: onnx.ModelProto) -> int:
    floats = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    return sum(onnx.numpy_helper.to_array(t).size for t in model.graph.initializer if t.data_type in floats)


def rows_of(path: Path) -> list[dict[str, Any]]:
    raw = onnx.load(path)
    simplified, _ = onnxsim.simplify(raw)
    rows = []
    for form, model in (("as exported", raw), ("simplified", simplified)):
        for name in PASSES:
            pruned = getattr(pruning, name)(model, sparsity=0.5)
            rows.append({"form": form, "pass": name, "before": parameters(model), "after": parameters(pruned)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", type=Path, nargs="+")
    options = parser.parse_args()
    results = {"onnxsim": version("onnxsim"), "files": {path.name: rows_of(path) for path in options.models}}
    RESULTS.write_text(json.dumps({**json.loads(RESULTS.read_text()), **results}, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
