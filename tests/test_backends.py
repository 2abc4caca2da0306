"""How videos are opened: by a name, by an object, by code of one's own; and a store that does not mind which."""
import json
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from videos import number_of, write_video
from world import extract_config, register_tiny, write_world
from xmic.features import FeatureStore, StoredView, extract_dataset, read_shard
from xmic.files import DataError, read_json, write_json
from xmic.frames import store_dataset
from xmic.video import Backend, iter_frames, probe, read_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights", "ignore:no hand boxes")

OWN = '''
import av
import numpy as np


class Video:
    def __init__(self, path):
        with av.open(str(path)) as container:
            self.images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        self.times = np.arange(len(self.images)) / 25

    def read(self, indices):
        return np.stack([self.images[i] for i in indices])


class Reader:
    def open(self, path):
        if "v1" in str(path): raise KeyError("not in the archive")
        return Video(path)


class Wrong(Video):
    def read(self, indices):
        return super().read(indices).astype("float32")


class WrongReader:
    def open(self, path): return Wrong(path)


class Unsorted:
    times = [0.0, 2.0, 1.0]


class UnsortedReader:
    def open(self, path): return Unsorted()


nothing = 3
'''


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    register_tiny()
    return write_world(tmp_path_factory.mktemp("world"), videos=4, frames=60)


@pytest.fixture
def own(tmp_path) -> str:
    (tmp_path / "own_reader.py").write_text(OWN)
    return f"{tmp_path / 'own_reader.py'}"


def test_names_and_objects_are_the_same(tmp_path, own, monkeypatch):
    video = write_video(tmp_path / "a.mp4", 30)
    right = read_frames(video, [0, 29, 7], "pyav")
    monkeypatch.syspath_prepend(str(tmp_path))
    import own_reader
    for backend in ("decord", Backend("decord"), Backend("pyav"), f"{own}:Reader", Backend(f"{own}:Reader"), own_reader.Reader(), Backend(own_reader.Reader())):
        assert np.array_equal(read_frames(video, [0, 29, 7], backend), right)
        assert [number_of(f) for _, part in iter_frames(video, range(0, 30, 3), 4, backend) for f in part] == list(range(0, 30, 3))
        assert probe(video, backend) == probe(video, "pyav")
    assert probe(video, f"{own}:Reader").reader == f"{own}:Reader" and probe(video, own_reader.Reader()).reader == "Reader"
    with pytest.raises(DataError, match="frames 0 to 29"): read_frames(video, [30], own_reader.Reader())


@pytest.mark.parametrize("given, says", [
    ("opencv", "backend is 'decord', 'pyav' or 'torchcodec'.* not 'opencv'"), (3, "backend is"), ("nowhere.py:Reader", "there is no file")])
def test_what_is_no_backend(tmp_path, given, says):
    video = write_video(tmp_path / "a.mp4", 5)
    for call in (lambda: probe(video, given), lambda: Backend(given)):
        with pytest.raises(DataError, match=says): call()


@pytest.mark.parametrize("name, says", [
    ("Reader", "v1.mp4: it cannot be opened by .*KeyError"), ("WrongReader", "gives float32 of shape"), ("UnsortedReader", "no times that increase"),
    ("nothing", r"no method open\(path\)"), ("Raeder", "defines no 'Raeder'; did you mean 'Reader'")])
def test_faults_of_a_reader_of_ones_own_are_said(tmp_path, own, name, says):
    video = write_video(tmp_path / "v1.mp4", 5)
    with pytest.raises(DataError, match=says): probe(video, f"{own}:{name}")


def test_torchcodec_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    monkeypatch.setattr("xmic.video.find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install torchcodec") as e: probe(write_video(tmp_path / "a.mp4", 5), "torchcodec")
    assert "\n" not in str(e.value)


def test_torchcodec_gives_the_same_frames(tmp_path):
    pytest.importorskip("torchcodec", reason="needs the optional package torchcodec")
    video = write_video(tmp_path / "a.mp4", 30)
    assert probe(video, "torchcodec").reader == "torchcodec"
    assert np.array_equal(read_frames(video, range(30), "torchcodec"), read_frames(video, range(30), "pyav"))


@pytest.mark.parametrize("workers", [0, 1])
def test_extraction_with_a_reader_of_ones_own(world, tmp_path, own, workers):
    store, report = extract_dataset(extract_config(world, tmp_path / "features", backend=f"{own}:Reader", workers=workers))
    assert (report.extracted, len(report.failed)) == (6, 2) and all("KeyError" in cause and "v1.mp4" in cause for cause in report.failed.values())
    (path,) = (store.root / "full").glob("v0.safetensors")
    (said,) = set(read_shard(path)[2]["readers"])
    assert said.startswith("Reader, SHA-256 ") and len(said) == 32
    _, plain = extract_dataset(extract_config(world, tmp_path / "plain", views=["full"]))
    other = FeatureStore(next((tmp_path / "plain").glob("*/csv")))
    assert (store.segment("v0_0", "full") == other.segment("v0_0", "full")).all()


def test_a_reader_that_workers_cannot_import_is_refused(world, tmp_path):
    kind = type("Mine", (), dict(open=lambda self, path: None, __module__="__main__"))
    with pytest.raises(DataError, match="module that decoding workers can import"): extract_dataset(extract_config(world, tmp_path, backend=kind(), workers=1))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("before", ["PyAV 17.0.0", "decord 0.5.2, long runs by PyAV 11.0.0", "reader.py:Old, SHA-256 0123456789abcdef"])
def test_a_store_is_continued_with_another_decoder(world, tmp_path, before):
    store, _ = extract_dataset(extract_config(world, tmp_path, splits=["train"], backend="pyav"))
    for view in ("full", "hand"): write_json(store.root / view / "manifest.json", read_json(store.root / view / "manifest.json") | dict(decoder=before))
    first = {p: p.read_bytes() for p in store.root.rglob("v*.safetensors")}
    store, report = extract_dataset(extract_config(world, tmp_path))
    assert (report.extracted, report.present) == (6, 2) and store.verify() == [] and store.manifest["full"]["decoder"] == before
    assert all(p.read_bytes() == data for p, data in first.items())
    readers = {i: o.reader for i, o in StoredView(store.root / "full").origins.items()}
    assert readers["v0_0"].startswith("PyAV") and len(readers) == 8 and any(r.startswith("decord") for r in readers.values())


def test_stores_of_earlier_versions_are_read(world, tmp_path):
    "Their shards and indices do not say what read the videos."
    from xmic.clips import Origin
    from xmic.features import write_shard
    store, _ = extract_dataset(extract_config(world, tmp_path))
    for path in store.root.glob("*/v*.safetensors"):
        features, frames, header = read_shard(path)
        rows = list(header["segments"].values())
        origins = {i: Origin(s, v) for i, s, v in zip(header["segments"], header["spans"], header["videos"])}
        write_shard(path, [(i, f.clone(), n.numpy().copy()) for i, f, n in zip(header["segments"], features.split(rows), frames.split(rows))], origins)
        assert "readers" not in read_shard(path)[2]
    for index in store.root.glob("*/index.json"): index.unlink()
    store, report = extract_dataset(extract_config(world, tmp_path))
    assert (report.present, report.extracted, report.unknown) == (8, 0, 0) and store.verify() == []
    assert store.view("full").origins["v0_0"].reader is None


def test_stored_frames_are_continued_too(world, tmp_path):
    store, _ = store_dataset(extract_config(world, tmp_path, splits=["train"], backend="pyav"))
    write_json(store.folder / "manifest.json", read_json(store.folder / "manifest.json") | dict(decoder="decord 0.5.2"))
    store, report = store_dataset(extract_config(world, tmp_path))
    assert (report.extracted, report.present) == (6, 2) and store.verify() == []
    assert store.origins["v0_0"].reader.startswith("PyAV") and any(o.reader.startswith("decord") for o in store.origins.values())


def test_each_video_says_what_read_it(tmp_path):
    "AVI is not read with decord, so PyAV takes over, for this file alone."
    world = write_world(tmp_path / "world", videos=2, frames=60)
    write_video(world / "videos" / "v1.avi", 60, size=(128, 96), codec="mpeg4")
    (world / "videos" / "v1.mp4").unlink()
    store, report = extract_dataset(extract_config(world, tmp_path / "features", splits=["test"], views=["full"]))
    assert report.extracted == 4 and not report.failed
    readers = {i: o.reader.split()[0] for i, o in store.view("full").origins.items()}
    assert readers == {"v0_0": "decord", "v0_1": "decord", "v1_0": "PyAV", "v1_1": "PyAV"}


def wide(path: Path, sar: str = "4/3") -> Path:
    "The same video, whose pixels are wider than high."
    from fractions import Fraction
    made = path.with_name("made.mp4")
    with av.open(str(path)) as source, av.open(str(made), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(sar)
        for frame in source.decode(video=0): out.mux(stream.encode(frame.reformat(format="yuv420p")))
        out.mux(stream.encode())
    made.replace(path)
    return path


def test_pixels_that_are_not_square_are_said(tmp_path):
    from xmic.checks import check_data
    from xmic.recognizer import Recognizer
    world = write_world(tmp_path / "world", videos=2, frames=60)
    video = wide(world / "videos" / "v0.mp4")
    assert probe(video).aspect == pytest.approx(4 / 3) and probe(video).width == 128
    _, report = extract_dataset(extract_config(world, tmp_path / "features", splits=["test"], views=["full"]))
    assert report.aspects == {"v0": pytest.approx(4 / 3)} and "1 video has pixels that are not square (v0: 1.333 times as wide as high)" in repr(report)
    _, report = store_dataset(extract_config(world, tmp_path / "frames", splits=["test"]))
    assert "pixels that are not square (v0: 1.333" in repr(report)
    check = check_data("csv", world, progress=False)
    assert "1 opened video has pixels that are not square: v0.mp4 (1.333 times as wide as high)" in " ".join(str(check).split())
    answer = Recognizer.zero_shot(register_tiny(), "random", "cpu").predict(video, ["cup", "pan"])
    assert any("1.333 times as wide" in note for note in answer.as_dict()["notes"]) and "1.333" in repr(answer)
    square = Recognizer.zero_shot(register_tiny(), "random", "cpu").predict(world / "videos" / "v1.mp4", ["cup", "pan"])
    assert "times as wide" not in json.dumps(square.as_dict())
