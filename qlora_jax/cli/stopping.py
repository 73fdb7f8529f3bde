"""Ctrl-C and SIGTERM: a step is finished and saved, anything else ends at once.

A thread hears of a signal at the moment that it comes, also while the main thread is in a
long call of XLA, where Python's own handlers wait. A second signal ends the process there.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class _State:
    received: int | None = None
    """The signal that came first."""
    starting = True
    """Modules are being imported, where an exception would end as any other one."""
    finishing = False
    """Somebody asks `requested` from time to time."""


_state = _State()


@contextlib.contextmanager
def handled(keep: bool) -> Iterator[None]:
    """Handles the signals while a command runs; nothing outside of the main thread.

    Args:
      keep: Stay in charge afterwards, as the process ends then.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _state = _State()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before_fd = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    # What is ignored, as nohup and some shells have it, stays so.
    heeded = [one for one in _SIGNALS if signal.getsignal(one) != signal.SIG_IGN]
    before = {number: signal.signal(number, _in_main_thread) for number in heeded}
    listening = threading.Thread(target=_listen, args=(reading,), daemon=True)
    listening.start()
    try:
        yield
    finally:
        if keep:
            _state.starting = True  # what is left is Python's own ending
        else:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before_fd)
            os.close(writing)
            listening.join()
            os.close(reading)


def started() -> None:
    """Says that the command's modules are there."""
    _state.starting = False


@contextlib.contextmanager
def finishing() -> Iterator[Callable[[], bool]]:
    """Lets what runs within finish what it is at.

    Yields:
      Says whether to stop; it has to be asked from time to time.
    """
    _state.finishing = True
    try:
        yield lambda: _state.received is not None
    finally:
        _state.finishing = False


def status() -> int:
    """Returns the exit status that the signal asks for, 128 more than its number; 0 without."""
    return 0 if _state.received is None else 128 + _state.received


def word() -> str:
    """Returns what happened to the process, in a word."""
    received = signal.SIGINT if _state.received is None else _state.received
    return _WORDS[signal.Signals(received)]


def _in_main_thread(number: int, frame: object) -> None:
    if _state.received is None:
        _state.received = number
    if not _state.finishing and not _state.starting:
        raise KeyboardInterrupt


def _listen(reading: int) -> None:
    count = 0
    while data := os.read(reading, 1):
        number = data[0]
        if number not in _SIGNALS:
            continue
        count += 1
        if _state.received is None:
            _state.received = number
        if count > 1 or _state.starting:
            os.write(2, f"{word()}\n".encode())
            os._exit(status())
        if _state.finishing:
            os.write(
                2,
                b"\nstopping: the step under way is finished and saved; once more (Ctrl-C) "
                b"stops at once\n",
            )
