"""A surgeon of Olive that prunes the model, as one surgery of its pass GraphSurgeries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
from olive.passes.onnx.graph_surgeries import Surgeon

from snpc.errors import UserError
from snpc.pipeline import PruneOptions, prune


class SnpcSurgeon(Surgeon):  # type: ignore[misc]  # Olive has no types
    """Prune an ONNX model in a workflow of Olive. Importing this class registers it there.

        {"type": "GraphSurgeries", "surgeries": [
            {"surgeon": "SnpcSurgeon", "calibration": "calib.npz", "options": {"target": "macs=0.5"}}
        ]}

    Olive drops keys of a surgery that the constructor does not name, and goes on with a warning. So all that says how
    much is cut is in ``options``, where a word that snpc does not know is an error.
    """

    def __init__(self, options: Mapping[str, Any], calibration: str | None = None, tokens: str | None = None) -> None:
        """``options``, ``calibration``, ``tokens``: as those of ``snpc.prune``. ValueError: there is no such option."""
        super().__init__()
        unknown = sorted(set(options) - PruneOptions.__optional_keys__)
        if unknown:
            known = ", ".join(sorted(PruneOptions.__optional_keys__))
            raise ValueError(f"SnpcSurgeon: no option {', '.join(unknown)}; there are {known}")
        self._options = dict(options)
        self._calibration = calibration
        self._tokens = tokens

    def call_ir(self, model: ir.Model) -> ir.Model:
        """The pruned and verified model.

        Raises ValueError where the request cannot be served: Olive ends its run at that, and writes other errors to its
        log. CheckFailed where the result fails verification.
        """
        options: Any = self._options.copy()
        try:
            pruned = prune(model, calibration=self._calibration, tokens=self._tokens, **options).model
        except UserError as error:
            raise ValueError(f"SnpcSurgeon: {error}") from error
        assert isinstance(pruned, ir.Model)  # of the type that came in
        return pruned
