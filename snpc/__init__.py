"""snpc: make exported attention models small and fast.

    snpc.prune("vit.onnx", "vit-half.onnx", target="macs=0.5", calibration="calib.npz")

In steps, each of which takes what the one before returned:

    model = snpc.load("vit.onnx")
    analysis = snpc.analyze(model)
    calibration = snpc.load_calibration("calib.npz", model.inputs)
    plan = snpc.plan(analysis, snpc.Budget(ratio=0.5), calibration)
    pruned = snpc.apply(plan, "vit-half.onnx")

``import snpc`` loads nothing else: each name is imported when it is first used. ``__init__.pyi`` says from where.
"""

from __future__ import annotations

import lazy_loader

from snpc.version import __version__

__getattr__, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [*_names, "__version__"]
