"""All faults, with how many of each are injected in the short and in the long mode."""
import random
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

from .damage import damaged_runs, damaged_stores, extracted_again, jumping_clocks, manifests
from .kills import killed_extraction, killed_reproduce, killed_training
from .limits import broken_workers, full_disks, limited_files, read_only, two_at_once
from .places import Place
from .tally import LOST, Fault, injected


class Case(NamedTuple):
    faults: Callable[[Place, Path, random.Random, int], Iterator[Fault]]
    short: int  # 0: not at all
    long: int


CASES = {case.faults.__name__: case for case in [
    Case(damaged_stores, 3, 100),
    Case(manifests, 1, 1),
    Case(extracted_again, 1, 20),
    Case(damaged_runs, 1, 15),
    Case(jumping_clocks, 1, 1),
    Case(full_disks, 2, 15),
    Case(limited_files, 1, 15),
    Case(read_only, 1, 1),
    Case(two_at_once, 1, 10),
    Case(broken_workers, 1, 8),
    Case(killed_extraction, 3, 40),
    Case(killed_training, 3, 40),
    Case(killed_reproduce, 0, 20),
]}


def inject(name: str, place: Place, folder: Path, seed: int, many: int) -> Iterator[Fault]:
    "The faults of a case; one that breaks off counts as lost."
    faults = CASES[name].faults(place, folder, random.Random(f"{name} {seed}"), many)
    while True:
        ended: list[bool] = []
        def next_fault() -> None: ended.append((found := next(faults, None)) is None) or ended.append(found)
        broken = injected(name, "the harness", next_fault)
        if broken.outcome == LOST: yield broken
        if len(ended) < 2 or ended[0]: return
        yield ended[1]
