"""Watches the event loop from a thread, and says what blocks it while it is blocked."""

import asyncio
import contextlib
import logging
import selectors
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

logger = logging.getLogger(__name__)

AGAIN_S = 0.02  # until a blocked loop is looked at again
_MACHINERY = (str(Path(asyncio.__file__).parent), selectors.__file__)


class Watchdog:
    """Logs once for each time that the loop is blocked for longer than `after_s`, with the stack, and once its length.

    The loop says by `due` when it will turn again. The thread sleeps until that is long past: on a calm loop it wakes
    a few times a second, for a comparison. A loop that is late while it runs nothing, since the whole process had no
    CPU, is not blocked by anything, and not reported.
    """

    def __init__(self, after_s: float) -> None:
        self._after_s = after_s
        self._stopped = threading.Event()
        self.due = 0.0  # on the monotonic clock
        self.blocks = 0

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """While the block runs, the loop of this thread is watched."""
        self.due = time.monotonic()
        thread = threading.Thread(target=self._watch, args=(threading.get_ident(),), name="watchdog", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join()

    def _watch(self, loop_thread: int) -> None:
        while not self._stopped.wait(max(self.due + self._after_s - time.monotonic(), 0)):
            due = self.due
            if time.monotonic() < due + self._after_s:
                continue  # it has turned since
            frame = sys._current_frames().get(loop_thread)
            if self.due == due and frame is not None and not _is_idle(frame):
                self.blocks += 1
                stack = "".join(traceback.format_stack(frame))
                logger.warning("the event loop is blocked, here:\n%s", stack, extra={"action": "loop_blocked"})
                is_reported = True
            else:
                is_reported = False
            del frame
            while self.due == due and not self._stopped.wait(AGAIN_S):
                pass
            if is_reported:
                blocked_s = time.monotonic() - due
                fields = {"action": "loop_unblocked", "blocked_s": round(blocked_s, 3)}
                logger.warning("the event loop was blocked for %.2f s", blocked_s, extra=fields)


def _is_idle(frame: FrameType) -> bool:
    """Whether the loop waits for something to do: its own machinery is all that there is on the stack's top."""
    return frame.f_code.co_filename.startswith(_MACHINERY)
