"""Sensitivities of outputs to what units say, against finite differences of the model under onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

pytest.importorskip("torch")

import snpc
import snpc.torch
from snpc.types import FloatArray, Group, Probe, Role

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB = DATA / "digits_vit.onnx", DATA / "calib.npz"
SAMPLES, STEP = 2, 0.1
UNITS = {"qk": (5, 30), "vo": (5, 30), "ffn": (3, 200), "head": (0, 2)}  # units of each role, from different heads


@pytest.fixture(scope="module")
def analysis() -> snpc.Analysis:
    return snpc.analyze(snpc.load(VIT))


def group_of(analysis: snpc.Analysis, role: Role) -> Group:
    return next(g for g in analysis.groups if g.role == role and g.layer == 2)


@pytest.fixture(scope="module")
def data(analysis: snpc.Analysis) -> snpc.Calibration:
    return snpc.load_calibration(CALIB, analysis.model.inputs, samples=SAMPLES, held_out=0)


def score(data: snpc.Calibration, analysis: snpc.Analysis, criterion: str, role: Role) -> FloatArray:
    return snpc.score(analysis, criterion, data, roles=(role,)).values[group_of(analysis, role).id].ravel()


def shifted_session(tensor: str) -> ort.InferenceSession:
    """The model with a further input that is added to ``tensor``."""
    model = onnx.load(VIT)
    for node in model.graph.node:
        for k, name in enumerate(node.input):
            if name == tensor:
                node.input[k] = "shifted"
    made = next(k for k, node in enumerate(model.graph.node) if tensor in node.output)
    model.graph.node.insert(made + 1, onnx.helper.make_node("Add", [tensor, "shift"], ["shifted"]))
    model.graph.input.append(onnx.helper.make_tensor_value_info("shift", onnx.TensorProto.FLOAT, None))
    model.graph.output.append(onnx.helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, None))
    return ort.InferenceSession(model.SerializeToString())


def jacobian(session: ort.InferenceSession, image: FloatArray, probe: Probe, unit: int) -> FloatArray:
    """[values of the unit in all rows, classes]: central differences of one sample's logits."""
    zero = np.zeros((1,) * probe.units.ndim, np.float32)
    shape = session.run([probe.tensor], {"image": image[None], "shift": zero})[0].shape
    places = np.argwhere(np.broadcast_to(probe.units, shape) == unit)
    shifts = np.zeros((len(places), *shape[1:]), np.float32)
    for shift, place in zip(shifts, places, strict=True):
        shift[tuple(place[1:])] = STEP
    images = np.repeat(image[None], len(places), axis=0)
    up, down = (session.run(["logits"], {"image": images, "shift": sign * shifts})[0] for sign in (1, -1))
    return (up.astype(np.float64) - down) / (2 * STEP)


@pytest.mark.parametrize("role", [*UNITS])
def test_sensitivity_is_that_of_finite_differences(role: Role, analysis: snpc.Analysis, data: snpc.Calibration) -> None:
    group = group_of(analysis, role)
    probes = [p for p in group.probes if p.kind != "value"]
    assert len(probes) == (2 if role == "qk" else 1)
    sessions = [shifted_session(p.tensor) for p in probes]
    images = next(data.batches())["image"]
    exact, bound = score(data, analysis, "serene:outputs=10", role), score(data, analysis, "serene:outputs=0", role)
    for unit in UNITS[role]:
        slopes = [
            np.concatenate([jacobian(s, image, p, unit) for s, p in zip(sessions, probes, strict=True)])
            for image in images
        ]
        assert exact[unit] == pytest.approx(np.mean([np.abs(j).mean(1).sum() for j in slopes]), rel=0.01)
        assert bound[unit] == pytest.approx(np.mean([np.abs(j.mean(1)).sum() for j in slopes]), rel=0.02)


def test_fewer_outputs_are_the_likeliest(analysis: snpc.Analysis, data: snpc.Calibration) -> None:
    probe = next(p for p in group_of(analysis, "ffn").probes)
    images, session = next(data.batches())["image"], shifted_session(probe.tensor)
    logits = ort.InferenceSession(VIT).run(None, {"image": images})[0]
    found = score(data, analysis, "serene:outputs=1", "ffn")
    for unit in UNITS["ffn"]:
        slopes = [
            jacobian(session, image, probe, unit)[:, row.argmax()] for image, row in zip(images, logits, strict=True)
        ]
        assert found[unit] == pytest.approx(np.mean([np.abs(j).sum() for j in slopes]), rel=0.02)


@pytest.mark.parametrize("role", ["qk", "vo", "ffn", "head", "residual"])
def test_the_bound_is_one(role: Role, analysis: snpc.Analysis, data: snpc.Calibration) -> None:
    data = snpc.load_calibration(CALIB, analysis.model.inputs, samples=SAMPLES)
    exact, bound = (snpc.score(analysis, f"serene:outputs={n}", data, roles=(role,)).values for n in (10, 0))
    for group in exact:
        assert (bound[group] <= exact[group] * (1 + 1e-5)).all() and bound[group].max() > 0


def test_gradients_of_half_precision_are_those_of_single(
    data: snpc.Calibration, analysis: snpc.Analysis, tmp_path: Path
) -> None:
    float16 = pytest.importorskip("onnxruntime.transformers.float16")
    onnx.save(float16.convert_float_to_float16(onnx.load(VIT), keep_io_types=True), tmp_path / "half.onnx")
    half = snpc.analyze(snpc.load(tmp_path / "half.onnx"))
    expected, found = score(data, analysis, "taylor", "ffn"), score(data, half, "taylor", "ffn")
    assert np.corrcoef(expected, found)[0, 1] > 0.99
    assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)
