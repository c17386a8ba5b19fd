"""What follows from token ids: it is filled in where data lacks it, and only there."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import snpc
from snpc.errors import UserError
from snpc.runtime.calibration import Calibration, find_ids, find_mask, load_calibration
from snpc.types import TensorSpec
from tests.command_line import invoke
from tests.models.builder_decoders import BuilderDecoder
from tests.models.language import Language

SAMPLES, TOKENS = 6, 5
IDS = np.random.default_rng(0).integers(1, 24, (SAMPLES, TOKENS))


def spec(name: str, dtype: Any, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, np.dtype(dtype), shape)


TOKEN_IDS = spec("input_ids", np.int64, "batch", "tokens")
MASK = spec("attention_mask", np.int64, "batch", "total")
POSITIONS = spec("position_ids", np.int64, "batch", "tokens")
TYPES = spec("token_type_ids", np.int32, "batch", "tokens")
PAST = spec("past_key_values.0.key", np.float16, "batch", 2, "past", 8)
BRANCH = spec("use_cache_branch", np.bool_, 1)
DECODER = (TOKEN_IDS, MASK, POSITIONS, TYPES, PAST, BRANCH)


def as_npz(folder: Path) -> Any:
    np.savez(folder / "ids.npz", input_ids=IDS)
    return folder / "ids.npz"


def as_unnamed(folder: Path) -> Any:
    np.savez(folder / "ids.npz", IDS)
    return folder / "ids.npz"


def as_npy(folder: Path) -> Any:
    np.save(folder / "ids.npy", IDS)
    return folder / "ids.npy"


def as_json(folder: Path) -> Any:
    (folder / "ids.json").write_text(json.dumps([{"input_ids": row[None].tolist()} for row in IDS]))
    return folder / "ids.json"


def as_test_data(folder: Path) -> Any:
    (folder / "test_data_set_0").mkdir()
    tensor = onnx.numpy_helper.from_array(IDS, "input_ids")
    (folder / "test_data_set_0" / "input_0.pb").write_bytes(tensor.SerializeToString())
    return folder


def as_dict(folder: Path) -> Any:
    return {"input_ids": IDS}


def as_single_samples(folder: Path) -> Any:
    return [{"input_ids": row} for row in IDS]


def joined(calibration: Calibration) -> dict[str, np.ndarray]:
    feeds = list(calibration.batches())
    whole = {name: array for name, array in feeds[0].items() if not calibration.has_sample_axis(name)}
    return {**{n: np.concatenate([f[n] for f in feeds]) for n in feeds[0] if n not in whole}, **whole}


@pytest.mark.parametrize("form", [as_npz, as_unnamed, as_npy, as_json, as_test_data, as_dict, as_single_samples])
def test_ids_are_enough_in_every_form(form: Callable[[Path], Any], tmp_path: Path) -> None:
    calibration = load_calibration(form(tmp_path), DECODER, batch=4)
    fed = joined(calibration)
    assert {name: (array.shape, array.dtype) for name, array in fed.items()} == {
        "input_ids": ((SAMPLES, TOKENS), np.dtype(np.int64)),
        "attention_mask": ((SAMPLES, TOKENS), np.dtype(np.int64)),
        "position_ids": ((SAMPLES, TOKENS), np.dtype(np.int64)),
        "token_type_ids": ((SAMPLES, TOKENS), np.dtype(np.int32)),
        "past_key_values.0.key": ((SAMPLES, 2, 0, 8), np.dtype(np.float16)),
        "use_cache_branch": ((1,), np.dtype(np.bool_)),
    }
    np.testing.assert_array_equal(fed["input_ids"], IDS)
    assert (fed["attention_mask"] == 1).all()
    assert (fed["position_ids"] == np.arange(TOKENS)).all()
    assert not fed["token_type_ids"].any()
    assert not fed["use_cache_branch"].any()
    assert calibration.describe().endswith(
        "filled in: attention_mask (ones), position_ids (counted), token_type_ids (zeros), "
        "past_key_values.0.key (empty), use_cache_branch (false)"
    )


def test_positions_are_counted_by_the_given_mask(tmp_path: Path) -> None:
    mask = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    np.savez(tmp_path / "padded.npz", input_ids=IDS[:2], attention_mask=mask)
    calibration = load_calibration(tmp_path / "padded.npz", (TOKEN_IDS, MASK, POSITIONS))
    fed = joined(calibration)
    np.testing.assert_array_equal(fed["attention_mask"], mask)
    np.testing.assert_array_equal(fed["position_ids"], [[0, 0, 0, 1, 2], [0, 1, 2, 2, 2]])
    assert calibration.filled == {"position_ids": "counted"}


def test_given_inputs_are_fed_as_they_are() -> None:
    given = {
        "input_ids": IDS,
        "attention_mask": np.tile([0, 1, 1, 1, 1], (SAMPLES, 1)),
        "position_ids": np.tile([3, 4, 5, 6, 7], (SAMPLES, 1)),
    }
    calibration = load_calibration(given, (TOKEN_IDS, MASK, POSITIONS))
    for name, array in joined(calibration).items():
        np.testing.assert_array_equal(array, given[name])
    assert not calibration.filled


@pytest.mark.parametrize(
    "missing",
    [
        spec("encoder_hidden_states", np.float32, "batch", "length", 8),
        spec("attention_mask", np.float32, "batch", 1, "tokens", "tokens"),
        spec("past_key_values.0.key", np.float32, "batch", 2, 127, 8),
        spec("past_key_values.0.key", np.float32, "batch", 2, "past", "width"),
        spec("past_ids", np.int64, "batch", "tokens", 2),
        spec("position_ids", np.int64, 3, "batch", "tokens"),
        spec("global_attention_mask", np.int64, "batch", "tokens"),
        spec("num_logits_to_keep", np.int64),
    ],
    ids=str,
)
def test_whatever_does_not_follow_from_ids_must_be_given(missing: TensorSpec) -> None:
    with pytest.raises(UserError, match=f"no data for input {missing.name}; it holds input_ids: name arrays"):
        load_calibration({"input_ids": IDS}, (TOKEN_IDS, TYPES, missing))


def test_nothing_is_filled_in_without_ids() -> None:
    with pytest.raises(UserError, match="no data for input input_ids, attention_mask; it holds position_ids"):
        load_calibration({"position_ids": IDS}, (TOKEN_IDS, MASK, POSITIONS))


def test_ids_are_found_by_name_or_because_there_are_no_others() -> None:
    other = spec("labels", np.int64, "batch", "tokens")
    words = spec("words", np.int64, "batch", "tokens")
    decoder_ids = spec("decoder_input_ids", np.int64, "batch", "tokens")
    assert find_ids((other, TOKEN_IDS, MASK)) == TOKEN_IDS
    assert find_ids((decoder_ids, TOKEN_IDS)) == TOKEN_IDS
    assert find_ids((words, MASK, POSITIONS, TYPES)) == words
    assert find_ids((words, other)) is None
    assert find_ids((spec("x", np.float32, "batch", 4),)) is None


def test_of_data_in_memory_a_slice_holds_its_rows_alone() -> None:
    calibration = load_calibration({"input_ids": IDS}, DECODER, batch=2, held_out=0)
    part = calibration.slice(1, 2)
    (rows,) = part.batch_plan[0]
    assert len(rows.part.read.arrays["input_ids"]) == 2  # type: ignore[attr-defined]
    for name, array in list(calibration.batches())[1].items():
        np.testing.assert_array_equal(next(part.batches())[name], array)


def test_parts_of_files_can_be_sent_to_other_processes(tmp_path: Path) -> None:
    calibration = load_calibration(as_npz(tmp_path), DECODER)
    copy = pickle.loads(pickle.dumps(calibration))
    for name, array in joined(calibration).items():
        np.testing.assert_array_equal(joined(copy)[name], array)


def test_a_decoder_with_caches_is_pruned_on_ids_alone(tmp_path: Path) -> None:
    decoder = Language(cached=True)
    onnx.save(decoder.model(), tmp_path / "decoder.onnx")
    np.savez(tmp_path / "ids.npz", input_ids=decoder.sample(24, 8))
    pruned = snpc.prune(tmp_path / "decoder.onnx", tmp_path / "half.onnx", ratio=0.5, calibration=tmp_path / "ids.npz")
    assert pruned.quality.held_out
    assert pruned.after.params < pruned.before.params
    run = invoke("verify", tmp_path / "decoder.onnx", tmp_path / "half.onnx", "--calib", tmp_path / "ids.npz")
    assert (
        "lacks inputs that follow from its ids; filled in: attention_mask (ones), position_ids (counted), "
        "past_key_values.0.key and 1 more (empty)"
    ) in run.stderr


def test_caches_of_a_sliding_window_are_filled_with_room_for_it(tmp_path: Path) -> None:
    path = BuilderDecoder(window=24, rolling=True).write(tmp_path / "decoder.onnx")
    model = snpc.load(path)
    assert {spec.capacity for spec in model.inputs if "past" in spec.name} == {24}
    arrays = joined(load_calibration({"input_ids": IDS}, model.inputs))
    assert arrays["past_key_values.0.key"].shape == (SAMPLES, 2, 24, 32)
    found = snpc.prune(path, tmp_path / "half.onnx", ratio=0.4, calibration={"input_ids": IDS})
    assert found.after.params < found.before.params


def test_a_mask_of_encoder_states_is_as_long_as_they_are() -> None:
    states = spec("encoder_hidden_states", np.float32, "batch", "frames", 4)
    mask = spec("encoder_attention_mask", np.int64, "batch", "frames")
    values = np.zeros((SAMPLES, 9, 4), np.float32)
    given = {"input_ids": IDS, "encoder_hidden_states": values}
    arrays = joined(load_calibration(given, (TOKEN_IDS, mask, states)))
    np.testing.assert_array_equal(arrays["encoder_attention_mask"], np.ones((SAMPLES, 9), np.int64))
    assert find_mask((TOKEN_IDS, mask, MASK)) == MASK, "the decoder's own"
    with pytest.raises(UserError, match="no data for input encoder_attention_mask, encoder_hidden_states"):
        load_calibration({"input_ids": IDS}, (TOKEN_IDS, mask, states))


def test_caches_of_encoder_states_are_empty_beside_the_states() -> None:
    states = spec("encoder_hidden_states", np.float32, "batch", "frames", 4)
    cache = spec("past_key_values.0.cross.key", np.float32, "batch", 2, "frames", 8)
    given = {"input_ids": IDS, "encoder_hidden_states": np.zeros((SAMPLES, 9, 4), np.float32)}
    arrays = joined(load_calibration(given, (TOKEN_IDS, states, cache)))
    assert arrays[cache.name].shape == (SAMPLES, 2, 0, 8)
    with pytest.raises(UserError, match=f"no data for input {cache.name}"):
        load_calibration({"input_ids": IDS}, (TOKEN_IDS, cache))
