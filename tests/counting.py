"""How much work is done, counted and not timed: on a busy machine it is the same."""
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class Work:
    calls = 0


@contextmanager
def counted() -> Iterator[Work]:
    "Counts the functions, of Python and of C, that this thread calls inside."
    work, before = Work(), sys.getprofile()

    def count(frame, event, arg):
        work.calls += event in ("call", "c_call")

    sys.setprofile(count)
    try:
        yield work
    finally:
        sys.setprofile(before)
