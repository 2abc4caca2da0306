"""Files that change by themselves: flipped bits, cut ends, lost and foreign files, and clocks that jump."""
import json
import os
import random
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Callable, Iterator
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from xmic.features import FeatureStore, extract_dataset, shard_name, write_shard
from xmic.files import DataError, write_json
from xmic.streams import Streams
from xmic.training import RunResult, Trainer, restore, train

from .places import Place, store_bytes, stores
from .tally import Fault, injected, said

Truth = dict[str, tuple[torch.Tensor, torch.Tensor]]  # segment -> features, frames


def flip(path: Path, rng: random.Random, start: float = 0.0) -> None:
    "Turns one bit over, behind this share of the file."
    content = bytearray(path.read_bytes())
    content[rng.randrange(int(start * len(content)), len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[:rng.randrange(path.stat().st_size - 1)])  # a last line break alone would not be missed


def small_store(root: Path, seed: int) -> Truth:
    "Four shards of three segments, all of one size, so that one may be taken for another."
    rng, truth = np.random.default_rng(seed), {}
    write_json(root / "full" / "manifest.json", {"dim": 8})
    for video in "abcd":
        lengths = rng.permutation([3, 5, 4])
        parts = [(f"{video}_{i}", torch.from_numpy(rng.normal(size=(n, 8))).half(), rng.integers(0, 999, n).astype(np.int32)) for i, n in enumerate(lengths)]
        write_shard(root / "full" / shard_name(video), parts)
        truth |= {i: (f, torch.from_numpy(n)) for i, f, n in parts}
    FeatureStore(root).refresh()
    return truth


def read_all(root: Path, truth: Truth) -> int:
    "Reads whatever can be read, in all ways; gives how many segments were refused. Fails where anything else than the truth comes."
    refused = 0
    for resident in (None, True, False):
        for segment, (features, frames) in truth.items():
            try:
                view = FeatureStore(root).view("full")
                if resident is None:
                    got, where = view.rows(segment)
                    assert torch.equal(where, frames), segment
                elif segment in view.place:
                    stream = Streams(view, [], [segment], resident=resident)
                    got = stream.batch(np.array([0]), np.arange(len(features))[None]).video[0].half()
                    assert stream.lengths.tolist() == [len(features)], segment
                else:
                    raise DataError("not there")
                assert torch.equal(got, features), segment
            except DataError as e:
                assert "\n" not in str(e), e
                refused += 1
    return refused


def _foreign(path: Path) -> None:
    save_file({"weights": torch.ones(3)}, path)


def _other_segments(folder: Path, rng: random.Random) -> None:
    "An index.json that fits the sizes of the shards, and not what they hold."
    index = json.loads((folder / "index.json").read_text())
    for shard in index.values():
        names, rows = list(shard["segments"]), list(shard["segments"].values())
        shard["segments"] = dict(zip(names, rows[1:] + rows[:1]))
    (folder / "index.json").write_text(json.dumps(index))


def _without_index_flip(folder: Path, rng: random.Random) -> None:
    (folder / "index.json").unlink()
    flip(folder / "b.safetensors", rng)


STORE: dict[str, Callable[[Path, random.Random], object]] = {  # what happens to the folder of a view
    "a flipped bit in a shard": lambda f, rng: flip(f / "b.safetensors", rng),
    "a flipped bit in a shard without index.json": _without_index_flip,
    "a cut shard": lambda f, rng: cut(f / "b.safetensors", rng),
    "an empty shard": lambda f, rng: (f / "b.safetensors").write_bytes(b""),
    "a shard that is gone": lambda f, rng: (f / "b.safetensors").unlink(),
    "a shard under the name of another": lambda f, rng: shutil.copy(f / "a.safetensors", f / "b.safetensors"),
    "a copy of a shard": lambda f, rng: shutil.copy(f / "a.safetensors", f / "a copy.safetensors"),
    "index.json is gone": lambda f, rng: (f / "index.json").unlink(),
    "index.json of other segments": _other_segments,
    "a flipped bit in index.json": lambda f, rng: flip(f / "index.json", rng),
    "index.json is cut": lambda f, rng: cut(f / "index.json", rng),
    "index.json of another kind": lambda f, rng: (f / "index.json").write_text(rng.choice(
        ["[]", "3", '{"b.safetensors": 1}', "null", '{"b.safetensors": {"bytes": null}}'])),
    "a foreign safetensors file": lambda f, rng: _foreign(f / "model.safetensors"),
    "a text called a shard": lambda f, rng: (f / "notes.safetensors").write_text("no shard"),
    "a folder called a shard": lambda f, rng: (f / "x.safetensors").mkdir(),
    "a link that leads nowhere": lambda f, rng: (f / "x.safetensors").symlink_to("nowhere"),
    "a shard of another width": lambda f, rng: write_shard(f / "w.safetensors", [("w_0", torch.ones(3, 4), np.arange(3))]),
    "a shard of numbers that are not finite": lambda f, rng: write_shard(f / "b.safetensors", [("b_0", torch.full((3, 8), torch.inf), np.arange(3))]),
    "temporary files of killed writers": lambda f, rng: [(f / name).write_bytes(rng.randbytes(99)) for name in (
        ".a.safetensors.9-1.part", ".tmpAbc123", ".index.json.7.part")],
    "a damaged failures.jsonl": lambda f, rng: (f / "failures.jsonl").write_text('{"segment_id": "x", "cause": "y", "bytes": 3}\n{"segm'),
}


def damaged_stores(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "A store that was whole: what is read is right or refused, `repair` leaves a right store, and what it set aside is made anew."
    weight = lambda kind: many if "flipped" in kind or "cut" in kind else 1
    for kind in [kind for kind in STORE for _ in range(weight(kind))]:
        root = folder / "store"
        shutil.rmtree(root, ignore_errors=True)
        truth = small_store(root, rng.randrange(10**6))
        whole = store_bytes(root)
        shards = {name: {i: truth[i] for i in truth if i[0] == name[5]} for name in whole if name.endswith(".safetensors")}

        def trial() -> str | None:
            STORE[kind](root / "full", rng)
            infinite = "finite" in kind  # a right checksum of wrong numbers, which training and `verify` look for
            refused = 0 if infinite else read_all(root, truth)
            sentence = said(lambda: FeatureStore(root).view("full").rows("b_1")) or (FeatureStore(root).verify() or [""])[0]
            assert sentence or not refused or "gone" in kind
            repaired = FeatureStore(root).repair()
            assert FeatureStore(root).verify() == [] and len(FeatureStore(root).repair()) == 0
            read_all(root, truth)
            there = store_bytes(root)
            for name in shards:
                if name not in there: write_shard(root / name, [(i, f, n.numpy()) for i, (f, n) in shards[name].items()])
            FeatureStore(root).refresh()
            assert not read_all(root, truth)
            left = {name: content for name, content in store_bytes(root).items() if name != "full/failures.jsonl"}
            harmless = {name for name in left if left[name] != whole.get(name)}
            assert not (harmless | (set(whole) - set(left))) or kind.startswith("a flipped bit"), harmless  # a bit that means nothing, such as a space
            lost = [name for name in shards if name not in there]
            assert len(lost) <= (2 if "copy" in kind or "name of another" in kind else 1), repaired
            return sentence or None

        yield injected("store", kind, trial)


def manifests(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "Without a manifest nothing says how features were made: they are neither read nor added to."
    harms = {"manifest.json is gone": Path.unlink, "manifest.json is empty": lambda p: p.write_text(""), "manifest.json is cut": lambda p: cut(p, rng),
             "manifest.json of another kind": lambda p: p.write_text(rng.choice(["[]", "{}", "7", '{"dim": "wide"}']))}
    for kind, harm in harms.items():
        features = folder / "features"
        shutil.rmtree(features, ignore_errors=True)
        shutil.copytree(place.features, features)

        def trial() -> str | None:
            (store,) = stores(features)
            harm(store.root / "full" / "manifest.json")
            before = store_bytes(features)
            sentence = said(lambda: extract_dataset(place.extraction(features)))
            assert sentence and said(lambda: FeatureStore(store.root).segment("v0_0", "full")) and store_bytes(features) == before
            return sentence

        yield injected("extraction", kind, trial)


def extracted_again(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "Damage between two extractions: with `repair=True` the second ends in the bytes of the first."
    for _ in range(many):
        features = folder / "features"
        shutil.rmtree(features, ignore_errors=True)
        shutil.copytree(place.features, features)
        shards = sorted(features.rglob("*.safetensors"))
        shards = [s for s in shards if "text" not in s.parts]
        harmed = rng.sample(shards, 3)

        def trial() -> str | None:
            flip(harmed[0], rng, 0.5), cut(harmed[1], rng), harmed[2].unlink()
            sentence = said(lambda: extract_dataset(place.extraction(features)))
            _, report = extract_dataset(place.extraction(features, repair=True))
            assert report.extracted <= 2 * 3 and store_bytes(features) == place.bytes, report
            return sentence

        yield injected("extraction", "a flipped bit, a cut shard and one that is gone, then repair=True", trial)


def jumping_clocks(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "Files from the future and from before they can have been made."
    for years in (-40, -1, 1, 60):
        def trial() -> None:
            features, runs = folder / f"features{years}", folder / f"runs{years}"
            shutil.copytree(place.features, features)
            _interrupted(replace(place.training(runs), features_root=str(features)), 3)
            gone = rng.choice([s for s in sorted(features.rglob("*.safetensors")) if "text" not in s.parts])
            gone.unlink()
            for file in [*features.rglob("*"), *runs.rglob("*")]:
                stat = file.stat()
                os.utime(file, (max(0, stat.st_atime + years * 3.15e7 * rng.random()), max(0, stat.st_mtime + years * 3.15e7 * rng.random())))
            extract_dataset(place.extraction(features))
            assert store_bytes(features) == place.bytes
            run = train(replace(place.training(runs), features_root=str(features)))
            assert (run.folder / "model.safetensors").read_bytes() == (place.run / "model.safetensors").read_bytes()

        yield injected("extraction and training", f"a clock that jumps by up to {years} years", trial)


def _interrupted(config, epoch: int) -> Path:  # folder of the run
    "Stops a run after an epoch; its checkpoint stays."
    original = Trainer.run_epoch

    def until(self):
        if self.epoch == epoch: raise KeyboardInterrupt
        return original(self)

    with patch.object(Trainer, "run_epoch", until):
        try:
            train(config)
        except KeyboardInterrupt:
            return Path(config.runs_root) / config.name
    raise AssertionError("it was not stopped")


def damaged_runs(place: Place, folder: Path, rng: random.Random, many: int) -> Iterator[Fault]:
    "A damaged checkpoint is noticed and the run ends in the same weights; a damaged finished run is refused."
    run = _interrupted(place.training(folder / "runs"), 3)
    whole = {p.name: p.read_bytes() for p in run.iterdir()}
    for kind in [kind for kind in ("a flipped bit in checkpoint.pt", "checkpoint.pt is cut", "history.csv is cut") for _ in range(many)]:
        def trial() -> str | None:
            shutil.rmtree(run)
            run.mkdir()
            for name, content in whole.items(): (run / name).write_bytes(content)
            (cut if "cut" in kind else flip)(run / ("history.csv" if "history" in kind else "checkpoint.pt"), rng)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = train(place.training(folder / "runs"))
            assert (run / "model.safetensors").read_bytes() == (place.run / "model.safetensors").read_bytes()
            assert len(result.history) == 6 and result.metrics["results"] == RunResult.read(place.run).metrics["results"]
            return next((str(w.message) for w in caught if "begins anew" in str(w.message)), None)

        yield injected("training", kind, trial)
    for name, harm in [("metrics.json", lambda p: cut(p, rng)), ("config.json", lambda p: cut(p, rng)), ("history.csv", lambda p: p.write_bytes(b"")),
                       ("history.csv", lambda p: p.write_bytes(rng.randbytes(300))), ("model.safetensors", lambda p: cut(p, rng))]:
        def trial() -> str | None:
            done = folder / "done" / "run"
            shutil.rmtree(done.parent, ignore_errors=True)
            shutil.copytree(place.run, done)
            harm(done / name)
            sentence = said(lambda: restore(RunResult.read(done), torch.device("cpu")))
            assert sentence
            return sentence

        yield injected("training", f"a finished run whose {name} is damaged", trial)
