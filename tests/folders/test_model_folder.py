"""What a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from snpc.errors import UserError
from snpc.folders.model_folder import find_model_folder, main_model, models_with_same_weights
from snpc.folders.output_folder import open_output_folder
from tests.models.folders import GENAI_CONFIG, write_decoder, write_folder
from tests.oracle import analysis_of


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.as_posix() for path in paths]


def test_the_only_model_and_what_goes_with_it(tmp_path: Path) -> None:
    found = find_model_folder(write_folder(tmp_path / "llama"))
    assert found.model == Path("model.onnx") and found.model_path.is_file()
    assert names(found.others) == ["config.json", "tokenizer.json"]
    assert found.forms == ()


def test_other_precisions_of_the_model_are_its_forms(tmp_path: Path) -> None:
    """As transformers.js has them: weights of a form belong to the form."""
    folder = write_folder(tmp_path / "llama", "onnx/model.onnx")
    write_decoder(folder / "onnx" / "model_q4.onnx")
    write_decoder(folder / "onnx" / "model_quantized.onnx", external=False)
    found = find_model_folder(folder)
    assert found.model == Path("onnx/model.onnx")
    assert names(found.forms) == ["onnx/model_q4.onnx", "onnx/model_q4.onnx.data", "onnx/model_quantized.onnx"]
    assert names(found.others) == ["config.json", "tokenizer.json"]


def test_genai_config_names_the_model(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama", "decoder.onnx", {"genai_config.json": GENAI_CONFIG})
    write_decoder(folder / "vision.onnx", external=False)
    found = find_model_folder(folder)
    assert found.model == Path("decoder.onnx")
    assert "vision.onnx" in names(found.others)


@pytest.mark.parametrize("config", ["{", "[]", json.dumps({"model": {"decoder": {"filename": "other.onnx"}}})])
def test_a_config_that_names_no_model_is_refused(config: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "llama")
    (folder / "genai_config.json").write_text(config)
    with pytest.raises(UserError, match="genai_config"):
        find_model_folder(folder)


def test_of_several_models_one_is_named(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "whisper", "encoder_model.onnx")
    write_decoder(folder / "decoder_model.onnx", external=False)
    with pytest.raises(UserError, match=r"decoder_model\.onnx, encoder_model\.onnx: name the one to cut with --file"):
        main_model(folder)
    found = find_model_folder(folder, "encoder_model.onnx")
    assert found.model == Path("encoder_model.onnx")
    assert names(found.others) == ["config.json", "decoder_model.onnx", "tokenizer.json"]
    with pytest.raises(UserError, match=r"has no model encoder\.onnx; it holds decoder_model\.onnx"):
        find_model_folder(folder, "encoder.onnx")


def test_a_pair_with_the_same_weights_is_not_torn(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "t5", "decoder_model.onnx")
    write_decoder(folder / "decoder_with_past_model.onnx")
    onnx.save(onnx.load(analysis_of("gpt2_cached__ts14").model.path), folder / "encoder_model.onnx")
    pair, other = (find_model_folder(folder, name) for name in ("decoder_model.onnx", "encoder_model.onnx"))
    assert names(models_with_same_weights(pair)) == ["decoder_with_past_model.onnx"]
    assert not models_with_same_weights(other)
    with (
        pytest.raises(UserError, match=r"has the same weights as decoder_with_past_model\.onnx"),
        open_output_folder(pair, tmp_path / "out"),
    ):
        pass


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.onnx file"):
        find_model_folder(tmp_path)
