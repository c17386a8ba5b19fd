"""The scale of attention goes into what makes queries, wherever it stands; outputs stay."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.passes.canonicalization.canonicalize import canonicalize
from snpc.passes.slicing.query_scale import FoldAttentionScale
from tests.passes.text_graphs import Array, attention_model, op_types, outputs_of

X = np.random.default_rng(1).standard_normal((2, 3, 8)).astype(np.float32)
NONE = "ss = Identity(s)"


def scalar(number: float) -> Array:
    return np.array(number, np.float32)


def with_operands(lines: str, scaled: str = NONE, **more: Array) -> onnx.ModelProto:
    """``lines`` make ``ql`` and ``kl`` of queries ``qt`` and keys ``kt``."""
    model = attention_model(scaled, **more)
    text = onnx.printer.to_text(attention_model(scaled))
    assert text.count("MatMul (qt, kt)") == 1
    changed = onnx.parser.parse_model(text.replace("s = MatMul (qt, kt)", f"{lines} s = MatMul (ql, kl)"))
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(model.graph.initializer)
    return changed


FORMS = {
    "a factor on the scores": attention_model("ss = Mul(s, factor)", factor=scalar(0.3)),
    "a divisor of the scores": attention_model("ss = Div(s, factor)", factor=scalar(2.0)),
    "before a mask": attention_model("sc = Mul(s, factor) ss = Add(sc, m)", factor=scalar(0.3), m=scalar(-1.0)),
    "the root on both sides": with_operands("ql = Mul(qt, factor) kl = Mul(kt, factor)", factor=scalar(0.55)),
    "on queries": with_operands("ql = Mul(qt, factor) kl = Identity(kt)", factor=scalar(0.3)),
    "on keys and scores": with_operands(
        "ql = Identity(qt) kl = Div(kt, factor)", "ss = Mul(s, factor)", factor=scalar(0.7)
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_scale_goes_into_the_weights_of_queries(form: str) -> None:
    proto = FORMS[form]
    (expected,) = outputs_of(proto, {"x": X})
    model = canonicalize(ir.from_proto(proto))
    result = FoldAttentionScale()(model)
    assert result.modified and result.count == 1  # type: ignore[attr-defined]
    assert not {"Mul", "Div"} & set(op_types(result.model))
    np.testing.assert_allclose(outputs_of(result.model, {"x": X})[0], expected, rtol=1e-4, atol=1e-5)
    assert {"Mul", "Div"} & set(op_types(model)), "the model that was given stays"
    ratios = [weight_of(result.model, name) / weight_of(model, name) for name in ("wq", "bq")]
    np.testing.assert_allclose(ratios[0], np.full((8, 8), ratios[1][0]), rtol=1e-4, atol=1e-5)


def weight_of(model: ir.Model, name: str) -> Array:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def test_what_no_weight_can_take_is_multiplied_on_queries() -> None:
    """A function that is not linear stands between the weights and the queries."""
    proto = with_operands("ql = Tanh(qt) kl = Identity(kt)", "ss = Mul(s, factor)", factor=scalar(0.3))
    result = FoldAttentionScale()(canonicalize(ir.from_proto(proto)))
    (product,) = (n for n in result.model.graph if n.op_type == "Mul")
    assert product.inputs[0] is not None and product.inputs[0].producer().op_type == "Tanh"  # type: ignore[union-attr]
    np.testing.assert_allclose(
        outputs_of(result.model, {"x": X})[0], outputs_of(proto, {"x": X})[0], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    "proto",
    [
        attention_model(NONE),
        attention_model("sm = Add(s, factor) ss = Mul(sm, factor)", factor=scalar(0.3)),  # it scales the mask as well
        with_operands("qh = Tanh(qt) ql = Mul(qh, factor) kl = Identity(kt)", factor=scalar(0.3)),  # where it should be
    ],
    ids=["no scale", "behind a mask", "on queries already"],
)
def test_others_are_left_alone(proto: onnx.ModelProto) -> None:
    assert not FoldAttentionScale()(canonicalize(ir.from_proto(proto))).modified


def test_weights_that_others_read_stay() -> None:
    """Queries are an output too: they are multiplied behind it."""
    proto = attention_model("ss = Mul(s, factor)", factor=scalar(0.3))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("qb", onnx.TensorProto.FLOAT, ["B", "N", 8]))
    result = FoldAttentionScale()(canonicalize(ir.from_proto(proto)))
    for mine, theirs in zip(outputs_of(result.model, {"x": X}), outputs_of(proto, {"x": X}), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)
