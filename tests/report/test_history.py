"""How a file was made, in words."""

from __future__ import annotations

from typing import Any

import pytest

from snpc.report import history_text, step_text

PRUNED = {"step": "prune", "target": "macs=0.5"}
TUNED = {"step": "finetune", "steps": "48", "best_step": "48"}
BUILT = {"step": "build", "runtime": "ort", "precision": "int8"}


def test_steps_make_a_sentence() -> None:
    assert history_text([PRUNED, TUNED, BUILT]) == (
        "pruned to 50 % of the MACs, then finetuned for 48 steps, then built for onnxruntime in int8"
    )
    assert history_text([]) == ""


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ({"target": "ratio=0.3"}, "pruned by 30 % of the units"),
        ({"target": "latency=0.6"}, "pruned to 60 % of the latency"),
        ({"target": "latency=12ms"}, "pruned to a latency of 12ms"),
        ({"target": "max_drift=0.1"}, "pruned as far as a drift of 0.1 allows"),
        ({"target": "max_ppl=1.1x"}, "pruned as far as a perplexity of 1.1x allows"),
        ({"target": "max_drop=1.0"}, "pruned as far as a loss of 1.0 points allows"),
        ({"tokens": "merge:2@1"}, "pruned to fewer tokens (merge:2@1)"),
        (
            {"target": "bytes=0.5", "tokens": "topk:0.5@1"},
            "pruned to 50 % of the bytes and to fewer tokens (topk:0.5@1)",
        ),
        ({}, "pruned by hand"),
        ({"target": "macs=nan"}, "pruned to macs=nan"),  # of another program
        ({"step": "finetune", "steps": "1", "best_step": "1"}, "finetuned for 1 step"),
        ({"step": "finetune", "steps": "9", "best_step": "0"}, "finetuned for 9 steps, which did not help"),
        ({"step": "finetune"}, "finetuned"),  # by a loop of the user's own
        ({"step": "build", "runtime": "openvino"}, "built for OpenVINO in fp32"),
        ({"step": "build", "runtime": "later", "precision": "fp4"}, "built for later in fp4"),
        ({"step": "convert", "precision": "q4"}, "converted to q4"),
        ({"step": "dequantize"}, "dequantized"),
        ({"step": "of a later version"}, "of a later version"),
    ],
)
def test_one_step(step: dict[str, Any], words: str) -> None:
    assert history_text([{"step": "prune", **step}]) == words


def test_a_step_says_what_it_was_made_of() -> None:
    text = step_text(
        {**TUNED, "version": "1.0", "source": "half.onnx", "source_sha256": "0123456789abcdef", "loss": "kd"}
    )
    assert text == "finetune by snpc 1.0 from half.onnx: sha256 0123456789ab; loss kd"
    assert step_text({"step": "build", "source": "a.onnx"}) == "build by snpc from a.onnx"
