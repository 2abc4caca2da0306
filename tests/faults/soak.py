"""A long extraction in a loop of kills, and not a byte of difference in the end."""
import csv
import json
import os
import random
import shutil
import signal
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import psutil

from videos import numbered_frame, write_video
from world import extract_config, jobs

from .places import store_bytes, stores

FRAMES, SIZE = 12, (64, 48)


def write_soak_world(root: Path, videos: int) -> Path:
    "Tiny videos of which no two are alike, with two overlapping segments each."
    (root / "videos").mkdir(parents=True, exist_ok=True)
    rows, boxes = [], []
    for v in range(videos):
        write_video(root / "videos" / f"v{v:05d}.mp4", FRAMES, size=SIZE, images=[numbered_frame(v + 7 * i, SIZE) for i in range(FRAMES)])
        for s, (start, stop) in enumerate(((0.0, 0.3), (0.2, 0.48))):
            rows.append(dict(segment_id=f"v{v:05d}_{s}", video_id=f"v{v:05d}", start_sec=start, stop_sec=stop, verb="take", noun="pan", split="train"))
            boxes.append(dict(segment_id=f"v{v:05d}_{s}", frame=5, left=10, top=8, right=50, bottom=40))
    for name, lines in (("segments.csv", rows), ("hand_boxes.csv", boxes)):
        with open(root / name, "w", newline="") as f:
            writer = csv.DictWriter(f, lines[0])
            writer.writeheader()
            writer.writerows(lines)
    return root


def soak(
    folder: Path,
    videos: int,
    rng: random.Random,
    kills: int = 200,  # at least; one extraction after the other is killed until it is done
    seconds_between: float = 0.25,  # of processor time, which other work does not stretch
) -> dict:
    "Extracts the videos undisturbed, and then with kills; counts kills, and shards that were wrong, lost or different."
    world = write_soak_world(folder / "world", videos)
    settings = {name: [asdict(extract_config(world, folder / name, workers=workers, splits=["train"])) for workers in (0, 1)] for name in ("whole", "killed")}
    count = dict(videos=videos, segments=2 * videos, shards=2 * videos, extractions=0, kills=0, kills_of_workers=0, shards_compared=0, wrong=0, lost=0,
                 files_that_differ=0, faults_found_by_verify=0)
    with jobs() as job:
        job.run("extract", settings["whole"][0], 0.0)  # the process that starts the others has imported everything then
        begin = time.perf_counter()
        assert job.run("extract", settings["whole"][0])[0] == 0
        count["seconds_undisturbed"] = round(time.perf_counter() - begin, 1)
        begin = time.perf_counter()
        while count["kills"] < kills:
            shutil.rmtree(folder / "killed", ignore_errors=True)
            _until_done(job, folder, settings["killed"], seconds_between, rng, count)
            one, other = (store_bytes(folder / name) for name in ("whole", "killed"))
            count["extractions"] += 1
            count["files_that_differ"] += sum(one.get(name) != other.get(name) for name in set(one) | set(other))
            count["faults_found_by_verify"] += sum(len(store.verify()) for store in stores(folder / "killed"))
        count["seconds_with_kills"] = round(time.perf_counter() - begin, 1)
    return count


def _until_done(job, folder: Path, settings: list[dict], seconds_between: float, rng: random.Random, count: dict) -> None:
    whole, held, code = _stamps(folder / "whole"), {}, None
    while code != 0 or set(held) != set(whole) or any(store.failures(view) for store in stores(folder / "killed") for view in store.views):
        workers = int(rng.random() < 0.3)
        after = rng.uniform(0, 2 * seconds_between) + workers * rng.uniform(0, 3)  # a worker takes its time to start
        code = _killed(job, settings[workers], after, workers and rng.random() < 0.5, count)
        assert code in (0, -signal.SIGKILL), f"exit code {code}"
        there = _stamps(folder / "killed")
        new = [name for name in there if held.get(name) != there[name]]
        count["lost"] += sum(name not in there for name in held)
        count["wrong"] += sum((folder / "killed" / name).read_bytes() != (folder / "whole" / name).read_bytes() for name in new)
        count["shards_compared"] += len(new)
        held = there


def _stamps(features: Path) -> dict[str, tuple]:
    return {str(p.relative_to(features)): (p.stat().st_ino, p.stat().st_mtime_ns) for p in features.glob("*/*/*/[!.]*.safetensors")}


def _killed(job, settings: dict, after: float, worker_instead: bool, count: dict) -> int:  # exit code
    "Runs an extraction and kills it; or its decoding worker, once or more, and lets it go on to its end or to a kill some time later."
    print(json.dumps(["extract", settings]), file=job.zygote.stdin, flush=True)
    child = int(job.zygote.stdout.readline())
    _spend(child, after)
    if worker_instead:
        for process in _decoders(child):
            with suppress(psutil.NoSuchProcess):
                process.kill()
                count["kills_of_workers"] += 1
        _spend(child, after)
    with suppress(ProcessLookupError): os.kill(child, signal.SIGKILL)
    while not (line := job.zygote.stdout.readline()).startswith("exit"): assert line == "end\n", line
    code = int(line.split()[1])
    count["kills"] += code == -signal.SIGKILL
    return code


def _spend(child: int, seconds: float) -> None:
    "Waits until a process and its children have spent so much more processor time, or are over."
    def spent() -> float:
        process = psutil.Process(child)
        if process.status() == psutil.STATUS_ZOMBIE: raise psutil.NoSuchProcess(child)
        return sum(sum(p.cpu_times()[:2]) for p in [process, *process.children()])

    with suppress(psutil.NoSuchProcess):
        begin, until = spent(), time.monotonic() + 30
        while spent() < begin + seconds and time.monotonic() < until: time.sleep(0.01)


def _decoders(parent: int) -> list[psutil.Process]:
    with suppress(psutil.NoSuchProcess):
        return [p for p in psutil.Process(parent).children() if "spawn_main" in " ".join(p.cmdline())]
    return []
