"""What a folder holds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from snpc.errors import UserError
from snpc.folders.model_folder import find_model_folder, main_model
from tests.models.decoder_pairs import ENCODER, FIRST, SECOND
from tests.models.folders import GENAI_CONFIG, write_decoder, write_folder, write_other_model, write_pair_folder


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
    write_other_model(folder / "vision.onnx")
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
    write_other_model(folder / "decoder_model.onnx")
    with pytest.raises(UserError, match=r"decoder_model\.onnx, encoder_model\.onnx: name the one to cut with --file"):
        main_model(folder)
    found = find_model_folder(folder, "encoder_model.onnx")
    assert found.model == Path("encoder_model.onnx")
    assert names(found.others) == ["config.json", "decoder_model.onnx", "tokenizer.json"]
    with pytest.raises(UserError, match=r"has no model encoder\.onnx; it holds decoder_model\.onnx"):
        find_model_folder(folder, "encoder.onnx")


def test_decoders_with_the_same_weights_go_together(tmp_path: Path) -> None:
    """Whichever of them is named, the plan is made for the one that takes no caches."""
    folder = write_pair_folder(tmp_path / "bart")
    for name in (FIRST, SECOND):
        found = find_model_folder(folder, name)
        assert (found.model, found.companions, found.part) == (Path(FIRST), (Path(SECOND),), "decoder")
        assert names(found.forms) == ["decoder_with_past_model_q4.onnx"]
        assert names(found.others) == ["config.json", "encoder_model.onnx"]
    whole = find_model_folder(folder)
    assert whole.cut == (Path(ENCODER), Path(FIRST), Path(SECOND)) and whole.part == "decoder"
    assert names(whole.others) == ["config.json"]
    encoder = find_model_folder(folder, "encoder_model.onnx")
    assert (encoder.model, encoder.companions, encoder.part) == (Path("encoder_model.onnx"), (), "encoder")


def test_a_pair_alone_needs_no_name(tmp_path: Path) -> None:
    folder = write_pair_folder(tmp_path / "gpt2", cross=False)
    found = find_model_folder(folder)
    assert (found.model, found.companions, found.part) == (Path(FIRST), (Path(SECOND),), "")
    assert main_model(folder) == folder / FIRST


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no \.onnx file"):
        find_model_folder(tmp_path)
