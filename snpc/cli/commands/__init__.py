"""The commands: each parses, calls one verb, prints. Each is imported when it is called.

Files
  bench       ``snpc bench``: latency of models, side by side.
  build       ``snpc build``: what a runtime loads fastest.
  card        ``snpc card``: a model card for the Hugging Face hub.
  dequantize  ``snpc dequantize``: the float model of a quantized file.
  finetune    ``snpc finetune`` and ``snpc export-torch``: what needs torch.
  inspect     ``snpc inspect``: what a model can lose, and why not the rest.
  listings    ``snpc passes``, ``snpc criteria`` and ``snpc example``: what ships with snpc.
  plan        ``snpc plan`` and ``snpc apply``: pruning in two steps, with a file in between that can be read and
              edited.
  prune       ``snpc prune``: score, plan, write and verify in one step.
  report      ``snpc report``: files beside their original, as a page with charts.
  sweep       ``snpc sweep``: one model at several sizes, and which of them are worth having.
  verify      ``snpc verify``: a pruned file against its original.
"""

from __future__ import annotations

__all__: list[str] = []
