"""The model that tests of targets build."""

from __future__ import annotations

from pathlib import Path

import pytest

import snpc


@pytest.fixture(scope="package")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example, and ``half.onnx``, half of it."""
    folder = tmp_path_factory.mktemp("digits")
    snpc.write_example("digits", folder)
    decision = snpc.plan(snpc.analyze(snpc.load(folder / "digits_vit.onnx")), snpc.Budget(ratio=0.5))
    snpc.apply(decision, folder / "half.onnx")
    return folder
