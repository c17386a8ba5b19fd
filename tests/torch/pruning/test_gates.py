"""Gates on units: at zero the model is the pruned one, their gradients are finite differences, and what criteria make
of them finds the unit that is not used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from tests.models.exports import export, load_feeds

torch = pytest.importorskip("torch")

import snpc  # noqa: E402
from snpc.torch.operators.registry import TORCH_DTYPES  # noqa: E402
from snpc.torch.operators.relevance import relevance_rules  # noqa: E402
from snpc.torch.pruning.gates import apply_gates, canonical_module, make_gate  # noqa: E402
from snpc.types import FloatArray, Group  # noqa: E402

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB, EVAL = DATA / "digits_vit.onnx", DATA / "calib.npz", DATA / "eval.npz"
MODELS = ["vit_timm__ts17", "llama__ts17", "t5_gated__ts17", "bert__dyn20", "vit_timm__dyn23_sdpa"]
CRITERIA = ("taylor", "lm", "qm", "fisher", "group_fisher", "lrp", "movement", "serene")


def keeping(plan: snpc.SlicePlan, group: Group) -> torch.Tensor:
    """[blocks, size]: one where the plan keeps the unit."""
    kept = torch.zeros(group.blocks, group.size)
    for block, row in enumerate(plan.keep[group.id]):
        kept[block, list(row)] = 1
    return kept


def cut_groups(plan: snpc.SlicePlan) -> list[Group]:
    return [g for g in plan.analysis.groups if g.id in plan.keep]


@pytest.mark.parametrize("name", MODELS)
def test_closed_gates_are_the_pruned_model(name: str, tmp_path: Path) -> None:
    analysis = snpc.analyze(snpc.load(export(name)))
    plan = snpc.make_slice_plan(snpc.score(analysis, "random"), snpc.Budget(ratio=0.5, uniform=True))
    snpc.apply(snpc.PruningPlan(plan), tmp_path / "cut.onnx")
    feeds = load_feeds(name)
    session = ort.InferenceSession(tmp_path / "cut.onnx")
    taken = {i.name for i in session.get_inputs()}
    names = [o.name for o in session.get_outputs()]
    expected = session.run(names, {k: v for k, v in feeds.items() if k in taken})
    module, groups = canonical_module(analysis), cut_groups(plan)
    assert {g.role for g in groups} >= {"qk", "vo", "ffn"}
    given = {k: torch.tensor(v) for k, v in feeds.items()}
    dense = module(given)
    with apply_gates(module, [make_gate(analysis, g) for g in groups], {g.id: keeping(plan, g) for g in groups}):
        found = module(given)
    for key, array in zip(names, expected, strict=True):
        assert np.abs(found[key].detach().numpy() - array).max() < 1e-4 * np.abs(array).max()
        assert not torch.allclose(found[key], dense[key], rtol=1e-3)


@pytest.mark.parametrize("name", ["vit_timm__ts17", "llama__ts17"])
def test_gradients_of_gates_are_finite_differences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TORCH_DTYPES, 1, torch.float64)
    analysis = snpc.analyze(snpc.load(export(name)))
    groups = [g for g in analysis.groups if g.prunable and g.role in ("qk", "vo", "ffn")]
    gates = [make_gate(analysis, g) for g in groups]
    module = canonical_module(analysis).double()
    given = {k: torch.tensor(v) for k, v in load_feeds(name).items()}
    given = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    generator = torch.Generator().manual_seed(0)
    shape = {g.id: (g.blocks, g.size) for g in groups}
    away = {k: torch.randn(s, generator=generator, dtype=torch.float64) for k, s in shape.items()}

    def loss(step: float) -> torch.Tensor:
        factors = {k: torch.ones(s, dtype=torch.float64) + step * away[k] for k, s in shape.items()}
        for factor in factors.values():
            factor.requires_grad_()
        with apply_gates(module, gates, factors):
            value = sum(v.square().mean() for v in module(given).values() if v.is_floating_point())
        value.backward()
        slopes.append(sum(float((f.grad * away[k]).sum()) for k, f in factors.items()))
        return value.detach()

    slopes: list[float] = []
    loss(0.0)
    assert float(loss(1e-6) - loss(-1e-6)) / 2e-6 == pytest.approx(slopes[0], rel=1e-4)


# -- criteria --------------------------------------------------------------------------------------------------------


def changed(path: Path, change: Any) -> Path:
    """The digits ViT with other feed-forward weights in its second layer."""
    model = onnx.load(VIT)
    group = next(g for g in snpc.analyze(snpc.load(VIT)).groups if g.role == "ffn" and g.layer == 1)
    tensors = {t.name: t for t in model.graph.initializer}
    for site in group.sites:
        array = onnx.numpy_helper.to_array(tensors[site.tensor])
        made = np.ascontiguousarray(change(array, site))
        tensors[site.tensor].CopyFrom(onnx.numpy_helper.from_array(made, site.tensor))
    onnx.save(model, path)
    return path


def scores_of(path: Path, criterion: str) -> FloatArray:
    analysis = snpc.analyze(snpc.load(path))
    data = snpc.load_calibration(CALIB, analysis.model.inputs, samples=6)
    group = next(g for g in analysis.groups if g.role == "ffn" and g.layer == 1)
    return snpc.score(analysis, criterion, data, roles=("ffn",)).values[group.id][0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_unit_that_nothing_reads_scores_nothing(criterion: str, tmp_path: Path) -> None:
    def unread(array: np.ndarray, site: Any) -> np.ndarray:
        array = array.copy()
        if site.kind == "consume":
            np.moveaxis(array, site.axis, 0)[7] = 0
        return array

    found = scores_of(changed(tmp_path / "m.onnx", unread), criterion)
    assert found[7] == 0
    if criterion != "movement":  # of either sign
        assert found.argmin() == 7 and (found > 0).sum() > 300


@pytest.mark.parametrize("criterion", ["movement", "gum"])
def test_a_unit_that_training_would_shrink_scores_least(criterion: str, tmp_path: Path) -> None:
    """The unit that answers depend on most works against them when what reads it is turned round."""
    images = np.load(CALIB)["image"]
    np.save(tmp_path / "said.npy", ort.InferenceSession(VIT).run(None, {"image": images})[0].argmax(-1))

    unit = scores_of(VIT, "taylor").argmax()

    def against(array: np.ndarray, site: Any) -> np.ndarray:
        array = array.copy()
        if site.kind == "consume":
            np.moveaxis(array, site.axis, 0)[unit] *= -4
        return array

    spelled = f"{criterion}:labels={tmp_path / 'said.npy'}"
    found = scores_of(changed(tmp_path / "m.onnx", against), spelled)
    assert found.argmin() == unit and found[unit] < 0
    assert scores_of(VIT, spelled).argmin() != unit


def test_gum_gives_twins_less_than_either_had_alone(tmp_path: Path) -> None:
    """Two units that do the same: unlike the others' likeness, theirs has grown."""

    def doubled(array: np.ndarray, site: Any) -> np.ndarray:
        array = array.copy()
        if site.kind != "consume":
            rows = np.moveaxis(array, site.axis, 0)
            rows[7] = rows[8]
        return array

    twins = changed(tmp_path / "m.onnx", doubled)
    bonus = scores_of(twins, "gum:unique=1000") - scores_of(twins, "gum:unique=0")
    before = scores_of(VIT, "gum:unique=1000") - scores_of(VIT, "gum:unique=0")
    scale = np.median(bonus) / np.median(before)  # the mean movement, which uniqueness is multiplied with
    assert bonus[7] == pytest.approx(bonus[8], rel=1e-4)
    assert bonus[8] < before[8] * scale * 0.9999


@pytest.mark.parametrize("criterion", [*CRITERIA, "gum"])
def test_scores_follow_units_that_are_stored_in_another_order(criterion: str, tmp_path: Path) -> None:
    order = np.random.default_rng(0).permutation(384)
    turned = changed(tmp_path / "m.onnx", lambda array, site: np.take(array, order, site.axis))
    plain = scores_of(VIT, criterion)
    assert np.abs(plain).max() > 0
    np.testing.assert_allclose(scores_of(turned, criterion), plain[order], rtol=1e-2, atol=1e-3 * np.abs(plain).max())


def test_labels_are_those_of_their_samples(tmp_path: Path) -> None:
    """What the model answers, as labels, is the same as no labels; other labels are not."""
    images = np.load(CALIB)["image"]
    said = ort.InferenceSession(VIT).run(None, {"image": images})[0].argmax(-1)
    np.save(tmp_path / "said.npy", said)
    np.save(tmp_path / "other.npy", (said + 1) % 10)
    plain, same, other = (
        scores_of(VIT, c) for c in ("taylor", *(f"taylor:labels={tmp_path / n}.npy" for n in ("said", "other")))
    )
    np.testing.assert_array_equal(plain, same)
    assert other.mean() > 3 * plain.mean()


def test_group_fisher_divides_by_what_is_saved() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    data = snpc.load_calibration(CALIB, analysis.model.inputs, samples=3)
    found = {
        per: snpc.score(analysis, f"group_fisher:per={per}", data, roles=("qk", "ffn")).values
        for per in ("unit", "macs", "memory")
    }
    for group in (g for g in analysis.groups if g.id in found["unit"]):
        macs = group.macs / (group.blocks * group.size) / 1e6
        np.testing.assert_allclose(found["macs"][group.id] * macs, found["unit"][group.id], rtol=1e-6)
        ratio = found["unit"][group.id] / found["memory"][group.id]
        np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-6)


RELU = """
  <ir_version: 9, opset_import: ["": 17]>
  net (float[n, 6] x) => (float[n, 5] logits)
  {
      h = MatMul (x, A)
      a = Relu (h)
      g = MatMul (a, B)
      b = Relu (g)
      logits = MatMul (b, C)
  }
"""


def test_relevance_is_conserved(tmp_path: Path) -> None:
    """Without biases, all of the answer passes through every layer."""
    model = onnx.parser.parse_model(RELU)
    rng = np.random.default_rng(0)
    for name, shape in (("A", (6, 8)), ("B", (8, 7)), ("C", (7, 5))):
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "net.onnx")
    analysis = snpc.analyze(snpc.load(tmp_path / "net.onnx"))
    groups = [g for g in analysis.groups if g.prunable]
    assert len(groups) == 2
    module, gates = canonical_module(analysis), [make_gate(analysis, g) for g in groups]
    factors = {g.id: torch.ones(1, g.size, requires_grad=True) for g in groups}
    with apply_gates(module, gates, factors), relevance_rules(module):
        answer = module({"x": torch.randn(1, 6, generator=torch.Generator().manual_seed(0))})["logits"].max()
        answer.backward()
    for factor in factors.values():
        assert float(factor.grad.sum()) == pytest.approx(answer.item(), rel=1e-4)
        assert (factor.grad != 0).sum() > 1


def test_relevance_rules_leave_the_outputs_as_they_are() -> None:
    analysis = snpc.analyze(snpc.load(VIT))
    module = canonical_module(analysis)
    images = torch.from_numpy(np.load(CALIB)["image"][:3])
    with torch.no_grad():
        expected = module(images)
    with relevance_rules(module):
        assert torch.allclose(module(images), expected, atol=1e-4)
    assert torch.equal(module(images), expected)


def test_without_torch_gradients_are_refused_in_words(tmp_path: Path) -> None:
    target = str(tmp_path / "p.json")
    code = f"""
import sys
sys.modules["torch"] = None
from snpc.cli import main
main(["plan", {str(VIT)!r}, "--ratio", "0.5", "--criterion", "taylor", "--calib", {str(CALIB)!r}, "-o", {target!r}])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "criterion taylor needs torch, which is not installed: pip install" in done.stderr


def test_gradients_are_measured_once_snpc_torch_is_imported() -> None:
    """Without it, snpc says in one line what to import, and does not import torch itself."""
    code = f"""
import sys
import snpc
analysis = snpc.analyze(snpc.load({str(VIT)!r}))
data = snpc.load_calibration({str(CALIB)!r}, analysis.model.inputs, samples=2)
def scored():
    return snpc.score(analysis, "taylor", data, roles=("ffn",))
try:
    scored()
except snpc.UserError as error:
    print(error)
assert "torch" not in sys.modules
import snpc.torch
print(len(scored().values))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    message, groups = done.stdout.splitlines()
    assert message.startswith("criterion taylor needs gradients: import snpc.torch first") and int(groups) > 1
