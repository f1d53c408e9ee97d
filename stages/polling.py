"""How is something looked at again and again while other work goes on?"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def repeated_meanwhile(look: Callable[[], None], *, every_seconds: float) -> Iterator[None]:
    """Call a function in a thread of its own, every so many seconds, while the block runs.

    No call is under way any more when the block is left, however it is left.
    """
    is_over = threading.Event()

    def repeat() -> None:
        while not is_over.wait(every_seconds):
            look()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
