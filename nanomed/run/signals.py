"""Being asked to stop."""

import signal
from collections.abc import Callable
from typing import Any

from nanomed.run.progress import say

PREEMPTED = 75  # exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL)


class StopSignal:
    """Remembers that SIGTERM or SIGINT came. While `later` is set the loop asks between steps, and a second SIGINT
    stops at once. At other times there is nothing to save: `leave` is called, and the process ends where it is."""

    def __init__(self):
        self.received, self.later = "", False
        self.leave: Callable[[], None] = lambda: None
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        again, self.received = bool(self.received), signal.Signals(number).name
        if not self.later:
            self.leave()
            raise SystemExit(PREEMPTED)
        if again and number == signal.SIGINT:
            raise KeyboardInterrupt
        say(f"{self.received}: stopping after this step")
