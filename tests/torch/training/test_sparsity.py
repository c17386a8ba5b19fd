"""LOBSTER's update against its formula, and the weights that are set to zero."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch")

import snpc  # noqa: E402
import snpc.torch  # noqa: E402
from snpc.errors import UserError  # noqa: E402
from snpc.torch import Batch, TrainingHooks, TrainingOptions  # noqa: E402
from snpc.torch.training.sparsity import Sparsifier, Sparsity, decay_insensitive, kept_zeros  # noqa: E402
from tests.command_line import invoke  # noqa: E402

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB = DATA / "digits_vit.onnx", DATA / "calib.npz"
FEATURES, USED = 40, 4


class Regression(torch.nn.Module):
    """y = x w of ``FEATURES`` features, of which the first ``USED`` count."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(0)
        self.x = torch.randn(256, FEATURES, generator=draw)
        self.y = self.x[:, :USED] @ torch.full((USED, 1), 2.0) + 0.1 * torch.randn(256, 1, generator=draw)
        self.weight = torch.nn.Parameter(torch.randn(FEATURES, 1, generator=draw))
        self.bias = torch.nn.Parameter(torch.ones(1))

    def error(self) -> torch.Tensor:
        return (self.x @ self.weight + self.bias - self.y).square()


class Steps:
    """Batches without content: the module holds its data."""

    steps_per_epoch = 8

    def epoch(self, number: int, first: int) -> Iterator[Batch]:
        yield from (Batch({}) for _ in range(first, self.steps_per_epoch))


def error(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return module.error()


def mean_error(module: torch.nn.Module) -> float:
    return float(module.error().detach().mean())


# -- the update ------------------------------------------------------------------------------------------------------


def test_one_step_is_the_formula() -> None:
    """AdamW's first step is lr g / (|g| + eps); before it a weight shrinks by lr lambda w max(0, 1 - |g|)."""
    module = Regression()
    weight, bias = module.weight.detach().double().numpy().copy(), module.bias.detach().double().numpy().copy()
    x, y = module.x.double().numpy(), module.y.double().numpy()
    residual = x @ weight + bias - y
    gradient, bias_gradient = 2 * x.T @ residual / len(x), 2 * residual.mean()
    assert (np.abs(gradient) > 1).any() and (np.abs(gradient) < 0.5).any()
    training = TrainingOptions(
        steps=1, lr=0.01, decay=7.0, warmup=0, clip=0.0, regularize="lobster", sparsify=1.0, loss="mse"
    )
    snpc.torch.train(module, error, Steps(), training)
    shrunk = weight * (1 - 0.01 * 7.0 * np.maximum(0, 1 - np.abs(gradient)))
    expected = shrunk - 0.01 * gradient / (np.abs(gradient) + 1e-8)
    np.testing.assert_allclose(module.weight.detach().numpy(), expected, rtol=1e-5)
    expected_bias = bias - 0.01 * bias_gradient / (abs(bias_gradient) + 1e-8)  # vectors do not decay
    np.testing.assert_allclose(module.bias.detach().numpy(), expected_bias, rtol=1e-5)


def test_gradients_count_as_they_are_before_clipping() -> None:
    clipped, free = Regression(), Regression()
    for module, clip in ((clipped, 1e-3), (free, 0.0)):
        training = TrainingOptions(steps=1, lr=0.01, decay=7.0, warmup=0, clip=clip, regularize="lobster", sparsify=1.0)
        snpc.torch.train(module, error, Steps(), training)
    # AdamW's first step does not depend on the size of gradients, up to its epsilon
    torch.testing.assert_close(clipped.weight, free.weight, rtol=1e-3, atol=1e-5)


def test_a_weight_that_nothing_reads_decays_in_full() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 2))
    weight.grad = torch.tensor([[0.0, 0.25], [1.0, -3.0]])
    decay_insensitive([weight], 0.1)
    torch.testing.assert_close(weight.detach(), torch.tensor([[0.9, 0.925], [1.0, 1.0]]))


# -- zeros -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.0, 0.01, 0.1, 1.0, 1e9])
def test_the_smallest_weights_go_as_far_as_the_limit(limit: float) -> None:
    """Of 200 weights in two matrices, against every threshold tried in turn."""
    draw = torch.Generator().manual_seed(1)
    module = torch.nn.ParameterList([torch.randn(10, 10, generator=draw) for _ in range(2)] + [torch.ones(5)])
    start = [p.detach().clone() for p in module]

    def loss(module: torch.nn.Module) -> float:
        return sum(float((p.detach() - q).square().sum()) for p, q in zip(module.parameters(), start, strict=True))

    squares = np.sort(np.concatenate([p.square().numpy().ravel() for p in start[:2]]))
    possible = int((np.cumsum(squares) <= limit).sum())
    with torch.no_grad():
        found = Sparsifier(loss, limit)(module)
    zeros, weights = Sparsity.of(module.parameters())
    assert weights == 200 and zeros == possible
    assert found == pytest.approx(loss(module)) and found <= limit
    kept = np.concatenate([p.detach().abs().numpy().ravel() for p in module[:2]])
    assert np.sort(kept[kept > 0] ** 2) == pytest.approx(squares[zeros:])
    assert (module[2] == 1).all()


def test_what_is_zero_stays_zero() -> None:
    module = Regression()
    with torch.no_grad():
        module.weight[::2] = 0
    snpc.torch.train(module, error, Steps(), TrainingOptions(steps=5, lr=0.1, sparsify=1.0))
    assert (module.weight[::2] == 0).all() and (module.weight[1::2] != 0).all()
    with kept_zeros([module.weight]), torch.no_grad():
        module.weight += 1
    assert (module.weight[::2] == 0).all()


def zeros_after(regularize: str, strength: float) -> int:
    """Zeros at a held-out error of at most 1, of weights whose scale the decay alone keeps small."""
    module = Regression()
    training = TrainingOptions(steps=400, lr=0.02, decay=strength, regularize=regularize, sparsify=1.0, evaluate=400)
    sparsifier = Sparsifier(mean_error, 1.0)
    trained = snpc.torch.train(module, error, Steps(), training, hooks=TrainingHooks(sparsifier, keep_best=False))
    zeros, _ = Sparsity.of([module.weight])
    assert trained.best_step == 400 and trained.drift == pytest.approx(mean_error(module))
    return zeros if trained.drift <= 1.0 else 0


def test_lobster_makes_more_zeros_at_the_same_loss_than_decay_of_the_same_strength() -> None:
    found = {kind: zeros_after(kind, 20.0) for kind in ("decay", "lobster")}
    assert found["lobster"] == FEATURES - USED
    assert found["lobster"] > found["decay"]


# -- finetuning ------------------------------------------------------------------------------------------------------


def test_a_file_with_zeros_is_written_within_the_limit(tmp_path: Path) -> None:
    path = tmp_path / "sparse.onnx"
    said = invoke(
        "finetune", VIT, "--teacher", VIT, "--data", CALIB, "--samples", 64, "--steps", 4, "--batch", 16,
        "--regularize", "lobster", "--decay", 1, "--sparsify", 0.05, "-o", path, "--json", tmp_path / "out.json",
    ).output  # fmt: skip
    report = json.loads((tmp_path / "out.json").read_text())
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    zeros = sum(int((a == 0).sum()) for a in arrays if a.ndim > 1 and a.dtype == np.float32)
    assert report["sparsity"]["zeros"] == zeros > 0.2 * report["sparsity"]["weights"]
    assert f"{zeros:,} of " in said
    assert 0 < report["held_out_drift"] <= 0.05 and report["best_step"] == 4
    shapes = {t.name: tuple(t.dims) for t in onnx.load(VIT).graph.initializer}
    assert {t.name: tuple(t.dims) for t in onnx.load(path).graph.initializer} == shapes


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"regularize": "lobster"}, "sparsify 0.0: must be more than 0 for lobster"),
        ({"regularize": "l1"}, "regularize l1: must be one of decay, lobster"),
        ({"sparsify": -1.0}, "sparsify -1.0: must be 0 or more"),
        ({"sparsify": 0.1, "ema": 0.9}, "ema 0.9: must be 0 where weights are sparsified"),
        ({"sparsify": 0.1, "adapters": 2}, "adapters 2: must be 0 where weights are sparsified"),
        ({"sparsify": 0.1, "early_stop": 2}, "early_stop 2: must be 0 where weights are sparsified"),
        ({"sparsify": 0.1, "sharded": True}, "sharded True: must be False where weights are sparsified"),
        ({"sparsify": 0.1, "reinit": "epochs"}, "reinit epochs: must be none where weights are sparsified"),
    ],
)
def test_refusals(options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError) as refusal:
        TrainingOptions(**options)
    assert str(refusal.value) == words


def test_units_are_not_pruned_with_it() -> None:
    training = TrainingOptions(sparsify=0.1)
    with pytest.raises(UserError, match=r"^a schedule prunes whole units: leave out --sparsify"):
        snpc.torch.Rounds("macs=0.5", training=training)
    analysis = snpc.analyze(snpc.load(VIT))
    data = snpc.load_calibration(CALIB, analysis.model.inputs, samples=4)
    with pytest.raises(UserError, match=r"^masks prune whole units"):
        snpc.torch.learn_masks(analysis, data, "vib", snpc.Budget(target="macs=0.5"), training=training)
