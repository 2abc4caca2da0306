"""`kill -9` at random moments, over and over, until the work is done all the same."""
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Callable, Iterator

import pandas as pd

from world import jobs
from xmic.experiments import MINI_ENCODERS, plan, profile
from xmic.files import read_json, write_json
from xmic.training import RunResult

from .places import Place, store_bytes, stores
from .tally import Fault, compared, injected, skipped

ROOT = Path(__file__).resolve().parents[2]


def _rounds(
    place_of: str,
    start: Callable[[float | None], tuple[int, float]],  # runs the job, killed after some seconds or left alone: exit code, seconds
    longest: float,  # seconds of the undisturbed job
    rng: random.Random,
    many: int,
    after_each: Callable[[], None],
    done: Callable[[], None],  # checks what a job that came to its end has left, and clears it away
) -> Iterator[Fault]:
    "Kills until `many` kills have met a living process; then lets the job come to its end."
    met = 0
    while met < many:
        code, _ = start(rng.uniform(0, 1) ** 2 * 0.6 * longest)
        if code == -signal.SIGKILL:
            met += 1
            yield injected(place_of, "kill -9", after_each)
        else:
            assert code == 0, f"exit code {code}"
            yield compared(place_of, done)
    assert start(None)[0] == 0
    yield compared(place_of, done)


def killed_extraction(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    features, held = folder / "features", {}
    settings = asdict(place.extraction(features, workers=1))
    whole = {name: content for name, content in place.bytes.items() if name.endswith(".safetensors")}

    def after_each() -> None:
        "Shards that are there are right, and stay."
        there = {name: content for name, content in store_bytes(features).items() if name.endswith(".safetensors")}
        assert all(content == whole[name] for name, content in there.items()) and set(held) <= set(there)
        held.update(there)
        for store in stores(features): assert store.verify() == []

    def done() -> None:
        assert store_bytes(features) == place.bytes
        shutil.rmtree(features)
        held.clear()

    with jobs() as job:
        _, seconds = job.run("extract", asdict(place.extraction(folder / "timed", workers=1)))
        yield from _rounds("extraction", lambda after: job.run("extract", settings, after), seconds, rng, many, after_each, done)


def killed_training(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    runs, epochs = folder / "runs", [0]
    settings = asdict(place.training(runs, epochs=40))

    def after_each() -> None:
        history = runs / "run" / "history.csv"
        rows = len(pd.read_csv(history)) if history.exists() else 0
        assert rows >= epochs[0], "epochs were lost"
        epochs[0] = rows

    with jobs() as job:
        _, seconds = job.run("train", asdict(place.training(folder / "whole", epochs=40)))
        whole = RunResult.read(folder / "whole" / "run")

        def done() -> None:
            run = RunResult.read(runs / "run")
            assert (run.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
            assert run.metrics["results"] == whole.metrics["results"] and len(run.history) == 40 and not (run.folder / "checkpoint.pt").exists()
            shutil.rmtree(runs)
            epochs[0] = 0

        yield from _rounds("training", lambda after: job.run("train", settings, after), seconds, rng, many, after_each, done)


class Workflow:
    "`make reproduce` of a table on the smallest mini world, in the layout of real data, with everything it writes in a folder."

    def __init__(self, folder: Path, data: Path):
        self.folder, self.data = folder, folder / "data"
        if not self.data.exists():
            self.data.mkdir(parents=True)
            for dataset in ("epic", "ego4d", "egtea"): (self.data / dataset).symlink_to(data / dataset)
        write_json(self.data / "profile.json", dict(
            encoders={role: dict(encoder=name) for role, name in MINI_ENCODERS.items()}, features_root="features",
            runs_root="runs", reports="report", threads=1, gpus=0,
            extract=dict(feature_fps=4.0, workers=1, device="cpu", progress=False),
            train=dict(epochs=2, warmup_epochs=0, batch_size=8, device="cpu", progress=False)))
        self.plan = plan(profile("paper", data=str(self.data)), TABLE)

    def start(self, after: float | None, whole_group: bool = True) -> tuple[int, float]:
        "Runs it, or kills it after some seconds: all of its processes, or only the first one, whose children go on."
        begin = time.perf_counter()
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        with open(self.folder / "log", "ab") as log:
            process = subprocess.Popen(["make", "reproduce", "PROFILE=paper", f"DATA={self.data}", f"TABLES={TABLE}", "CORES=2"], cwd=ROOT,
                                       stdout=log, stderr=log, start_new_session=True, env=os.environ | dict(PATH=path, PYTHONPATH=str(ROOT)))
            try:
                return process.wait(after), time.perf_counter() - begin
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError): (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
                return process.wait(), time.perf_counter() - begin

    @property
    def finished(self) -> dict[str, dict]:
        "The results of every finished run."
        return {name: read_json(path)["results"] for name in self.plan.runs if (path := self.data / "runs" / name / "metrics.json").exists()}

    @property
    def shards(self) -> dict[str, bytes]:
        return {name: content for name, content in store_bytes(self.data / "features").items() if name.endswith(".safetensors")}

    @property
    def tables(self) -> dict[str, bytes]:
        return {p.name: p.read_bytes() for p in sorted((self.data / "report").glob("table*")) if p.suffix in (".csv", ".md", ".tex", ".svg")}


TABLE = "8"


def killed_reproduce(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "Half of the kills meet everything from the first feature on, half the making of tables and report from finished runs."
    if shutil.which("make") is None or subprocess.run(["make", "-q", "env"], cwd=ROOT).returncode:
        yield skipped("make reproduce", "kill -9", "the environment of this checkout was not made by `make env`")
        return
    from xmic.mini import build
    build(root=str(folder / "mini"), size="tiny", progress=False)
    whole, killed = (Workflow(folder / name, folder / "mini") for name in ("whole", "killed"))
    code, seconds = whole.start(None)
    assert code == 0, (folder / "whole" / "log").read_text()[-3000:]
    seen: dict[str, dict] = {}

    def after_each() -> None:
        finished = killed.finished
        assert set(seen) <= set(finished) and all(result == whole.finished[name] for name, result in finished.items())
        seen.update(finished)
        assert all(content == whole.shards[name] for name, content in killed.shards.items())
        assert all(content == whole.tables[name] for name, content in killed.tables.items())

    def done() -> None:
        after_each()
        assert killed.finished == whole.finished and killed.tables == whole.tables and set(killed.shards) == set(whole.shards)
        assert (killed.data / "report" / "index.html").stat().st_size > 0.5 * (whole.data / "report" / "index.html").stat().st_size

    def all_done() -> None:
        done()
        for name in ("features", "runs", "report"): shutil.rmtree(killed.data / name)
        seen.clear()

    def tables_done() -> None:
        done()
        _forget_tables(killed.data)

    start = lambda after: killed.start(after, rng.random() < 0.7)
    yield from _rounds("make reproduce", start, seconds, rng, many - many // 2, after_each, all_done)
    if many // 2:
        assert start(None)[0] == 0
        _forget_tables(killed.data)
        begin = time.perf_counter()
        assert start(None)[0] == 0
        rendering = time.perf_counter() - begin
        tables_done()
        yield from _rounds("tables", start, rendering / 0.6, rng, many // 2, after_each, tables_done)


def _forget_tables(folder: Path) -> None:
    shutil.rmtree(folder / "report")
    for done in (folder / "runs").glob("*/done"): done.unlink()
