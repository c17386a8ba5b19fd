"""A graph as a torch module says what onnxruntime says, its gradients are right, and its weights go back unchanged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from exports import EXPORTS, export, load_feeds

torch = pytest.importorskip("torch")

import snpc.torch  # noqa: E402
from snpc.errors import UserError  # noqa: E402
from snpc.torch.operators.table import DTYPES  # noqa: E402

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
        expected = session.run(names, {k: v.numpy() for k, v in given.items() if k in module.inputs})
        found = module(given)
        assert all(relative(found[k], v) < 1e-4 for k, v in zip(names, expected, strict=True))
    assert len(module.programs) == 2


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17", "t5_gated__ts17", "swin_timm__ts17"])
def test_gradients_are_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(DTYPES, 1, torch.float64)  # a Cast to float stays as exact as the rest
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
