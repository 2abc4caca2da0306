"""What the faults meet: a small world, its undisturbed features and run, and processes of their own."""
import os
import subprocess
import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Callable, Iterator

from world import contents, extract_config, register_tiny, write_world
from xmic.features import FeatureStore, extract_dataset
from xmic.files import DataError
from xmic.config import TrainConfig
from xmic.training import train


@dataclass
class Place:
    "A world of eight videos, its features, and a run on them, all undisturbed."

    folder: Path
    world: Path
    features: Path
    run: Path

    def extraction(self, features: Path, **changes):
        return extract_config(self.world, features, **dict(batch_size=8) | changes)

    def training(self, runs: Path, **changes) -> TrainConfig:
        return TrainConfig(**dict(dataset="csv", data_root=str(self.world), features_root=str(self.features), encoder=register_tiny(), weights="random",
                                  runs_root=str(runs), name="run", device="cpu", epochs=6, warmup_epochs=1, batch_size=4, progress=False) | changes)

    @property
    def bytes(self) -> dict[str, bytes]:
        return store_bytes(self.features)


def store_bytes(features: Path) -> dict[str, bytes]:
    "Every file of the feature stores but what was set aside, and text embeddings."
    return {name: content for name, content in contents(features).items() if "/damaged/" not in name and not name.startswith("text/")}


def stores(features: Path) -> list[FeatureStore]:
    return [FeatureStore(path) for path in sorted({m.parents[1] for m in features.glob("*/*/*/manifest.json")})]


def make_place(folder: Path) -> Place:
    register_tiny()
    place = Place(folder, write_world(folder / "world", videos=8, frames=60), folder / "features", folder / "runs" / "run")
    extract_dataset(place.extraction(place.features))
    train(place.training(folder / "runs"))
    return place


def in_child(
    call: Callable[[], object],
) -> Callable[[], str]:
    "Starts a call in a process of its own; calling the answer waits for it and gives \"\", the `DataError`'s sentence, or raises."
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        words = ""
        try:
            call()
        except DataError as e:
            words = f"said {e}"
        except BaseException:
            words = f"died {traceback.format_exc()}"
        with os.fdopen(writing, "w") as pipe: pipe.write(words)
        os._exit(0)
    os.close(writing)

    def answer() -> str:
        with os.fdopen(reading) as pipe: words = pipe.read()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == 0 and not words.startswith("died"), words or f"exit code {code}"
        return words.removeprefix("said ")
    return answer


@contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path | None]:
    "A small file system in memory; None where it cannot be mounted."
    folder.mkdir(parents=True, exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, how: str) -> None:  # "ro" or "rw"
    subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
