"""A graph as a torch module says what onnxruntime says, its gradients are right, and its weights go back unchanged."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.models.exports import EXPORTS, export, load_feeds

torch = pytest.importorskip("torch")

import snpc.torch  # noqa: E402
from snpc.errors import UserError  # noqa: E402
from snpc.ops import operator_table  # noqa: E402
from snpc.torch.operators import implemented_operators  # noqa: E402
from snpc.torch.operators.registry import TORCH_DTYPES  # noqa: E402

TIED = "gpt2__ts17"


def feeds_of(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(array) for key, array in load_feeds(name).items()}


def relative(found: torch.Tensor, expected: np.ndarray) -> float:
    gap = np.abs(found.detach().double().numpy() - expected.astype(np.float64)).max(initial=0.0)
    return float(gap / (np.abs(expected.astype(np.float64)).max(initial=0.0) + 1e-9))


@pytest.mark.parametrize("name", EXPORTS)
def test_a_module_says_what_onnxruntime_says(name: str) -> None:
    path, feeds = export(name), load_feeds(name)
    session = ort.InferenceSession(path)
    taken = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    expected = dict(zip(names, session.run(names, {k: v for k, v in feeds.items() if k in taken}), strict=True))
    module = snpc.torch.load(path)
    half = any(w.dtype == torch.float16 for _, w in module.weights())
    for _ in range(2):  # as it is recorded, and from what was kept
        found = module(feeds_of(name))
        assert max(relative(found[k], expected[k]) for k in names) < (1e-2 if half else 1e-4)
    sum(v.float().square().mean() for v in found.values() if v.is_floating_point()).backward()
    weights = dict(module.weights())
    assert weights and all(w.grad is not None for w in weights.values())


def test_other_sizes_are_other_programs() -> None:
    module = snpc.torch.load(export("bert__ts17"))
    feeds = feeds_of("bert__ts17")
    one = {k: v[:1, :5] for k, v in feeds.items()}
    session = ort.InferenceSession(export("bert__ts17"))
    for given in (feeds, one, feeds):
        names = [o.name for o in session.get_outputs()]
        expected = session.run(names, {k: v.numpy() for k, v in given.items() if k in module.input_names})
        found = module(given)
        assert all(relative(found[k], v) < 1e-4 for k, v in zip(names, expected, strict=True))
    assert len(module.programs) == 2


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17", "t5_gated__ts17", "swin_timm__ts17"])
def test_gradients_are_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TORCH_DTYPES, 1, torch.float64)  # a Cast to float stays as exact as the rest
    module = snpc.torch.load(export(name)).double()
    feeds = {k: v.double() if v.is_floating_point() else v for k, v in feeds_of(name).items()}
    generator = torch.Generator().manual_seed(0)
    shapes = {k: v.shape for k, v in module(feeds).items() if v.is_floating_point()}
    weighing = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shapes.items()}

    def loss() -> torch.Tensor:
        found = module(feeds)
        return sum((found[k] * w).mean() for k, w in weighing.items())

    loss().backward()
    weights = [w for _, w in module.weights()]
    directions = [torch.randn(w.shape, generator=generator, dtype=torch.float64) for w in weights]
    expected = sum((w.grad * d).sum() for w, d in zip(weights, directions, strict=True)).item()
    with torch.no_grad():
        sides = []
        for step in (1e-6, -2e-6):
            for weight, direction in zip(weights, directions, strict=True):
                weight += step * direction
            sides.append(loss().item())
    assert (sides[0] - sides[1]) / 2e-6 == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17", "bert__dyn20", TIED])
def test_weights_go_back_into_the_same_graph(name: str, tmp_path: Path) -> None:
    source, target = export(name), tmp_path / "tuned.onnx"
    module = snpc.torch.load(source)
    with torch.no_grad():
        for _, weight in module.weights():
            weight += 0.01 * torch.randn_like(weight)
    snpc.torch.save(module, source, target)
    before, after = onnx.load(source).graph, onnx.load(target).graph
    assert [n.SerializeToString() for n in before.node if n.op_type != "Constant"] == [
        n.SerializeToString() for n in after.node if n.op_type != "Constant"
    ]
    assert {t.name: (list(t.dims), t.data_type) for t in before.initializer} == {
        t.name: (list(t.dims), t.data_type) for t in after.initializer
    }
    feeds = load_feeds(name)
    session = ort.InferenceSession(target)
    names = [o.name for o in session.get_outputs()]
    expected = session.run(names, {k: v for k, v in feeds.items() if k in {i.name for i in session.get_inputs()}})
    found = module(feeds_of(name))
    assert all(relative(found[k], v) < 1e-4 for k, v in zip(names, expected, strict=True))


def test_a_module_that_was_not_trained_writes_the_same_weights(tmp_path: Path) -> None:
    source, target = export("vit_timm__ts17"), tmp_path / "same.onnx"
    snpc.torch.save(snpc.torch.load(source), source, target)
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() for k in before)


def tied_model(path: Path) -> Path:
    """A table that is looked up in, and its transpose as the head, as exporters write a tied embedding."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(11, 4)).astype(np.float32)
    nodes = [
        onnx.helper.make_node("Gather", ["table", "ids"], ["x"]),
        onnx.helper.make_node("MatMul", ["x", "head"], ["logits"]),
    ]
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        nodes,
        "tied",
        [value("ids", onnx.TensorProto.INT64, ["B", 3])],
        [value("logits", onnx.TensorProto.FLOAT, ["B", 3, 11])],
        [onnx.numpy_helper.from_array(table, "table"), onnx.numpy_helper.from_array(table.T.copy(), "head")],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    source, target = tied_model(tmp_path / "tied.onnx"), tmp_path / "tuned.onnx"
    module = snpc.torch.load(source)
    assert [name for name, _ in module.weights()] == ["table"]
    optimiser = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimiser.step()
    snpc.torch.save(module, source, target)
    found = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(target).graph.initializer}
    old = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(source).graph.initializer}
    assert (found["table"] == found["head"].T).all()
    assert not (found["table"] == old["table"]).all()


def test_parameters_have_the_names_of_the_file() -> None:
    module = snpc.torch.load(export("vit_timm__ts17"))
    held = {t.name for t in onnx.load(export("vit_timm__ts17")).graph.initializer}
    names = {name for name, _ in module.named_parameters()}
    assert "blocks.0.norm1.weight" in names or names & held
    assert {name for name, _ in module.weights()} <= held


def test_masks_and_rotary_tables_do_not_train() -> None:
    model = onnx.load(export("llama__ts17"))
    shapes = {t.name: tuple(t.dims) for t in model.graph.initializer}
    for name, weight in snpc.torch.load(export("llama__ts17")).weights():
        assert tuple(weight.shape) == shapes[name]
        assert weight.numel() > 1 and weight.detach().abs().max() < 1e3


def test_an_operator_without_an_implementation_is_named(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Det", ["x"], ["y"], name="the_det")],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [3, 3])],
        [value("y", onnx.TensorProto.FLOAT, [])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "d.onnx")
    with pytest.raises(UserError, match=r"the_det: .*Det"):
        snpc.torch.load(tmp_path / "d.onnx")


def test_quantized_operators_name_the_command_that_makes_floats(tmp_path: Path) -> None:
    graph = onnx.parser.parse_graph("quantized (uint8[N, 4] x) => (float[N, 4] y) { y = DequantizeLinear(x, scale) }")
    graph.initializer.append(onnx.numpy_helper.from_array(np.float32(0.5), "scale"))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "q.onnx")
    with pytest.raises(UserError, match=r"DequantizeLinear.*snpc dequantize FILE"):
        snpc.torch.load(tmp_path / "q.onnx")


# -- operators -------------------------------------------------------------------------------------------------------

NOT_TRAINED = {
    **dict.fromkeys(["RandomNormalLike", "RandomUniformLike"], "draws random numbers, which no gradient goes through"),
    "com.microsoft.DecoderMaskedMultiHeadAttention": "one step of generation over a cache",
    "com.microsoft.PackedMultiHeadAttention": "tokens without their padding, for inference on GPUs",
    "com.microsoft.MoE": "experts in one node, for inference",
    "RoiAlign": "it pools regions of boxes, which torch itself does not",
}


def test_every_operator_of_the_table_runs_in_torch() -> None:
    known = {f"{domain}.{name}" if domain else name: spec for (domain, name), spec in operator_table().items()}
    followed = {name for name, spec in known.items() if spec.kind != "opaque"}
    assert followed - set(implemented_operators()) <= set(NOT_TRAINED)
    assert not set(NOT_TRAINED) & set(implemented_operators()), "it is implemented: take it off the list"


def node_model(op: str, inputs: dict[str, np.ndarray], outputs: int, opset: int, attrs: dict[str, Any]) -> bytes:
    """One node, with a path for every input that is not empty."""
    domain = "com.microsoft" if op.startswith("ms.") else ""
    names = [name if array.size else "" for name, array in inputs.items()]
    made = [f"out{k}" for k in range(outputs)]
    node = onnx.helper.make_node(op.removeprefix("ms."), names, made, name="node", domain=domain, **attrs)
    taken = [
        onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in inputs.items()
        if array.size
    ]
    given = [onnx.ValueInfoProto(name=name) for name in made]
    graph = onnx.helper.make_graph([node], "g", taken, given)
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=9).SerializeToString()


RNG = np.random.default_rng(0)
IMAGE = RNG.normal(size=(2, 3, 6, 7)).astype(np.float32)
ROWS = RNG.normal(size=(4, 5)).astype(np.float32)
KERNEL = RNG.normal(size=(4, 3, 3, 3)).astype(np.float32)
BYTES = RNG.integers(0, 9, (3, 4)).astype(np.uint8)
GRID = RNG.uniform(-1.2, 1.2, (len(IMAGE), 4, 5, 2)).astype(np.float32)
PLACES = np.array([[0, 2, 1, 3, 1]])
NONE = np.zeros(0, np.float32)
HEADS = {n: RNG.normal(size=(2, 5, w)).astype(np.float32) for n, w in (("q", 64), ("k", 32), ("v", 32))}
ANGLES = {n: RNG.normal(size=(9, 8)).astype(np.float32) for n in ("cos", "sin")}
LENGTHS = {"n": np.array([4, 2], np.int32), "total": np.array(5, np.int32)}
SHARED = {"past_k": NONE, "past_v": NONE, **LENGTHS}
GROUPED = {"num_heads": 4, "kv_num_heads": 2}

NODES: list[tuple[str, dict[str, np.ndarray], int, int, dict[str, Any]]] = [
    ("Shrink", {"x": ROWS}, 1, 17, {"lambd": 0.4, "bias": 0.3}),
    ("BitShift", {"x": BYTES, "by": BYTES % 4}, 1, 17, {"direction": "LEFT"}),
    ("BitShift", {"x": BYTES, "by": BYTES % 4}, 1, 17, {"direction": "RIGHT"}),
    ("Hardmax", {"x": ROWS}, 1, 17, {"axis": 0}),
    ("Hardmax", {"x": IMAGE}, 1, 11, {"axis": 2}),
    ("LpPool", {"x": IMAGE}, 1, 17, {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 0], "p": 3}),
    ("GlobalLpPool", {"x": IMAGE}, 1, 17, {}),
    ("HannWindow", {"n": np.array(9)}, 1, 17, {}),
    ("HammingWindow", {"n": np.array(9)}, 1, 17, {"periodic": 0}),
    ("BlackmanWindow", {"n": np.array(8)}, 1, 17, {}),
    ("GridSample", {"x": IMAGE, "grid": GRID}, 1, 16, {"mode": "bilinear", "align_corners": 1}),
    ("GridSample", {"x": IMAGE, "grid": GRID}, 1, 20, {"mode": "linear", "padding_mode": "border"}),
    ("GridSample", {"x": IMAGE, "grid": GRID}, 1, 16, {"mode": "nearest"}),
    ("Scatter", {"x": ROWS, "i": PLACES, "u": ROWS[:1]}, 1, 10, {"axis": 0}),
    ("ms.FusedConv", {"x": IMAGE, "w": KERNEL, "b": ROWS[:, 0]}, 1, 17, {"activation": "Relu", "pads": [1] * 4}),
    ("ms.GroupQueryAttention", {**HEADS, **SHARED}, 3, 17, GROUPED),
    ("ms.GroupQueryAttention", {**HEADS, **SHARED, **ANGLES}, 3, 17, {**GROUPED, "do_rotary": 1}),
    (
        "ms.GroupQueryAttention",
        {"q": np.concatenate([*HEADS.values()], -1), "k": NONE, "v": NONE, **SHARED, **ANGLES},
        3,
        17,
        {**GROUPED, "do_rotary": 1, "rotary_interleaved": 1, "scale": 0.2},
    ),
]


@pytest.mark.parametrize("case", NODES, ids=lambda case: f"{case[0]}-{case[3]}-{len(case[1])}")
def test_operators_that_no_export_has(case: Any, tmp_path: Path) -> None:
    op, inputs, outputs, opset, attrs = case
    (tmp_path / "node.onnx").write_bytes(node_model(op, inputs, outputs, opset, attrs))
    fed = {name: array for name, array in inputs.items() if array.size}
    expected = ort.InferenceSession(tmp_path / "node.onnx").run(None, fed)
    found = snpc.torch.load(tmp_path / "node.onnx")({name: torch.tensor(array) for name, array in fed.items()})
    rows = [slice(None)] * 2 if op != "ms.GroupQueryAttention" else [slice(0, 5), slice(0, 3)]  # past them: padding
    for value, array in zip(found.values(), expected, strict=True):
        for k, part in enumerate(rows if op == "ms.GroupQueryAttention" else [slice(None)]):
            axis = 1 if array.ndim == 3 else 2
            pick = (k, *[slice(None)] * (axis - 1), part) if op == "ms.GroupQueryAttention" else ...
            assert relative(value[pick], array[pick]) < 1e-5


# -- compiled, in bfloat16, on a GPU ---------------------------------------------------------------------------------


def test_a_compiled_module_says_the_same() -> None:
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        pytest.skip("torch.compile needs a C++ compiler, and there is none")
    module, feeds = snpc.torch.load(export("vit_timm__ts17")), feeds_of("vit_timm__ts17")
    expected = module(feeds)
    expected_loss = sum(v.square().mean() for v in expected.values())
    expected_loss.backward()
    gradients = [w.grad.clone() for _, w in module.weights()]
    module.zero_grad()
    found = torch.compile(module)(feeds)
    assert all(relative(found[k], v.detach().numpy()) < 1e-4 for k, v in expected.items())
    sum(v.square().mean() for v in found.values()).backward()
    assert all(relative(w.grad, g.numpy()) < 1e-3 for (_, w), g in zip(module.weights(), gradients, strict=True))


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17", "bert__dyn20", "t5_gated__ts17"])
def test_bfloat16_stays_close(name: str) -> None:
    module, feeds = snpc.torch.load(export(name)), feeds_of(name)
    expected = module(feeds)
    with torch.autocast("cpu", torch.bfloat16):
        fresh = snpc.torch.load(export(name))
        for found in (module(feeds), fresh(feeds), fresh(feeds)):  # what is kept must not be rounded either
            for key, value in expected.items():
                gap = (found[key].float() - value).square().mean().sqrt() / value.square().mean().sqrt()
                assert gap < 0.03
    assert fresh.full_precision == module.full_precision


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17", "bert__dyn20", "swin_timm__ts17"])
def test_a_gpu_says_the_same(name: str) -> None:
    module, feeds = snpc.torch.load(export(name)), feeds_of(name)
    expected = module(feeds)
    module.to("cuda")
    for _ in range(2):
        found = module({k: v.to("cuda") for k, v in feeds.items()})
        assert all(relative(found[k].cpu(), v.detach().numpy()) < 1e-3 for k, v in expected.items())
    sum(v.square().mean() for v in found.values()).backward()
    assert all(w.grad is not None for _, w in module.weights())
