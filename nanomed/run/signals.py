"""Being asked to stop."""

import signal
from typing import Any

PREEMPTED = 75  # exit code of a run that was asked to stop and has saved its state (EX_TEMPFAIL)


class StopSignal:
    """Remembers that SIGTERM or SIGINT came; the loop asks between steps. A second SIGINT stops at once."""

    def __init__(self):
        self.received = ""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: Any) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
