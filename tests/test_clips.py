"""From segments to crops: which frames, each cut once, and faults that cost no more than their own segment."""
import pickle
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videos import cut_short, number_of, numbered_frame, numbers_of, overwrite, write_jpegs, write_video
from xmic.clips import READ_AT_ONCE, Clip, ClipTask, Failed, Frames, Pixels, clip_pixels, frame_at, overlapping, wanted_frames
from xmic.files import DataError
from xmic.hands import HandBoxes
from xmic.pixels import Preprocess
from xmic.towers import device_squares
from xmic.video import DecodePool, VideoError, VideoInfo, read_frames

BACKENDS = ["decord", "pyav"]
both = pytest.mark.parametrize("backend", BACKENDS)
SQUARE = Preprocess(size=64, resize="squash")


def segment(name="a", start=0.0, stop=1.0, path="", start_frame=0, stop_frame=0, video_id="v"):
    return SimpleNamespace(segment_id=name, video_id=video_id, video_path=str(path), start_sec=start, stop_sec=stop, start_frame=start_frame, stop_frame=stop_frame)


def info(frames=300, fps=30.0, folder=False):
    return VideoInfo(frames, fps, 160, 120, folder)


# Which frames

def test_every_frame():
    assert wanted_frames(info(), segment(start=1.0, stop=4.0)).tolist() == list(range(30, 120))
    assert wanted_frames(info(fps=60000 / 1001), segment(start=1.0, stop=2.0)).tolist() == list(range(60, 120))
    for rate in (None, 0, 30.0, 60.0):
        assert wanted_frames(info(), segment(start=1.0, stop=4.0), rate).tolist() == list(range(30, 120))


def test_folders_count_official_frames_from_one():
    frames = wanted_frames(info(fps=60.0, folder=True), segment(start=99.0, stop=100.0, start_frame=11, stop_frame=31))
    assert frames.tolist() == list(range(10, 30))  # whatever the seconds say
    with pytest.raises(DataError, match="counted from 1"): wanted_frames(info(folder=True), segment(start_frame=0, stop_frame=31))


def test_a_grid_of_the_video():
    grid = np.round(np.arange(0, 400) * 7.5).astype(int)
    for start, stop in ((0.0, 10.0), (1.0, 4.0), (2.93, 3.91), (5.17, 5.48)):
        first, last = round(start * 30), round(stop * 30)
        assert wanted_frames(info(), segment(start=start, stop=stop), 4).tolist() == [g for g in grid if first <= g < last]


@pytest.mark.parametrize("fps", [10.0, 12.5, 24.0, 25.0, 30.0, 50.0, 60.0, 30000 / 1001, 60000 / 1001])
def test_at_a_constant_rate_a_time_is_rounded_to_a_frame_as_ever(fps):
    "Also where it lies midway between two frames, as 0.1 s does at 25 a second."
    for seconds in (np.arange(0, 3000) / 100, np.arange(0, 30_000) / 1000):
        assert frame_at(seconds, info(frames=int(fps * 40), fps=fps)).tolist() == [round(float(s) * fps) for s in seconds]


def test_a_short_segment_keeps_its_middle_frame():
    assert wanted_frames(info(), segment(start=1.05, stop=1.2), 1).tolist() == [33]
    assert wanted_frames(info(), segment(start=1.0, stop=1.0)).tolist() == [30]
    assert wanted_frames(info(), segment(start=1.1, stop=1.1), 4).tolist() == [33]


@given(fps=st.sampled_from([10.0, 25.0, 30000 / 1001, 50.0, 60000 / 1001]), rate=st.sampled_from([1, 4, 7.5, 8, 24]),
       start=st.floats(0, 9), length=st.floats(0, 9), later=st.floats(0, 3))
def test_overlapping_segments_share_their_grid(fps, rate, start, length, later):
    video = info(frames=int(fps * 30), fps=fps)
    a, b = (wanted_frames(video, segment(start=s, stop=s + length), rate) for s in (start, start + later))
    for frames, s in ((a, start), (b, start + later)):
        first, stop = round(s * fps), max(round((s + length) * fps), round(s * fps) + 1)
        assert frames.dtype == np.int64 and len(frames) and (np.diff(frames) > 0).all() and first <= frames[0] and frames[-1] < stop
        assert abs(len(frames) - length * min(rate, fps)) <= 2
    if len(a) > 1 and len(b) > 1:
        low, high = max(a[0], b[0]), min(a[-1], b[-1])
        assert a[(a >= low) & (a <= high)].tolist() == b[(b >= low) & (b <= high)].tolist()


@pytest.mark.parametrize("fps, slack", [(30.0, 15), (60.0, 30), (2.0, 2)])
@pytest.mark.parametrize("folder", [False, True])
def test_past_the_end(fps, slack, folder):
    "Up to half a second is rounding, and cut off; more is a segment of another video."
    video = info(frames=100, fps=fps, folder=folder)
    place = lambda a, b: segment(start=a / fps, stop=b / fps, start_frame=a + 1, stop_frame=b + 1)
    assert wanted_frames(video, place(90, 100)).tolist() == wanted_frames(video, place(90, 100 + slack)).tolist() == list(range(90, 100))
    assert wanted_frames(video, place(99, 100 + slack)).tolist() == [99]
    for a, b in ((90, 101 + slack), (100, 101), (500, 600)):
        said = f"frames {a} to {b - 1} are wanted, the video ends at 99" if folder else f"{a / fps:.2f} to {b / fps:.2f} s are wanted"
        with pytest.raises(DataError, match=f"segment a: {said}"): wanted_frames(video, place(a, b))


def test_groups():
    frames = {"a": range(0, 10), "b": range(9, 20), "c": range(20, 30), "d": range(40, 90), "e": range(45, 50), "f": range(80, 95), "g": range(95, 96)}
    wanted = [(name, np.array(frames[name])) for name in "gfcbade"]
    assert [[name for name, _ in group] for group in overlapping(wanted)] == [["a", "b"], ["c"], ["d", "e", "f"], ["g"]]
    assert overlapping([]) == []


# Crops

@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("clips") / "v.mp4", frames=100, gop=10)


def task(*segments, views=("full",), preprocess=(SQUARE,), **more) -> ClipTask:
    return ClipTask("v", segments, views, preprocess, **more)


def cut(parts, preprocess):
    "What a device makes of whole frames."
    for part in parts:
        if isinstance(part, Frames): yield from part.cut(preprocess, lambda p, crops: device_squares(p, torch.from_numpy(part.images), crops).numpy())
        else: yield part


def gather(parts):
    "Crops by view (one array for each encoder), clips and failures by segment; checks that nothing is announced before it is sent."
    squares, clips, failed = {}, {}, {}
    for part in parts:
        if isinstance(part, Pixels):
            for encoder, some in enumerate(part.squares): squares.setdefault((part.view, encoder), []).append(some)
        elif isinstance(part, Clip):
            for view, rows in part.rows.items():
                assert len(rows) == len(part.frames) and rows.max(initial=-1) < sum(map(len, squares.get((view, 0), [])))
                assert rows.min() >= (-sum(map(len, squares["full", 0])) if view == "hand" and ("full", 0) in squares else 0)
            assert part.segment_id not in clips
            clips[part.segment_id] = part
        else:
            assert isinstance(part, Failed) and part.segment_id not in failed
            failed[part.segment_id] = part.cause
    assert not set(clips) & set(failed)
    return {key: np.concatenate(some) for key, some in squares.items()}, clips, failed


def write_boxes(path, boxes):
    "A file of boxes: {segment: {frame: box}}."
    path.write_bytes(pickle.dumps(boxes))
    return HandBoxes.from_boxes(path)


@both
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_overlapping_segments_are_cut_once(path, backend, chunk):
    segments = segment("a", 0.0, 2.0, path), segment("b", 1.2, 2.8, path), segment("c", 3.2, 4.0, path), segment("twin", 1.2, 2.8, path)
    parts = list(clip_pixels(task(*segments, backend=backend, chunk=chunk)))
    squares, clips, failed = gather(parts)
    assert failed == {} and set(clips) == {"a", "b", "c", "twin"}
    assert all(len(p.squares[0]) <= chunk for p in parts if isinstance(p, Pixels))
    assert len(squares["full", 0]) == 70 + 20
    for s in segments:
        frames = list(range(round(s.start_sec * 25), round(s.stop_sec * 25)))
        assert clips[s.segment_id].frames.tolist() == frames == numbers_of(squares["full", 0][clips[s.segment_id].rows["full"]])
    assert (clips["b"].rows["full"] == clips["twin"].rows["full"]).all()
    expected = SQUARE.pixels(read_frames(path, range(30, 70), "pyav"))
    assert (squares["full", 0][clips["b"].rows["full"]] == expected).all()


def test_a_rate_is_kept(path):
    squares, clips, _ = gather(clip_pixels(task(segment("a", 0.0, 2.0, path), segment("b", 1.0, 1.1, path), segment("c", 1.08, 4.0, path), feature_fps=5)))
    assert clips["a"].frames.tolist() == list(range(0, 50, 5)) and clips["b"].frames.tolist() == [25] and clips["c"].frames.tolist() == list(range(30, 100, 5))
    assert sorted(numbers_of(squares["full", 0])) == list(range(0, 100, 5))


def test_the_end_of_a_video(path):
    squares, clips, failed = gather(clip_pixels(task(segment("end", 3.6, 4.3, path), segment("late", 3.6, 6.0, path), segment("after", 4.0, 4.2, path))))
    assert clips["end"].frames.tolist() == list(range(90, 100)) and set(failed) == {"late", "after"}
    assert all(str(path) in cause and "the video shows something from 0.00 to 4.00 s" in cause for cause in failed.values())


def test_boxes_of_each_segment(path, tmp_path):
    "Where two segments overlap, each has its own hand boxes; what they agree on is cut once."
    boxes = {"a": {i: (0, 0, 80, 60) for i in range(25)}, "b": {i: (0, 0, 80, 60) if i < 15 else (80, 60, 160, 120) for i in range(10, 35)}}
    boxes["b"][34] = None
    segments = segment("a", 0.0, 1.0, path), segment("b", 0.4, 1.4, path)
    crop = Preprocess(size=60)
    parts = list(clip_pixels(task(*segments, views=("full", "hand"), preprocess=(crop,), boxes=write_boxes(tmp_path / "a.pkl", boxes), chunk=8)))
    squares, clips, failed = gather(parts)
    assert failed == {} and len(squares["full", 0]) == 35
    assert len(squares["hand", 0]) == 25 + 25 - 5 - 1 and sum(p.whole for p in parts if isinstance(p, Pixels)) == 0
    assert clips["b"].rows["hand"][-1] == -1 - clips["b"].rows["full"][-1]  # the frame without a box is that of the full view
    frames = read_frames(path, range(35), "pyav")
    for name, clip in clips.items():
        expected = crop.pixels(frames[clip.frames], [boxes[name][i] for i in clip.frames])
        both = np.concatenate([squares["hand", 0], squares["full", 0][::-1]])
        assert (both[clip.rows["hand"]] == expected).all()
        assert (squares["full", 0][clip.rows["full"]] == crop.pixels(frames[clip.frames])).all()
    assert (clips["a"].rows["hand"][10:15] == clips["b"].rows["hand"][:5]).all()
    assert not set(clips["a"].rows["hand"][15:]) & set(clips["b"].rows["hand"][5:])


def test_without_boxes_the_hand_view_is_the_frame(path):
    parts = list(clip_pixels(task(segment("a", 0.0, 1.0, path), views=("hand",), preprocess=(Preprocess(size=60),))))
    assert sum(p.whole for p in parts if isinstance(p, Pixels)) == 25
    assert (gather(parts)[0]["hand", 0] == Preprocess(size=60).pixels(read_frames(path, range(25), "pyav"))).all()


def test_only_whole_frames_are_squashed(path, tmp_path):
    "Three encoders at once: two sizes, and one that squashes. Its hand crops keep their aspect."
    box = 10, 20, 130, 80
    encoders = Preprocess(size=32), Preprocess(size=48, resize="squash"), Preprocess(size=48, interpolation="bilinear")
    boxes = write_boxes(tmp_path / "a.pkl", {"a": {i: box for i in range(5)}})
    squares, clips, _ = gather(clip_pixels(task(segment("a", 0.0, 0.2, path), views=("full", "hand"), preprocess=encoders, boxes=boxes)))
    frames = read_frames(path, range(5), "pyav")
    for i, encoder in enumerate(encoders):
        assert squares["full", i].shape == squares["hand", i].shape == (5, encoder.size, encoder.size, 3)
        assert (squares["full", i] == encoder.pixels(frames)).all()
    assert (squares["full", 1] != Preprocess(size=48).pixels(frames)).any()
    assert (squares["hand", 0] == encoders[0].pixels(frames, [box] * 5)).all()
    assert (squares["hand", 1] == Preprocess(size=48).pixels(frames, [box] * 5)).all()
    assert (squares["hand", 1] != encoders[1].pixels(frames, [box] * 5)).any()
    assert (squares["hand", 2] == encoders[2].pixels(frames, [box] * 5)).all()


@pytest.mark.parametrize("views, more", [(("full", "hand"), {}), (("hand",), {}), (("full",), {}), (("full", "hand"), dict(clip_frames=4)),
                                         (("full", "hand"), dict(feature_fps=7.0)), (("full", "hand"), dict(backend="pyav"))])
@pytest.mark.parametrize("preprocess", [(Preprocess(size=60),), (Preprocess(size=32), Preprocess(size=48, resize="squash"), Preprocess(48, interpolation="bilinear"))])
def test_whole_frames_are_cut_elsewhere_to_the_same_crops(path, tmp_path, views, more, preprocess, monkeypatch):
    monkeypatch.setattr("xmic.clips.BYTES_AT_ONCE", 200_000)  # three frames
    boxes = write_boxes(tmp_path / "a.pkl", {"a": {i: (3, 5, 80 + i, 60) for i in range(20)}, "b": {i: (80, 60.4, 190, 120) for i in range(0, 100, 2)}})
    segments = segment("a", 0.0, 1.0, path), segment("b", 0.4, 3.2, path), segment("c", 3.5, 4.0, path), segment("late", 3.0, 9.0, path)
    one = task(*segments, views=views, preprocess=preprocess, boxes=boxes, **more)
    here = gather(clip_pixels(one))
    parts = list(clip_pixels(replace(one, whole_frames=True)))
    there = gather(cut(parts, preprocess))
    assert not any(isinstance(part, Pixels) for part in parts) and max(len(p.images) for p in parts if isinstance(p, Frames)) <= READ_AT_ONCE
    assert here[2] == there[2] and set(here[2]) == {"late"} and here[0].keys() == there[0].keys()
    for key in here[0]:
        assert (here[0][key] == there[0][key]).all()
    for name, clip in here[1].items():
        assert (clip.frames == there[1][name].frames).all() and all((rows == there[1][name].rows[view]).all() for view, rows in clip.rows.items())


@both
def test_long_segments_hold_few_frames(path, backend, monkeypatch):
    "No more than READ_AT_ONCE decoded frames are asked for at once, and crops leave before the end."
    import xmic.clips as clips
    asked = []
    def watched(path, indices, chunk, backend):
        for numbers, images in clips_iter(path, indices, chunk, backend):
            asked.append(len(numbers))
            yield numbers, images
    clips_iter = clips.iter_frames
    monkeypatch.setattr(clips, "iter_frames", watched)
    parts = clip_pixels(task(segment("a", 0.0, 4.0, path), backend=backend, chunk=8))
    first = next(parts)
    assert isinstance(first, Pixels) and len(asked) == 1
    assert len(gather([first, *parts])[1]) == 1 and max(asked) == READ_AT_ONCE and sum(asked) == 100


def test_folders_of_frames(tmp_path):
    folder = write_jpegs(tmp_path / "v", 30)
    squares, clips, failed = gather(clip_pixels(task(segment("a", 0, 0, folder, 1, 11), segment("b", 0, 0, folder, 6, 21), segment("none", 0.0, 0.2, folder))))
    assert clips["a"].frames.tolist() == list(range(10)) and clips["b"].frames.tolist() == list(range(5, 20)) and len(squares["full", 0]) == 20
    assert "counted from 1" in failed["none"]
    (folder / "frame_0000000015.jpg").unlink()
    squares, clips, failed = gather(clip_pixels(task(segment("a", 0, 0, folder, 1, 11), segment("b", 0, 0, folder, 6, 21), segment("c", 0, 0, folder, 21, 31))))
    assert set(clips) == {"a", "c"} and "frame_0000000015.jpg" in failed["b"]
    assert numbers_of(squares["full", 0][clips["a"].rows["full"]]) == list(range(10))


# Several files, and damage

@both
def test_whole_files(tmp_path, backend):
    "A segment is its file, however its times were counted."
    paths = [write_video(tmp_path / f"{i}.mp4", frames=n) for i, n in enumerate((30, 12, 45))]
    segments = [segment(f"s{i}", 100.0 * i, 100.0 * i + 7, p) for i, p in enumerate(paths)]
    squares, clips, failed = gather(clip_pixels(task(*segments, whole_files=True, backend=backend)))
    assert failed == {} and [len(clips[f"s{i}"].frames) for i in range(3)] == [30, 12, 45]
    for clip in clips.values():
        assert numbers_of(squares["full", 0][clip.rows["full"]]) == clip.frames.tolist() == list(range(len(clip.frames)))
    assert segments[1].start_sec == 100.0
    _, clips, failed = gather(clip_pixels(task(*segments, backend=backend)))
    assert clips == {} and set(failed) == {"s0", "s1", "s2"}


def test_files_that_cannot_be_read(path, tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    segments = (segment("missing", path=tmp_path / "none.mp4"), segment("ok", 0.4, 0.8, path), segment("text", path=tmp_path / "text.mp4"),
                segment("text2", path=tmp_path / "text.mp4"))
    squares, clips, failed = gather(clip_pixels(task(*segments)))
    assert list(clips) == ["ok"] and numbers_of(squares["full", 0]) == list(range(10, 20))
    assert set(failed) == {"missing", "text", "text2"} and "no such file" in failed["missing"] and "text.mp4" in failed["text2"]


def unreadable(path, backend):
    "The frames of a damaged file that cannot be read one by one."
    lost = []
    for i in range(100):
        try: read_frames(path, [i], backend)
        except VideoError: lost.append(i)
    return lost


def test_a_damaged_middle_costs_only_its_segments(tmp_path):
    "Segments that lie next to the damage, or overlap with one that is hit, are read; their crops are right."
    path = overwrite(write_video(tmp_path / "v.mp4", frames=100, gop=10, b_frames=0), 0.5, 0.52, 1)
    lost = unreadable(path, "pyav")
    assert lost and 10 < min(lost) and max(lost) < 90
    low, high = min(lost) / 25, (max(lost) + 1) / 25
    segments = [segment("before", 0.0, low, path), segment("across", low - 0.2, high + 0.2, path), segment("within", low, high, path),
                segment("after", high, 4.0, path), segment("all", 0.0, 4.0, path), segment("far", 3.8, 4.0, path)]
    squares, clips, failed = gather(clip_pixels(task(*segments, backend="pyav")))
    assert set(clips) == {"before", "after", "far"} and set(failed) == {"across", "within", "all"}
    for name, clip in clips.items():
        assert numbers_of(squares["full", 0][clip.rows["full"]]) == clip.frames.tolist()
    assert all(str(path) in cause and "frame" in cause for cause in failed.values())


def test_a_file_that_ends_early(tmp_path):
    path = cut_short(write_video(tmp_path / "v.mp4", frames=100, gop=10), 0.6)
    segments = [segment(f"s{i}", i * 0.4, i * 0.4 + 0.4, path) for i in range(10)]
    squares, clips, failed = gather(clip_pixels(task(*segments, backend="pyav")))
    assert {"s0", "s1", "s2", "s3"} <= set(clips) and {"s8", "s9"} <= set(failed) and len(clips) + len(failed) == 10
    for clip in clips.values():
        assert numbers_of(squares["full", 0][clip.rows["full"]]) == clip.frames.tolist()


def test_damaged_detections_cost_only_their_segments(path, tmp_path):
    from xmic.hands import Detections
    frames = [Detections(frame_number=i + 1).SerializeToString() for i in range(250)]
    frames[72] = b"\xff" * 9
    (tmp_path / "P01_01.pkl").write_bytes(pickle.dumps(frames))
    segments = [segment(name, start, stop, path, video_id="P01_01") for name, start, stop in (("a", 0.0, 1.0), ("hit", 0.8, 2.0), ("c", 2.0, 3.0))]
    _, clips, failed = gather(clip_pixels(task(*segments, views=("hand",), boxes=HandBoxes.from_epic(tmp_path))))
    assert set(clips) == {"a", "c"} and "P01_01.pkl: the detections of frame 73 are damaged" in failed["hit"]  # 60 a second against 25


def test_in_a_worker(path, tmp_path):
    boxes = write_boxes(tmp_path / "a.pkl", {"a": {i: (0, 0, 80, 60) for i in range(25)}})
    one = task(segment("a", 0.0, 1.0, path), segment("b", 0.4, 9.0, path), views=("full", "hand"), boxes=boxes)
    with DecodePool(1, 60) as pool:
        items = list(pool.map(clip_pixels, [one]))
    assert items[-1].done and items[-1].error is None
    (there, clips, failed), (here, _, _) = gather(i.chunk for i in items[:-1]), gather(clip_pixels(one))
    assert set(clips) == {"a"} and set(failed) == {"b"} and there.keys() == here.keys()
    assert all((there[key] == here[key]).all() for key in here)
    assert number_of(there["full", 0][3]) == 3 == number_of(numbered_frame(3))


def test_times_of_the_frames_decide_where_the_rate_varies():
    times = np.cumsum(np.r_[0, np.tile([0.02, 0.12, 0.04], 100)])[:300]
    video = VideoInfo(300, 299 / times[-1], 160, 120, times=times)
    assert not video.constant and info().constant
    frames = wanted_frames(video, segment(start=3.05, stop=5.0))
    assert (frames == np.arange(np.flatnonzero(times <= 3.05)[-1], np.flatnonzero(times < 5.0)[-1] + 1)).all()
    assert wanted_frames(video, segment(start=17.0, stop=times[-1] + 0.3))[-1] == 299
    with pytest.raises(DataError, match="shows something from 0.00 to"): wanted_frames(video, segment(start=17.0, stop=times[-1] + 2))


def test_a_gap_shows_the_frame_before_it():
    times = np.r_[np.arange(100), 225 + np.arange(100)] / 25  # no frame from 3.96 to 9 s
    video = VideoInfo(200, 25.0, 160, 120, times=times, end=13.0)
    assert wanted_frames(video, segment(start=5.0, stop=7.0)).tolist() == [99]
    assert wanted_frames(video, segment(start=5.0, stop=9.1)).tolist() == [99, 100, 101, 102]
    assert wanted_frames(video, segment(start=3.5, stop=9.1), 2).tolist() == [87, 99, 100]  # 3.48, 3.96 and 9 s
    assert frame_at(np.array([0.0, 3.959, 3.96, 8.9994, 8.9996, 9.0, 12.99, 13.0]), video).tolist() == [0, 98, 99, 99, 100, 100, 199, 200]


@given(st.lists(st.floats(0.002, 3), min_size=2, max_size=40), st.floats(0, 1))
def test_the_frame_at_a_time_is_the_latest_that_has_appeared(steps, share):
    times = np.cumsum(np.r_[0.3, steps])
    video = VideoInfo(len(times), 10.0, 160, 120, times=times, end=times[-1] + 1)
    t = times[0] + share * (video.end - times[0]) * 0.999
    if not video.constant and np.abs(times - t).min() > 6e-4:
        assert frame_at(t, video) == max(i for i, x in enumerate(times) if x <= t)


def test_a_picture_that_starts_late():
    video = VideoInfo(100, 25.0, 160, 120, times=0.5 + np.arange(100) / 25)
    assert video.end == 4.5 and video.constant
    assert wanted_frames(video, segment(start=1.02, stop=2.0)).tolist() == list(range(13, 38))
    assert wanted_frames(video, segment(start=0.1, stop=0.3)).tolist() == [0]  # as close to it as rounded times are
    late = VideoInfo(100, 25.0, 160, 120, times=3 + np.arange(100) / 25)
    with pytest.raises(DataError, match="from 3.00 to 7.00 s"): wanted_frames(late, segment(start=0.1, stop=0.9))
