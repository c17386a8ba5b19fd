"""A loader of Polygraphy that prunes the model of another loader."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import onnx
from polygraphy.backend.base import BaseLoader
from polygraphy.logger import G_LOGGER
from polygraphy.util import invoke_if_callable

from snpc.errors import UserError
from snpc.pipeline import prune
from snpc.report import format_count, rewrite_text
from snpc.runtime.execution import DEFAULT_EXECUTION, Execution

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from snpc.pipeline import PruneOptions

    LoadedModel: TypeAlias = str | os.PathLike[str] | onnx.ModelProto


class SnpcPrune(BaseLoader):  # type: ignore[misc]  # Polygraphy has no types
    """Functor that prunes an ONNX model; it chains with the loaders of Polygraphy.

        pruned = SnpcPrune(OnnxFromPath("model.onnx"), calibration="images/", target="macs=0.5")
        build_engine = EngineFromNetwork(NetworkFromOnnxBytes(BytesFromOnnx(pruned)))

    Nothing is read or pruned before the loader is called, and each call prunes anew, as loaders do: keep the model, or
    write it with ``SaveOnnx``.
    """

    def __init__(
        self,
        model: LoadedModel | Callable[[], LoadedModel],
        calibration: Any = None,
        *,
        tokens: str | None = None,
        execution: Execution = DEFAULT_EXECUTION,
        **options: Unpack[PruneOptions],
    ) -> None:
        """``model``: an ``onnx.ModelProto``, a path, or a callable that returns one of them. The others are those of
        ``snpc.prune``; ``calibration`` also takes what a data loader of Polygraphy is, an iterable of feed
        dictionaries (name of input -> array)."""
        self._model = model
        self._calibration = calibration
        self._tokens = tokens
        self._execution = execution
        self._options = options

    def call_impl(self) -> onnx.ModelProto:
        """The pruned and verified model, with all of its weights in memory; the model that came in is not changed.

        Raises UserError where the request cannot be served, CheckFailed where the result fails verification.
        """
        model, _ = invoke_if_callable(self._model)
        if not isinstance(model, str | os.PathLike | onnx.ModelProto):
            raise UserError(f"SnpcPrune takes a path, an onnx.ModelProto, or a loader of one, not {type(model)}")
        result = prune(
            model,
            calibration=self._calibration,
            tokens=self._tokens,
            execution=self._execution,
            **self._options.copy(),
        )
        params = f"{format_count(result.before.params)} -> {format_count(result.after.params)} parameters"
        G_LOGGER.info(f"snpc: {params}; {rewrite_text(result.verification)}")
        pruned = result.model
        assert isinstance(pruned, onnx.ModelProto)  # of both types that are taken, as no path is written
        return pruned
