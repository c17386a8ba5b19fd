"""How a file was made, in words: the steps of its provenance."""

from __future__ import annotations

import re
from collections.abc import Sequence

from snpc.planning import ProvenanceStep

SHOWN_ENTRIES = ("target", "method", "tokens", "layers", "teacher", "loss", "calibration")  # beside the source
SHARE_WORDS = {
    "macs": "to {} % of the MACs",
    "params": "to {} % of the parameters",
    "bytes": "to {} % of the bytes",
    "latency": "to {} % of the latency",
    "ratio": "by {} % of the units",
}
LIMIT_WORDS = {
    "latency": "to a latency of {}",
    "max_drift": "as far as a drift of {} allows",
    "max_ppl": "as far as a perplexity of {} allows",
    "max_drop": "as far as a loss of {} points allows",
}
RUNTIME_WORDS = {"ort": "onnxruntime", "openvino": "OpenVINO", "trt": "TensorRT", "trt-rtx": "TensorRT for RTX"}


def history_text(steps: Sequence[ProvenanceStep]) -> str:
    """``pruned to 50 % of the MACs, then finetuned for 48 steps``; "" where a file does not say it."""
    return ", then ".join(map(step_words, steps))


def step_words(step: ProvenanceStep) -> str:
    """What one step did; the name of a step that this version does not know."""
    match step["step"]:
        case "prune":
            return f"pruned {pruning_words(step)}"
        case "finetune":
            return f"finetuned{training_words(step)}"
        case "build":
            runtime = step.get("runtime", "")
            return f"built for {RUNTIME_WORDS.get(runtime, runtime)} in {step.get('precision', 'fp32')}"
        case "convert":
            return f"converted to {step.get('precision', 'another precision')}"
        case "dequantize":
            return "dequantized"
        case "restrict":
            return "restricted in what it says"
        case other:
            return other


def pruning_words(step: ProvenanceStep) -> str:
    """How much was asked for: widths, layers and tokens."""
    amount = [amount_words(text) for text in step.get("target", "").split(", ") if text]
    tokens = [f"to fewer tokens ({step['tokens']})"] if "tokens" in step else []
    return " and ".join([*amount, *tokens]) or "by hand"


def amount_words(target: str) -> str:
    """One of the targets in words; as it is where it is none of them."""
    name, _, amount = target.partition("=")
    if name in SHARE_WORDS and is_number(amount):
        return SHARE_WORDS[name].format(f"{100 * float(amount):.4g}")
    return LIMIT_WORDS[name].format(amount) if name in LIMIT_WORDS else f"to {target}"


def is_number(text: str) -> bool:
    return re.fullmatch(r"\d+(\.\d+)?(e-?\d+)?", text) is not None


def training_words(step: ProvenanceStep) -> str:
    steps = f" for {step['steps']} step{'' if step['steps'] == '1' else 's'}" if "steps" in step else ""
    return f"{steps}, which did not help" if step.get("best_step") == "0" else steps


def step_text(step: ProvenanceStep) -> str:
    """One step with the file that it was made of, and what else matters to make it again."""
    snpc = f"snpc {step['version']}" if "version" in step else "snpc"
    made = f"{step['step']} by {snpc} from {step.get('source', 'another file')}"
    digest = step.get("source_sha256", "")
    details = [f"sha256 {digest[:12]}"] if digest else []
    details += [f"{key} {step[key]}" for key in SHOWN_ENTRIES if key in step]
    return f"{made}: {'; '.join(details)}" if details else made
