"""The two implementations of relevance propagation against each other.

``snpc.runtime.statistics.token_relevance`` propagates by the z+ rule, node by node. ``snpc.torch.operators.relevance``
takes gradient times input, with a part of some operators held fixed. Where every product is positive the z+ rule is
gradient times input, so that both give a token the same share; where signs differ, so do the rules.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import snpc  # noqa: E402
from snpc.runtime.statistics.token_relevance import measure_token_relevance  # noqa: E402
from snpc.torch.module import GraphModule  # noqa: E402
from snpc.torch.operators.relevance import relevance_rules  # noqa: E402
from snpc.types import FloatArray  # noqa: E402

SAMPLES, TOKENS, WIDTH = 3, 6, 5
STREAM = "stream"
POOL = "pooled = ReduceMean <keepdims = 0> (last, one) logits = MatMul (pooled, O)"

NETS = {
    "feed-forward": "a = MatMul (stream, A) r = Relu (a) last = MatMul (r, B)",
    "a sum with itself, a gain and Gelu": "p = MatMul (stream, A) a = Add (p, p) g = Gelu (a) last = Mul (g, gain)",
    "residual sum": "a = MatMul (stream, A) r = Relu (a) b = MatMul (r, B) last = Add (stream, b)",
    "RMS normalization": "m = RMSNormalization <axis = -1> (stream, gain) last = MatMul (m, A)",
    "constant mixing of tokens": "last = MatMul (mix, stream)",
    "attention": """
        q = MatMul (x, Q) k = MatMul (x, K) kt = Transpose <perm = [0, 2, 1]> (k) raw = MatMul (q, kt)
        shares = Softmax <axis = -1> (raw) last = MatMul (shares, stream)""",
    "movement": """
        t = Transpose <perm = [0, 2, 1]> (stream) back = Transpose <perm = [0, 2, 1]> (t)
        a = MatMul (back, A) both = Concat <axis = -1> (a, stream) last = MatMul (both, C)""",
    "every second token": "last = Slice (stream, start, end, one, two)",
}


def write_net(body: str, path: Path, signed: bool) -> Path:
    """A graph whose ``stream`` [samples, TOKENS, WIDTH] is positive, and so are the weights behind it unless
    ``signed``."""
    text = f"""<ir_version: 10, opset_import: ["": 23]>
    net (float[n, {TOKENS}, {WIDTH}] x) => (float[n, 3] logits) {{
        s = MatMul (x, S) stream = Softplus (s) {body} {POOL}
    }}"""
    model = onnx.parser.parse_model(text)
    rng = np.random.default_rng(7)
    square = (WIDTH, WIDTH)
    shapes = {
        "A": square,
        "B": square,
        "C": (2 * WIDTH, WIDTH),
        "O": (WIDTH, 3),
        "gain": (WIDTH,),
        "mix": (TOKENS,) * 2,
    }
    arrays = {name: rng.normal(size=shape) if signed else rng.random(shape) + 0.1 for name, shape in shapes.items()}
    arrays |= {name: rng.normal(size=square) for name in "SQK"}
    integers = {"one": [1], "two": [2], "start": [0], "end": [TOKENS]}
    used = {name for node in model.graph.node for name in node.input}
    initializers = {k: a.astype(np.float32) for k, a in arrays.items()} | {k: np.array(v) for k, v in integers.items()}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(a, k) for k, a in initializers.items() if k in used)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def inputs() -> FloatArray:
    return np.random.default_rng(1).normal(size=(SAMPLES, TOKENS, WIDTH)).astype(np.float32)


def by_z_plus(path: Path) -> FloatArray:
    """[TOKENS]: each token's share of the relevance at the stream, averaged over samples."""
    point = SimpleNamespace(block=1, value=STREAM, count=TOKENS)  # all that is read of a TokenPoint
    return np.asarray(measure_token_relevance(snpc.load(path).graph, [point], [{"x": inputs()}])[1])


def by_gradient(path: Path) -> FloatArray:
    """[TOKENS]: the same, of gradient times input under the rules of the torch bridge."""
    module = GraphModule(snpc.load(path), watch=[STREAM])
    with relevance_rules(module):
        values = module({"x": torch.from_numpy(inputs())})
        (gradient,) = torch.autograd.grad(values["logits"].max(-1).values.sum(), values[STREAM])
    relevance = (gradient * values[STREAM]).sum(-1).detach().numpy()
    return np.asarray((relevance / relevance.sum(1, keepdims=True)).mean(0), np.float64)


@pytest.mark.parametrize("name", NETS)
def test_both_agree_where_all_products_are_positive(name: str, tmp_path: Path) -> None:
    path = write_net(NETS[name], tmp_path / "net.onnx", signed=False)
    shares = by_z_plus(path)
    assert shares.sum() == pytest.approx(1, rel=1e-4) and np.ptp(shares) > 0.01
    np.testing.assert_allclose(by_gradient(path), shares, rtol=1e-4, atol=1e-6)


def test_only_gradients_give_negative_relevance(tmp_path: Path) -> None:
    """z+ leaves out the negative products of a sum that has positive ones, gradient times input subtracts them."""
    path = write_net(NETS["feed-forward"], tmp_path / "net.onnx", signed=True)
    positive, signed = by_z_plus(path), by_gradient(path)
    assert positive.min() >= 0
    assert np.abs(positive - signed).max() > 0.01
