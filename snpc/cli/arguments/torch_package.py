"""snpc.torch, which is imported only when it is needed."""

from __future__ import annotations

from snpc.criteria import make_criterion
from snpc.errors import UserError
from snpc.runtime.statistics import needs_gradient_provider


def import_torch_package(needed_by: str = "this command", alternative: str = "") -> None:
    """Import snpc.torch. UserError where torch or safetensors is not installed."""
    try:
        import snpc.torch  # noqa: F401
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in ("torch", "safetensors"):
            raise
        raise UserError(
            f"{needed_by} needs {error.name}, which is not installed: pip install 'snpc[torch]'{alternative}"
        ) from None


def import_gradient_provider(criterion: str | None) -> None:
    """Import snpc.torch, which measures gradients, where a criterion asks for them."""
    if criterion is not None and needs_gradient_provider(make_criterion(criterion)):
        import_torch_package(f"criterion {criterion}", ", or choose --criterion mixed")
