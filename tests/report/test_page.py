"""The HTML report: it loads nothing, shows what the result says, and cannot be written by a model's names."""

from __future__ import annotations

import io
import json
import re
from base64 import b64decode
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner
from onnx import helper, numpy_helper

import snpc
from snpc.cli import main
from snpc.passes.mac_breakdown import ROLE_PRECEDENCE, macs_by_role
from snpc.report.attention_maps import AttentionMaps, patch_grid
from snpc.report.data import ReportData
from snpc.report.format import format_count, format_percent
from snpc.report.page import render_page
from snpc.report.png import png_data_url
from snpc.report.quality_text import quality_text
from tests.models.exports import export, load_feeds

DATA = Path(snpc.__file__).parent / "data" / "digits"
VOID = {"meta", "img", "br", "link", "hr", "input"}


class Parsed(HTMLParser):
    """Tags, attributes and text of a page; fails where a tag is closed that is not the open one."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def names(self) -> list[str]:
        return [tag for tag, _ in self.tags]

    def of_class(self, name: str) -> int:
        return sum(attributes.get("class") == name for _, attributes in self.tags)


@dataclass(frozen=True)
class Written:
    result: snpc.PrunedModel
    decision: snpc.PruningPlan
    report: ReportData
    text: str


def pruned(
    model: Path,
    folder: Path,
    choice: snpc.Budget,
    data: object = None,
    criterion: str | None = None,
) -> Written:
    analysis = snpc.analyze(snpc.load(model))
    calibration = None
    if data is not None:
        calibration = snpc.load_calibration(data, analysis.model.inputs, samples=16)  # type: ignore[arg-type]
    decision = snpc.plan(analysis, choice, calibration=calibration, criterion=criterion)
    result = snpc.apply(decision, folder / "pruned.onnx")
    target = folder / "report.html"
    report = snpc.write_report(result, target, plan=decision, calibration=calibration)
    return Written(result, decision, report, target.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Written:
    folder = tmp_path_factory.mktemp("digits")
    return pruned(DATA / "digits_vit.onnx", folder, snpc.Budget(ratio=0.5), str(DATA / "calib.npz"))


def exported(name: str, folder: Path, choice: snpc.Budget) -> Written:
    return pruned(export(name), folder, choice, dict(load_feeds(name)), "magnitude")


# -- the page itself -------------------------------------------------------------------------------------------------


def assert_loads_nothing(text: str) -> Parsed:
    parsed = Parsed(text)
    assert not re.search(r"https?://|@import|url\(", text)
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(parsed.names())
    for _, attributes in parsed.tags:
        for name in ("src", "href", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:")
        assert not any(name.startswith("on") for name in attributes)
    return parsed


def test_the_page_is_balanced_and_loads_nothing(digits: Written) -> None:
    parsed = assert_loads_nothing(digits.text)
    assert digits.text.startswith("<!DOCTYPE html>")
    assert "digits_vit.onnx, pruned" in parsed.texts


def test_every_group_of_the_plan_is_shown(digits: Written) -> None:
    texts = Parsed(digits.text).texts
    plan = digits.result.plan
    assert plan.keep
    for name in plan.keep:
        group = plan.analysis.group(name)
        assert name in texts
        assert any(t.startswith(f"{name}: {group.blocks} x {group.size} before") for t in texts)
        assert any(t.endswith(f"{group.blocks} x {plan.kept_width(group)} after") for t in texts)


def test_numbers_are_those_of_the_result(digits: Written) -> None:
    numbers = snpc.json_report(digits.result)
    costs = {pair.name: (pair.before, *pair.after) for pair in digits.report.costs}
    (file,) = digits.report.files
    for name, key in (("parameters", "params"), ("MACs", "macs"), ("size on disk", "bytes")):
        assert costs[name] == (numbers[key]["before"], numbers[key]["after"])
        assert format_count(numbers[key]["after"]) in digits.text
    assert {w.id: w.kept[0] for w in digits.report.widths} == {
        g["id"]: g["kept"] for g in numbers["groups"] if g["role"] in ("qk", "vo", "ffn")
    }
    (drift,) = numbers["verify"]["quality"]["differences"]
    assert file.differences[0].relative == drift["relative"]
    assert format_percent(drift["relative"]) in digits.text
    assert file.rewrite.startswith("rewrite: correct") and file.rewrite in digits.text
    assert file.quality == quality_text(digits.result.quality) and f"grade-{file.grade}" in digits.text
    assert json.loads(json.dumps(digits.report.to_json()))["costs"][0]["after"] == [numbers["macs"]["after"]]


def test_curves_are_drawn_with_the_chosen_point(digits: Written) -> None:
    curves = digits.decision.loss_curves
    parsed = Parsed(digits.text)
    assert parsed.of_class("curve") == parsed.of_class("drop") == len(curves) > 0
    for width in digits.report.widths:
        assert np.allclose(np.square(width.curve), curves[width.id])
        assert f"{width.kept[0]} of {width.size} kept, {format_percent(width.curve[width.kept[0] or 0])}" in digits.text


def test_without_curves_or_data_there_are_none(tmp_path: Path) -> None:
    written = pruned(DATA / "digits_vit.onnx", tmp_path, snpc.Budget(ratio=0.5))
    parsed = assert_loads_nothing(written.text)
    assert parsed.of_class("curve") == 0
    assert not written.report.attention.pictures
    assert "img" not in parsed.names()
    assert any("random inputs" in text for text in written.report.warnings)


def test_latency_is_shown_where_it_was_measured(digits: Written, tmp_path: Path) -> None:
    files = [digits.result.plan.analysis.model.path, digits.result.path]
    timed = snpc.bench(files, protocol=snpc.TimingProtocol(warmup=1, iterations=3))
    report = snpc.write_report(digits.result, tmp_path / "timed.html", bench=timed)
    (latency,) = [pair for pair in report.costs if pair.unit == "ms"]
    (speedup,) = timed.speedups
    assert (latency.before, latency.after) == (timed.timings[0].median, (timed.timings[0].median / speedup.ratio,))
    assert f"{latency.after[0]:.3g} ms, {speedup.ratio:.2f} x" in (tmp_path / "timed.html").read_text()
    assert not any(pair.unit == "ms" for pair in digits.report.costs)


# -- MACs by role ----------------------------------------------------------------------------------------------------


def test_macs_by_role_add_up_to_those_of_the_files(digits: Written) -> None:
    result = digits.result
    assert sum(pair.before for pair in digits.report.macs) == result.before.macs
    assert sum(pair.after[0] or 0 for pair in digits.report.macs) == result.after.macs
    groups = [g for g in result.plan.analysis.groups if g.role == "ffn"]
    (ffn,) = [pair for pair in digits.report.macs if pair.name == "ffn"]
    assert ffn.before == sum(g.macs for g in groups)
    assert ffn.after[0] == sum(g.macs * result.plan.kept_width(g) // g.size for g in groups)


@pytest.mark.parametrize(
    "name", ["bert__ts17", "gpt2__dyn20", "convnet__ts17", "swin_timm__ts17", "vit_timm__dyn23_sdpa"]
)
def test_no_product_counts_twice(name: str) -> None:
    """Convolutions and chains of layers make and read several widths each."""
    analysis = snpc.analyze(snpc.load(export(name)))
    macs = macs_by_role(analysis)
    assert sum(macs.values()) == analysis.cost.macs
    assert sum(macs.get(role, 0) for role in ROLE_PRECEDENCE) > 0.5 * analysis.cost.macs


# -- attention maps --------------------------------------------------------------------------------------------------


def weights_in(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What every softmax of a file gives, by onnx and onnxruntime alone."""
    model = onnx.load(path)
    names = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    del model.graph.output[:]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(names, feeds))


def test_maps_are_the_attention_of_the_class_token(tmp_path: Path) -> None:
    name = "vit_timm__ts17"
    written = exported(name, tmp_path, snpc.Budget(ratio=0.5))
    feeds = load_feeds(name)
    attention = written.report.attention
    assert len(attention.pictures) == 2
    assert attention.seen_from == "the class token"
    groups = [g.id for g in written.result.plan.analysis.groups if g.role == "qk"]
    for side, path in (("before", export(name)), ("after", written.result.path)):
        weights = weights_in(path, feeds)
        for k, picture in enumerate(attention.pictures):
            for item in picture.maps:
                row = weights[groups.index(item.group)][k, item.head, 0, 1:].reshape(4, 4)
                assert np.allclose(getattr(item, side), row / row.sum(), atol=1e-5)
    assert Parsed(written.text).names().count("img") == 2 + 2 * sum(len(p.maps) for p in attention.pictures)


def test_heads_are_compared_with_themselves(tmp_path: Path) -> None:
    """Dropping heads changes nothing about how the others of the first layer look at things."""
    written = exported("vit_hf__ts17", tmp_path, snpc.Budget(ratio=0.5, roles=("head",), uniform=True))
    plan = written.result.plan
    first, *_ = [g for g in plan.analysis.groups if g.role == "qk"]
    heads, *_ = [g for g in plan.analysis.groups if g.role == "head"]
    maps = [m for m in written.report.attention.pictures[0].maps if m.group == first.id]
    assert tuple(m.head for m in maps) == plan.keep[heads.id][0]
    assert all(m.overlap > 0.9999 for m in maps)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bert__ts17", "takes no pictures"),
        ("swin_timm__ts17", "not over the whole picture"),
        ("vit_timm__dyn23_sdpa", "inside fused nodes"),
    ],
)
def test_no_maps_where_there_is_no_picture_to_look_at(name: str, reason: str, tmp_path: Path) -> None:
    written = exported(name, tmp_path, snpc.Budget(ratio=0.5))
    assert written.report.attention == AttentionMaps(reason=written.report.attention.reason)
    assert reason in written.report.attention.reason
    assert "img" not in assert_loads_nothing(written.text).names()


def test_grids() -> None:
    assert patch_grid(197, (224, 224)) == (1, (14, 14))
    assert patch_grid(196, (224, 224)) == (0, (14, 14))
    assert patch_grid(201, (224, 224)) == (5, (14, 14))
    assert patch_grid(1 + 8 * 16, (128, 256)) == (1, (8, 16))
    assert patch_grid(150, (224, 224)) == (6, (12, 12))
    assert patch_grid(60, (224, 224)) is None


def test_pictures_are_png() -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype(np.uint8)
    data = b64decode(png_data_url(pixels).partition(",")[2])
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)


# -- names that bite -------------------------------------------------------------------------------------------------

HOSTILE = "</style></title><script>alert('x')</script><img src=x onerror=alert(1)> \" onload=\"x & ]]> &lt;"


def hostile_model(path: Path) -> Path:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("MatMul", ["x", f"{HOSTILE}.weight"], ["a"], f"{HOSTILE}.1"),
        helper.make_node("Relu", ["a"], ["b"], f"{HOSTILE}.2"),
        helper.make_node("MatMul", ["b", "out.weight"], [HOSTILE], f"{HOSTILE}.3"),
    ]
    weights = [
        numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name)
        for name, shape in ((f"{HOSTILE}.weight", (8, 16)), ("out.weight", (16, 8)))
    ]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 8]) for name in ("x", HOSTILE)]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_names_stay_text(tmp_path: Path) -> None:
    path = hostile_model(tmp_path / "<b onclick=x>&\"'.onnx")
    written = pruned(path, tmp_path, snpc.Budget(ratio=0.5))
    parsed = assert_loads_nothing(written.text)
    assert "b" in parsed.names()  # the page's own, without attributes
    assert all(not attributes for tag, attributes in parsed.tags if tag == "b")
    assert f"{path.name}, pruned" in parsed.texts
    assert HOSTILE in parsed.texts
    (group,) = written.report.widths
    assert "<" in group.id
    assert group.id in parsed.texts


def test_a_name_that_is_no_text_does_not_stop_the_page(digits: Written) -> None:
    from dataclasses import replace

    assert "?.onnx, pruned" in render_page(replace(digits.report, model="\udcff.onnx"))


# -- writing ---------------------------------------------------------------------------------------------------------


def test_the_command_line_writes_it(tmp_path: Path) -> None:
    model = tmp_path / "m.onnx"
    model.write_bytes((DATA / "digits_vit.onnx").read_bytes())
    target = tmp_path / "out.html"
    done = CliRunner().invoke(main, ["prune", str(model), "--ratio", "0.5", "--report", str(target), "--json", "-"])
    assert done.exit_code == 0, done.output
    after = format_count(json.loads(done.stdout)["params"]["after"])
    texts = assert_loads_nothing(target.read_text()).texts
    assert any(text.endswith(f" to {after}") for text in texts)
    assert any(text.startswith("snpc prune ") and "--ratio 0.5" in text for text in texts)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m-pruned.onnx", "m.onnx", "out.html"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--report", "r.html", "--dry-run"], "--dry-run writes none"),
        (["--report", "no/such/folder/r.html"], "does not exist"),
        (["--report", "m.onnx"], "m.onnx"),
        (["--report", "r", "--json", "r"], "two outputs"),
    ],
)
def test_what_cannot_be_written_is_refused_first(
    arguments: list[str], complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m.onnx").write_bytes((DATA / "digits_vit.onnx").read_bytes())
    done = CliRunner().invoke(main, ["prune", "m.onnx", "--ratio", "0.5", *arguments])
    assert done.exit_code == 2
    assert complaint in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_nothing_half_written_is_left(digits: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "r.html"
    target.write_text("before")

    def full(self: Path, *_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(snpc.UserError, match="No space left"):
        snpc.write_report(digits.result, target)
    assert target.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["r.html"]


# -- tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["topk:2@1-3", "merge:2@1-3", "fuse:0.6@2", "guided:3@1+topk:2@3"])
def test_patches_that_are_left_are_shown(spec: str, tmp_path: Path) -> None:
    model = snpc.load(DATA / "digits_vit.onnx")
    calibration = snpc.load_calibration(str(DATA / "calib.npz"), model.inputs, samples=8)
    reduced = snpc.reduce_tokens(snpc.analyze(model), spec)
    result = snpc.apply(
        snpc.PruningPlan(snpc.SlicePlan(reduced, "none", {}, {}), calibration=calibration), tmp_path / "out.onnx"
    )
    report = snpc.write_report(result, tmp_path / "page.html", calibration=calibration)
    assert reduced.reduction is not None
    steps = reduced.reduction.to_json()["steps"]
    leading = reduced.tokens.points[0].leading
    shown = Parsed((tmp_path / "page.html").read_text())
    pictures = report.token_maps.pictures
    assert pictures and not report.token_maps.reason
    for picture in pictures:
        assert [(s.block, s.tokens_left) for s in picture.stages] == [(s["block"], s["after"]) for s in steps]
        before = np.ones(np.shape(picture.stages[0].shares))
        for stage in picture.stages:
            shares = np.array(stage.shares)
            assert np.isclose(shares.sum(), stage.tokens_left - leading)  # every token is the patches in it, added up
            assert (shares <= before + 1e-9).all() and (shares < before).any()
            assert picture.shade_dropped_patches(stage).shape == np.shape(picture.pixels)
            before = shares
    said = [text for text in shown.texts if re.fullmatch(r"block \d+: \d+ of \d+", text)]
    assert len(said) == len(pictures) * len(steps)
