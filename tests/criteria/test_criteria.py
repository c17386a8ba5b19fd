"""Criteria against their definitions and against what all of them promise. No number here is an expected score."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import snpc.criteria as registry
from snpc.criteria import Criterion, criteria, describe, make_criterion, needs_data
from snpc.criteria import snp as snp_file
from snpc.criteria.activation import Activation
from snpc.criteria.magnitude import Magnitude
from snpc.criteria.random import Random
from snpc.criteria.snp import Snp, cosine_distances, qk_scores
from snpc.errors import UserError
from snpc.types import ROLES, CriterionInputs, FloatArray, Role

ROOT = Path(__file__).resolve().parents[2]
SPECS = (
    "activation",
    "activation:weighted=false",
    "magnitude",
    "magnitude:norm=l1",
    "magnitude:side=produce",
    "magnitude:side=consume",
    "mixed",
    "random",
    "random:seed=7",
    "fisher",
    "group_fisher",
    "group_fisher:per=macs",
    "group_fisher:per=unit",
    "gum",
    "gum:unique=0.1",
    "lm",
    "lrp",
    "movement",
    "qm",
    "reap",
    "serene",
    "serene:outputs=0",
    "snp",
    "snp:terms=1",
    "snp:terms=1000",
    "snp:average=grams",
    "taylor",
)
KINDS: Mapping[Role, tuple[str, ...]] = {
    "qk": ("query", "key"),
    "vo": ("context", "value"),
    "head": ("context",),
    "experts": ("expert",),
}

# --- a group made of random numbers -----------------------------------------------------------------------------------

Batch = dict[str, FloatArray]


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


def activations(role: Role, blocks: int, size: int, seed: int, samples: int = 5, rows: int = 9) -> Batch:
    """Probe kind -> [samples, blocks, rows, size], of uneven strength and with correlations, as real ones."""
    draw = rng(seed)
    shape = (samples, blocks, rows, size)
    return {
        kind: draw.normal(size=shape) @ draw.normal(size=(blocks, size, size)) * draw.uniform(0.1, 3, (blocks, 1, size))
        for kind in KINDS.get(role, ("hidden",))
    }


def measure(role: Role, values: Batch) -> Batch:
    """What the runtime would measure of these activations."""
    batch: Batch = {}
    for kind, x in values.items():
        batch[f"energy:{kind}"] = np.square(x).sum(axis=2)
        batch[f"tokens:{kind}"] = np.full(len(x), float(x.shape[2]))
        if role != "head":
            batch[f"gram:{kind}"] = np.swapaxes(x, -1, -2) @ x
    if role == "experts":
        norms = np.abs(values["expert"]).sum(axis=2).reshape(len(values["expert"]), -1)
        batch["routed:expert"] = np.stack([norms, np.full(norms.shape, 9.0)], axis=1)
    first = next(iter(values.values()))
    batch["gate:loss"] = first.sum(axis=2)
    batch["gate:weights"] = np.square(first).sum(axis=2)
    batch["gate:relevance"] = first.mean(axis=2)
    batch["gate:sensitivity"] = np.abs(first).mean(axis=2)
    batch["gate:macs"] = batch["gate:memory"] = np.full(len(first), 17.0)
    return batch


def weights(role: Role, units: int, seed: int) -> tuple[Batch, Batch]:
    """produce, consume."""
    draw = rng(seed + 1000)

    def made(*fans: tuple[str, int]) -> Batch:
        return {name: draw.normal(size=(units, fan)) for name, fan in fans}

    if role == "qk":
        return made(("wq", 7), ("wk", 7)), {}
    if role == "head":
        return made(("qk:wq", 14), ("qk:wk", 14), ("vo:wv", 21)), made(("vo:wo", 21))
    if role == "ffn":
        return made(("gate", 7), ("up", 7)), made(("down", 6))
    return made(("a", 7)), made(("b", 6), ("c", 3))


def numbers(
    criterion: Criterion,
    role: Role,
    batches: list[Batch],
    produce: Mapping[str, FloatArray],
    consume: Mapping[str, FloatArray],
    shape: tuple[int, int],
) -> CriterionInputs:
    """Streams the batches through the criterion as the runtime does."""
    sums: Batch = {}
    for batch in batches:
        asked = {name: batch[name] for name in criterion.probes(role) if name in batch}
        tokens = {name: array for name, array in batch.items() if name.startswith("tokens:")}
        for name, array in criterion.observe(role, {**asked, **tokens}).items():
            sums[name] = sums[name] + array if name in sums else array
    samples = sum(len(next(iter(batch.values()))) for batch in batches if batch)
    return CriterionInputs(role, *shape, produce, consume, sums, samples)


def scored(criterion: Criterion, role: Role, blocks: int = 3, size: int = 6, seed: int = 0) -> FloatArray:
    batch = measure(role, activations(role, blocks, size, seed))
    return criterion.score(numbers(criterion, role, [batch], *weights(role, blocks * size, seed), (blocks, size)))


# --- what every criterion promises ------------------------------------------------------------------------------------


def check_follows_units(criterion: Criterion, role: Role, blocks: int, size: int, seed: int) -> None:
    """Blocks reordered, and the units of every block reordered by themselves."""
    outer = rng(seed).permutation(blocks)
    inner = np.stack([rng(seed + 1 + block).permutation(size) for block in range(blocks)])
    rows = (outer[:, None] * size + inner).ravel()
    values = activations(role, blocks, size, seed)
    produce, consume = weights(role, blocks * size, seed)
    index = inner[None, :, None, :]
    moved_values = {kind: np.take_along_axis(x[:, outer], index, axis=3) for kind, x in values.items()}
    moved_weights = [{name: w[rows] for name, w in side.items()} for side in (produce, consume)]
    before = criterion.score(numbers(criterion, role, [measure(role, values)], produce, consume, (blocks, size)))
    after = criterion.score(
        numbers(criterion, role, [measure(role, moved_values)], moved_weights[0], moved_weights[1], (blocks, size))
    )
    np.testing.assert_allclose(after, before.ravel()[rows].reshape(blocks, size), rtol=1e-7, atol=1e-9)


def check_adds_up(criterion: Criterion, role: Role) -> None:
    batch = measure(role, activations(role, 2, 5, seed=3))
    whole = criterion.observe(role, batch)
    parts = [criterion.observe(role, {name: x[cut] for name, x in batch.items()}) for cut in (np.s_[:2], np.s_[2:])]
    assert parts[0].keys() == parts[1].keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(parts[0][name] + parts[1][name], whole[name], rtol=1e-10)


def degenerate(role: Role, blocks: int, size: int) -> Iterator[tuple[list[Batch], Batch, Batch]]:
    values = activations(role, blocks, size, seed=1)
    produce, consume = weights(role, blocks * size, seed=1)
    zeros = {kind: np.zeros_like(x) for kind, x in values.items()}
    blank = [{name: np.zeros_like(w) for name, w in side.items()} for side in (produce, consume)]
    yield [measure(role, zeros)], blank[0], blank[1]
    yield [measure(role, zeros)], produce, consume
    yield [measure(role, values)], blank[0], blank[1]
    yield [measure(role, values)], {}, {}
    yield [measure(role, {kind: x[:, :, :1] for kind, x in values.items()})], produce, consume  # fewer rows than units
    yield [measure(role, {kind: np.ones_like(x) for kind, x in values.items()})], produce, consume
    yield [measure(role, {kind: x * 1e-20 for kind, x in values.items()})], produce, consume
    for kind in values:
        yield [measure(role, {kind: values[kind]})], produce, consume  # the other side is a constant
    yield [], produce, consume
    yield [], {}, {}


def check_finite(criterion: Criterion, role: Role) -> None:
    for blocks, size in ((1, 1), (1, 5), (4, 1), (3, 4)):
        for batches, produce, consume in degenerate(role, blocks, size):
            with np.errstate(all="raise", under="ignore"):
                score = criterion.score(numbers(criterion, role, batches, produce, consume, (blocks, size)))
            assert score.shape == (blocks, size)
            assert score.dtype == np.float64
            assert np.isfinite(score).all()


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", SPECS)
@settings(max_examples=8, deadline=None)
@given(blocks=st.integers(1, 4), size=st.integers(1, 8), seed=st.integers(0, 999))
def test_scores_follow_the_units(spec: str, role: Role, blocks: int, size: int, seed: int) -> None:
    check_follows_units(make_criterion(spec), role, blocks, size, seed)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", SPECS)
def test_sums_of_two_halves_are_the_sums_of_the_whole(spec: str, role: Role) -> None:
    check_adds_up(make_criterion(spec), role)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", SPECS)
def test_degenerate_numbers_give_finite_scores(spec: str, role: Role) -> None:
    check_finite(make_criterion(spec), role)


def test_every_built_in_criterion_is_checked() -> None:
    assert {spec.partition(":")[0] for spec in SPECS} == set(registry._BUILT_IN)


def test_criteria_see_numbers_only() -> None:
    allowed = {"__future__", "collections", "dataclasses", "hashlib", "typing", "numpy", "snpc.types", "snpc.errors"}
    for path in (ROOT / "snpc" / "criteria").glob("[a-z]*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {alias.name.split(".")[0] for alias in node.names} <= allowed, path
            if isinstance(node, ast.ImportFrom):
                module = str(node.module)
                other = module.startswith("snpc.criteria.")  # a criterion may be made of others
                assert other or module in allowed or module.split(".")[0] in allowed, path


# --- SNP, query and key -----------------------------------------------------------------------------------------------


def literal_qk(query: FloatArray, key: FloatArray, terms: int) -> FloatArray:
    """The paper word for word: cosines of flattened N x N matrices."""
    scores = query @ key.T
    u, sigma, vt = np.linalg.svd(scores)
    rank = int((sigma > 1e-9 * sigma[0]).sum())
    omega = np.zeros(query.shape[1])
    for i in range(len(omega)):
        mine = np.outer(query[:, i], key[:, i]).ravel()
        for j in range(min(terms, rank)):
            term = (sigma[j] * np.outer(u[:, j], vt[j])).ravel()
            omega[i] += abs(term @ mine) / (np.linalg.norm(term) * np.linalg.norm(mine))
    return omega


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 9), rows=st.integers(2, 24), terms=st.integers(1, 12), seed=st.integers(0, 9999))
def test_scores_from_grams_are_the_papers_definition(size: int, rows: int, terms: int, seed: int) -> None:
    query, key = rng(seed).normal(size=(2, rows, size)) * rng(seed + 1).uniform(0.1, 10, size=(2, 1, size))
    got = qk_scores(query.T @ query, key.T @ key, terms)
    np.testing.assert_allclose(got, literal_qk(query, key, terms), atol=1e-8)


@pytest.mark.parametrize("terms", [1, 3, 6])
def test_mean_of_scores_over_samples_heads_and_batches(terms: int) -> None:
    values = activations("qk", blocks=2, size=6, seed=4)
    batches = [measure("qk", {kind: x[cut] for kind, x in values.items()}) for cut in (np.s_[:3], np.s_[3:])]
    criterion = Snp(terms=terms)
    got = criterion.score(numbers(criterion, "qk", batches, {}, {}, (2, 6)))
    query, key = values["query"], values["key"]
    literal = [[literal_qk(query[s, h], key[s, h], terms) for h in range(2)] for s in range(len(query))]
    np.testing.assert_allclose(got, np.mean(literal, axis=0), atol=1e-8)


def test_score_of_grams_is_the_score_of_all_rows_stacked() -> None:
    values = activations("qk", blocks=2, size=6, seed=5)
    batches = [measure("qk", {kind: x[cut] for kind, x in values.items()}) for cut in (np.s_[:1], np.s_[1:])]
    criterion = Snp(terms=3, average="grams")
    got = criterion.score(numbers(criterion, "qk", batches, {}, {}, (2, 6)))
    query, key = (np.concatenate(list(values[kind]), axis=1) for kind in ("query", "key"))
    np.testing.assert_allclose(got, [literal_qk(query[h], key[h], 3) for h in range(2)], atol=1e-8)


def test_a_column_far_smaller_than_the_others_keeps_its_score() -> None:
    query, key = rng(6).normal(size=(2, 20, 5))
    query[:, 2] *= 1e-7
    np.testing.assert_allclose(qk_scores(query.T @ query, key.T @ key, 2), literal_qk(query, key, 2), atol=1e-7)


@pytest.mark.parametrize("seed", range(8))
def test_units_that_cancel_each_other_are_like_no_term(seed: int) -> None:
    """q1 k1^T + q2 k2^T = 0: past the rank of S a singular pair is any pair, perhaps q1 and k1, and must not count."""
    a, b, c, d = np.linalg.qr(rng(seed).normal(size=(12, 4)))[0].T
    query, key = np.stack([a, a, b, d], axis=1), np.stack([c, -c, b, d], axis=1)
    got = qk_scores(query.T @ query, key.T @ key, 4)
    np.testing.assert_allclose(got[:2], 0.0, atol=1e-10)
    np.testing.assert_allclose(got, literal_qk(query, key, 4), atol=1e-8)


def test_a_constant_query_counts_as_strong_and_uncorrelated_in_all_units() -> None:
    key = activations("qk", blocks=1, size=5, seed=7)["key"]
    criterion = Snp(terms=2)
    got = criterion.score(numbers(criterion, "qk", [measure("qk", {"key": key})], {}, {}, (1, 5)))
    rows = np.zeros((key.shape[2], 5))
    rows[:5] = np.eye(5)
    np.testing.assert_allclose(got[0], np.mean([literal_qk(rows, k[0], 2) for k in key], axis=0), atol=1e-8)


def test_all_terms_cannot_rank_orthogonal_units_and_the_default_does() -> None:
    """Why `terms` is not d by default: with all of them sigma has dropped out of the formula."""
    strengths = np.arange(1.0, 17.0)
    gram = np.diag(strengths)
    np.testing.assert_allclose(qk_scores(gram, gram, 16), np.ones(16))
    batch = {f"gram:{kind}": gram[None, None] for kind in ("query", "key")}
    best = Snp().score(numbers(Snp(), "qk", [batch], {}, {}, (1, 16)))[0]
    np.testing.assert_allclose(best, strengths > 8, atol=1e-12)


@pytest.mark.parametrize(("size", "terms"), [(1, 1), (5, 3), (8, 4), (16, 8), (32, 8)])
def test_default_terms_are_eight_or_half_of_a_narrow_head(size: int, terms: int) -> None:
    np.testing.assert_array_equal(scored(Snp(), "qk", 2, size), scored(Snp(terms=terms), "qk", 2, size))


# --- SNP, weights -----------------------------------------------------------------------------------------------------


def literal_distances(weight: FloatArray) -> FloatArray:
    """The paper as a double loop; zero rows are parallel to everything."""
    omega = np.zeros(len(weight))
    for i, mine in enumerate(weight):
        for other in weight:
            product = np.linalg.norm(mine) * np.linalg.norm(other)
            omega[i] += 1 - abs(mine @ other) / product if product else 0.0
    return omega


@pytest.mark.parametrize("chunk", [1, 40, 1 << 22])
def test_distances_are_the_double_loop_in_any_chunks(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snp_file, "_CHUNK", chunk)
    weight = rng(8).normal(size=(13, 4))
    weight[3] = 0.0
    np.testing.assert_allclose(cosine_distances(weight), literal_distances(weight), atol=1e-10)


def test_value_scores_compare_all_heads_of_the_layer() -> None:
    produce, consume = weights("vo", 12, seed=9)
    got = Snp().score(numbers(Snp(), "vo", [], produce, consume, (3, 4)))
    np.testing.assert_allclose(got.ravel(), literal_distances(produce["a"]), atol=1e-10)


def test_gated_ffn_adds_both_weights() -> None:
    produce, consume = weights("ffn", 8, seed=10)
    got = Snp().score(numbers(Snp(), "ffn", [], produce, consume, (1, 8)))
    want = literal_distances(produce["gate"]) + literal_distances(produce["up"])
    np.testing.assert_allclose(got.ravel(), want, atol=1e-10)


def test_residual_averages_the_shares_of_its_producers() -> None:
    produce = {f"w{i}": rng(i).normal(size=(6, 5)) * 10.0**i for i in range(3)}
    got = Snp().score(numbers(Snp(), "residual", [], produce, {}, (1, 6)))
    omegas = [literal_distances(weight) for weight in produce.values()]
    np.testing.assert_allclose(got.ravel(), np.mean([omega / omega.sum() for omega in omegas], axis=0), atol=1e-12)
    assert got.sum() == pytest.approx(1.0)


def test_heads_are_compared_by_their_value_weights() -> None:
    produce, consume = weights("head", 4, seed=11)
    got = Snp().score(numbers(Snp(), "head", [], produce, consume, (1, 4)))
    np.testing.assert_allclose(got.ravel(), literal_distances(produce["vo:wv"]), atol=1e-10)


@pytest.mark.parametrize("role", ["qk", "vo", "ffn", "head"])
def test_without_data_and_producers_snp_compares_what_reads_the_units(role: Role) -> None:
    reader = rng(12).normal(size=(6, 4))
    got = Snp().score(numbers(Snp(), role, [], {}, {"vo:reader": reader}, (1, 6)))
    np.testing.assert_allclose(got.ravel(), literal_distances(reader), atol=1e-10)


@pytest.mark.parametrize("role", ["vo", "ffn", "conv", "residual", "other", "head"])
def test_a_duplicated_unit_scores_below_every_unique_one(role: Role) -> None:
    """Orthogonal units but for one pair: both of it are redundant, in either sign and at any length."""
    weight = np.eye(8)[:6] * rng(13).uniform(0.5, 2, size=(6, 1))
    weight[4] = -3.0 * weight[1]
    shape = (1, 6) if role == "head" else (2, 3)
    got = Snp().score(numbers(Snp(), role, [], {"vo:w": weight}, {}, shape)).ravel()
    assert max(got[1], got[4]) < np.delete(got, [1, 4]).min()


# --- the others -------------------------------------------------------------------------------------------------------


def test_magnitude_is_the_norm_of_all_the_units_rows() -> None:
    produce, consume = weights("vo", 6, seed=14)
    sides = {"produce": [produce["a"]], "consume": [consume["b"], consume["c"]]}
    sides["both"] = sides["produce"] + sides["consume"]
    for side, rows in sides.items():
        every = np.concatenate(rows, axis=1)
        for norm, order in (("l1", 1), ("l2", 2)):
            criterion = make_criterion(f"magnitude:norm={norm},side={side}")
            got = criterion.score(numbers(criterion, "vo", [], produce, consume, (2, 3)))
            np.testing.assert_allclose(got.ravel(), np.linalg.norm(every, ord=order, axis=1))


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_a_heads_tensors_compare_whatever_their_size(norm: str) -> None:
    """A tensor repeated along its fan says nothing new about the head."""
    produce, consume = weights("head", 4, seed=15)
    criterion = make_criterion(f"magnitude:norm={norm}")
    wide = {**produce, "qk:wq": np.tile(produce["qk:wq"], (1, 5))}
    scores = [criterion.score(numbers(criterion, "head", [], made, consume, (1, 4))) for made in (produce, wide)]
    np.testing.assert_allclose(scores[0], scores[1])


@pytest.mark.parametrize(("side", "given"), [("consume", "produce"), ("produce", "consume")])
def test_magnitude_takes_the_other_side_where_its_own_has_no_weights(side: str, given: str) -> None:
    weight = rng(16).normal(size=(4, 3))
    sides = {"produce": {}, "consume": {}, given: {"w": weight}}
    criterion = make_criterion(f"magnitude:side={side}")
    got = criterion.score(numbers(criterion, "qk", [], sides["produce"], sides["consume"], (1, 4)))
    np.testing.assert_allclose(got[0], np.linalg.norm(weight, axis=1))


def test_activation_is_the_mean_square_times_the_readers_square() -> None:
    values = activations("vo", blocks=2, size=3, seed=17)
    produce, consume = weights("vo", 6, seed=17)
    mean = np.square(values["context"]).mean(axis=(0, 2))
    reads = np.square(np.concatenate(list(consume.values()), axis=1)).sum(axis=1).reshape(2, 3)
    for criterion, want in ((Activation(), mean * reads), (Activation(weighted=False), mean)):
        got = criterion.score(numbers(criterion, "vo", [measure("vo", values)], produce, consume, (2, 3)))
        np.testing.assert_allclose(got, want)


def test_activation_of_qk_is_the_root_of_both_energies() -> None:
    values = activations("qk", blocks=2, size=3, seed=18)
    got = Activation().score(numbers(Activation(), "qk", [measure("qk", values)], {}, {}, (2, 3)))
    means = [np.square(values[kind]).mean(axis=(0, 2)) for kind in ("query", "key")]
    np.testing.assert_allclose(got, np.sqrt(means[0] * means[1]))


def test_activation_weighs_samples_by_their_rows() -> None:
    """A long text counts by its tokens: two samples of 3 and 9 rows are 12 rows."""
    x = rng(19).normal(size=(1, 1, 12, 4))
    batches = [measure("ffn", {"hidden": x[:, :, cut]}) for cut in (np.s_[:3], np.s_[3:])]
    got = Activation().score(numbers(Activation(), "ffn", batches, {}, {}, (1, 4)))
    np.testing.assert_allclose(got, np.square(x).mean(axis=(0, 2)))


def test_without_row_counts_activation_still_ranks_the_same() -> None:
    batch = measure("ffn", activations("ffn", 1, 5, seed=20))
    bare = {name: x for name, x in batch.items() if not name.startswith("tokens:")}
    scores = [Activation().score(numbers(Activation(), "ffn", [b], {}, {}, (1, 5))) for b in (batch, bare)]
    np.testing.assert_array_equal(np.argsort(scores[0]), np.argsort(scores[1]))


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("spec", ["magnitude", "magnitude:norm=l1", "activation", "activation:weighted=false", "snp"])
def test_a_dead_unit_scores_lowest(spec: str, role: Role) -> None:
    blocks, size, dead = 1, 6, 4
    values = activations(role, blocks, size, seed=21)
    produce, consume = weights(role, blocks * size, seed=21)
    for x in values.values():
        x[..., dead] = 0.0
    for weight in [*produce.values(), *consume.values()]:
        weight[dead] = 0.0
    criterion = make_criterion(spec)
    got = criterion.score(numbers(criterion, role, [measure(role, values)], produce, consume, (blocks, size)))[0]
    assert got[dead] == 0.0
    assert np.delete(got, dead).min() > 0.0


def test_random_is_reproducible_and_unrelated_between_groups_and_seeds() -> None:
    first = scored(Random(), "ffn", 1, 2000)
    np.testing.assert_array_equal(first, scored(Random(), "ffn", 1, 2000))
    for other in (
        scored(Random(seed=1), "ffn", 1, 2000),
        scored(Random(), "ffn", 1, 2000, seed=1),
        scored(Random(), "vo", 1, 2000),
    ):
        assert abs(np.corrcoef(first.ravel(), other.ravel())[0, 1]) < 0.1


def test_random_spreads_evenly_and_tells_equal_units_apart() -> None:
    got = Random().score(numbers(Random(), "ffn", [], {"w": np.zeros((2000, 3))}, {}, (1, 2000))).ravel()
    assert len(set(got)) == len(got)
    assert got.min() >= 0 and got.max() < 1 and abs(got.mean() - 0.5) < 0.05


# --- spelling, refusals, discovery ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "want"),
    [
        ("snp", Snp()),
        ("snp:terms=4", Snp(terms=4)),
        ("snp:terms=4,average=grams", Snp(terms=4, average="grams")),
        ("snp:average=grams, terms=4", Snp(terms=4, average="grams")),
        ("magnitude:norm=l1,side=consume", Magnitude(norm="l1", side="consume")),
        ("activation:weighted=false", Activation(weighted=False)),
        ("random:seed=-3", Random(seed=-3)),
    ],
)
def test_spelling(spec: str, want: Criterion) -> None:
    assert make_criterion(spec) == want


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("lasso", "there is no criterion 'lasso': choose one of activation, fisher, group_fisher, gum"),
        ("magnitud", "there is no criterion 'magnitud' (did you mean magnitude?): choose one of"),
        ("", "there is no criterion '': choose one of activation, fisher, group_fisher, gum"),
        ("snp:", "criterion 'snp:': '' is not key=value: write snp:terms=0"),
        ("snp:4", "criterion 'snp:4': '4' is not key=value: write snp:terms=0"),
        ("snp:gamma=4", "criterion 'snp' has no option 'gamma': it has terms, average"),
        ("snp:name=x", "criterion 'snp' has no option 'name': it has terms, average"),
        ("snp:terms=1,terms=2", "criterion 'snp:terms=1,terms=2' gives 'terms' twice: keep one"),
        ("snp:terms=few", "criterion 'snp': terms=few is not a whole number"),
        ("snp:terms=2.5", "criterion 'snp': terms=2.5 is not a whole number"),
        ("snp:terms=-1", "criterion 'snp': terms=-1 is negative: give a number of terms, or 0 for 8"),
        ("serene:outputs=-1", "criterion 'serene': outputs=-1 is negative: give a number, or 0 for their sum"),
        ("snp:average=mean", "criterion 'snp': average=mean is not one of scores, grams"),
        ("magnitude:norm=l3", "criterion 'magnitude': norm=l3 is not one of l1, l2"),
        ("activation:weighted=1", "criterion 'activation': weighted=1 is not true or false"),
    ],
)
def test_refusals(spec: str, words: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        make_criterion(spec)


def test_help_spells_options_that_parse() -> None:
    described = describe()
    assert [entry.name for entry in described] == sorted(criteria())
    for name, summary, options in described:
        assert summary.endswith(".") and len(summary) < 110
        assert all(text for _, text in options)
        spec = name + (":" + ",".join(option for option, _ in options) if options else "")
        assert make_criterion(spec) == make_criterion(name)


def test_which_criteria_need_data() -> None:
    assert needs_data(Snp(), ["qk", "ffn"])
    assert not needs_data(Snp(), ["vo", "ffn", "conv", "residual", "other", "head"])
    assert not needs_data(Snp(), [])
    assert all(needs_data(Activation(), [role]) for role in ROLES)
    assert not needs_data(Magnitude(), ROLES) and not needs_data(Random(), ROLES)


def offer(monkeypatch: pytest.MonkeyPatch, *offered: tuple[str, str]) -> None:
    """Pretends that installed packages offer these (name, "module:Class")."""
    entries = [metadata.EntryPoint(name, value, registry.ENTRY_POINTS) for name, value in offered]

    def entry_points(*, group: str) -> list[metadata.EntryPoint]:
        return [entry for entry in entries if entry.group == group]

    monkeypatch.setattr(metadata, "entry_points", entry_points)


def test_the_documented_example_works_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    doc = (ROOT / "docs" / "adding-a-criterion.md").read_text()
    (source,) = re.findall(r"```python\n(.*?)```", doc, re.DOTALL)
    (tmp_path / "documented_fluctuation.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    offer(monkeypatch, ("fluctuation", "documented_fluctuation:Fluctuation"))
    assert "fluctuation" in criteria()
    assert ("relative=false", "divide by the mean energy") in next(e for e in describe() if e.name == "fluctuation")[2]
    for spec in ("fluctuation", "fluctuation:relative=true"):
        criterion = make_criterion(spec)
        for role in ROLES:
            check_follows_units(criterion, role, blocks=2, size=5, seed=22)
            check_adds_up(criterion, role)
            check_finite(criterion, role)
    steady = {"energy:hidden": np.stack([[[4.0, 4.0]], [[4.0, 6.0]]])}
    criterion = make_criterion("fluctuation")
    flat, changing = criterion.score(numbers(criterion, "ffn", [steady], {}, {}, (1, 2)))[0]
    assert flat == 0.0 < changing


@pytest.mark.parametrize(
    ("offered", "words"),
    [
        ([("snp", "x:X")], "criterion 'snp' of 'x:X' is also snpc's own"),
        ([("new", "x:X"), ("new", "y:Y")], "criterion 'new' is offered by both 'x:X' and 'y:Y'"),
        ([("new", "no_such_module_of_snpc:X")], "criterion 'new' of 'no_such_module_of_snpc:X' does not load"),
        ([("new", "snpc.criteria.snp:Nothing")], "criterion 'new' of 'snpc.criteria.snp:Nothing' does not load"),
        ([("new", "snpc.criteria.snp:Snp")], "criterion 'new' of 'snpc.criteria.snp:Snp' is not a dataclass"),
        (
            [("new", "snpc.criteria.snp:qk_scores")],
            "criterion 'new' of 'snpc.criteria.snp:qk_scores' is not a",
        ),
    ],
)
def test_refused_packages(offered: list[tuple[str, str]], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, *offered)
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        criteria()
    with pytest.raises(UserError, match=f"^{re.escape(words)}"):
        make_criterion("new")


def test_a_broken_package_does_not_stop_snpcs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    offer(monkeypatch, ("new", "no_such_module_of_snpc:X"))
    assert make_criterion("snp") == Snp()
    with pytest.raises(
        UserError, match=r"choose one of activation, .*, movement, new, qm, random, reap, serene, snp, taylor$"
    ):
        make_criterion("old")
    assert "no_such_module_of_snpc" not in sys.modules
