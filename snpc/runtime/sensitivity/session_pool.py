"""Sessions that are opened when they are first run, and closed where the weights of all take more memory than there is.

Trials run from the segment on that they change. Of a model that does not fit into memory, each trial opens the segments
behind it again: slow, in bounded memory.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import onnx_ir as ir

from snpc.runtime.execution import Execution, RunFunction, model_weights, session_bytes, temporary_session
from snpc.types import AnyArray, Feeds


@dataclass
class OpenSession:
    """``close`` closes the session of ``run``, which holds ``size`` bytes of weights."""

    run: RunFunction
    size: int
    close: ExitStack


class SessionPool:
    """At most ``limit`` bytes of weights, or one session that takes more. The session that was not run for longest is
    closed first."""

    def __init__(self, limit: int, execution: Execution) -> None:
        self.limit, self.execution = limit, execution
        self.opened: OrderedDict[int, OpenSession] = OrderedDict()
        self.count = 0

    def lazily(self, build: Callable[[], ir.Model]) -> RunFunction:
        """A function that runs the model that ``build`` makes."""
        self.count += 1
        number = self.count

        def run(feeds: Feeds) -> dict[str, AnyArray]:
            if number not in self.opened:
                self.open(number, build())
            self.opened.move_to_end(number)
            return self.opened[number].run(feeds)

        return run

    def open(self, number: int, model: ir.Model) -> None:
        size = session_bytes(model_weights(model))
        while self.opened and size + sum(session.size for session in self.opened.values()) > self.limit:
            self.opened.popitem(last=False)[1].close.close()
        stack = ExitStack()
        run = stack.enter_context(temporary_session(model, execution=self.execution, memory="least", external=True))
        self.opened[number] = OpenSession(run, size, stack)

    def close(self) -> None:
        while self.opened:
            self.opened.popitem()[1].close.close()
