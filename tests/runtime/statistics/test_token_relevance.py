"""Relevance of positions, and tokens dropped by it: conservation, spellings, numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner

import snpc
from snpc.cli import main
from snpc.errors import UserError
from snpc.graph.shapes import infer_graph
from snpc.passes.analyze import Analysis
from snpc.passes.canonicalization.finalize import finalize
from snpc.pipeline.token_decisions import check_token_reduction, self_deciding_model
from snpc.runtime.execution.temporary_session import temporary_session
from snpc.runtime.io.save import save
from snpc.runtime.statistics.token_relevance import (
    RelevancePropagation,
    downstream_values,
    feed_dim_sizes,
    measure_token_relevance,
    seed_relevance,
)
from snpc.tokens.methods import ONLINE_WEIGHT, blend_scores
from snpc.tokens.reduction import reduce_tokens
from snpc.tokens.writer import TokenGraphBuilder
from tests.models.encoders import Array, Encoder, forward
from tests.oracle import analysis_of, feeds_of, run

FORMS = {
    "plain": Encoder(),
    "opset 13": Encoder(opset=13),
    "literal sizes": Encoder(literal=True),
    "batch and heads in one axis": Encoder(merged=True, literal=True),
    "pooled": Encoder(exit="mean"),
    "class token and pool": Encoder(exit="both", opset=18),
    "fused": Encoder(fused=True, opset=23),
}


def analysis(encoder: Encoder, folder: Path) -> Analysis:
    path = folder / "encoder.onnx"
    onnx.save(encoder.model(), path)
    return snpc.analyze(snpc.load(path))


def relevance(found: Analysis, encoder: Encoder) -> dict[int, tuple[float, ...]]:
    return measure_token_relevance(found.model.graph, found.tokens.points, [encoder.feeds(4, seed) for seed in (1, 2)])


def written(reduced: Analysis, folder: Path) -> Path:
    path = folder / "reduced.onnx"
    save(finalize(self_deciding_model(reduced)), path)
    return path


def handed_back(found: Analysis, feeds: dict[str, Array]) -> dict[str, Array]:
    """Relevance at every point, not normalised."""
    model = found.model.graph
    watched = downstream_values(model, found.tokens.points[0].value)
    shown = model.clone()
    values = {str(v.name): v for node in shown.graph for v in node.outputs} | {
        str(v.name): v for v in shown.graph.inputs
    }
    shown.graph.outputs.clear()
    shown.graph.outputs.extend(values[str(v.name)] for v in watched)
    with temporary_session(shown, optimization="basic") as call:
        held = dict(zip(watched, call(feeds).values(), strict=True))
    return RelevancePropagation(
        model, infer_graph(model, feed_dim_sizes(model, feeds)), held, {p.value for p in found.tokens.points}
    ).run()


@pytest.mark.parametrize("form", FORMS)
def test_relevance_is_conserved(form: str, tmp_path: Path) -> None:
    """What each sample's output is given, one, arrives at every point, and nothing is negative."""
    encoder = FORMS[form]
    for mine in handed_back(analysis(encoder, tmp_path), encoder.feeds(3)).values():
        assert np.allclose(mine.sum((1, 2)), 1, atol=1e-6)
        assert (mine >= 0).all()


@pytest.mark.parametrize("name", ["vit_timm__ts17", "vit_hf__ts17"])
def test_relevance_is_conserved_in_exports(name: str) -> None:
    for mine in handed_back(analysis_of(name), feeds_of(name)).values():
        assert np.allclose(mine.sum((1, 2)), 1, atol=1e-4)


def test_the_spelling_does_not_matter(tmp_path: Path) -> None:
    expected = relevance(analysis(FORMS["plain"], tmp_path), FORMS["plain"])
    for form in ("opset 13", "literal sizes", "batch and heads in one axis", "fused"):
        found = relevance(analysis(FORMS[form], tmp_path), FORMS[form])
        for block, scores in expected.items():
            assert np.allclose(found[block], scores, rtol=1e-3), (form, block)


def test_what_nothing_is_made_of_has_no_relevance(tmp_path: Path) -> None:
    """A sample whose class token attends to a single position of a single block hands all of it to these two."""
    encoder = Encoder(depth=2)
    proto = encoder.model()
    found = analysis(encoder, tmp_path)
    scores = np.asarray(relevance(found, encoder)[1])
    assert scores[0] > 1 / 13 and np.isclose(scores.sum(), 1, atol=1e-4)
    for tensor in proto.graph.initializer:
        if tensor.name == "v1":  # the second block's values are nothing: only the class token itself is read
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros((16, 16), np.float32), "v1"))
    onnx.save(proto, tmp_path / "blind.onnx")
    blind = snpc.analyze(snpc.load(tmp_path / "blind.onnx"))
    assert np.allclose(relevance(blind, encoder)[1], np.eye(13)[0])


@pytest.mark.parametrize("encoder", [Encoder(), Encoder(exit="mean"), Encoder(fused=True, opset=23)])
def test_star_drops_what_numpy_drops(encoder: Encoder, tmp_path: Path) -> None:
    found = analysis(encoder, tmp_path)
    offline = relevance(found, encoder)
    reduced = reduce_tokens(found, "star:3@1+topk:1@2+star:2@3", offline)
    path = written(reduced, tmp_path)
    tables = {block: np.asarray(scores) for block, scores in offline.items()}
    tables[2] = np.ones(encoder.tokens)
    for seed in range(3):
        feeds = encoder.feeds(4, seed)
        expected = forward(encoder, feeds["x"], {1: 3, 2: 1, 3: 2}, tables, ONLINE_WEIGHT)
        assert np.abs(run(path, feeds)[0] - expected).max() < 1e-4
        assert check_token_reduction(reduced, path, [feeds], 1e-5)


def test_star_without_differences_is_topk(tmp_path: Path) -> None:
    encoder = Encoder()
    found = analysis(encoder, tmp_path)
    even = {block: [1.0] * encoder.tokens for block in (1, 2, 3)}
    feeds = encoder.feeds()
    star = run(written(reduce_tokens(found, "star:3@1-3", even), tmp_path), feeds)[0]
    assert np.array_equal(star, run(written(reduce_tokens(found, "topk:3@1-3"), tmp_path), feeds)[0])


def test_fused_scores_have_the_least_weighted_divergence() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.dirichlet(np.ones(9), 3).astype(np.float32) for _ in range(2))
    values = [ir.Value(name=n, shape=ir.Shape([3, 9]), type=ir.TensorType(ir.DataType.FLOAT)) for n in "ab"]
    graph = ir.Graph(values, [], nodes=[], opset_imports={"": 17}, name="fusing")
    out = blend_scores(TokenGraphBuilder(graph, "f", ir.DataType.FLOAT), *values, 0.3)
    graph.outputs.append(out)
    out.type = ir.TensorType(ir.DataType.FLOAT)
    with temporary_session(ir.Model(graph, ir_version=8)) as call:
        (logs,) = call({"a": a, "b": b}).values()
    found = np.exp(logs) / np.exp(logs).sum(1, keepdims=True)

    def divergence(s: Array) -> Array:
        return np.asarray((s * (0.3 * np.log(s / a) + 0.7 * np.log(s / b))).sum(1))

    for _ in range(200):
        other = found * np.exp(rng.normal(0, 0.05, found.shape))
        assert (divergence(other / other.sum(1, keepdims=True)) > divergence(found)).all()


def test_refusals(tmp_path: Path) -> None:
    encoder = Encoder()
    found = analysis(encoder, tmp_path)
    with pytest.raises(UserError, match="give --calib"):
        reduce_tokens(found, "star:3@1")
    with pytest.raises(UserError, match="merged tokens have none"):
        reduce_tokens(found, "merge:2@1+star:3@2", relevance(found, encoder))


def test_plans_hold_the_scores(tmp_path: Path) -> None:
    encoder = Encoder()
    analysis(encoder, tmp_path)
    model, out, again, plan = (str(tmp_path / n) for n in ("encoder.onnx", "out.onnx", "again.onnx", "plan.json"))
    np.savez(tmp_path / "calib.npz", x=encoder.feeds(24)["x"])
    tokens = ["--roles", "none", "--tokens", "star:0.7@1,3"]
    flags = [*tokens, "--method", "select", "--calib", str(tmp_path / "calib.npz")]
    made = CliRunner().invoke(main, ["prune", model, *flags, "-o", out, "--plan", plan])
    assert made.exit_code == 0, made.output
    made = CliRunner().invoke(main, ["apply", model, plan, "-o", again])
    assert made.exit_code == 0, made.output
    assert Path(again).read_bytes() == Path(out).read_bytes()
    made = CliRunner().invoke(main, ["prune", model, *tokens, "-o", out])
    assert made.exit_code == 2 and "give --calib" in made.output + (made.stderr or "")


def test_relevance_starts_at_the_largest_entry_of_an_output_of_any_size() -> None:
    output = np.zeros((2, 300, 1000))
    output[0, 7, 11], output[1, 299, 999] = 3, 0.1
    seed = seed_relevance(output)
    assert np.argwhere(seed).tolist() == [[0, 7, 11], [1, 299, 999]] and seed.sum() == 2
