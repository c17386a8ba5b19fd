"""Options of the suite, what is slow, and which tests share a process."""

from __future__ import annotations

import gc
import math
import os

# Processes and libraries that each start a thread per core slow each other down many times over; set before numpy and
# torch are imported. Sessions of onnxruntime: see one_thread_per_session.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from snpc.cli.progress import displays
from tests.models import classifiers, dynamic_sizes, exports, families, normalized_decoders

pytest.register_assert_rewrite("tests.oracle", "tests.closed_forms", "tests.command_line")

# One or two exports of each kind of architecture. Tests of the others are marked slow: they find what is particular to
# an exporter or a model, and that seldom breaks alone.
REPRESENTATIVE = frozenset(
    {
        "vit_timm__ts17",  # packed projections
        "vit_timm__dyn20_sdpa",
        "convchain__ts17",
        "mlp__ts17",
        "bert__ts17",  # padding masks
        "bert_class__ts17",
        "gpt2__dyn20",
        "llama__ts17",  # rotary positions, grouped heads
        "t5__ts17",  # cross attention
        "encdec__dyn20",
        "gpt2_cached__ts14",  # caches
        "llama_cached__dyn20",
        "qwen3_cached__ts17",  # norms on the heads of queries and keys
    }
)
EXPORTS = {
    **exports.EXPORTS,
    **families.FAMILIES,
    **classifiers.CLASSIFIERS,
    **classifiers.SENTENCES,
    **dynamic_sizes.DECODERS,
    **dynamic_sizes.CONSTRAINED,
    **normalized_decoders.NORMALIZED_DECODERS,
}
TORCH = Path(__file__).parent / "torch"
PROGRESS = Path(__file__).parent / "cli" / "progress"


@pytest.fixture(autouse=True, scope="session")
def one_thread_per_session() -> Iterator[None]:
    """Sessions that leave the number of threads to onnxruntime take one: there is a test process per core."""
    create = onnxruntime.InferenceSession.__init__

    def create_with_one_thread(
        session: onnxruntime.InferenceSession,
        model: str | bytes | os.PathLike[str],
        options: onnxruntime.SessionOptions | None = None,
        *rest: Any,
        **named: Any,
    ) -> None:
        options = named.pop("sess_options", options) or onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.intra_op_num_threads or 1
        create(session, model, options, *rest, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnxruntime.InferenceSession, "__init__", create_with_one_thread)
        yield


@pytest.fixture(autouse=True)
def no_lines_of_progress(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says on stderr must not depend on how busy the machine is."""
    if PROGRESS not in request.node.path.parents:
        monkeypatch.setattr(displays, "FIRST_LINE", math.inf)
        monkeypatch.setattr(displays, "LINE_INTERVAL", math.inf)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite golden files from what comes out now")
    parser.addoption(
        "--exhaustive", action="store_true", help="cut every group of every export alone, not one of each kind"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        export = export_of(item)
        if export is not None and export not in REPRESENTATIVE:
            item.add_marker(pytest.mark.slow)
        if TORCH in item.path.parents:
            item.add_marker(pytest.mark.torch)
        # With --dist loadgroup a process analyzes an export once for the tests of all files; other tests stay together
        # with those of their file, whose fixtures they share.
        item.add_marker(pytest.mark.xdist_group(export or str(item.path)))


def pytest_collection_finish() -> None:
    """Modules and collected tests stay until the end: the garbage collector need not go through them again and again.
    It took a quarter of the suite's time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def export_of(item: pytest.Item) -> str | None:
    """The export that a test is for, if it is a parameter."""
    call = getattr(item, "callspec", None)
    names = [value for value in call.params.values() if isinstance(value, str)] if call else []
    return next((name for name in names if name in EXPORTS), None)
