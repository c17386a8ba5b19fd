"""Learned masks: their gradients are finite differences, they find the unit that is not used, and end in a plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import snpc  # noqa: E402
import snpc.torch  # noqa: E402
from snpc.cli import main  # noqa: E402
from snpc.errors import UserError  # noqa: E402
from snpc.passes import remove_sublayers  # noqa: E402
from snpc.torch import TrainingOptions  # noqa: E402
from snpc.torch.pruning.gates import apply_gates, canonical_module, layer_gates, make_gate  # noqa: E402
from snpc.torch.pruning.learned_masks import MASK_METHODS, MaskedModule, make_masks  # noqa: E402
from tests.models.idle import IDLE, write_idle  # noqa: E402

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB = DATA / "digits_vit.onnx", DATA / "calib.npz"
DEAD = 7


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> snpc.Analysis:
    """The digits ViT, in which nothing reads one unit of the second layer's feed-forward width."""
    path = tmp_path_factory.mktemp("masks") / "planted.onnx"
    model = onnx.load(VIT)
    group = next(g for g in snpc.analyze(snpc.load(VIT)).groups if g.role == "ffn" and g.layer == 1)
    (site,) = (s for s in group.sites if s.kind == "consume")
    tensor = next(t for t in model.graph.initializer if t.name == site.tensor)
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[DEAD] = 0
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    return snpc.analyze(snpc.load(path))


def cuttable(analysis: snpc.Analysis) -> list[snpc.types.Group]:
    return [g for g in analysis.groups if g.prunable and g.role in ("qk", "vo", "ffn")]


@pytest.mark.parametrize("kind", MASK_METHODS)
def test_gradients_of_masks_are_finite_differences(kind: str, planted: snpc.Analysis) -> None:
    """In the smooth parts: PSP's gates are all open, VIB's noise is the same on both sides."""
    groups = cuttable(planted)
    masks = make_masks(kind, planted, groups, 0.5)
    masked = MaskedModule(canonical_module(planted), [make_gate(planted, g) for g in groups], masks).double()
    images = torch.from_numpy(np.load(CALIB)["image"][:4]).double()
    generator = torch.Generator().manual_seed(1)
    parameters = list(masks.parameters())
    away = [0.01 * torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]

    def loss() -> torch.Tensor:
        torch.manual_seed(0)
        return masked({"image": images})["logits"].square().mean() + masks.penalty()

    loss().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, away, strict=True))
    sides = []
    with torch.no_grad():
        for step in (1e-4, -2e-4):
            for p, d in zip(parameters, away, strict=True):
                p += step * d
            sides.append(loss().item())
    assert (sides[0] - sides[1]) / 2e-4 == pytest.approx(slope, rel=1e-3)


@pytest.mark.parametrize("kind", MASK_METHODS)
def test_masks_follow_units_that_are_stored_in_another_order(kind: str, tmp_path: Path) -> None:
    """Gradients, on which all training rests, and worth; without VIB's noise, which has an order of its own."""
    group = next(g for g in snpc.analyze(snpc.load(VIT)).groups if g.role == "ffn" and g.layer == 1)
    order = np.random.default_rng(0).permutation(group.size)
    model = onnx.load(VIT)
    for site in group.sites:
        tensor = next(t for t in model.graph.initializer if t.name == site.tensor)
        turned = np.ascontiguousarray(np.take(onnx.numpy_helper.to_array(tensor), order, site.axis))
        tensor.CopyFrom(onnx.numpy_helper.from_array(turned, tensor.name))
    onnx.save(model, tmp_path / "turned.onnx")
    images = torch.from_numpy(np.load(CALIB)["image"][:4]).double()
    found = []
    for path, place in ((VIT, slice(None)), (tmp_path / "turned.onnx", torch.from_numpy(order))):
        analysis = snpc.analyze(snpc.load(path))
        groups = cuttable(analysis)
        number = next(k for k, g in enumerate(groups) if g.id == group.id)
        masks = make_masks(kind, analysis, groups, 0.3)
        masked = (
            MaskedModule(canonical_module(analysis), [make_gate(analysis, g) for g in groups], masks).double().eval()
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for k, p in enumerate(masks.parameters()):
                away = 0.1 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p += away[:, place] if k % len(groups) == number else away
        loss = masked({"image": images})["logits"].square().mean() + masks.penalty()
        slopes = torch.autograd.grad(loss, list(masks.parameters()), allow_unused=True)
        found.append((slopes[number][0], masks.importance(groups[number])[0].detach()))
    for plain, turned in zip(*found, strict=True):
        assert float(plain.std()) > 0
        torch.testing.assert_close(turned, plain[torch.from_numpy(order)], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("kind", MASK_METHODS)
def test_masks_find_the_unit_that_nothing_reads(kind: str, planted: snpc.Analysis) -> None:
    data = snpc.load_calibration(CALIB, planted.model.inputs, samples=64, batch=16)
    choice = snpc.Budget(target="macs=0.35")
    learned = snpc.torch.learn_masks(planted, data, kind, choice, training=TrainingOptions(steps=40, batch=16, lr=0.05))
    assert learned.kept_macs < 0.82
    group = next(g for g in planted.groups if g.role == "ffn" and g.layer == 1)
    assert DEAD not in learned.plan.keep[group.id][0]
    assert learned.plan.method == "select" and learned.plan.criterion == f"masks:{kind}"


def test_the_command_cuts_and_writes_the_plan(tmp_path: Path) -> None:
    target, plan = tmp_path / "cut.onnx", tmp_path / "cut.plan.json"
    words = ["finetune", VIT, "--teacher", VIT, "--data", CALIB, "--samples", 32, "--batch", 16, "--steps", 3]
    words += ["--learn-masks", "vib", "--target", "macs=0.6", "-o", target, "--plan", plan]
    main([str(w) for w in words], standalone_mode=False)
    analysis = snpc.analyze(snpc.load(target))
    assert analysis.cost.macs <= 0.6 * snpc.analyze(snpc.load(VIT)).cost.macs
    again = snpc.plan_from_json(plan.read_text(), snpc.analyze(snpc.load(VIT)), plan.name)
    assert again.criterion == "masks:vib" and again.keep


def test_vib_finds_the_layer_that_adds_nothing(tmp_path: Path) -> None:
    idle = write_idle(tmp_path / "idle.onnx")
    words = ["finetune", idle, "--teacher", idle, "--data", CALIB, "--samples", 48, "--batch", 16, "--steps", 30]
    words += ["--learn-masks", "vib", "--roles", "layer", "--target", "macs=0.74", "--lr", 0.05]
    main([str(w) for w in (*words, "-o", tmp_path / "cut.onnx", "--json", tmp_path / "r.json")], standalone_mode=False)
    report = json.loads((tmp_path / "r.json").read_text())
    assert [layer["name"] for layer in report["layers"]] == [IDLE]
    assert report["macs"]["after"] <= 0.74 * report["macs"]["before"]


def test_a_gate_on_a_layer_is_its_removal() -> None:
    """With the factor at one the module is the model, at zero the graph without the layer."""
    analysis = snpc.analyze(snpc.load(VIT))
    layers = [s for s in analysis.sublayers if s.removable]
    gates = layer_gates(analysis, layers)
    module = canonical_module(analysis, gated_layers=layers)
    feeds = {"image": torch.from_numpy(np.load(CALIB)["image"][:4])}
    factors = {gate.group.id: torch.ones(1, 1) for gate in gates}
    with torch.no_grad(), apply_gates(module, gates, factors):
        torch.testing.assert_close(module(feeds), canonical_module(analysis)(feeds))
    factors[layers[2].name] = torch.zeros(1, 1)
    with torch.no_grad(), apply_gates(module, gates, factors):
        without = canonical_module(remove_sublayers(analysis, [layers[2].name]))
        torch.testing.assert_close(module(feeds), without(feeds), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "target", "training", "message"),
    [
        ("vib", "params=0.5", TrainingOptions(), "give --target macs=R"),
        ("gates", "macs=0.5", TrainingOptions(), "there are vib, psp, apma"),
        ("vib", "macs=0.5", TrainingOptions(loss="ce"), "loss kd or mse, not ce"),
    ],
)
def test_what_masks_cannot_do_is_refused(
    kind: str, target: str, training: TrainingOptions, message: str, planted: snpc.Analysis
) -> None:
    data = snpc.load_calibration(CALIB, planted.model.inputs, samples=8)
    with pytest.raises(UserError, match=message):
        snpc.torch.learn_masks(planted, data, kind, snpc.Budget(target=target), training=training)


@pytest.mark.parametrize(
    ("kind", "roles", "target", "message"),
    [
        ("vib", ("layer", "ffn"), "macs=0.5", "give --roles layer alone"),
        ("psp", ("layer",), "macs=0.5", "for whole layers take vib"),
        ("vib", ("layer",), "macs=0.0001", "cannot be reached: with all layers gone"),
    ],
)
def test_layers_that_masks_cannot_take_are_refused(
    kind: str, roles: tuple[snpc.types.Role, ...], target: str, message: str, planted: snpc.Analysis
) -> None:
    data = snpc.load_calibration(CALIB, planted.model.inputs, samples=8)
    budget = snpc.Budget(target=target, roles=roles)
    with pytest.raises(UserError, match=message):
        snpc.torch.learn_masks(planted, data, kind, budget, training=TrainingOptions(steps=1, batch=4, lr=0.05))
