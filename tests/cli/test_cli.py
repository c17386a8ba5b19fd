"""The command line as users have it: every flag does what it says, and the JSON report is an interface."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

import snpc
import snpc.cli
from snpc.cli import COMMAND_PLACES
from tests.command_line import CALIB, COMMANDS, DATA, VIT, Array, Report, arrays, command, invoke, reported, write_tiny
from tests.models.exports import EXPORTS, export, load_feeds


@functools.cache
def dry(*arguments: object, model: Path = VIT) -> Report:
    """The groups that a prune would keep, by id."""
    report = reported("prune", model, "--dry-run", *arguments)
    assert report["dry_run"] is True
    return {g["id"]: g for g in report["groups"]}


def kept(groups: Report, role: str) -> list[int]:
    return [g["kept"] for g in groups.values() if g["role"] == role]


def share_removed(groups: Report, role: str) -> float:
    of_role = [g for g in groups.values() if g["role"] == role]
    removed = 1 - sum(g["blocks"] * g["kept"] for g in of_role) / sum(g["blocks"] * g["size"] for g in of_role)
    return float(removed)


def run(model: Path | bytes, feeds: dict[str, Array]) -> list[Array]:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    source = model if isinstance(model, bytes) else str(model)
    session = ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {i.name: feeds[i.name] for i in session.get_inputs()}))


def masked(original: Path, report: Report) -> bytes:
    """The original file with everything that is in no ``keep`` set to zero, made with onnx and numpy alone."""
    model = onnx.load(original)
    tensors = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value":
            tensors[node.output[0]] = node.attribute[0].t
    for site in (s for g in report["groups"] for s in g["sites"]):
        tensor = tensors[site["tensor"]]
        array = numpy_helper.to_array(tensor).copy()
        gone = np.setdiff1d(np.arange(array.shape[site["axis"]]), site["keep"])
        np.moveaxis(array, site["axis"], 0)[gone] = 0
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    return bytes(model.SerializeToString())


@pytest.fixture
def vit(tmp_path: Path) -> Path:
    """A copy of the shipped model that a test may write beside."""
    path = tmp_path / "vit.onnx"
    path.write_bytes(VIT.read_bytes())
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_tiny(tmp_path / "tiny.onnx")


@pytest.fixture(scope="module")
def third(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """The example pruned with its own data: 0.3 of the units, scored by snp."""
    path = tmp_path_factory.mktemp("third") / "third.onnx"
    return path, reported("prune", VIT, "--ratio", 0.3, "--criterion", "snp", "--calib", CALIB, "-o", path)


# -- the report is an interface --------------------------------------------------------------------------------------


class TestReport:
    def test_before_and_after(self, third: tuple[Path, Report]) -> None:
        path, report = third
        for key in ("params", "macs", "bytes"):
            assert set(report[key]) == {"before", "after"}
            dead = 0.178 if key == "macs" else 0.0  # rows of the last layer but the class token's
            assert 0.6 < report[key]["after"] / report[key]["before"] / (1 - dead) < 0.8, key
        assert report["bytes"] == {"before": VIT.stat().st_size, "after": path.stat().st_size}
        for file, count in ((VIT, report["params"]["before"]), (path, report["params"]["after"])):
            floats = sum(a.size for a in arrays(file).values() if a.dtype == np.float32)
            assert abs(count - floats) < 100  # scalars may lie in Constant nodes

    def test_macs_are_those_of_the_matrices(self, third: tuple[Path, Report]) -> None:
        _, report = third
        tokens, width, heads, size, ffn, layers = 17, 96, 4, 24, 384, 4
        layer = tokens * width * (4 * width + 2 * ffn) + 2 * heads * tokens * tokens * size
        assert report["macs_at"] == {"batch": 1}
        assert report["macs"]["before"] == layers * layer + 16 * 4 * width + 10 * width

    def test_groups(self, third: tuple[Path, Report]) -> None:
        path, report = third
        assert {g["role"] for g in report["groups"]} == {"qk", "vo", "ffn", "head", "residual"}
        before, after = arrays(VIT), arrays(path)
        for group in report["groups"]:
            assert set(group) >= {"id", "role", "blocks", "size", "kept", "sites"}
            if group["role"] in ("head", "residual"):
                assert group["kept"] == group["size"]
                continue
            assert 0 < group["kept"] < group["size"]
            for site in group["sites"]:
                assert set(site) == {"tensor", "axis", "keep"}
                length = before[site["tensor"]].shape[site["axis"]]
                assert site["keep"] == sorted(set(site["keep"]))
                assert 0 <= site["keep"][0] <= site["keep"][-1] < length
            if group["role"] == "ffn":
                assert {len(s["keep"]) for s in group["sites"]} == {group["kept"]}
                for site in group["sites"]:
                    expected = np.take(before[site["tensor"]], site["keep"], site["axis"])
                    np.testing.assert_array_equal(after[site["tensor"]], expected)

    def test_pins(self, third: tuple[Path, Report]) -> None:
        _, report = third
        assert report["pins"]
        for pin in report["pins"]:
            assert pin["tensor"]
            assert pin["axis"] >= 0
            assert pin["reason"]
        assert any("output" in pin["reason"] and pin["tensor"] == "logits" for pin in report["pins"])

    def test_verify(self, third: tuple[Path, Report]) -> None:
        _, report = third
        verification = report["verify"]
        assert 0 <= verification["max_abs_diff"] < 1e-4
        assert re.search(r"sliced against masked on 8 held-out samples of .*calib\.npz", verification["compared"])
        (drift,) = verification["quality"]["differences"]
        assert drift["output"] == "logits"
        assert 0 < drift["relative"] < 1
        assert 0.5 < drift["agreement"] <= 1

    def test_drift_is_what_onnxruntime_says(self, third: tuple[Path, Report]) -> None:
        path, report = third
        held_out = snpc.load_calibration(CALIB, snpc.load(VIT).inputs).held_out
        assert held_out is not None
        shares = []
        for feeds in held_out.batches():
            (a,), (b,) = run(VIT, feeds), run(path, feeds)
            shares.append(np.sqrt(np.mean((a - b) ** 2.0) / np.mean(a**2.0)))
        np.testing.assert_allclose(
            report["verify"]["quality"]["differences"][0]["relative"], np.mean(shares), rtol=1e-3
        )

    def test_seconds(self, third: tuple[Path, Report]) -> None:
        _, report = third
        seconds = report["seconds"]
        assert {"analyze", "calibration", "rewrite", "write", "verify"} <= set(seconds)
        assert any("score" in stage for stage in seconds)
        assert any("plan" in stage for stage in seconds)
        assert all(0 <= s < 600 for s in seconds.values())
        assert sum(seconds.values()) > 0.05

    def test_says_what_was_asked(self, third: tuple[Path, Report]) -> None:
        path, report = third
        assert (report["criterion"], report["options"]["ratio"]) == ("snp", 0.3)
        assert (report["model"], report["output"]) == (str(VIT), str(path))
        assert report["calibration"]["text"].startswith("128 of 256 samples from")
        assert onnx.load(path).producer_name == "snpc"

    def test_ratio_is_the_share_of_units(self, third: tuple[Path, Report]) -> None:
        groups = {g["id"]: g for g in third[1]["groups"]}
        for role in ("qk", "vo", "ffn"):
            assert 0.28 < share_removed(groups, role) <= 0.3, role

    def test_better_than_chance_after_a_third_is_gone(self, third: tuple[Path, Report]) -> None:
        with np.load(DATA / "eval.npz") as data:
            (logits,) = run(third[0], {"image": data["image"]})
            accuracy = float((logits.argmax(1) == data["labels"]).mean())
        assert accuracy > 0.5


MASKED = {
    "vit_timm__ts17": ("--roles", "qk,vo,ffn,head"),
    "vit_hf__dyn20": (),
    "swin_timm__ts17": ("--roles", "qk"),
    "bert__dyn20": ("--roles", "qk,vo,ffn,head"),
    "bert_zero_bias__ts17": (),
    "gpt2__ts17": ("--uniform",),
    "llama__ts17": (),
    "qwen3__dyn20": ("--roles", "vo,ffn"),  # queries and keys are normalized over what stays
    "bart__dyn20": ("--roles", "vo,ffn"),
    "t5__ts17": ("--roles", "qk,vo,ffn,head"),
    "albert__dyn20": ("--roles", "qk,vo,ffn,head"),  # its layers share biases, but not weights, in the file
    "albert__dyn20_sdpa": ("--include", "#2"),
    "llama__dyn23_sdpa_static1": (),  # and its layers the rotary tables
    "mlp__dyn20": ("--roles", "ffn,residual"),
}


@pytest.mark.parametrize("name", MASKED)
def test_keep_are_indices_into_the_original_file(name: str, tmp_path: Path) -> None:
    """Zeroing by hand what the report does not keep gives the same outputs, all unlike the original's."""
    if EXPORTS[name].missing():
        pytest.skip("cannot be exported here")
    source, feeds, path = export(name), load_feeds(name), tmp_path / "pruned.onnx"
    report = reported("prune", source, "--ratio", 0.4, "-o", path, *MASKED[name])
    assert any(g["kept"] < g["size"] for g in report["groups"])
    pairs = zip(run(masked(source, report), feeds), run(path, feeds), run(source, feeds), strict=True)
    for by_hand, pruned, original in pairs:
        np.testing.assert_allclose(pruned, by_hand, rtol=0, atol=1e-4 * max(1.0, float(np.abs(by_hand).max())))
        assert np.abs(pruned - original).max() > 1e-3


# -- choosing --------------------------------------------------------------------------------------------------------


class TestChoosing:
    @pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
    def test_ratio_and_equal_heads(self, ratio: float) -> None:
        groups = dry("--ratio", ratio)
        for role in ("qk", "vo", "ffn"):
            assert ratio - 0.03 < share_removed(groups, role) <= ratio, role
        for group in (g for g in groups.values() if g["role"] in ("qk", "vo")):
            bias = next(s for s in group["sites"] if s["tensor"].endswith("qkv.bias"))
            part = [k for k in bias["keep"] if (k >= 192) == (group["role"] == "vo")]
            heads = np.bincount([k // 24 for k in part])
            assert set(heads[heads > 0]) == {group["kept"]}, group["id"]

    def test_nothing_goes_at_ratio_zero(self) -> None:
        assert all(g["kept"] == g["size"] for g in dry("--ratio", 0).values())

    def test_no_group_disappears(self) -> None:
        assert all(g["kept"] >= 1 for g in dry("--ratio", 0.999).values())

    @pytest.mark.parametrize("roles", ["qk", "vo", "ffn", "qk,ffn", " vo , ffn "])
    def test_roles(self, roles: str) -> None:
        chosen = {r.strip() for r in roles.split(",")}
        groups = dry("--ratio", 0.5, "--roles", roles)
        assert {g["role"] for g in groups.values() if g["kept"] < g["size"]} == chosen

    def test_heads_go_whole(self, tmp_path: Path) -> None:
        path = tmp_path / "heads.onnx"
        report = reported("prune", VIT, "--ratio", 0.25, "--roles", "head", "--uniform", "-o", path)
        heads = [g for g in report["groups"] if g["role"] == "head"]
        assert [g["kept"] for g in heads] == [3, 3, 3, 3]
        for group in heads:
            for site in group["sites"]:
                whole = np.array(site["keep"]).reshape(-1, 24)
                assert (whole[:, 0] % 24 == 0).all()
                np.testing.assert_array_equal(whole, whole[:, :1] + np.arange(24))
        # A packed [96, 3 * 96] weight loses one head of each of the three.
        assert [a.shape for n, a in arrays(path).items() if n.endswith("qkv.bias")] == [(216,)] * 4

    def test_uniform_is_the_same_for_every_layer(self) -> None:
        groups = dry("--ratio", 0.5, "--uniform")
        assert kept(groups, "qk") == kept(groups, "vo") == [12] * 4
        assert kept(groups, "ffn") == [192] * 4

    def test_ranking_is_not(self) -> None:
        groups = dry("--ratio", 0.5)
        assert len(set(kept(groups, "qk"))) > 1
        assert len(set(kept(groups, "ffn"))) > 1

    @pytest.mark.parametrize("flag", ["--round-to", "--align"])
    @pytest.mark.parametrize("uniform", [(), ("--uniform",)])
    def test_widths_are_multiples(self, flag: str, uniform: tuple[str, ...]) -> None:
        groups = dry("--ratio", 0.45, flag, 8, *uniform)
        for role in ("qk", "vo", "ffn"):
            assert all(k % 8 == 0 for k in kept(groups, role)), role
            assert 0 < share_removed(groups, role) <= 0.5

    def test_min_width(self) -> None:
        groups = dry("--ratio", 0.9, "--min-width", 10)
        assert min(kept(groups, "qk")) == 10
        assert min(kept(dry("--ratio", 0.9), "qk")) < 10
        assert set(kept(dry("--ratio", 0.9, "--min-width", 24), "qk")) == {24}

    def test_include_and_exclude(self) -> None:
        def cut(*flags: object) -> set[str]:
            return {name for name, g in dry("--ratio", 0.5, *flags).items() if g["kept"] < g["size"]}

        everything = cut()
        assert cut("--include", r"blocks\.[12]\.") == {n for n in everything if re.search(r"\.[12]\.", n)}
        assert cut("--exclude", "mlp") == {n for n in everything if "mlp" not in n}
        assert cut("--include", "attn", "--exclude", r"blocks\.0\.|vo$") == {
            n for n in everything if "attn" in n and "blocks.0." not in n and not n.endswith("vo")
        }

    def test_criteria_differ(self) -> None:
        calib = ("--calib", CALIB, "--calib-samples", 16)
        found = {
            name: dry("--ratio", 0.5, "--criterion", name, *calib)
            for name in (
                "magnitude",
                "magnitude:norm=l1",
                "random",
                "random:seed=1",
                "activation",
                "snp",
                "snp:terms=1",
            )
        }
        assert len({json.dumps(groups) for groups in found.values()}) == len(found)

    def test_defaults(self) -> None:
        assert dry("--ratio", 0.5) == dry("--ratio", 0.5, "--criterion", "magnitude", "--method", "select")
        calib = ("--calib", CALIB, "--calib-samples", 16)
        assert dry("--ratio", 0.5, "--criterion", "snp", *calib) == dry(
            "--ratio", 0.5, "--criterion", "snp", "--method", "select", *calib
        )
        assert dry("--ratio", 0.5, "--method", "select", *calib) == dry("--ratio", 0.5, "--criterion", "mixed", *calib)
        assert "no calibration data" in invoke("prune", VIT, "--ratio", 0.5, "--dry-run").stderr


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A timm ViT of two layers, 3 heads of 16, and inputs for it."""
    if EXPORTS["vit_timm__ts17"].missing():
        pytest.skip("cannot be exported here")
    data = tmp_path_factory.mktemp("small") / "data.npz"
    np.savez(data, allow_pickle=False, **load_feeds("vit_timm__ts17"))
    return export("vit_timm__ts17"), data


class TestMethod:
    def test_closed_forms_move_outputs_less(self, small: tuple[Path, Path], tmp_path: Path) -> None:
        model, data = small
        flags = ("--ratio", 0.5, "--calib", data, "-o", tmp_path / "out.onnx")
        auto = reported("prune", model, *flags)
        assert {g["role"]: g["form"] for g in auto["groups"] if g["role"] not in ("head", "residual")} == {
            "qk": "scores", "vo": "values", "ffn": "refit"
        }  # fmt: skip
        for group in auto["groups"]:
            for site in group["sites"]:
                assert ("keep" in site) == (group["form"] not in ("scores", "values"))
        assert auto["verify"]["max_abs_diff"] < 1e-4
        select = reported("prune", model, *flags, "--method", "select")
        assert all(g["form"] is None for g in select["groups"])
        drifts = [r["verify"]["quality"]["differences"][0]["relative"] for r in (auto, select)]
        assert drifts[0] < drifts[1] / 2
        for role in ("qk", "vo", "ffn"):
            assert 0.43 < share_removed({g["id"]: g for g in auto["groups"]}, role) <= 0.5

    def test_uniform_and_roles(self, small: tuple[Path, Path]) -> None:
        model, data = small
        flags = ("--ratio", 0.5, "--calib", data, "--uniform", "--roles", "qk,ffn", "--round-to", 8)
        groups = dry(*flags, model=model)
        assert (kept(groups, "qk"), kept(groups, "vo"), kept(groups, "ffn")) == ([8] * 2, [16] * 2, [96] * 2)

    @pytest.mark.parametrize("kind", ["macs", "params"])
    def test_target_is_a_share_of_the_model(self, kind: str, small: tuple[Path, Path], tmp_path: Path) -> None:
        model, data = small
        report = reported("prune", model, "--target", f"{kind}=0.5", "--calib", data, "-o", tmp_path / "out.onnx")
        assert 0.45 < report[kind]["after"] / report[kind]["before"] <= 0.5
        groups = {g["id"]: g for g in report["groups"]}
        assert len({share_removed(groups, role) for role in ("qk", "vo", "ffn")}) > 1

    def test_target_without_data(self, tmp_path: Path) -> None:
        report = reported("prune", VIT, "--target", "params=0.8", "-o", tmp_path / "out.onnx")
        assert 0.75 < report["params"]["after"] / report["params"]["before"] <= 0.8


# -- data and running ------------------------------------------------------------------------------------------------


class TestCalibrating:
    def test_how_many_and_in_what_batches(self, tmp_path: Path) -> None:
        flags = ("--calib", CALIB, "--calib-samples", 20, "--calib-batch", 5, "--roles", "ffn", "--criterion", "snp")
        report = reported("prune", VIT, "--ratio", 0.2, "-o", tmp_path / "out.onnx", *flags)
        assert report["calibration"]["text"] == f"20 of 256 samples from {CALIB}, 5 per batch, 64 others held out"
        assert report["verify"]["compared"] == f"sliced against masked on 10 held-out samples of {CALIB}"

    def test_batch_changes_nothing_but_samples_and_seed_do(self) -> None:
        flags = ("--ratio", 0.5, "--criterion", "snp", "--roles", "qk", "--calib", CALIB)
        eight = dry(*flags, "--calib-samples", 8)
        assert dry(*flags, "--calib-samples", 8, "--calib-batch", 1) == eight
        assert dry(*flags, "--calib-samples", 8, "--seed", 0) == eight
        assert dry(*flags, "--calib-samples", 8, "--seed", 1) != eight
        assert dry(*flags, "--calib-samples", 64) != eight

    def test_the_long_name(self) -> None:
        flags = ("--ratio", 0.5, "--roles", "qk", "--criterion", "snp", "--calib-samples", 8)
        assert dry(*flags, "--calibration-data", CALIB) == dry(*flags, "--calib", CALIB)

    def test_image_flags(self, tmp_path: Path) -> None:
        image = pytest.importorskip("PIL.Image")
        folder = tmp_path / "pictures"
        folder.mkdir()
        rng = np.random.default_rng(0)
        for k in range(4):
            image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / f"{k}.png")

        def drift(*flags: object) -> float:
            report = reported(
                "prune",
                VIT,
                "--ratio",
                0.3,
                "--criterion",
                "magnitude",
                "--roles",
                "ffn",
                "--calib",
                folder,
                "-o",
                tmp_path / "out.onnx",
                *flags,
            )
            assert report["calibration"]["samples"] == 4
            assert report["calibration"]["images"]["mean"] == [float(flags[flags.index("--image-mean") + 1])]
            return float(report["verify"]["quality"]["differences"][0]["relative"])

        plain = drift("--image-mean", "0", "--image-std", "1")
        others = {
            drift("--image-mean", "0.5", "--image-std", "1"),
            drift("--image-size", "8,8", "--image-mean", "0", "--image-std", "0.5", "--image-layout", "nchw"),
        }
        assert len(others - {plain}) == 2


class TestRunning:
    @pytest.mark.parametrize("provider", ["cpu", "CPUExecutionProvider"])
    def test_provider(self, provider: str, tiny: Path) -> None:
        flags = ("--ratio", 0.2, "--provider", provider)
        assert reported("prune", tiny, *flags)["verify"]["max_abs_diff"] < 1e-4

    def test_sizes_of_dynamic_dimensions_set_the_macs(self, tmp_path: Path) -> None:
        source = export("bert__dyn20")
        short, long = (reported("inspect", source, "--dim-param", f"sequence={n}") for n in (8, 16))
        assert (short["macs_at"], long["macs_at"]) == ({"batch": 1, "sequence": 8}, {"batch": 1, "sequence": 16})
        assert 2 * short["macs"] < long["macs"] < 3 * short["macs"]
        flags = ("--ratio", 0.2, "-o", tmp_path / "out.onnx", "--dim-param", "sequence=16", "--dim-param", "batch=2")
        report = reported("prune", source, *flags)
        assert report["macs_at"] == {"batch": 2, "sequence": 16}
        assert report["macs"]["before"] == 2 * long["macs"]


# -- what is written -------------------------------------------------------------------------------------------------


class TestWriting:
    def test_default_name_beside_the_model(self, tiny: Path) -> None:
        invoke("prune", tiny, "--ratio", 0.5)
        assert {p.name for p in tiny.parent.iterdir()} == {"tiny.onnx", "tiny-pruned.onnx"}

    def test_everything_that_is_asked_for(self, tiny: Path) -> None:
        folder = tiny.parent
        result = invoke(
            "prune",
            tiny,
            "--ratio",
            0.5,
            "-o",
            folder / "o.onnx",
            "--plan",
            folder / "p.json",
            "--json",
            folder / "r.json",
        )
        assert {p.name for p in folder.iterdir()} == {"tiny.onnx", "o.onnx", "p.json", "r.json"}
        report = json.loads((folder / "r.json").read_text())
        assert report["output"] == str(folder / "o.onnx")
        assert json.loads((folder / "p.json").read_text())["digest"] == report["digest"]
        for words in (
            "parameters",
            "MACs",
            "bytes on disk",
            "removed: .* of ffn",
            "rewrite: correct",
            "quality: ",
            "drift",
            "seconds:",
        ):
            assert re.search(words, result.stdout), words

    def test_dry_run_writes_no_model(self, tiny: Path) -> None:
        folder = tiny.parent
        result = invoke("prune", tiny, "--ratio", 0.5, "--dry-run", "-o", folder / "o.onnx")
        assert re.search(r"ffn\.0 +ffn +1 x 32 +1 x 16", result.stdout)
        invoke("prune", tiny, "--ratio", 0.5, "--dry-run", "--plan", folder / "p.json", "--json", folder / "r.json")
        assert {p.name for p in folder.iterdir()} == {"tiny.onnx", "p.json", "r.json"}

    def test_dry_run_keeps_what_prune_keeps(self, tiny: Path) -> None:
        report = reported("prune", tiny, "--ratio", 0.5)
        assert {g["id"]: g for g in report["groups"]} == dry("--ratio", 0.5, model=tiny)

    def test_overwrites_its_own_earlier_output(self, tiny: Path) -> None:
        path = tiny.parent / "o.onnx"
        sizes = []
        for ratio in (0.2, 0.6):
            invoke("prune", tiny, "--ratio", ratio, "-o", path)
            sizes.append(path.stat().st_size)
        assert sizes[1] < sizes[0]

    def test_same_bytes_every_time(self, tiny: Path) -> None:
        paths = [tiny.parent / name for name in ("a.onnx", "b.onnx")]
        for path in paths:
            invoke("prune", tiny, "--ratio", 0.4, "-o", path)
        assert paths[0].read_bytes() == paths[1].read_bytes()

    def test_external_weights_stay_external(self, tmp_path: Path) -> None:
        inline, out = write_tiny(tmp_path / "inline.onnx"), tmp_path / "out" / "o.onnx"
        model = write_tiny(tmp_path / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        out.parent.mkdir()
        report = reported("prune", model, "--ratio", 0.4, "-o", out)
        invoke("prune", inline, "--ratio", 0.4)
        (data,) = out.parent.glob("o.onnx.*.data")
        assert set(out.parent.iterdir()) == {out, data}
        assert report["bytes"]["after"] == sum(p.stat().st_size for p in out.parent.iterdir())
        assert report["bytes"]["before"] == model.stat().st_size + (tmp_path / "w.bin").stat().st_size
        onnx.checker.check_model(str(out))
        a, b = arrays(out), arrays(tmp_path / "inline-pruned.onnx")
        assert set(a) == set(b)
        assert all(np.array_equal(a[name], b[name]) for name in a)
        invoke("verify", model, out)

    @pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
    def test_models_that_are_links(self, link: str, tiny: Path, tmp_path: Path) -> None:
        """Caches of models are made of links."""
        folder = tmp_path / "snapshot"
        folder.mkdir()
        getattr(folder / "linked.onnx", link)(tiny)
        invoke("prune", folder / "linked.onnx", "--ratio", 0.5)
        assert {p.name for p in folder.iterdir()} == {"linked.onnx", "linked-pruned.onnx"}

    def test_a_linked_model_with_linked_data(self, tmp_path: Path) -> None:
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
        blobs.mkdir()
        snapshot.mkdir()
        write_tiny(blobs / "m.onnx", save_as_external_data=True, location="w.bin", size_threshold=0)
        for name in ("m.onnx", "w.bin"):
            (snapshot / name).symlink_to(blobs / name)
        invoke("prune", snapshot / "m.onnx", "--ratio", 0.5, "-o", tmp_path / "o.onnx")
        assert len(list(tmp_path.glob("o.onnx.*.data"))) == 1


class TestPlanAndApply:
    @pytest.mark.parametrize("method", [("--criterion", "snp"), ("--method", "auto")], ids=" ".join)
    def test_the_same_weights_as_prune(self, method: tuple[str, ...], small: tuple[Path, Path], tmp_path: Path) -> None:
        model, file = small
        data, flags = ("--calib", file), ("--ratio", 0.5, "--roles", "qk,ffn", "--round-to", 4, *method)
        planned = invoke("plan", model, *flags, *data, "-o", tmp_path / "p.json")
        assert str(tmp_path / "p.json") in planned.stdout
        needed = data if "auto" in method else ()
        applied = reported("apply", model, tmp_path / "p.json", *needed, "-o", tmp_path / "a.onnx")
        target = ("-o", tmp_path / "b.onnx", "--plan", tmp_path / "q.json")
        pruned = reported("prune", model, *flags, *data, *target)
        assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
        assert (tmp_path / "p.json").read_text() == (tmp_path / "q.json").read_text()
        for key in ("groups", "params", "macs", "bytes", "criterion", "options", "digest"):
            assert applied[key] == pruned[key], key

    def test_the_plan_knows_its_data(self, small: tuple[Path, Path], tmp_path: Path) -> None:
        """Of other data, apply says that it makes another model, and verify does not blame the file."""
        model, file = small
        other, plan, pruned = tmp_path / "other.npz", tmp_path / "p.json", tmp_path / "a.onnx"
        with np.load(file) as arrays:
            np.savez(other, **{name: array[::-1] for name, array in arrays.items()})
        invoke("plan", model, "--ratio", 0.5, "--calib", file, "-o", plan)
        assert json.loads(plan.read_text())["calibration"]["samples"] > 0
        same = invoke("apply", model, plan, "--calib", file, "-o", pruned)
        assert "another model" not in same.stderr
        assert "sliced equals masked" in invoke("verify", model, pruned, "--plan", plan, "--data", file).stdout
        found = invoke("verify", model, pruned, "--plan", plan, "--calib", other)
        assert "is not compared: the plan was made with" in found.stdout and str(file) in found.stdout
        fitted = invoke("apply", model, plan, "--calib", other, "-o", tmp_path / "b.onnx")
        assert f"the plan was made with {json.loads(plan.read_text())['calibration']['text']}" in fitted.stderr
        assert (tmp_path / "b.onnx").read_bytes() != pruned.read_bytes()

    def test_default_names(self, tiny: Path) -> None:
        invoke("plan", tiny, "--ratio", 0.5)
        invoke("apply", tiny, tiny.with_name("tiny.plan.json"))
        assert {p.name for p in tiny.parent.iterdir()} == {"tiny.onnx", "tiny.plan.json", "tiny-pruned.onnx"}

    def test_data_of_apply_verifies(self, tiny: Path) -> None:
        data = tiny.with_name("data.npz")
        np.savez(data, x=np.random.default_rng(0).standard_normal((10, 8)).astype(np.float32))
        invoke("plan", tiny, "--ratio", 0.5)
        flags = ("--calib", data, "--calib-samples", 6, "--calib-batch", 2)
        report = reported("apply", tiny, tiny.with_name("tiny.plan.json"), *flags)
        assert report["verify"]["compared"] == f"sliced against masked on 4 held-out samples of {data}"

    def test_an_edited_plan_is_followed(self, tiny: Path) -> None:
        file = tiny.parent / "p.json"
        invoke("plan", tiny, "--ratio", 0.5, "--roles", "ffn", "-o", file)
        plan = json.loads(file.read_text())
        plan["groups"] = plan["groups"][:1]
        plan["groups"][0]["keep"] = [[5, 3, 20]]
        file.write_text(json.dumps(plan))
        report = reported("apply", tiny, file)
        cut = [g for g in report["groups"] if g["kept"] < g["size"]]
        assert [(g["id"], g["kept"]) for g in cut] == [("ffn.0", 3)]
        assert all(s["keep"] == [3, 5, 20] for s in cut[0]["sites"])

    def test_a_plan_that_keeps_everything(self, tiny: Path) -> None:
        invoke("plan", tiny, "--ratio", 0)
        report = reported("apply", tiny, tiny.with_name("tiny.plan.json"))
        assert report["params"]["before"] == report["params"]["after"]
        assert report["verify"]["quality"]["differences"][0]["max_abs_diff"] == 0


# -- the other commands ----------------------------------------------------------------------------------------------


class TestInspect:
    def test_json(self) -> None:
        report = reported("inspect", VIT)
        assert (report["snpc_inspect"], report["model"], report["macs_at"]) == (1, str(VIT), {"batch": 1})
        prunable = [g for g in report["groups"] if g["prunable"] and g["role"] != "residual"]
        assert [(g["role"], g["blocks"], g["size"]) for g in prunable[:3]] == [
            ("qk", 4, 24), ("vo", 4, 24), ("ffn", 1, 384)
        ]  # fmt: skip
        assert {p["reason"] for p in report["pins"]} == {"it is a graph output"}
        assert all(g["pins"] for g in report["groups"] if not g["prunable"])
        assert 0 < sum(g["macs"] for g in prunable if g["role"] == "ffn") < report["macs"]

    def test_text_and_pins(self, tmp_path: Path) -> None:
        text = invoke("inspect", VIT).stdout
        assert "inputs: image float32[batch,1,8,8]" in text and "outputs: logits float32[batch,10]" in text
        assert "the first always stays" in text
        assert re.search(r"blocks\.0\.attn\.qk +qk +0 +4 x 24", text)
        assert re.search("prunable: .*4 qk", text)
        assert re.search(r"rows that no output depends on: 17\.8 %", text)
        assert "select (4 groups): a nonlinear operator between producer and consumer" in text
        assert re.search(r"blocks\.0\.attn +attention +\d+\.\d % +\d+\.\d % +can go", text)
        assert {s["kind"] for s in reported("inspect", VIT)["sublayers"]} == {"attention", "feed-forward"}
        assert "it is a graph output" in text
        assert "graph output" not in invoke("inspect", VIT, "--no-pins").stdout
        invoke("inspect", VIT, "--json", tmp_path / "i.json")
        assert json.loads((tmp_path / "i.json").read_text()) == reported("inspect", VIT)

    def test_curves(self, small: tuple[Path, Path]) -> None:
        model, data = small
        groups = {g["id"]: g for g in reported("inspect", model, "--curves", "--calib", data)["groups"]}
        measured = [g for g in groups.values() if "curve" in g]
        assert {g["role"] for g in measured} == {"qk", "vo", "ffn"}
        for group in measured:
            curve = group["curve"]
            assert len(curve) == group["size"] + 1
            assert curve == sorted(curve, reverse=True)
            assert curve[group["size"] // 2] > 0
        text = invoke("inspect", model, "--curves", "--calib", data).stdout
        assert all(re.search(rf"{re.escape(g['id'])}( +[0-9.]+ %){{4}}", text) for g in measured)
        assert "go together" in invoke("inspect", model, "--curves", code=2).stderr


class TestBench:
    def test_two_files(self, third: tuple[Path, Report], tmp_path: Path) -> None:
        flags = ("--iterations", 3, "--warmup", 1, "--batch", 4, "--threads", 1)
        report = reported("bench", VIT, third[0], *flags)
        assert len(report["timings"]) == 2
        assert len(report["speedups"]) == 1
        assert (report["rounds"], report["warmup"]) == (3, 1)
        assert [s[0] for s in report["shapes"].values()] == [4]
        text = invoke("bench", VIT, third[0], *flags, "--json", tmp_path / "b.json").stdout
        assert "digits_vit" in text and "image [4,1,8,8]" in text
        assert len(json.loads((tmp_path / "b.json").read_text())["timings"]) == 2

    def test_data_and_shapes(self) -> None:
        flags = ("--iterations", 2, "--warmup", 0)
        assert reported("bench", VIT, "--data", CALIB, "--batch", 2, *flags)["feeds"]
        report = reported("bench", VIT, "--input-shapes", "image:3,1,8,8", *flags)
        assert list(report["shapes"].values()) == [[3, 1, 8, 8]]


def test_a_position_table_shorter_than_the_quoted_length(tmp_path: Path) -> None:
    report = reported("prune", export("bert__dyn23_sdpa"), "--ratio", 0.3, "-o", tmp_path / "out.onnx")
    assert report["macs_at"]["sequence"] <= 32


def test_verify_without_a_plan_says_what_it_compared(third: tuple[Path, Report]) -> None:
    report = reported("verify", VIT, third[0], "--data", CALIB)
    assert report["max_abs_diff"] is None
    assert report["compared"] == f"pruned against original on 128 samples of {CALIB}"
    assert report["structure"][0] == "same inputs and outputs"
    assert report["quality"]["differences"][0]["relative"] > 0


def test_example(tmp_path: Path) -> None:
    names = invoke("example", "digits", tmp_path / "here").stdout.split()
    assert [Path(n).name for n in names] == ["digits_vit.onnx", "calib.npz", "eval.npz"]
    assert (tmp_path / "here" / "digits_vit.onnx").read_bytes() == VIT.read_bytes()


def test_criteria_are_listed() -> None:
    text = invoke("criteria").stdout
    for name in ("activation", "magnitude", "mixed", "random", "snp"):
        assert re.search(rf"^{name}: \w", text, re.MULTILINE)
    assert "terms=0" in text


@pytest.mark.parametrize("words", [[], *([name] for name in sorted(COMMANDS))], ids=" ".join)
def test_help(words: list[str]) -> None:
    text = invoke(*words, "-h").stdout
    assert text.startswith("Usage: ")
    assert "--help" in text


def test_every_command_is_in_the_list() -> None:
    """The list names the commands without importing them: what stands in it is what the files define."""
    defined = {
        (path.stem, name)
        for path in (Path(snpc.cli.__file__).parent / "commands").glob("*.py")
        for name in re.findall(r"^def (\w+_command)\(", path.read_text(), re.MULTILINE)
    }
    assert {(place.module, place.function) for place in COMMAND_PLACES.values()} == defined
    assert all(COMMANDS[name].name == name for name in COMMAND_PLACES)
    assert all(place.summary in invoke("-h").stdout.replace("\n" + 16 * " ", " ") for place in COMMAND_PLACES.values())


# -- as a process ----------------------------------------------------------------------------------------------------


class TestProcess:
    def test_json_alone_on_stdout(self, tiny: Path) -> None:
        done = command("prune", tiny.name, "--ratio", "0.3", "--json", "-", cwd=tiny.parent)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["output"] == "tiny-pruned.onnx"
        assert [line.split(":")[1] for line in done.stderr.splitlines()] == [" warning", " plan", " next"]

    def test_a_refusal_is_one_line(self, tmp_path: Path) -> None:
        done = command("prune", tmp_path / "none.onnx", "--ratio", "0.3")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(r"snpc: .*none\.onnx: no such file\n", done.stderr)

    def test_version(self) -> None:
        done = command("--version")
        assert (done.returncode, done.stdout.split()[-1]) == (0, snpc.__version__)


READ_MODELS = ("inspect", "prune", "plan", "apply", "verify", "sweep", "bench", "build", "finetune")


@pytest.mark.parametrize("verb", READ_MODELS)
def test_every_command_that_reads_a_model_takes_sizes(verb: str) -> None:
    flags = {flag for parameter in COMMANDS[verb].params for flag in parameter.opts}
    assert {"--dim-param", "--input-shapes"} <= flags


def test_a_shape_gives_the_sizes_of_its_axes(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.onnx")
    by_name, by_shape = (
        reported("inspect", path, *flags) for flags in (("--dim-param", "n=5"), ("--input-shapes", "x:5,8"))
    )
    assert by_name["macs_at"] == by_shape["macs_at"] == {"n": 5}
    invoke("inspect", path, "--input-shapes", "x:5,9", code=2)
    invoke("inspect", path, "--input-shapes", "x:5,8", "--dim-param", "n=6", code=2)


def test_sizes_that_are_given_are_verified_at(tmp_path: Path) -> None:
    path = write_tiny(tmp_path / "tiny.onnx")
    flags = ("--ratio", 0.5, "-o", tmp_path / "out.onnx", "--input-shapes", "x:5,8")
    assert "random inputs at n=5" in invoke("prune", path, *flags).output
