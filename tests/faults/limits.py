"""What runs out or is closed: disks, memory, permissions, patience; and two who want the same."""
import os
import random
import resource
import shutil
import signal
from pathlib import Path
from typing import Callable, Iterator
from unittest.mock import patch

from xmic.features import FeatureStore, extract, extract_dataset
from xmic.encoders import create_encoder
from xmic.segments import read_csv
from xmic.training import train
from world import register_tiny

from . import decoders
from .places import Place, in_child, mounted, remount, store_bytes, stores
from .tally import Fault, injected, said, skipped

KIB = 1024


def _partly_right(features: Path, place: Place) -> None:
    "What is there is what an undisturbed extraction would have left."
    whole = place.bytes
    for name, content in store_bytes(features).items():
        assert content == whole[name] or name.endswith("index.json"), name


def _calls(place: Place, folder: Path) -> dict[str, Callable[[], object]]:
    return {"extraction": lambda: extract_dataset(place.extraction(folder / "features")), "training": lambda: train(place.training(folder / "runs"))}


def full_disks(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "A small file system that a ballast leaves less and less room on; then the ballast goes, and the same call goes on."
    with mounted(folder / "disk", "4m") as disk:
        if disk is None:
            yield skipped("extraction", "a full disk", "no file system may be mounted here")
            return
        for place_of, call in _calls(place, disk).items():
            for _ in range(many):
                def trial() -> str | None:
                    for there in ("features", "runs"): shutil.rmtree(disk / there, ignore_errors=True)
                    free = shutil.disk_usage(disk).free
                    (disk / "ballast").write_bytes(bytes(max(0, free - rng.randrange(0, 150) * KIB)))
                    sentence = said(call)
                    if place_of == "extraction": _partly_right(disk / "features", place)
                    (disk / "ballast").unlink()
                    assert sentence is None or "No space left" in sentence
                    assert said(call) is None
                    _same(place, disk, place_of)
                    return sentence

                yield injected(place_of, "a full disk", trial)


def _same(place: Place, folder: Path, place_of: str) -> None:
    if place_of == "extraction":
        assert store_bytes(folder / "features") == place.bytes
    else:
        assert (folder / "runs/run/model.safetensors").read_bytes() == (place.run / "model.safetensors").read_bytes()


def limited_files(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "No file may grow beyond a size, as under a quota."
    for place_of in ("extraction", "training"):
        for _ in range(many):
            def trial() -> str | None:
                shutil.rmtree(folder, ignore_errors=True)
                call = _calls(place, folder)[place_of]

                def limited() -> None:
                    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                    resource.setrlimit(resource.RLIMIT_FSIZE, (rng.randrange(50, 6000 if place_of == "extraction" else 60000),) * 2)
                    call()

                sentence = in_child(limited)()
                if place_of == "extraction": _partly_right(folder / "features", place)
                assert said(call) is None
                _same(place, folder, place_of)
                return sentence or None

            yield injected(place_of, "a limit of the size of files", trial)


def read_only(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "A folder that cannot be written to: what is there is read, what is missing is refused in a sentence."
    with mounted(folder / "disk", "16m") as disk:
        if disk is None:
            yield skipped("extraction", "a read-only folder", "no file system may be mounted here")
            return
        extract_dataset(place.extraction(disk / "features"))
        gone = next(disk.rglob("hand/*.safetensors"))
        content = gone.read_bytes()

        def complete() -> str | None:
            remount(disk, "ro")
            try:
                _, report = extract_dataset(place.extraction(disk / "features"))
                assert report.extracted == 0 and store_bytes(disk / "features") == place.bytes and stores(disk / "features")[0].verify() == []
            finally:
                remount(disk, "rw")

        def incomplete() -> str | None:
            gone.unlink()
            remount(disk, "ro")
            sentence = said(lambda: extract_dataset(place.extraction(disk / "features")))
            remount(disk, "rw")
            assert sentence and "Read-only" in sentence
            extract_dataset(place.extraction(disk / "features"))
            assert gone.read_bytes() == content
            return sentence

        def training() -> str | None:
            remount(disk, "ro")
            sentence = said(lambda: train(place.training(disk / "runs")))
            remount(disk, "rw")
            assert sentence and "Read-only" in sentence
            return sentence

        def repairing() -> str | None:
            remount(disk, "ro")
            sentence = said(lambda: stores(disk / "features")[0].repair())
            remount(disk, "rw")
            assert sentence and "Read-only" in sentence
            return sentence

        yield injected("extraction", "a read-only store that is complete", complete)
        yield injected("extraction", "a read-only store", incomplete)
        yield injected("training", "a read-only folder", training)
        yield injected("store", "repair of a read-only store", repairing)


def two_at_once(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "Two extractions on one store: of the same segments, of halves of the same videos, and with settings that cannot be mixed."
    segments, encoder = read_csv(place.world), create_encoder(register_tiny(), "random", "cpu")

    def same() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        answers = [in_child(lambda: extract_dataset(place.extraction(folder))) for _ in range(2)]
        assert [answer() for answer in answers] == ["", ""] and store_bytes(folder) == place.bytes

    def halves() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        call = lambda half: lambda: extract(segments[half::2], encoder, FeatureStore(folder), workers=0, progress=False)
        answers = [in_child(call(half)) for half in (0, 1)]
        assert [answer() for answer in answers] == ["", ""]
        store, whole = FeatureStore(folder), stores(place.features)[0]
        assert store.verify() == [] and store.missing(segments).empty
        assert all((store.segment(i, "full") == whole.segment(i, "full")).all() for i in segments.segment_id)

    def different() -> str | None:
        shutil.rmtree(folder, ignore_errors=True)
        call = lambda fps: lambda: extract(segments, encoder, FeatureStore(folder), feature_fps=fps, workers=0, progress=False)
        answers = [in_child(call(fps)) for fps in (5.0, None)]
        sentences = [answer() for answer in answers]
        store = FeatureStore(folder)
        rows = {len(store.segment(i, "full")) for i in segments.segment_id}
        assert store.verify() == [] and sorted(map(bool, sentences)) == [False, True] and rows in ({6, 7}, {6}, {30}, {7}), (sentences, rows)
        return max(sentences)

    for _ in range(many):
        yield injected("extraction", "two at once, of the same segments", same)
        yield injected("extraction", "two at once, of halves of the same videos", halves)
        yield injected("extraction", "two at once, with settings that do not mix", different)


def broken_workers(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "A decoding worker that is killed, starved or hangs: the other videos are extracted, and the next extraction does the rest."
    for number, kind in enumerate(["a worker that is killed", "a worker that hangs", *["a worker without memory"] * (2 * many)]):
        function = {"killed": decoders.killed, "hangs": decoders.hanging, "memory": decoders.starved}[kind.split()[-1]]

        def trial() -> str | None:
            features = folder / f"features{number}"
            os.environ[decoders.ENVIRONMENT] = f"v{rng.randrange(8)} {folder / f'met{number}'}"
            os.environ[decoders.HEADROOM] = str(rng.randrange(0, 24 << 20))
            folder.mkdir(parents=True, exist_ok=True)
            with patch("xmic.features.clip_pixels", function):
                _, report = extract_dataset(place.extraction(features, workers=1, timeout=8.0 if "hangs" in kind else 60.0, backend=rng.choice(["decord", "pyav"])))
            assert (folder / f"met{number}").exists() and report.extracted >= 14 and len(report.failed) <= 2, report.failed
            for store in stores(features): assert store.verify() == []
            if "hangs" in kind: return _hung(features, report)
            _, again = extract_dataset(place.extraction(features, backend=_backend(features)))
            assert not again.failed and again.extracted == 16 - report.extracted, again.failed
            if _backend(features) == "decord": assert store_bytes(features) == place.bytes
            return next(iter(report.failed.values()), None)

        yield injected("extraction", kind, trial)


def _backend(features: Path) -> str:
    return stores(features)[0].manifest["full"]["decoder"].split()[0].lower()


def _hung(features: Path, report) -> str:
    "It is noted with its cause and not tried again: it would hang again."
    assert report.failed and all("no frame came for 8 s" in cause for cause in report.failed.values())
    (store,) = stores(features)
    assert set(store.failures("full")) == set(report.failed)
    return next(iter(report.failed.values()))
