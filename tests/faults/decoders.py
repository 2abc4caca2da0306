"""Decoding that goes wrong, for workers to import."""
import os
import resource
import time
from pathlib import Path
from typing import Any, Iterator

from xmic.clips import clip_pixels

ENVIRONMENT = "XMIC_FAULT"  # the id of the video that is to be met, and a file that says that it was met
HEADROOM = "XMIC_FAULT_HEADROOM"  # bytes


def _first_time(task: Any) -> bool:
    "Whether this is the video to be met, and it has not been met before."
    video, mark = os.environ[ENVIRONMENT].split(" ", 1)
    if task.video_id != video or Path(mark).exists(): return False
    Path(mark).touch()
    return True


def starved(task: Any) -> Iterator:
    "Leaves a worker little memory beyond what it has."
    if _first_time(task):
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + int(os.environ[HEADROOM]),) * 2)
    yield from clip_pixels(task)


def hanging(task: Any) -> Iterator:
    "Hangs after its first frames."
    for part in clip_pixels(task):
        yield part
        if _first_time(task): time.sleep(1000)


def killed(task: Any) -> Iterator:
    "Is killed after its first frames, as by the system when memory runs out."
    for part in clip_pixels(task):
        yield part
        if _first_time(task): os.kill(os.getpid(), 9)
