"""Faults, a few of each kind; `pytest tests/faults --long` injects many. `python -m tests.faults --long` writes the counts down, too."""
import random
import time

import pytest

from videos import misbehave
from xmic.video import DecodePool, VideoError

from .cases import CASES, inject
from .places import make_place
from .soak import soak
from .tally import LOST, SKIPPED, counts

pytestmark = [pytest.mark.filterwarnings("ignore:.*RANDOM weights"), pytest.mark.slow]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return make_place(tmp_path_factory.mktemp("place"))


@pytest.mark.parametrize("name", CASES)
def test_nothing_is_lost_by(name, place, tmp_path, request):
    case, long = CASES[name], request.config.getoption("--long", False)
    many = case.long if long else case.short
    if not many:
        pytest.skip("takes minutes: pytest tests/faults --long")
    faults = list(inject(name, place, tmp_path / "fault", request.config.getoption("--faults-seed", 0), many))
    assert not [f for f in faults if f.outcome == LOST], "\n\n".join(f"{f.place}, {f.kind}:\n{f.detail}" for f in faults if f.outcome == LOST)
    if all(f.outcome == SKIPPED for f in faults):
        pytest.skip(faults[0].detail)
    assert counts(faults)["injected"] >= 1


def test_a_soak_ends_in_the_same_bytes(tmp_path, request):
    long = request.config.getoption("--long", False)
    count = soak(tmp_path, 200 if long else 10, random.Random(0), 50 if long else 3, 0.1)
    assert count["kills"] >= 3 and not any(count[name] for name in ("wrong", "lost", "files_that_differ", "faults_found_by_verify")), count


@pytest.mark.parametrize("ordered", [True, False])
def test_a_worker_that_dies_while_nobody_listens_is_reported(ordered):
    ends = {}
    with DecodePool(2, 60) as pool:
        for item in pool.map(misbehave, ["crash", "fine", "fine", "fine"], ordered):
            if item.done: ends[item.task] = item.error
            time.sleep(0.3)
    assert isinstance(ends.pop(0), VideoError) and ends == {1: None, 2: None, 3: None}
