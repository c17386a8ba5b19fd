"""Finetuning: towards the teacher, the same again, after a kill, and by two processes; the data in an order by seed."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

import snpc  # noqa: E402
import snpc.torch  # noqa: E402
from snpc.cli import main  # noqa: E402
from snpc.cli.tables import print_finetuned  # noqa: E402
from snpc.errors import UserError  # noqa: E402
from snpc.planning import options_of, read_provenance  # noqa: E402
from snpc.runtime.closed_form.stages import residual_values  # noqa: E402
from snpc.torch import Batch, TrainingHooks, TrainingOptions  # noqa: E402
from snpc.torch.training.losses import cross_entropy, kl_divergence, relative_squared_error  # noqa: E402
from snpc.torch.training.sampling import hold_out, sample_ids, shard_batches, shuffle_samples, skip_batches  # noqa: E402
from snpc.torch.training.teacher import mean_squares  # noqa: E402

DATA = Path(snpc.__file__).parent / "data" / "digits"
VIT, CALIB, EVAL = DATA / "digits_vit.onnx", DATA / "calib.npz", DATA / "eval.npz"


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quarter of every width, chosen by magnitude: far from the dense model."""
    return cut(tmp_path_factory.mktemp("pruned") / "quarter.onnx", 0.75)


def cut(target: Path, ratio: float) -> Path:
    scores = snpc.score(snpc.analyze(snpc.load(VIT)), "magnitude")
    snpc.apply(snpc.PruningPlan(snpc.make_slice_plan(scores, snpc.Budget(ratio=ratio))), target)
    return target


def data(samples: int = 64, batch: int = 16) -> snpc.Calibration:
    return snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=samples, batch=batch)


def weights_of(path: Path) -> dict[str, np.ndarray]:
    return {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer}


def same_weights(one: Path, other: Path) -> bool:
    a, b = weights_of(one), weights_of(other)
    return a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)


def drift(result: snpc.torch.FinetuneResult) -> tuple[float, float]:
    return result.before.differences[0].relative, result.after.differences[0].relative


# -- data ------------------------------------------------------------------------------------------------------------


def parts(sizes: list[int]) -> list[dict[str, np.ndarray]]:
    """Samples that hold their own number."""
    ends = np.cumsum([0, *sizes])
    return [{"x": np.arange(a, b, dtype=np.float32)[:, None]} for a, b in pairwise(ends)]


def numbered(sizes: list[int], batch: int = 4) -> snpc.Calibration:
    spec = snpc.types.TensorSpec("x", np.dtype(np.float32), ("n", 1))
    return snpc.load_calibration(parts(sizes), (spec,), samples=999, batch=batch, held_out=0)


def fed(found: snpc.Calibration) -> list[list[int]]:
    return [feeds["x"][:, 0].astype(int).tolist() for feeds in found.batches()]


def flat(batches: list[list[int]]) -> list[int]:
    return [number for batch in batches for number in batch]


def test_shuffling_is_a_permutation_that_the_seed_decides() -> None:
    plain = numbered([5, 1, 9, 4])
    orders = [fed(shuffle_samples(plain, (seed, epoch), 4)) for seed, epoch in ((0, 0), (0, 0), (0, 1), (1, 0))]
    assert all(sorted(flat(order)) == list(range(19)) for order in orders)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] and orders[0] != orders[3]
    assert {len(batch) for batch in orders[0]} <= {3, 4}  # nearly equal
    mixed = shuffle_samples(plain, (0, 0), 4)
    assert [ids.tolist() for ids in sample_ids(mixed)] == fed(mixed)
    assert fed(skip_batches(mixed, 2)) == fed(mixed)[2:]


def test_the_order_has_nothing_to_do_with_which_samples_are_taken() -> None:
    """With one seed for both: calibrated samples must not come first, nor be those that are held out."""
    spec = snpc.types.TensorSpec("x", np.dtype(np.float32), ("n", 1))
    taken = snpc.load_calibration(parts([1] * 40), (spec,), samples=20, batch=4, seed=0)
    mine = set(flat(fed(taken)))
    whole = numbered([1] * 40)
    first = flat(fed(shuffle_samples(whole, (0, 0), 4)))[:20]
    _, held = hold_out(whole, 20, seed=0)
    assert 0 < len(mine & set(first)) < 20 and 0 < len(mine & set(flat(fed(held)))) < 20


def test_holding_out_splits_the_data() -> None:
    kept, held = hold_out(numbered([5, 1, 9, 4]), 6, seed=3)
    assert kept.samples == 13 and held.samples == 6
    assert sorted(flat(fed(kept) + fed(held))) == list(range(19))
    with pytest.raises(UserError, match="too few"):
        hold_out(numbered([1]), 1, seed=0)


def test_processes_share_every_batch() -> None:
    whole = shuffle_samples(numbered([5, 1, 9, 4]), (0, 0), 4)
    shares = [shard_batches(whole, rank, 2) for rank in range(2)]
    for batch, one, other in zip(fed(whole), *(fed(found) for found, _ in shares), strict=True):
        assert sorted(one + other) == sorted(batch)
    for (_, a), (_, b), batch in zip(*(zip(fed(f), w, strict=True) for f, w in shares), fed(whole), strict=True):
        assert a + b == pytest.approx(2) and a == pytest.approx(2 * -(-len(batch) // 2) / len(batch))


# -- losses ----------------------------------------------------------------------------------------------------------


def test_masked_entries_have_no_loss() -> None:
    """Minus infinity in both made the loss NaN; in one only it still does."""
    a, b = torch.randn(2, 3, 5, generator=torch.manual_seed(0)), torch.randn(2, 3, 5)
    masked = [torch.cat([x, torch.full((2, 3, 2), -torch.inf)], -1) for x in (a, b)]
    student = masked[0].requires_grad_()
    loss = kl_divergence(student, masked[1], 2.0)
    assert torch.allclose(loss, kl_divergence(a, b, 2.0))
    loss.sum().backward()
    assert student.grad is not None and torch.isfinite(student.grad).all()
    expected = (a - b).square().sum((1, 2)) / 21
    assert torch.allclose(relative_squared_error(masked[0], masked[1], 1.0), expected)
    assert mean_squares({"y": masked[1]})["y"] == pytest.approx(float(b.square().sum() / masked[1].numel()))
    assert not torch.isfinite(relative_squared_error(masked[0], torch.cat([b, b[..., :2]], -1), 1.0)).all()


def test_losses_are_what_their_formulas_say() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 7, generator=generator, dtype=torch.float64).float() for _ in range(2))
    p, q = (b / 3).softmax(-1), (a / 3).softmax(-1)
    assert torch.allclose(kl_divergence(a, b, 3.0), 9 * (p * (p / q).log()).sum(-1).mean(1), atol=1e-5)
    assert torch.allclose(relative_squared_error(a, b, 2.0), (a - b).square().mean((1, 2)) / 2)
    labels = torch.tensor([[0, 1, -1, -100, 6], [1, 1, 1, 1, 1], [-1, -1, -1, -1, -1]])
    expected = [
        -a[0].log_softmax(-1)[[0, 1, 4], [0, 1, 6]].mean(),
        -a[1].log_softmax(-1)[:, 1].mean(),
        torch.tensor(0.0),
    ]
    assert torch.allclose(cross_entropy(a, labels), torch.stack(expected))


@pytest.mark.parametrize(
    "options",
    [{}, {"loss": "mse"}, {"layerwise": True}, {"loss": "ce"}, {"loss": "kd+ce", "ema": 0.9}, {"precision": "bf16"}],
    ids=str,
)
def test_every_loss_comes_closer_to_the_teacher(pruned: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    labels = None
    if "ce" in options.get("loss", ""):  # the teacher's own predictions, for every sample of the source
        images = np.load(CALIB)["image"]
        labels = ort.InferenceSession(VIT).run(None, {"image": images})[0].argmax(-1)
    training = TrainingOptions(steps=12, lr=1e-3, batch=16, **options)
    result = snpc.torch.finetune(pruned, VIT, data(), tmp_path / "t.onnx", training=training, labels=labels)
    assert result is not None
    before, after = drift(result)
    assert result.after.held_out and result.helped
    if training.loss != "ce":
        assert after < 0.9 * before
    assert np.mean(result.trained.losses[-3:]) < np.mean(result.trained.losses[:3])
    assert bool(result.hidden) == training.layerwise
    assert snpc.verify(VIT, result.path).quality.differences[0].agreement is not None


def test_training_that_does_not_help_keeps_the_given_weights(tmp_path: Path) -> None:
    """Steps that are far too long: judged on samples that are not trained on, no weights are better than the given."""
    little = cut(tmp_path / "little.onnx", 0.3)
    target = tmp_path / "t.onnx"
    training = TrainingOptions(steps=4, lr=0.5, batch=16)
    result = snpc.torch.finetune(little, VIT, data(), target, training=training)
    assert result is not None and not result.helped and result.trained.best_step == 0
    assert same_weights(little, target)
    assert result.after == result.before and result.after.held_out and result.after.samples == 64
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        print_finetuned(result)
    assert "training did not help: the given weights are kept" in output.getvalue()


def test_few_samples_are_judged_on_themselves(pruned: Path, tmp_path: Path) -> None:
    few = snpc.load_calibration(CALIB, snpc.load(VIT).inputs, samples=12, held_out=0)
    result = snpc.torch.finetune(pruned, VIT, few, tmp_path / "t.onnx", training=TrainingOptions(steps=3, batch=12))
    assert result is not None and not result.after.held_out and "12 samples" in result.after.source


@pytest.mark.parametrize("side", ["inputs", "outputs"])
def test_a_teacher_of_another_model_is_refused_before_training(side: str, pruned: Path, tmp_path: Path) -> None:
    model = onnx.load(VIT)
    if side == "inputs":
        model.graph.input[0].type.tensor_type.shape.dim[2].dim_value = 16
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 16
    else:
        node = next(n for n in model.graph.node if "logits" in n.output)
        model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 9
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(9), "nine"))
        node.output[0] = "all_logits"
        model.graph.node.append(onnx.helper.make_node("Gather", ["all_logits", "nine"], ["logits"], axis=1))
    other = tmp_path / "other.onnx"
    onnx.save(model, other)
    with pytest.raises(
        UserError, match=rf"its {side} are not those of .*other\.onnx: .* against .*the teacher is"
    ) as found:
        snpc.torch.finetune(pruned, other, data(), tmp_path / "t.onnx", training=TrainingOptions(steps=1))
    assert "\n" not in str(found.value) and not (tmp_path / "t.onnx").exists()


def test_hidden_states_are_those_behind_every_layer(pruned: Path) -> None:
    names = residual_values(snpc.analyze(snpc.load(VIT)))
    assert len(names) == 8  # four layers, attention and feed-forward
    images = torch.from_numpy(np.load(CALIB)["image"][:2])
    for path in (VIT, pruned):
        found = snpc.torch.load(path, watch=names)({"image": images})
        assert len({found[name].shape[-1] for name in names}) == 1


# -- the loop --------------------------------------------------------------------------------------------------------


class Line:
    """y = 3 x + 1, in batches of four."""

    steps_per_epoch = 8

    def epoch(self, number: int, first: int) -> Any:
        for k in range(first, self.steps_per_epoch):
            x = torch.randn(4, 1, generator=torch.Generator().manual_seed(100 * number + k))
            yield Batch({"x": x}, {"y": 3 * x + 1})


def gap(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    return (module(batch.feeds["x"]) - batch.targets["y"]).square().mean(1)


def test_the_loop_trains_any_module(tmp_path: Path) -> None:
    heard: list[snpc.torch.TrainingProgress] = []
    module = torch.nn.Linear(1, 1)
    training = TrainingOptions(steps=300, lr=0.1, decay=0.0)
    trained = snpc.torch.train(module, gap, Line(), training, hooks=TrainingHooks(on_progress=heard.append))
    assert module.weight.item() == pytest.approx(3, abs=1e-2) and module.bias.item() == pytest.approx(1, abs=1e-2)
    assert trained.steps == 300 == heard[-1].step and heard[-1].seconds_left == 0 and heard[0].seconds_left > 0
    assert heard[0].lr < max(h.lr for h in heard) == pytest.approx(0.1) and heard[-1].lr < 1e-3


def test_early_stopping_keeps_the_best_weights() -> None:
    module = torch.nn.Linear(1, 1)
    first = module.weight.detach().clone()
    drifts = iter([5.0, 3.0, 4.0, 4.0, 1.0])
    seen = []

    def evaluate(module: torch.nn.Module) -> float:
        seen.append(module.weight.detach().clone())
        return next(drifts)

    trained = snpc.torch.train(
        module, gap, Line(), TrainingOptions(steps=50, early_stop=2, evaluate=5), hooks=TrainingHooks(evaluate=evaluate)
    )
    assert trained.steps == 15 and trained.drift == 3.0
    assert (seen[0] == first).all() and (module.weight == seen[1]).all() and not (seen[3] == seen[1]).all()


def test_a_moving_average_is_written(tmp_path: Path) -> None:
    modules = [torch.nn.Linear(1, 1) for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    for module, ema in zip(modules, (0.0, 0.9), strict=True):
        snpc.torch.train(module, gap, Line(), TrainingOptions(steps=3, lr=0.1, ema=ema))
    assert not torch.equal(modules[0].weight, modules[1].weight)


def test_vectors_do_not_decay_and_gradients_are_clipped() -> None:
    class Nothing(Line):
        def epoch(self, number: int, first: int) -> Any:
            yield from (Batch({"x": torch.zeros(4, 1)}) for _ in range(8))

    module = torch.nn.Linear(1, 1)
    weight, bias = module.weight.item(), module.bias.item()
    still = lambda module, batch: 0.0 * module(batch.feeds["x"])  # noqa: E731
    snpc.torch.train(module, still, Nothing(), TrainingOptions(steps=5, lr=0.1, decay=0.5, warmup=0))
    assert abs(module.weight.item()) < abs(weight) and module.bias.item() == bias
    norms = []
    steep = lambda module, batch: 1e6 * module(batch.feeds["x"] + 1)  # noqa: E731

    class Watching(torch.nn.Linear):
        pass

    module = Watching(1, 1)
    hooked = torch.optim.AdamW.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        norms.append(float(torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm()))
        return hooked(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", step)
        snpc.torch.train(module, steep, Nothing(), TrainingOptions(steps=2, clip=0.25))
    assert norms and all(n == pytest.approx(0.25, rel=1e-3) for n in norms)


def test_a_loss_that_explodes_is_said() -> None:
    with pytest.raises(UserError, match="step 1: the loss is nan"):
        snpc.torch.train(
            torch.nn.Linear(1, 1), lambda m, b: m(b.feeds["x"]) * float("nan"), Line(), TrainingOptions(steps=2)
        )


# -- the same again, after a kill, and shared ------------------------------------------------------------------------


def arguments(pruned: Path, target: Path, *more: object) -> list[str]:
    words = ["finetune", pruned, "--teacher", VIT, "--data", CALIB, "--samples", 64, "--batch", 16, "--steps", 14]
    return [str(w) for w in (*words, "--layerwise", "--ema", 0.8, "-o", target, *more)]


def environment() -> dict[str, str]:
    """As many threads as here: sums are split among them."""
    root, threads = str(Path(snpc.__file__).parents[1]), str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.slow
def test_a_run_that_was_killed_goes_on_to_the_same_weights(pruned: Path, tmp_path: Path, rng: random.Random) -> None:
    whole, resumed, folder = tmp_path / "whole.onnx", tmp_path / "resumed.onnx", tmp_path / "state"
    main(arguments(pruned, whole), standalone_mode=False)
    more = ("--checkpoint", folder, "--checkpoint-every", 3, "--resume")
    words = [sys.executable, "-m", "snpc.cli", *arguments(pruned, resumed, *more)]
    with subprocess.Popen(words, env=environment(), stderr=subprocess.DEVNULL) as victim:
        while not (folder / "checkpoint.pt").is_file():
            assert victim.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        victim.send_signal(signal.SIGKILL)
    assert not resumed.exists() or victim.returncode == 0
    run("snpc.cli", *arguments(pruned, resumed, *more))
    assert same_weights(whole, resumed)
    assert not same_weights(pruned, resumed)


def test_a_checkpoint_of_another_run_is_refused(pruned: Path, tmp_path: Path) -> None:
    saved = snpc.torch.CheckpointOptions(tmp_path / "state", every=1)
    training = TrainingOptions(steps=2, batch=16)
    snpc.torch.finetune(pruned, VIT, data(), tmp_path / "a.onnx", training=training, checkpoints=saved)
    with pytest.raises(UserError, match="--resume, or remove it"):
        snpc.torch.finetune(pruned, VIT, data(), tmp_path / "b.onnx", training=training, checkpoints=saved)
    again = snpc.torch.CheckpointOptions(tmp_path / "state", every=1, resume=True)
    with pytest.raises(UserError, match="other models, data or options"):
        snpc.torch.finetune(
            pruned, VIT, data(), tmp_path / "b.onnx", training=TrainingOptions(steps=3, batch=16), checkpoints=again
        )
    snpc.torch.finetune(pruned, VIT, data(), tmp_path / "b.onnx", training=training, checkpoints=again)
    assert same_weights(tmp_path / "a.onnx", tmp_path / "b.onnx")
    (tmp_path / "state" / "checkpoint.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="not a checkpoint"):
        snpc.torch.finetune(pruned, VIT, data(), tmp_path / "c.onnx", training=training, checkpoints=again)


@pytest.mark.slow
def test_two_processes_do_what_one_does(pruned: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one.onnx", tmp_path / "two.onnx"
    main(arguments(pruned, one, "--batch", 15), standalone_mode=False)
    words = arguments(pruned, two, "--batch", 15)
    run("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "snpc.cli", *words)
    before, a, b = weights_of(pruned), weights_of(one), weights_of(two)
    moved = np.sqrt(sum(((a[k] - before[k]) ** 2).sum() for k in a))
    apart = np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in a))
    assert moved > 0 and apart < 1e-3 * moved


@pytest.mark.slow
def test_processes_that_share_the_weights_do_what_one_does(pruned: Path, tmp_path: Path, rng: random.Random) -> None:
    """With clipping, averages and early stopping; then once more, ended in the middle and taken up again."""
    one, two, again, state = (tmp_path / name for name in ("one.onnx", "two.onnx", "again.onnx", "state"))
    more = ("--early-stop", 9, "--evaluate", 3, "--lr", 1e-3, "--warmup", 2)
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "snpc.cli")
    main(arguments(pruned, one, *more), standalone_mode=False)
    run(*torchrun, *arguments(pruned, two, *more, "--sharded"))
    before, a, b = weights_of(pruned), weights_of(one), weights_of(two)
    moved = np.sqrt(sum(((a[k] - before[k]) ** 2).sum() for k in a))
    apart = np.sqrt(sum(((a[k] - b[k]) ** 2).sum() for k in a))
    assert moved > 0 and apart < 2e-3 * moved  # sums in another order, over all steps
    words = arguments(pruned, again, *more, "--sharded", "--checkpoint", state, "--checkpoint-every", 1, "--resume")
    with subprocess.Popen([sys.executable, "-m", *torchrun, *words], env=environment()) as victim:
        while not (state / "checkpoint.pt").is_file():
            assert victim.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.3))
        victim.terminate()  # ends both processes with it
    held = torch.load(state / "checkpoint.pt", weights_only=True)["weights"]
    assert [tuple(w.shape) for w in held] == [tuple(w.shape) for w in snpc.torch.load(pruned).parameters()]
    run(*torchrun, *words)
    assert same_weights(two, again)


def test_one_process_has_nobody_to_share_weights_with(pruned: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="start several with torchrun"):
        snpc.torch.finetune(pruned, VIT, data(), tmp_path / "t.onnx", training=TrainingOptions(steps=1, sharded=True))
    with pytest.raises(UserError, match="adapters 2: must be 0 with sharded weights"):
        TrainingOptions(adapters=2, sharded=True)


# -- what is asked ---------------------------------------------------------------------------------------------------


EARLY = ("--steps", 40, "--early-stop", 5, "--evaluate", 4, "--lr", 1e-3)


def test_the_report_is_of_the_written_file(pruned: Path, tmp_path: Path) -> None:
    target = tmp_path / "t.onnx"
    done = run("snpc.cli", *arguments(pruned, target, *EARLY, "--json", "-"))
    found = json.loads(done.stdout)
    assert 0 < found["steps"] <= 40 and found["helped"]
    assert found["after"]["differences"][0]["relative"] < found["before"]["differences"][0]["relative"]
    assert found["after"]["held_out"] and found["held_out_drift"] is not None
    assert f"step {found['steps']} of 40: loss" in done.stderr and "left" in done.stderr
    before, after = onnx.load(pruned).graph, onnx.load(target).graph
    assert [n.SerializeToString() for n in before.node] == [n.SerializeToString() for n in after.node]


def test_the_written_file_says_how_it_was_trained(pruned: Path, tmp_path: Path) -> None:
    target, again = tmp_path / "t.onnx", tmp_path / "again.onnx"
    result = snpc.torch.finetune(pruned, VIT, data(), target, training=TrainingOptions(steps=2, layerwise=True))
    assert result is not None
    cut, trained = read_provenance(snpc.load(target).graph)
    assert (cut,) == read_provenance(snpc.load(pruned).graph)
    assert (trained["step"], trained["steps"], trained["loss"]) == ("finetune", str(result.trained.steps), "kd")
    assert trained["best_step"] == str(result.trained.best_step)
    assert trained["source"] == pruned.name and trained["source_sha256"] == snpc.load(pruned).digest
    assert trained["teacher"] == VIT.name and trained["teacher_sha256"] == snpc.load(VIT).digest
    assert options_of(trained) == {"steps": 2, "layerwise": True} and "calib.npz" in trained["calibration"]
    snpc.torch.save(snpc.torch.GraphModule(snpc.load(target)), target, again)
    (*earlier, own) = read_provenance(snpc.load(again).graph)
    assert earlier == [cut, trained] and own["step"] == "finetune" and own["source"] == target.name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0.0}, "lr 0.0: must be more than 0"),
        ({"ema": 1.0}, "ema 1.0"),
        ({"loss": "l1"}, "loss l1: must be one of kd, ce, mse, kd\\+ce"),
        ({"batch": 0}, "batch 0"),
        ({"loss": "ce"}, "give --labels"),
        ({"outputs": ("nothing",)}, "no float output nothing; there is logits"),
    ],
)
def test_what_makes_no_sense_is_refused(pruned: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        snpc.torch.finetune(pruned, VIT, data(), tmp_path / "t.onnx", training=TrainingOptions(**options))
    assert not list(tmp_path.iterdir())


def test_labels_must_fit(pruned: Path, tmp_path: Path) -> None:
    ask = lambda labels: snpc.torch.finetune(  # noqa: E731
        pruned, VIT, data(), tmp_path / "t.onnx", training=TrainingOptions(steps=1, loss="ce"), labels=labels
    )
    with pytest.raises(UserError, match="3 labels for 256 samples"):
        ask(np.arange(3))
    with pytest.raises(UserError, match="whole numbers"):
        ask(np.zeros(256))
    (tmp_path / "l.txt").write_text("1\n2\n")
    with pytest.raises(UserError, match=r"l\.txt: 2 labels"):
        ask(tmp_path / "l.txt")
    with pytest.raises(UserError, match="leave out --labels"):
        snpc.torch.finetune(pruned, VIT, data(), tmp_path / "t.onnx", labels=np.zeros(256, np.int64))


def test_labels_belong_to_their_samples(pruned: Path, tmp_path: Path) -> None:
    """With labels that are what the dense model says of every image, the dense model has next to no loss; with labels
    that are one image off, it has."""
    with np.load(EVAL) as arrays:
        labels = arrays["labels"]
    losses = []
    for given in (labels, np.roll(labels, 1)):
        some = snpc.load_calibration(EVAL, snpc.load(VIT).inputs, samples=100, batch=32)
        result = snpc.torch.finetune(
            pruned,
            VIT,
            some,
            tmp_path / "t.onnx",
            training=TrainingOptions(steps=1, loss="ce", lr=1e-9, batch=99),
            labels=given,
        )
        assert result is not None
        losses.append(result.trained.losses[0])
    assert losses[0] < losses[1]


# -- safetensors -----------------------------------------------------------------------------------------------------


def test_weights_and_widths_are_exported(pruned: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    weights, widths = snpc.torch.export_tensors(pruned, tmp_path / "out")
    found, held = load_file(weights), weights_of(pruned)
    assert found and all((found[name] == held[name]).all() for name in found)
    described = json.loads(widths.read_text())
    by_role = {role: [g for g in described["groups"] if g["role"] == role] for role in ("qk", "vo", "ffn")}
    assert [len(groups) for groups in by_role.values()] == [4, 4, 4]
    for qk, vo in zip(by_role["qk"], by_role["vo"], strict=True):
        packed = next(site for site in qk["sites"] if held[site["tensor"]].ndim == 2)
        width = held[packed["tensor"]].shape[packed["axis"]]
        assert width == 2 * qk["blocks"] * qk["size"] + vo["blocks"] * vo["size"] < 3 * 96
    for group in described["groups"]:
        for site in group["sites"]:
            assert site["tensor"] in held and site["axis"] < held[site["tensor"]].ndim
    assert described["shapes"] == {name: list(array.shape) for name, array in found.items()}


# -- adapters, and new weights ---------------------------------------------------------------------------------------


def test_adapters_change_matrices_by_their_rank_and_nothing_else(pruned: Path, tmp_path: Path) -> None:
    training = TrainingOptions(steps=12, lr=3e-3, batch=16, adapters=2)
    result = snpc.torch.finetune(pruned, VIT, data(), tmp_path / "t.onnx", training=training)
    assert result is not None and result.after.drift < result.before.drift
    before, after = weights_of(pruned), weights_of(tmp_path / "t.onnx")
    changed = {name for name in before if not (before[name] == after[name]).all()}
    assert changed and all(before[name].ndim == 2 for name in changed)
    for name in changed:
        values = np.linalg.svd(after[name].astype(np.float64) - before[name], compute_uv=False)
        assert values[2] < 1e-4 * values[0]  # rank 2, to the rounding of float32


def test_adapters_begin_at_the_weights_and_resume(pruned: Path, tmp_path: Path) -> None:
    still = TrainingOptions(steps=1, lr=1e-12, batch=16, adapters=4)
    snpc.torch.finetune(pruned, VIT, data(), tmp_path / "s.onnx", training=still)
    assert all(np.allclose(a, weights_of(pruned)[k], atol=1e-6) for k, a in weights_of(tmp_path / "s.onnx").items())
    saved = snpc.torch.CheckpointOptions(tmp_path / "state", every=2, resume=True)
    training = TrainingOptions(steps=4, batch=16, adapters=4)
    snpc.torch.finetune(pruned, VIT, data(), tmp_path / "a.onnx", training=training)
    snpc.torch.finetune(pruned, VIT, data(), tmp_path / "b.onnx", training=training, checkpoints=saved)
    snpc.torch.finetune(pruned, VIT, data(), tmp_path / "c.onnx", training=training, checkpoints=saved)
    assert same_weights(tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert same_weights(tmp_path / "a.onnx", tmp_path / "c.onnx")


def test_new_weights_forget_the_old_ones(pruned: Path, tmp_path: Path) -> None:
    steps = {}
    for reinit in ("epochs", "budget"):
        training = TrainingOptions(steps=6, batch=16, lr=1e-3, reinit=reinit)
        result = snpc.torch.finetune(pruned, VIT, data(), tmp_path / "t.onnx", training=training)
        assert result is not None and result.after.drift > result.before.drift
        steps[reinit] = result.trained.steps
    saved = snpc.analyze(snpc.load(VIT)).cost.macs / snpc.analyze(snpc.load(pruned)).cost.macs
    assert steps == {"epochs": 6, "budget": round(6 * saved)}
    before, after = weights_of(pruned), weights_of(tmp_path / "t.onnx")
    for name in ("blocks.0.norm1.weight", "blocks.0.norm1.bias"):
        assert np.abs(after[name] - (1 if "weight" in name else 0)).max() < 0.05
        assert not np.allclose(after[name], before[name], atol=1e-3)
    cosines = [
        abs(float((before[k] * after[k]).sum() / np.linalg.norm(before[k]) / np.linalg.norm(after[k])))
        for k in before
        if before[k].ndim == 2 and before[k].size > 1000
    ]
    assert max(cosines) < 0.2
