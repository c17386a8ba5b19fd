"""A model card: the ``README.md`` of a model on the Hugging Face hub, from the JSON report of a pruned model.

The metadata block is what the hub reads (https://huggingface.co/docs/hub/model-cards): ``base_model``,
``base_model_relation``, ``library_name``, ``tags``, ``license``.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, Literal, get_args

from snpc.errors import UserError
from snpc.report.format import format_count, format_share
from snpc.report.history import history_text

REPORT_FORMAT = 1
BaseModelRelation = Literal["finetune", "quantized", "adapter", "merge"]
"""What the hub takes. It has no word for pruning: "finetune" says that weights are other ones."""


@dataclass(frozen=True)
class CardOptions:
    """What a report does not say: ``base_model``, the id of the original on the hub; ``license``, that of the weights;
    each "" where it is left out."""

    base_model: str = ""
    relation: BaseModelRelation = "finetune"
    license: str = ""

    def __post_init__(self) -> None:
        if self.relation not in get_args(BaseModelRelation):
            raise UserError(f"relation {self.relation!r} is not one of {', '.join(get_args(BaseModelRelation))}")


def model_card(report: Mapping[str, Any], options: CardOptions | None = None) -> str:
    """The card as Markdown. ``report``: what ``snpc prune --json`` wrote.

    Raises UserError for anything else.
    """
    if report.get("snpc_report") != REPORT_FORMAT:
        raise UserError(f'not a report ("snpc_report": {REPORT_FORMAT} is missing): `snpc prune --json` writes one')
    try:
        sections = (front_matter(options or CardOptions()), *body(report))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"a report that is not whole ({type(error).__name__}: {error})") from None
    return "\n\n".join(section for section in sections if section) + "\n"


def front_matter(options: CardOptions) -> str:
    """The metadata, as YAML; JSON strings are YAML strings."""
    lines = ["---"]
    if options.license:
        lines.append(f"license: {json.dumps(options.license)}")
    if options.base_model:
        lines += [f"base_model: {json.dumps(options.base_model)}", f"base_model_relation: {options.relation}"]
    lines += ["library_name: onnx", "tags:", *(f"- {tag}" for tag in ("onnx", "pruned", "structured-pruning", "snpc"))]
    return "\n".join([*lines, "---"])


def body(report: Mapping[str, Any]) -> Iterator[str]:
    output, original = PurePath(report["output"]).name, PurePath(report["model"]).name
    macs = report["macs"]
    yield f"# {inline(output)}"
    yield (
        f"This model is {inline(original)} with {format_share(macs['after'], macs['before'])} of its "
        "multiply-accumulate operations (MACs). It was pruned after export: parts of its weights were removed, and the "
        "result is an ordinary ONNX file."
    )
    yield cost_table(report)
    yield quality_section(report)
    yield width_table(report["groups"])
    yield removed_section(report)
    yield method_section(report)
    yield (
        "## How to run it\n\n```python\nimport onnxruntime\n\n"
        f"session = onnxruntime.InferenceSession({json.dumps(output)})\n```"
    )


def cost_table(report: Mapping[str, Any]) -> str:
    names = {"macs": "MACs", "params": "parameters", "bytes": "file, bytes", "cache": "KV cache per token, bytes"}
    numbers = {**report, "cache": report.get("cache_bytes_per_token") or {"before": 0, "after": 0}}
    rows = [(names[key], numbers[key]["before"], numbers[key]["after"]) for key in names if numbers[key]["before"]]
    cells = [(name, format_count(old), format_count(new), format_share(new, old)) for name, old, new in rows]
    return table(("", "original", "this model", "share"), cells)


def quality_section(report: Mapping[str, Any]) -> str:
    quality = report["verify"]["quality"]
    lines = ["## Quality", ""]
    if quality["perplexity"] is not None:
        found = quality["perplexity"]
        lines.append(f"- perplexity: {found['before']:.4g} of the original, {found['after']:.4g} of this model")
    for difference in quality["differences"]:
        if difference["metric"] != "none":
            lines.append(f"- output {inline(difference['output'])}: {difference_text(difference)}")
    if len(lines) == 2:
        return ""
    return "\n".join([*lines, "", f"Compared with the original on {plain(quality['source'])}."])


def difference_text(difference: Mapping[str, Any]) -> str:
    """The change of one output by its metric, and how often the top entry is the same where it has one."""
    name = {"kl": "KL divergence in nats", "cosine": "1 - cosine", "relative": "relative change (RMS)"}
    metric = name.get(difference["metric"], plain(difference["metric"]))
    text = f"{metric} {difference['distance']:.3g}"
    if difference["metric"] == "kl" and difference["agreement"] is not None:
        text += f", same top entry in {100 * difference['agreement']:.1f} %"
    return text


def width_table(groups: list[Mapping[str, Any]]) -> str:
    """What was cut, by layer."""
    cut = [group for group in groups if group["kept"] < group["size"]]
    if not cut:
        return ""
    rows = [
        (inline(g["id"]), g["role"], f"{g['blocks']} x {g['size']}", f"{g['blocks']} x {g['kept']}", g["form"] or "")
        for g in cut
    ]
    return "## Widths\n\n" + table(("group", "role", "original", "this model", "refitted as"), rows)


STANDS = {"nothing": "", "mean": ": its mean stays", "map": ": a small map of its tokens stands in its place"}


def removed_section(report: Mapping[str, Any]) -> str:
    """Layers and tokens that are gone."""
    lines = [f"- layer {inline(layer['name'])} is gone{STANDS[layer['replaced_by']]}" for layer in report["layers"]]
    if report["tokens"] is not None:
        lines.append(f"- tokens get fewer between layers: {inline(report['tokens']['spec'])}")
    return "\n".join(["## Layers and tokens", "", *lines]) if lines else ""


def method_section(report: Mapping[str, Any]) -> str:
    options = {key: value for key, value in report["options"].items() if value not in (None, False)}
    data = report["calibration"]
    lines = [
        f"Pruned with snpc, method {inline(report['method'])}, criterion "
        f"{inline(report['criterion'])}, options {inline(json.dumps(options))}.",
        f"Calibration data: {plain(data['text'])}." if data else "No calibration data was used.",
        history_line(report),
        f"Digest of the original (sha256): {inline(report['digest'])}.",
    ]
    return "## How it was made\n\n" + "\n".join(filter(None, lines))


def history_line(report: Mapping[str, Any]) -> str:
    """What was done before, where pruning was not the only step; reports of older versions do not say it."""
    steps = report.get("provenance", [])
    return f"Step by step, the file was {plain(history_text(steps))}." if len(steps) > 1 else ""


def table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def inline(text: Any) -> str:
    """Text as code, in which nothing is Markdown; ``|`` would end a cell of a table, and a backtick the code."""
    return "`" + plain(text).replace("`", "'").replace("|", "/") + "`"


def plain(text: Any) -> str:
    """In one line."""
    return " ".join(str(text).split())
