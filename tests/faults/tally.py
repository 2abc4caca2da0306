"""What became of each fault, and the counts."""
import os
import platform
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from typing import Callable

from xmic.files import DataError

SURVIVED, SAID, LOST, SKIPPED, COMPARED = "survived", "said", "lost", "skipped", "compared"


@dataclass
class Fault:
    "One injected fault."

    place: str  # what it met: "extraction", "store", "training", "tables", "make reproduce"
    kind: str
    outcome: str  # one of the five above; "compared": no fault, but what several have left in the end, and it is right
    detail: str = ""  # the sentence that was said, or what was lost, or why the fault could not be injected


def injected(
    place: str,
    kind: str,
    trial: Callable[[], str | None],  # injects and judges; gives the sentence that was said, if one was; raises where something is lost
) -> Fault:
    try:
        sentence = trial()
    except Exception:
        return Fault(place, kind, LOST, traceback.format_exc())
    return Fault(place, kind, SAID if sentence else SURVIVED, sentence or "")


def skipped(place: str, kind: str, why: str) -> Fault:
    return Fault(place, kind, SKIPPED, why)


def compared(place: str, trial: Callable[[], None]) -> Fault:
    "What is left when a job that was killed has come to its end."
    fault = injected(place, "what is left in the end", trial)
    return fault if fault.outcome == LOST else Fault(place, fault.kind, COMPARED)


def said(call: Callable[[], object]) -> str | None:
    "The one sentence with which a call was refused; None if it went through. Any other error is raised."
    try:
        call()
    except DataError as e:
        assert str(e) and "\n" not in str(e), f"not one sentence: {e}"
        return str(e)
    return None


def hardware() -> dict:
    import torch
    names = [line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")] if os.path.exists("/proc/cpuinfo") else []
    return dict(cpu=names[0] if names else platform.processor(), cores=os.cpu_count(), platform=platform.platform(), python=platform.python_version(),
                torch=torch.__version__, load_average=[round(n, 2) for n in os.getloadavg()], date=time.strftime("%Y-%m-%d"))


def counts(faults: list[Fault]) -> dict:
    tally = Counter(f.outcome for f in faults)
    return dict(injected=tally[SURVIVED] + tally[SAID] + tally[LOST], survived=tally[SURVIVED], said=tally[SAID], lost=tally[LOST], skipped=tally[SKIPPED],
                compared=tally[COMPARED])


def summary(faults: list[Fault]) -> dict:
    "Counts over all, and for each kind with an example of what was said."
    kinds = []
    for key in dict.fromkeys((f.place, f.kind) for f in faults):
        own = [f for f in faults if (f.place, f.kind) == key]
        sentence = next((f.detail for f in own if f.outcome in (SAID, LOST, SKIPPED)), None)
        kinds.append(dict(met_by=key[0], fault=key[1], **counts(own), for_example=sentence or ""))
    return counts(faults) | dict(kinds=kinds)
