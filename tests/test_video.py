"""The frames that were asked for, or an error: sampling, seeking, damaged files, and workers that die."""
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videos import (count, cut_short, large, misbehave, number_of, numbers_of, overwrite, remux, trim_end, turn,
                    wait_or_write, write_jpegs, write_video)
from xmic import video
from xmic.files import DataError
from xmic.video import Backend, DecodePool, VideoError, decoder_version, frame_indices, frame_times, iter_frames, probe, read_frames

BACKENDS = ["decord", "pyav"]
both = pytest.mark.parametrize("backend", BACKENDS)
ROOT = Path(__file__).resolve().parents[1]


class Extreme:
    "Instead of a random generator: always the smallest or the largest value."

    def __init__(self, largest): self.largest = largest

    def integers(self, low, high, n): return np.full(n, high - 1 if self.largest else low)


# Which frames

def test_frame_indices_are_those_of_the_release(golden):
    reference = json.loads((golden / "frame_indices.json").read_text())
    for row in reference["epic"]:
        segment = 0, row["stop_frame"] - row["start_frame"] - 1, row["T"]
        assert frame_indices(*segment).tolist() == row["test"]
        assert frame_indices(*segment, train=True, rng=Extreme(False)).tolist() == row["train_min"]
        assert frame_indices(*segment, train=True, rng=Extreme(True)).tolist() == row["train_max"]
    for row in (row for row in reference["ego4d"] if "classified" in row):
        assert frame_indices(*row["range"], row["T"]).tolist() == row["classified"]
        if "train_min_classified" in row:
            assert frame_indices(*row["range"], row["T"], True, Extreme(False)).tolist() == row["train_min_classified"]
            assert frame_indices(*row["range"], row["T"], True, Extreme(True)).tolist() == row["train_max_classified"]


@given(start=st.integers(0, 10**6), length=st.integers(1, 10**5), n=st.integers(1, 64), seed=st.integers(0, 9))
def test_one_frame_of_each_bin(start, length, n, seed):
    for frames in (frame_indices(start, start + length, n), frame_indices(start, start + length, n, True, np.random.default_rng(seed))):
        assert frames.dtype == np.int64 and len(frames) == n and start <= frames.min() and frames.max() < start + length
        places = (frames - start).tolist()
        assert all(k * length // n <= places[k] < (k + 1) * length / n for k in range(n)) and places == sorted(places)


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 10**5)), min_size=1, max_size=8), st.integers(1, 64), st.sampled_from([None, False, True]))
def test_many_segments_at_once_are_as_each_alone(segments, n, largest):
    start, length = np.array(segments).T
    draw = dict(train=True, rng=Extreme(largest)) if largest is not None else {}
    together = frame_indices(start, start + length, n, **draw)
    assert together.shape == (len(segments), n) and together.dtype == np.int64
    assert together.tolist() == [frame_indices(a, a + b, n, **draw).tolist() for a, b in segments]


def test_each_segment_has_its_own_jitter():
    draws = frame_indices(np.zeros(500, int), np.full(500, 160), 16, True, np.random.default_rng(0))
    assert len(np.unique(draws, axis=0)) == 500 and abs(np.corrcoef((draws - 10 * np.arange(16))[:, :2].T)[0, 1]) < 0.2


def test_jitter_is_uniform_and_seeded():
    draws = np.stack([frame_indices(10, 90, 8, True, np.random.default_rng(i)) for i in range(2000)]) - 10 - 10 * np.arange(8)
    assert set(np.unique(draws)) == set(range(10))
    assert np.abs(np.bincount(draws.ravel()) / 1600 - 1).max() < 0.1
    assert (frame_indices(0, 99, train=True, rng=np.random.default_rng(5)) == frame_indices(0, 99, train=True, rng=np.random.default_rng(5))).all()


@pytest.mark.parametrize("segment", [(5, 5), (6, 5), (0, 10, 0), (0, 10, -3), (np.array([0, 5]), np.array([9, 5]))])
def test_empty_segments_are_refused(segment):
    with pytest.raises(DataError): frame_indices(*segment)


# Reading

MADE = {
    "plain.mp4": {}, "plain.mkv": {}, "plain.mov": {}, "b0.mp4": dict(b_frames=0), "b5.mp4": dict(b_frames=5, gop=50),
    "variable.mp4": dict(variable=True), "variable.mkv": dict(variable=True), "ntsc.mp4": dict(fps=30000 / 1001),
    "tall.mp4": dict(size=(90, 160)), "hd.mp4": dict(color=1, size=(322, 178)), "index_last.mp4": dict(faststart=False),
    "long_gop.mp4": dict(gop=250), "hevc.mp4": dict(codec="libx265", b_frames=0), "vp9.webm": dict(codec="libvpx-vp9"),
}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("videos")
    return {name: write_video(folder / name, frames=100, **options) for name, options in MADE.items()}


@both
@pytest.mark.parametrize("name", MADE)
def test_seeking_is_exact(made, name, backend):
    for indices in ([0], [99], [57], [99, 98, 0, 51, 51, 3], range(100), range(0, 100, 7), range(40, 60)):
        assert numbers_of(read_frames(made[name], indices, backend)) == list(indices)
    rng = np.random.default_rng(0)
    for _ in range(10):
        indices = rng.integers(0, 100, 6)
        assert numbers_of(read_frames(made[name], indices, backend)) == indices.tolist()


@pytest.mark.parametrize("name", MADE)
def test_backends_agree_to_the_last_bit(made, name):
    pytest.importorskip("decord")
    assert (read_frames(made[name], range(0, 100, 3), "decord") == read_frames(made[name], range(0, 100, 3), "pyav")).all()
    assert probe(made[name], "decord") == probe(made[name], "pyav")
    assert np.allclose(frame_times(made[name], "decord"), frame_times(made[name], "pyav"), atol=1e-4)


@both
def test_result_is_rgb(made, backend):
    from videos import numbered_frame
    frame = read_frames(made["plain.mp4"], [42], backend)
    assert frame.dtype == np.uint8 and frame.shape == (1, 120, 160, 3)
    assert np.abs(frame[0].astype(int) - numbered_frame(42)).mean() < 5


@both
@pytest.mark.parametrize("chunk", [1, 7, 16, 200])
def test_iter_frames_gives_the_same(made, backend, chunk):
    for name in ("b5.mp4", "variable.mkv"):
        indices = sorted(np.random.default_rng(1).choice(100, 40, replace=False))
        parts = list(iter_frames(made[name], indices, chunk, backend))
        assert np.concatenate([i for i, _ in parts]).tolist() == indices
        assert all(len(i) == len(f) <= chunk for i, f in parts)
        assert numbers_of(np.concatenate([f for _, f in parts])) == indices


def test_iter_frames_reads_forward_only(made):
    for indices in ([3, 3], [5, 4]):
        with pytest.raises(DataError, match="increase"): next(iter_frames(made["plain.mp4"], indices))


@both
def test_probe(made, backend):
    info = probe(made["tall.mp4"], backend)
    assert (info.frames, info.fps, info.width, info.height, info.duration, info.folder) == (100, 25, 90, 160, 4, False)
    assert probe(made["ntsc.mp4"], backend).fps == pytest.approx(30000 / 1001, rel=1e-6)
    info, times = probe(made["variable.mp4"], backend), frame_times(made["variable.mp4"], backend)
    steps = np.random.default_rng(0).choice([20, 40, 120], 100)
    assert times == pytest.approx(np.concatenate([[0], steps[:-1].cumsum()]) / 1000, abs=1e-4)
    assert info.fps == pytest.approx(99 / times[-1], rel=0.01)


@both
def test_readers_interleave(made, backend):
    "Several readers of one file and of others at the same time do not disturb each other."
    a, b = (iter_frames(made["plain.mp4"], range(first, 100, 2), 5, backend) for first in (0, 1))
    for (i, frames), (j, others) in zip(a, b):
        assert numbers_of(frames) == i.tolist() and numbers_of(others) == j.tolist()
        assert number_of(read_frames(made["plain.mp4"], [33], backend)[0]) == 33
        assert number_of(read_frames(made["b5.mp4"], [77], backend)[0]) == 77


@both
def test_a_replaced_file_is_read_anew(tmp_path, backend):
    path = write_video(tmp_path / "a.mp4", frames=40)
    assert probe(path, backend).frames == 40
    write_video(path, frames=60, size=(320, 120))
    assert numbers_of(read_frames(path, [59, 2], backend)) == [59, 2]


@both
def test_a_turned_video_is_upright(tmp_path, made, backend):
    path = tmp_path / "turned.mp4"
    path.write_bytes(made["plain.mp4"].read_bytes())
    turn(path)
    assert (read_frames(path, [5, 60], backend) == np.rot90(read_frames(made["plain.mp4"], [5, 60], "pyav"), -1, (1, 2))).all()
    assert (probe(path, backend).width, probe(path, backend).height) == (120, 160)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@both
def test_a_forked_process_reads_too(made, backend):
    read_frames(made["plain.mp4"], [1], backend)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        frames = pool.apply_async(read_frames, (made["plain.mp4"], [50, 7], backend)).get(timeout=60)
    assert numbers_of(frames) == [50, 7] and numbers_of(read_frames(made["plain.mp4"], [2], backend)) == [2]


def test_folder_of_frames(tmp_path):
    folder = write_jpegs(tmp_path / "P01_01", 30)
    assert numbers_of(read_frames(folder, [29, 0, 7, 7])) == [29, 0, 7, 7]
    assert [numbers_of(f) for _, f in iter_frames(folder, range(25), 10)] == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
    info = probe(folder, Backend(fps=50))
    assert (info.frames, info.fps, info.width, info.height, info.folder) == (30, 50, 160, 120, True)
    assert frame_times(folder, Backend(fps=50))[-1] == pytest.approx(0.58)
    (folder / "frame_0000000008.jpg").unlink()
    assert probe(folder).frames == 30 and numbers_of(read_frames(folder, [6, 8])) == [6, 8]
    with pytest.raises(VideoError, match="frame_0000000008.jpg") as e: read_frames(folder, [6, 7])
    assert e.value.frames == (7,)
    cut_short(folder / "frame_0000000011.jpg", 0.6)
    with pytest.raises(VideoError, match="frame_0000000011.jpg"): read_frames(folder, [10])
    with pytest.raises(VideoError, match="frames 0 to 29"): read_frames(folder, [30])


@pytest.mark.parametrize("indices", [[], [[1]], [1.5], ["a"], [True]])
def test_strange_indices_are_refused(made, indices):
    with pytest.raises(DataError, match="whole number"): read_frames(made["plain.mp4"], indices)


def test_unknown_backend_is_refused(made):
    for call in (lambda: read_frames(made["plain.mp4"], [0], "opencv"), lambda: decoder_version("opencv")):
        with pytest.raises(DataError, match="'decord', 'pyav' or 'torchcodec'"): call()


def test_without_decord_pyav_reads(made, monkeypatch):
    monkeypatch.setattr(video, "find_spec", lambda name: None)
    assert decoder_version() == decoder_version("pyav") and "PyAV" in decoder_version()
    monkeypatch.setattr(video, "_DecordReader", None)
    assert numbers_of(read_frames(made["plain.mp4"], [9, 4])) == [9, 4]


# Damaged files

@both
@pytest.mark.parametrize("indices", [[100], [-1], [5, 100, 120]])
def test_frames_outside_are_refused(made, backend, indices):
    with pytest.raises(VideoError, match="frames 0 to 99") as e: read_frames(made["plain.mp4"], indices, backend)
    assert e.value.frames == tuple(i for i in indices if i != 5) and e.value.path == str(made["plain.mp4"])


NO_VIDEOS = {
    "missing.mp4": lambda path: None,
    "empty.mp4": lambda path: path.write_bytes(b""),
    "zeros.mp4": lambda path: path.write_bytes(bytes(50_000)),
    "text.mp4": lambda path: path.write_text("start_sec,stop_sec\n0,1\n" * 500),
    "folder": lambda path: path.mkdir(),
    "no_index.mp4": lambda path: cut_short(write_video(path, faststart=False), 0.8),
    "header.mp4": lambda path: cut_short(write_video(path), 0.01),
    "sound.mp4": lambda path: write_sound(path),
}


def write_sound(path):
    import av
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@both
@pytest.mark.parametrize("name", NO_VIDEOS)
def test_what_is_no_video_is_refused(tmp_path, backend, name):
    path = tmp_path / name
    NO_VIDEOS[name](path)
    for call in (lambda: read_frames(path, [3, 4], backend), lambda: probe(path, backend), lambda: list(iter_frames(path, [3, 4], 1, backend))):
        with pytest.raises(VideoError) as e: call()
        assert str(e.value).startswith(str(path)) and len(e.value.cause) > 10


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_title_that_is_not_utf8_does_not_matter(tmp_path, suffix):
    from xmic.timeline import open_stream
    plain = write_video(tmp_path / f"a{suffix}", frames=20, b_frames=0, title="Kueche of P01")
    content = plain.read_bytes()
    assert b"Kueche of P01" in content
    path = tmp_path / f"b{suffix}"
    path.write_bytes(content.replace(b"Kueche of P01", b"K\xfcche \xff\xfe\xe4 P01"))
    assert probe(path, "pyav") == probe(plain, "pyav")
    assert numbers_of(read_frames(path, [0, 7, 19], "pyav")) == [0, 7, 19]
    with open_stream(str(path)) as (_, frames): assert numbers_of(np.stack(list(frames))) == list(range(20))


@both
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.97])
def test_cut_short(tmp_path, backend, suffix, share):
    "What is whole can be read, or nothing; what is lost never comes back as another frame."
    path = cut_short(write_video(tmp_path / f"a{suffix}", frames=100), share)
    with pytest.raises(VideoError): read_frames(path, [0, 99], backend)
    for index in range(0, 100, 3):
        try:
            assert number_of(read_frames(path, [index], backend)[0]) == index
        except VideoError:
            assert index > 100 * share - 40


@both
@pytest.mark.parametrize("seed", range(12))
def test_damaged_pictures_are_refused(tmp_path, backend, seed, made):
    "Noise somewhere in the pictures of an MP4: what is handed out is right, and most of the rest of the file can still be read."
    start = np.random.default_rng(seed).uniform(0.2, 0.95)
    path = tmp_path / "a.mp4"
    path.write_bytes(made["variable.mp4" if seed % 2 else "plain.mp4"].read_bytes())
    sound = read_frames(path, range(100), "pyav")
    overwrite(path, start, start + 0.03, seed)
    refused = 0
    for first in range(0, 100, 10):
        indices = list(range(first, first + 10, 2))
        try:
            frames = read_frames(path, indices, backend)
        except VideoError:
            refused += 1
        else:
            assert (frames == sound[indices]).all()
    assert 1 <= refused <= 6


@both
def test_undecodable_beginning(tmp_path, made, backend):
    path = remux(made["plain.mp4"], tmp_path / "a.mp4", drop=5)
    for indices in ([0], [1, 2], range(95)):
        with pytest.raises(VideoError): read_frames(path, indices, backend)
    assert numbers_of(read_frames(path, [7, 40, 94], backend)) == [12, 45, 99]


@both
@pytest.mark.parametrize("hide", [0.2, 0.6])
def test_hidden_beginning(tmp_path, made, backend, hide):
    "Frames that an edit list hides do not count. decord would count them, so it is not used for such files."
    path = remux(made["plain.mp4"], tmp_path / "a.mp4", hide=hide)
    hidden = round(hide * 25)
    assert probe(path, backend).frames == 100 - hidden and probe(path, backend).reader == "pyav"
    assert numbers_of(read_frames(path, [0, 50, 99 - hidden], backend)) == [hidden, 50 + hidden, 99]


@both
@pytest.mark.parametrize("shown", [50, 88, 90, 97, 99])
def test_hidden_end(tmp_path, backend, shown):
    path = trim_end(write_video(tmp_path / "a.mp4", frames=100), shown / 25)
    assert numbers_of(read_frames(path, [0, shown // 2, shown - 1], backend)) == [0, shown // 2, shown - 1]
    with pytest.raises(VideoError): read_frames(path, [shown], backend)


@both
@pytest.mark.parametrize("codec", ["libx264", "libx265"])
def test_open_groups_of_pictures(tmp_path, backend, codec):
    "Where pictures refer to the keyframe behind them."
    path = write_video(tmp_path / "a.mp4", frames=100, codec=codec, b_frames=3, open_gop=True)
    for indices in ([0], [48, 60, 99], range(0, 100, 7), range(100)):
        assert numbers_of(read_frames(path, indices, backend)) == list(indices)


@both
@pytest.mark.parametrize("suffix", [".avi", ".ts"])
def test_containers_without_exact_seeking(tmp_path, backend, suffix):
    path = write_video(tmp_path / f"a{suffix}", frames=100)
    for indices in ([60], [3, 60, 99], range(0, 100, 7)):
        assert numbers_of(read_frames(path, indices, backend)) == list(indices)


@both
def test_av1_is_read(tmp_path, backend):
    try:
        path = write_video(tmp_path / "a.mp4", frames=40, codec="libsvtav1")
    except ValueError:
        pytest.skip("this PyAV has no AV1 encoder")
    assert numbers_of(read_frames(path, [33, 3], backend)) == [33, 3] and probe(path, backend).reader == "pyav"


@both
def test_a_still_video_is_fine(tmp_path, backend):
    still = np.full((120, 160, 3), 90, np.uint8)
    path = write_video(tmp_path / "a.mp4", images=[still] * 60)
    assert np.abs(read_frames(path, range(60), backend).astype(int) - 90).max() < 4


def test_errors_travel(tmp_path):
    import pickle
    e = pickle.loads(pickle.dumps(VideoError(tmp_path / "a.mp4", "cut short", np.arange(9))))
    assert type(e) is VideoError and e.frames == tuple(range(9)) and "a.mp4, frames 0, 1, 2, 3, 4 and 4 more: cut short" in str(e)


# Memory

@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("long") / "a.mp4", frames=1500, size=(320, 240), gop=250)


READ = """
import sys, time
import psutil
from xmic.video import frame_indices, iter_frames, read_frames

path, backend = sys.argv[1:]
used = lambda: psutil.Process().memory_info().rss
for name in (backend, "pyav"): read_frames(path, [0], name)
before = used()
read_frames(path, frame_indices(0, 1500), backend)
time.sleep(1)
most = used()
for number, _ in enumerate(iter_frames(path, range(1500), 32, backend)):
    if number < 10: time.sleep(0.1)
    most = max(most, used())
print(most - before)
"""


@pytest.mark.slow
@both
def test_memory_stays_small(long_video, backend):
    """16 frames of a video of 1,500, and all of them in chunks; held whole they would be 350 MB.

    Until decord has been sent back it decodes on, so where this process waits for its turn it may hold more: once, not always."""
    grown = []
    while len(grown) < 10 and min(grown, default=1e9) > 100e6:
        time.sleep(len(grown))  # on a machine that lets processes wait, it may let them wait for seconds
        grown.append(int(subprocess.run([sys.executable, "-c", READ, long_video, backend], capture_output=True, text=True, check=True).stdout))
    assert min(grown) < 100e6, grown


# Workers

def results(items):
    "What each task gave: its chunks and how it ended."
    chunks, ends = {}, {}
    for item in items:
        assert item.task not in ends
        if item.done: ends[item.task] = item.error
        else: chunks.setdefault(item.task, []).append(item.chunk)
    return chunks, ends


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_pool_gives_everything_in_order(workers, ordered):
    tasks = [5, 0, 30, 1, 2, 7, 3]
    with DecodePool(workers, 60) as pool:
        for _ in range(2):
            items = list(pool.map(count, iter(tasks), ordered))
            chunks, ends = results(items)
            assert ends == dict.fromkeys(range(7)) and all(chunks.get(i, []) == list(range(n)) for i, n in enumerate(tasks))
            if ordered: assert [item.task for item in items] == sorted(item.task for item in items)
        assert list(pool.map(count, [])) == []


def test_workers_decode(made, tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    paths = [made["plain.mp4"], tmp_path / "text.mp4", made["b5.mp4"], tmp_path / "missing.mp4"]
    with DecodePool(2, 60) as pool:
        chunks, ends = results(pool.map(partial(iter_frames, indices=range(0, 100, 4), chunk=10), paths))
    for task in (0, 2):
        assert numbers_of(np.concatenate([frames for _, frames in chunks[task]])) == list(range(0, 100, 4)) and ends[task] is None
    assert type(ends[1]) is type(ends[3]) is VideoError and ends[1].path == str(paths[1]) and "no such file" in str(ends[3])


def test_workers_do_not_import_torch():
    import torch  # here it is
    with DecodePool(1, 60) as pool:
        assert [item.chunk for item in pool.map(misbehave, ["torch"])][1] is False


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_an_interrupt_does_not_reach_the_first_worker_either():
    code = """
from xmic.video import _Worker
worker = _Worker(60)
(blocked,) = (line.split()[1] for line in open(f"/proc/{worker.process.pid}/status") if line.startswith("SigBlk"))
worker.stop()
assert int(blocked, 16) & 2, blocked
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, cwd=ROOT)


@pytest.mark.parametrize("ordered", [True, False])
def test_faults_stay_with_their_task(ordered):
    tasks = ["fine", "hang", "bug", "fine", "crash", "fine"]
    with DecodePool(2, 2) as pool:
        chunks, ends = results(pool.map(misbehave, tasks, ordered))
        assert [chunks[i][1:] for i in (0, 3, 5)] == [["fine"]] * 3 and all(ends[i] is None for i in (0, 3, 5))
        assert isinstance(ends[1], VideoError) and "no frame came for 2 s" in str(ends[1])
        assert isinstance(ends[2], RuntimeError) and "KeyError: 'a bug'" in str(ends[2]) and "misbehave" in str(ends[2])
        assert isinstance(ends[4], VideoError) and "SIGSEGV" in str(ends[4])
        assert not psutil.pid_exists(chunks[1][0]) and not psutil.pid_exists(chunks[4][0])
        assert results(pool.map(misbehave, ["fine"]))[1] == {0: None}


@pytest.mark.parametrize("ordered", [True, False])
def test_a_worker_that_takes_long_to_die_gets_no_task(ordered, monkeypatch):
    stop, stopped = video._Worker.stop, []

    def linger(worker):
        stop(worker)
        stopped.append(worker)
        monkeypatch.setattr(worker.process, "is_alive", lambda: True)  # it was killed, and is not gone yet

    monkeypatch.setattr(video._Worker, "stop", linger)
    with DecodePool(2, 2) as pool:
        chunks, ends = results(pool.map(misbehave, ["hang", "fine", "crash", "fine", "fine"], ordered))
    assert stopped and "no frame came" in str(ends[0]) and "SIGSEGV" in str(ends[2])
    assert all(ends[i] is None and chunks[i][1:] == ["fine"] for i in (1, 3, 4))


def test_a_killed_worker_is_reported():
    with DecodePool(2, 60) as pool:
        items, killed = [], None
        for item in pool.map(misbehave, ["hang", "fine", "fine", "fine"], ordered=False):
            if item.task == 0 and killed is None:
                killed = item.chunk
                os.kill(killed, signal.SIGKILL)
            items.append(item)
    ends = results(items)[1]
    assert "SIGKILL" in str(ends.pop(0)) and ends == {1: None, 2: None, 3: None}


def test_errors_name_the_task():
    from types import SimpleNamespace
    worker = video._Worker(60)
    worker.begin(4, misbehave, SimpleNamespace(video_id="P01_01"))
    assert worker.give_up("killed").error.path == "P01_01"


@pytest.mark.parametrize("ordered", [True, False])
def test_a_worker_waits_to_be_read(tmp_path, ordered):
    "No worker runs far ahead of a slow reader."
    tasks = [(str(tmp_path / str(i)), 60) for i in range(2)]
    with DecodePool(2, 60, ahead=3) as pool:
        items = pool.map(large, tasks, ordered)
        first = next(items)
        time.sleep(2)
        made = [int(Path(path).read_text() or 0) if Path(path).exists() else 0 for path, _ in tasks]
        assert max(made) <= 12 and (first.chunk == 0).all()
        chunks, ends = results([first, *items])
    assert [len(chunks[i]) for i in range(2)] == [60, 60] and ends == {0: None, 1: None}
    assert all((chunk == number).all() for number, chunk in enumerate(chunks[1]))


def test_workers_work_ahead_of_their_turn(tmp_path):
    "The first task only ends once the second, whose turn comes later, is made."
    with DecodePool(2, 120, ahead=100) as pool:
        chunks, ends = results(pool.map(wait_or_write, [("wait", str(tmp_path / "made")), ("write", str(tmp_path / "made"))]))
    assert ends == {0: None, 1: None} and chunks == {0: ["the other is made"], 1: list(range(40))}


def test_a_slow_reader_is_no_hanging_worker(tmp_path):
    "The second worker waits two seconds for its turn, with a time limit of one."
    with DecodePool(2, 1, ahead=1) as pool:
        ends = {}
        for item in pool.map(large, [(str(tmp_path / str(i)), 8) for i in range(2)]):
            time.sleep(0.25)
            if item.done: ends[item.task] = item.error
    assert ends == {0: None, 1: None}


def test_a_pool_that_is_left_early_leaves_nothing():
    with DecodePool(2, 60) as pool:
        for item in pool.map(misbehave, ["hang", "hang"], ordered=False): break
        assert results(pool.map(count, [3, 4]))[1] == {0: None, 1: None}
        processes = [worker.process.pid for worker in pool._running]
    assert not any(psutil.pid_exists(pid) for pid in [item.chunk, *processes])


def test_functions_of_the_script_are_refused():
    function = partial(count).func
    lost = type("F", (), {"__call__": lambda self, task: count(task), "__module__": "__main__", "__name__": "mine"})()
    with DecodePool(1) as pool, pytest.raises(DataError, match="lie in a module"): next(pool.map(lost, [1]))
    assert function is count


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
import torch
from videos import misbehave
from xmic.video import DecodePool
pool = DecodePool(2, {timeout})
for item in pool.map(misbehave, {tasks}, ordered=False): print(item.chunk, flush=True)
"""


def run_script(**values) -> subprocess.Popen:
    code = SCRIPT.format(tests=str(ROOT / "tests"), **values)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})


def gone(pids, seconds=60) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if not any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids): return True
        time.sleep(0.1)
    return False


def test_no_orphans_when_the_parent_is_killed():
    parent = run_script(tasks=["hang", "hang"], timeout=600)
    workers = [int(parent.stdout.readline()) for _ in range(2)]
    family = [p.pid for p in psutil.Process(parent.pid).children(recursive=True)]
    assert set(workers) <= set(family)
    parent.kill()
    parent.wait()
    assert gone(family)


@pytest.mark.slow
def test_a_script_need_not_guard_its_workers(tmp_path):
    "Workers do not run the script again, so one without `if __name__ == '__main__'` works, and torch stays out of them."
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(ROOT / "tests"), tasks=["torch", "torch"], timeout=60))
    out = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert out.returncode == 0, out.stderr
    assert out.stdout.split().count("False") == 2 and out.stdout.split().count("torch") == 2


# Real clips

@pytest.mark.slow
def test_real_clips(shared_data):
    paths = sorted((shared_data / "real_clips/videos").glob("*.mp4"))
    assert len(paths) == 24
    for path in paths:
        info = probe(path, "pyav")
        indices = frame_indices(0, info.frames)
        frames = read_frames(path, indices, "pyav")
        assert frames.shape == (16, info.height, info.width, 3) and frames.std() > 10 and 10 <= info.fps <= 30
        assert len(read_frames(path, [info.frames - 2, info.frames - 1], "pyav")) == 2
        assert info == probe(path, "decord") and (frames == read_frames(path, indices, "decord")).all()
