"""Boxes around hands and what they touch: the rule, every reader, hostile and damaged files, and the numbering of frames."""
import json
import math
import pickle
import subprocess
import sys
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from xmic.files import DataError
from xmic.hands import (ARRAYS, Detections, Hand, HandBoxes, Object, centre, read_100doh, read_boxes, read_epic_hands,
                        union_box, unpickle)
from xmic.video import VideoInfo, probe

FILE = VideoInfo(frames=10_000, fps=60.0, width=456, height=256)


def segment(segment_id="P01_01_0", video_id="P01_01", start_sec=0.0):
    return SimpleNamespace(segment_id=segment_id, video_id=video_id, start_sec=start_sec)


def hand(left, top, right, bottom, score=0.9, state=3, offset=(0.0, 0.0)):
    return Hand((left, top, right, bottom), score, state, 0, offset)


def message(hands=(), objects=(), number=0):
    "A serialised frame of EPIC's detections; without a number, it is of the frame of its place."
    frame = Detections(video_id="P01_01", frame_number=number)
    for h in hands:
        frame.hands.add(score=h.score, state=h.state, side=h.side, bbox=dict(zip(("left", "top", "right", "bottom"), h.box)),
                        object_offset=dict(zip("xy", h.offset)))
    for o in objects:
        frame.objects.add(score=o.score, bbox=dict(zip(("left", "top", "right", "bottom"), o.box)))
    return frame.SerializeToString()


def write(path, value, protocol=4):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(value, protocol))
    return path


def doh(*box, score=0.9, state=3, offset=(0.0, 0.0, 0.0), side=1):
    "A row of the 100DOH detector."
    return [*box, score, state, *offset, side]


# The rule

def test_thresholds():
    "A hand counts from its threshold on, but touches only above it; an object counts from its threshold on."
    pan = Object((50, 50, 70, 70), 0.3)
    assert union_box([hand(0, 0, 10, 10, 0.8)], [pan], 0.8, 0.3) == (0, 0, 10, 10)
    assert union_box([hand(0, 0, 10, 10, 0.81)], [pan], 0.8, 0.3) == (0, 0, 70, 70)
    assert union_box([hand(0, 0, 10, 10, 0.81)], [pan], 0.8, 0.31) == (0, 0, 10, 10)
    assert union_box([hand(0, 0, 10, 10, 0.79)], [pan], 0.8, 0.3) is None
    assert union_box([], [pan], 0.8, 0.3) is None and union_box([], [], 0.8, 0.3) is None


def test_no_candidate_object():
    touching = hand(3, 4, 10, 12)
    assert union_box([touching], [], 0.8, 0.01) == union_box([touching], [Object((0, 0, 99, 99), 0.005)], 0.8, 0.01) == touching.box


@pytest.mark.parametrize("state, touches", [(0, False), (1, True), (2, True), (3, True), (4, True)])
def test_contact_states(state, touches):
    box = union_box([hand(0, 0, 10, 10, state=state)], [Object((20, 20, 30, 30), 0.9)], 0.8, 0.01)
    assert box == ((0, 0, 30, 30) if touches else (0, 0, 10, 10))


def test_the_offset_chooses_the_object():
    "The nearest centre to hand centre + offset; not the nearest object, nor the surest one, nor the largest."
    near, far, huge = Object((12, 0, 22, 10), 0.99), Object((100, 0, 110, 10), 0.02), Object((0, 0, 300, 300), 0.99)
    pointing = hand(0, 0, 10, 10, offset=(98.0, 0.0))
    assert union_box([pointing], [near, far, huge], 0.8, 0.01) == (0, 0, 110, 10)
    assert union_box([pointing._replace(offset=(10.0, 0.0))], [near, far, huge], 0.8, 0.01) == (0, 0, 22, 10)
    assert union_box([pointing, hand(0, 50, 10, 60, state=0)], [near, far], 0.8, 0.01) == (0, 0, 110, 60)


numbers = st.floats(0, 1, allow_nan=False, width=32)
boxes = st.tuples(numbers, numbers, numbers, numbers).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]), max(b[1], b[3])))
some_hands = st.lists(st.builds(Hand, boxes, numbers, st.integers(0, 4), st.integers(0, 1),
                                st.tuples(st.floats(-1, 1), st.floats(-1, 1))), max_size=4)
some_objects = st.lists(st.builds(Object, boxes, numbers), max_size=5)


@given(some_hands, some_objects, numbers, numbers)
def test_the_union_holds_each_part_and_nothing_else(hands, objects, hand_threshold, object_threshold):
    box = union_box(hands, objects, hand_threshold, object_threshold)
    seen = [h for h in hands if h.score >= hand_threshold]
    assert (box is None) == (not seen)
    assume(seen)
    parts = [h.box for h in seen]
    candidates = [o for o in objects if o.score >= object_threshold]
    for h in seen:
        if h.state and h.score > hand_threshold and candidates:
            aim = [c + d for c, d in zip(centre(h.box), h.offset)]
            parts.append(candidates[int(np.argmin([math.hypot(*np.subtract(centre(o.box), aim)) for o in candidates]))].box)
    assert all(box[0] <= p[0] and box[1] <= p[1] and box[2] >= p[2] and box[3] >= p[3] for p in parts)
    assert all(any(p[side] == box[side] for p in parts) for side in range(4))


@given(some_hands, some_objects)
def test_a_higher_threshold_for_hands_never_enlarges(hands, objects):
    areas = []
    for threshold in (0.0, 0.3, 0.6, 0.9):
        box = union_box(hands, objects, threshold, 0.01)
        areas.append((box[2] - box[0]) * (box[3] - box[1]) if box else -1.0)
    assert areas == sorted(areas, reverse=True)


# EPIC-KITCHENS

@pytest.fixture(scope="session")
def record(shared_data):
    "One real frame of the official detections, as text and as the pickled message."
    folder = shared_data / "epic_hand_object_sample"
    return json.loads((folder / "P01_09_frame13404.json").read_text()), folder / "P01_09_one_frame_rebuilt.pkl"


def test_the_real_record_decodes(record):
    text, path = record
    found = read_epic_hands(path)
    assert len(found) == text["frame_number"] == 13404 and found[0] == ([], [])
    hands, objects = found[13403]
    box = lambda entry: tuple(entry["bbox"][side] for side in ("left", "top", "right", "bottom"))
    assert hands == [Hand(box(h), h["score"], h["state"], h["side"], (h["object_offset"]["x"], h["object_offset"]["y"])) for h in text["hands"]]
    assert objects == [Object(box(o), o["score"]) for o in text["objects"]]


def test_the_left_hand_spans_what_the_picture_shows(record):
    left = next(h for h in read_epic_hands(record[1])[13403][0] if h.side == 0)
    assert (math.floor(left.box[0] * 640), math.ceil(left.box[2] * 640)) == (252, 316)


def test_the_box_of_the_real_record(record, tmp_path):
    text, path = record
    (tmp_path / "P01").mkdir()
    (tmp_path / "P01/P01_09.pkl").symlink_to(path)
    parts = [e["bbox"] for e in text["hands"] + text["objects"]]  # each hand touches another object
    expected = [f(p[side] for p in parts) * size for f, side, size in
                ((min, "left", 640), (min, "top", 360), (max, "right", 640), (max, "bottom", 360))]
    boxes = HandBoxes.from_epic(tmp_path)
    assert boxes.box(segment("P01_09_0", "P01_09"), 13403, FILE, 640, 360) == tuple(map(round, expected))
    assert boxes.box(segment("P01_09_0", "P01_09"), 0, FILE, 640, 360) is None


@pytest.mark.parametrize("place", ["P01/P01_01.pkl", "P01/hand-objects/P01_01.pkl", "P01_01.pkl"])
def test_layouts_of_the_official_files(tmp_path, place):
    write(tmp_path / place, [message([hand(0.25, 0.25, 0.5, 0.75)])])
    assert HandBoxes.from_epic(tmp_path).box(segment(), 0, FILE, 456, 256) == (114, 64, 228, 192)
    assert HandBoxes.from_epic(tmp_path).box(segment("P09_01_0", "P09_01"), 0, FILE, 456, 256) is None


@pytest.mark.parametrize("protocol", range(6))
def test_protocols(tmp_path, protocol):
    messages = [message([hand(0.25, 0.25, 0.5, 0.75)]), b"", message()]
    assert read_epic_hands(write(tmp_path / "a.pkl", messages, protocol)).messages == messages


def test_pickles_of_python_2(tmp_path):
    "Their byte strings and arrays, as Python 2 wrote them."
    written = message([hand(0.25, 0.25, 0.5, 0.75)])
    (tmp_path / "a.pkl").write_bytes(b"\x80\x02]q\x00U" + bytes([len(written)]) + written + b"a.")
    assert read_epic_hands(tmp_path / "a.pkl")[0][0][0].box == (0.25, 0.25, 0.5, 0.75)
    row = np.array([doh(1, 2, 30, 40)]).tobytes()
    (tmp_path / "b.pkl").write_bytes(
        b"\x80\x02}K\x03}U\x09hand_detscnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x01K\x0a\x86cnumpy\ndtype\nU\x02f8K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U"
        + bytes([len(row)]) + row + b"tbsU\x08obj_detsNss.")
    assert read_100doh(tmp_path / "b.pkl")[3][0][0].box == (1, 2, 30, 40)


def test_messages_give_back_what_was_written(tmp_path):
    seen = Hand((0.125, 0.25, 0.5, 0.75), 0.875, 3, 1, (0.0625, -0.5)), Object((0.5, 0.25, 0.75, 1.0), 0.375)
    frame = Detections.FromString(message([seen[0]], [seen[1]], number=7))
    assert (frame.video_id, frame.frame_number, len(frame.hands), len(frame.objects)) == ("P01_01", 7, 1, 1)
    assert read_epic_hands(write(tmp_path / "a.pkl", [message([seen[0]], [seen[1]])]))[0] == ([seen[0]], [seen[1]])


def test_a_message_belongs_to_the_frame_that_it_names(tmp_path):
    "Not to its place in the list: here the message of frame 3 is not there."
    seen = {number: message([hand(number / 100, 0.25, 0.5, 0.75)], number=number) for number in (1, 2, 4, 5, 9)}
    found = read_epic_hands(write(tmp_path / "P01_01.pkl", list(seen.values())))
    assert len(found) == 9 and [round(100 * h[0].box[0]) if h else None for h, _ in found] == [1, 2, None, 4, 5, None, None, None, 9]
    backwards = read_epic_hands(write(tmp_path / "P01_02.pkl", list(seen.values())[::-1]))
    assert list(found) == list(backwards)
    assert HandBoxes.from_epic(tmp_path).box(segment(), 3, FILE, 100, 100)[0] == 4
    with pytest.raises(IndexError): found[9]


def test_messages_without_a_number_are_of_the_frame_of_their_place(tmp_path):
    found = read_epic_hands(write(tmp_path / "P01_01.pkl", [message(), message([hand(0.2, 0, 1, 1)]), message([hand(0.3, 0, 1, 1)], number=3)]))
    assert [len(h) for h, _ in found] == [0, 1, 1]


@pytest.mark.parametrize("numbers, words", [([0, 1, 2, 3], "numbered from 0"), ([1, 2, 2], "message 3 says frame_number 2, as message 2 does"), ([1, -4], "which cannot be"),
                                            ([1, 2**31 - 1], "which cannot be")])
def test_numbers_that_cannot_be_are_refused(tmp_path, numbers, words):
    with pytest.raises(DataError, match=words): read_epic_hands(write(tmp_path / "P01_01.pkl", [message(number=n) for n in numbers]))


@pytest.mark.parametrize("damage", [lambda m: m[:-3], lambda m: m + b"\x1a", lambda m: b"\xff" * 20])
def test_damaged_messages_name_their_frame(tmp_path, damage):
    good = message([hand(0.25, 0.25, 0.5, 0.75)])
    path = write(tmp_path / "P01_01.pkl", [good, damage(good), good])
    found = read_epic_hands(path)
    assert found[0] == found[2] and len(found) == 3
    with pytest.raises(DataError, match="frame 2 "): found[1]
    boxes = HandBoxes.from_epic(tmp_path)
    assert boxes.box(segment(), 2, FILE, 456, 256)
    with pytest.raises(DataError, match="P01_01.pkl: the detections of frame 2 "): boxes.box(segment(), 1, FILE, 456, 256)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_numbers_that_are_none(tmp_path, value):
    "A damaged number is found when it is read, not when a frame is cut."
    write(tmp_path / "P01_01.pkl", [message([hand(value, 0.25, 0.5, 0.75)])])
    with pytest.raises(DataError, match="frame 1 "): read_epic_hands(tmp_path / "P01_01.pkl")[0]
    write(tmp_path / "clip.pkl", {0: {"hand_dets": np.array([doh(1, 2, 30, value)]), "obj_dets": None}})
    with pytest.raises(DataError, match="frame 0"): read_100doh(tmp_path / "clip.pkl")


@pytest.mark.parametrize("content", [b"", {0: b""}, ["text"], [b"", None], "text"])
def test_pickles_that_hold_other_things(tmp_path, content):
    with pytest.raises(DataError, match="list of byte strings"): read_epic_hands(write(tmp_path / "a.pkl", content))


@pytest.mark.parametrize("make", [HandBoxes.from_epic, HandBoxes.from_100doh])
def test_a_folder_without_detections(tmp_path, make):
    "Otherwise every frame would be whole, and nobody would know why."
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="holds no detections"): make(folder)


# Hostile and damaged pickles

class Touch:
    "Leaves a file behind when it is unpickled."

    def __init__(self, path, how): self.path, self.how = str(path), how

    def __reduce__(self):
        import os
        return {"exec": (exec, (f"open({self.path!r}, 'w').close()",)), "open": (open, (self.path, "w")),
                "system": (os.system, (f"touch '{self.path}'",)), "mkdir": (os.mkdir, (self.path,))}[self.how]


READERS = [read_epic_hands, read_100doh, read_boxes]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("how", ["exec", "open", "system", "mkdir"])
@pytest.mark.parametrize("read", READERS)
def test_hostile_pickles_do_nothing(tmp_path, read, how, protocol):
    trace, bomb = tmp_path / "trace", Touch(tmp_path / "trace", how)
    for content in (bomb, [message(), bomb], {0: {"hand_dets": np.zeros((1, 10)), "obj_dets": bomb}}, {"a": {0: bomb}}):
        path = write(tmp_path / "evil.pkl", content, protocol)
        with pytest.raises(DataError, match="plain data does not need|not readable as a pickle"): read(path)
        assert not trace.exists()
    pickle.loads(pickle.dumps(bomb, protocol))
    assert trace.exists()  # so the payload works where nobody looks


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("program", [
    b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy.core\nmultiarray.os.system\n.", b"\x80\x04\x8c\x05numpy\x8c\x0ccore.os.path\x93.",
    b"cnumpy\nload\n(S'/etc/hosts'\ntR.", b"(S'x'\nios\nsystem\n.", b"Pname\n.", b"\x80\x02\x82\x01."])
def test_other_ways_to_a_function(tmp_path, read, program):
    (tmp_path / "a.pkl").write_bytes(program)
    with pytest.raises(DataError, match="not readable as a pickle"): read(tmp_path / "a.pkl")


@pytest.mark.parametrize("read", READERS)
def test_files_that_are_no_pickle(tmp_path, read):
    whole = pickle.dumps({0: {"hand_dets": np.ones((2, 10)), "obj_dets": None}})
    for content in (b"", bytes(100), b"no pickle at all", whole[:len(whole) // 2]):
        (tmp_path / "a.pkl").write_bytes(content)
        with pytest.raises(DataError, match="a.pkl: not readable"): read(tmp_path / "a.pkl")
    with pytest.raises(DataError, match="no such file"): read(tmp_path / "missing.pkl")


CRAFTED = """
import pickle, sys
import numpy as np
class Made:
    def __init__(self, *call): self.call = call
    def __reduce__(self): return self.call
def dtype(code, *state): return Made(np.dtype, (code, False, True), state)
def array(dtype, data, shape=(1,)): return Made(np.zeros(1).__reduce__()[0], (np.ndarray, (0,), b"b"), (1, shape, dtype, False, data))
outside = dtype("V8", 3, "|", None, ("a",), {"a": (np.dtype("f8"), 10**9)}, 8, 1, 16)
pointer = dtype("V8", 3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 1, 0)
crafted = {
    "outside": array(outside, bytes(8)), "pointer": array(pointer, b"A" * 8), "scalar": Made(np.float64(0).__reduce__()[0], (pointer, b"A" * 8)),
    "objects": np.array([None, 1]), "text": np.array(["a"]), "too short": array(np.dtype("f8"), bytes(8), (10**9,)), "dates": np.array(["2024"], "M8[Y]"),
}
pickle.dump({1: {"hand_dets": crafted[sys.argv[2]], "obj_dets": None}}, open(sys.argv[1], "wb"))
"""


@pytest.mark.parametrize("name", ["outside", "pointer", "scalar", "objects", "text", "too short", "dates"])
def test_crafted_arrays_are_refused(tmp_path, name):
    "Arrays whose pickles point outside of their memory crash a process that reads them as numpy does; read in one of its own."
    path = tmp_path / "clip.pkl"
    subprocess.run([sys.executable, "-c", CRAFTED, path, name], check=True)
    code = f"from xmic.hands import read_100doh; from xmic.files import DataError\ntry: read_100doh({str(path)!r})\nexcept DataError as e: print('refused:', e)"
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).resolve().parents[1])
    assert read.returncode == 0 and "refused:" in read.stdout, read.stderr


@settings(max_examples=60)
@given(st.binary(max_size=300))
def test_noise_is_refused(tmp_path_factory, noise):
    path = tmp_path_factory.mktemp("noise") / "P01_09.pkl"
    path.write_bytes(b"\x80\x04" + noise)
    for read in READERS:
        try: assert read(path) is not None
        except DataError as e: assert "P01_09.pkl" in str(e)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("values", [
    np.arange(12, dtype="f4").reshape(3, 4).T, np.arange(6, dtype=">i2"), np.zeros((0, 10)), np.arange(24.0).reshape(4, 6)[::2, ::3],
    np.array(5), np.float64(0.25), np.int64(-7), np.uint8(200), np.bool_(True)], ids=repr)
def test_numbers_are_read_as_they_were_written(tmp_path, values, protocol):
    found = np.asarray(unpickle(write(tmp_path / "a.pkl", values, protocol), ARRAYS))
    assert np.array_equal(found, values) and found.shape == values.shape


# 100DOH

@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_numpy_pickles(tmp_path, protocol, dtype):
    rows = np.array([doh(10, 20, 60, 80, offset=(0.005, 0.6, -0.8)), doh(200, 20, 260, 80, state=0, side=0)], dtype)
    content = {np.int64(7): {"hand_dets": np.asfortranarray(rows), "obj_dets": rows[::-1][:1]}, "info": {"height": np.float64(256)}, 8: {"hand_dets": None, "obj_dets": None}}
    path = write(tmp_path / "a.pkl", content, protocol)
    frames = read_100doh(path)
    assert set(frames) == {7, 8} and frames[8] == ([], [])
    (first, second), (thing,) = frames[7]
    assert first.box == (10, 20, 60, 80) and first.offset == pytest.approx((30, -40), rel=1e-6) and (first.state, first.side) == (3, 1)
    assert (second.state, second.side) == (0, 0) and thing.box == (200, 20, 260, 80) and thing.score == pytest.approx(0.9)
    assert read_100doh(path, offset_scale=1000)[7][0][0].offset == pytest.approx((3, -4), rel=1e-6)


@pytest.mark.parametrize("name", ["core", "_core"])
def test_pickles_of_other_numpy_versions(tmp_path, name):
    content = pickle.dumps({3: {"hand_dets": np.array([doh(1, 2, 30, 40)]), "obj_dets": None, "score": np.float64(2)}}, 2)
    (tmp_path / "a.pkl").write_bytes(content.replace(b"numpy._core.", b"numpy.core.").replace(b"numpy.core.", f"numpy.{name}.".encode()))
    assert read_100doh(tmp_path / "a.pkl")[3][0][0].box == (1, 2, 30, 40)


@pytest.mark.parametrize("found", [None, [1, 2], {"hand_dets": np.zeros((2, 5))}, {"hand_dets": np.zeros((4, 5))}, {"hand_dets": "text"},
                                   {"obj_dets": np.zeros((1, 2, 10))[..., :9]}, {"hand_dets": [["a"] * 10]}])
def test_detections_of_another_shape(tmp_path, found):
    path = write(tmp_path / "a.pkl", {0: {"hand_dets": None, "obj_dets": None}, 41: found})
    with pytest.raises(DataError, match=r"10 columns for each frame \(1 row\):\n  frame 41"): read_100doh(path)


@pytest.mark.parametrize("content", [[1, 2], "text", None])
def test_100doh_detections_are_a_dict(tmp_path, content):
    with pytest.raises(DataError, match=f"a.pkl: expected a dict of frame number to detections, not a {type(content).__name__}"):
        read_100doh(write(tmp_path / "a.pkl", content))


def test_100doh_boxes(tmp_path):
    rows = np.array([doh(10, 20, 60, 80, offset=(0.005, 0.6, 0.8)), doh(300, 20, 360, 80, score=0.4)])
    write(tmp_path / "P01_01.pkl", {5: {"hand_dets": rows, "obj_dets": np.array([doh(60, 80, 90, 100), doh(0, 0, 20, 20)])}})
    assert HandBoxes.from_100doh(tmp_path).box(segment(), 5, FILE, 456, 256) == (10, 20, 90, 100)
    assert HandBoxes.from_100doh(tmp_path, 0.4).box(segment(), 5, FILE, 456, 256) == (10, 20, 360, 100)
    assert HandBoxes.from_100doh(tmp_path).box(segment(), 4, FILE, 456, 256) is None
    assert HandBoxes.from_100doh(tmp_path, max_gap=1).box(segment(), 4, FILE, 456, 256) == (10, 20, 90, 100)
    assert replace(HandBoxes.from_100doh(tmp_path), size=(912, 512)).box(segment(), 5, FILE, 456, 256) == (5, 10, 45, 50)


# Ready boxes

HEADER = "segment_id,frame,left,top,right,bottom\n"


def test_boxes_of_real_clips(shared_data):
    folder = shared_data / "real_clips"
    boxes = read_boxes(folder / "hand_boxes.csv")
    lines = (folder / "hand_boxes.csv").read_text().splitlines()[1:]
    assert sum(map(len, boxes.values())) == len(lines) and {len(b) for b in boxes.values()} == {3}
    assert sum(b is None for frames in boxes.values() for b in frames.values()) == sum(line.endswith(",,,,") for line in lines) > 0
    source, infos = HandBoxes.from_boxes(folder / "hand_boxes.csv"), {}
    for name, frames in boxes.items():
        video_id = name.rsplit("_", 1)[0]
        if video_id not in infos: infos[video_id] = probe(folder / f"videos/{video_id}.mp4", "pyav")
        info = infos[video_id]
        for frame, box in frames.items():
            assert 0 <= frame < info.frames
            assert source.box(segment(name, video_id), frame, info, info.width, info.height) == box  # none needs clipping


def test_boxes_of_the_release(tmp_path):
    content = {"P01_01_0": {10: (1, 2, 30, 40), 11: np.array([5, 6, 70, 80]), 12: None}, "P01_01_1": {}}
    boxes = read_boxes(write(tmp_path / "a.pkl", content))
    assert boxes == {"P01_01_0": {10: (1, 2, 30, 40), 11: (5, 6, 70, 80), 12: None}}
    source = HandBoxes.from_boxes(tmp_path / "a.pkl", first_frame=1)
    assert [source.box(segment(), i, FILE, 456, 256) for i in (8, 9, 10, 11)] == [None, (1, 2, 30, 40), (5, 6, 70, 80), None]
    assert source.box(segment("P01_01_1"), 9, FILE, 456, 256) is None


BAD = ["a,1,5,5,4,9", "a,1,5,9,9,5", "a,1,x,5,9,9", "a,one,1,2,3,4", "a,1.5,1,2,3,4", "a,1,nan,2,3,4", "a,1,1,2,inf,4", "a,1,1,2,,4", "a,,1,2,3,4"]


@pytest.mark.parametrize("row", BAD)
def test_bad_rows_are_named(tmp_path, row):
    path = tmp_path / "boxes.csv"
    path.write_text(f"{HEADER}a,0,1,2,3,4\n{row}\na,2,,,,\n")
    with pytest.raises(DataError, match=r"boxes.csv: expected .*\(1 row\):\n  row 2: segment 'a'"): read_boxes(path)
    with pytest.raises(DataError, match="row 2"): HandBoxes.from_boxes(path)


def test_a_frame_has_one_box(tmp_path):
    (tmp_path / "boxes.csv").write_text(f"{HEADER}a,7,1,2,30,40\nb,7,1,2,30,40\na,7,9,9,30,40\n")
    with pytest.raises(DataError, match=r"once for each segment.*\(1 row\):\n  row 3"): read_boxes(tmp_path / "boxes.csv")


def test_many_bad_rows_are_one_error(tmp_path):
    (tmp_path / "boxes.csv").write_text(HEADER + "\n".join(BAD))
    with pytest.raises(DataError, match=rf"\({len(BAD)} rows\)") as e: read_boxes(tmp_path / "boxes.csv")
    assert len(str(e.value).splitlines()) == 7 and f"and {len(BAD) - 5} more" in str(e.value)


@pytest.mark.parametrize("content", [[1, 2], {"a": [1, 2, 3, 4]}, "text"])
def test_pickles_of_another_shape(tmp_path, content):
    with pytest.raises(DataError, match="expected {segment"): read_boxes(write(tmp_path / "a.pkl", content))


@pytest.mark.parametrize("box", [(1, 2, 3), (1, 2, 3, 4, 5), 7, (4, 2, 3, 4), (1, 2, math.nan, 4), "text"])
def test_pickles_with_bad_boxes(tmp_path, box):
    with pytest.raises(DataError, match="row 2: segment 'a', frame 1"): read_boxes(write(tmp_path / "a.pkl", {"a": {0: (1, 2, 3, 4), 1: box}}))


def test_tables_without_a_column(tmp_path):
    (tmp_path / "boxes.csv").write_text("segment_id,frame,left,top,right\na,1,2,3,4\n")
    with pytest.raises(DataError, match="no column bottom"): read_boxes(tmp_path / "boxes.csv")
    with pytest.raises(DataError): HandBoxes.from_boxes(tmp_path / "missing.csv")


# Which number a frame has

def marked(frames):
    "Detections in which the left edge of the hand in frame i is i / 100,000."
    return [message([hand(i / 1e5, 0, 0.9, 0.9)]) for i in range(frames)]


@pytest.mark.parametrize("video_id, official", [("P01_01", 60), ("P01_101", 50)])
def test_official_rates(tmp_path, video_id, official):
    "EPIC numbers frames at 60 or 50 a second from 1, whatever the rate of the file; a folder of frames is numbered like that itself."
    write(tmp_path / f"{video_id}.pkl", marked(3000))
    boxes, name = HandBoxes.from_epic(tmp_path), segment(f"{video_id}_0", video_id)
    width, rate = 100_000, Fraction(60_000, 1001)
    info = VideoInfo(frames=3000, fps=float(rate), width=456, height=256)
    for index in (0, 1, 499, 998, 999, 1000, 1001, 1002, 1999, 2000, 2001, 2400):
        assert boxes.box(name, index, info, width, 256)[0] == math.floor(index * official / rate)
    for index in (0, 1, 1500, 2999):
        assert boxes.box(name, index, replace(info, fps=float(official)), width, 256)[0] == index
        assert boxes.box(name, index, replace(info, folder=True), width, 256)[0] == index
    assert boxes.box(name, 3000, replace(info, folder=True), width, 256) is None


def test_ready_boxes_at_the_official_rate(tmp_path):
    write(tmp_path / "a.pkl", {"P01_01_0": {n: (n, 0, n + 50, 50) for n in range(1, 1200)}})
    source = HandBoxes.from_boxes(tmp_path / "a.pkl", first_frame=1, official_rate=True)
    half = replace(FILE, fps=30.0)
    assert [source.box(segment(), i, half, 5000, 256)[0] for i in (0, 1, 100)] == [1, 3, 201]
    assert [source.box(segment(), i, replace(half, folder=True), 5000, 256)[0] for i in (0, 1, 100)] == [1, 2, 101]


def test_boxes_relative_to_their_segment(tmp_path):
    "The smallest number belongs to the segment's first frame."
    write(tmp_path / "a.pkl", {"uid_3": {n: (n, 0, n + 50, 50) for n in range(740, 800)}})
    source = HandBoxes.from_boxes(tmp_path / "a.pkl", relative=True)
    info = replace(FILE, fps=30.0)
    placed = segment("uid_3", "uid", start_sec=2.02)  # frame 61
    assert [source.box(placed, i, info, 5000, 256) for i in (60, 61, 62, 120, 121)] == [
        None, (740, 0, 790, 50), (741, 0, 791, 50), (799, 0, 849, 50), None]
    assert source.box(segment("other_0", "other"), 5, info, 5000, 256) is None


def test_gaps(tmp_path):
    "A frame without an entry takes the nearest one, the earlier of two as near; an entry without hands stays one."
    (tmp_path / "boxes.csv").write_text(f"{HEADER}P01_01_0,10,10,0,60,50\nP01_01_0,20,20,0,60,50\nP01_01_0,30,,,,\n")
    left = lambda gap, i: (HandBoxes.from_boxes(tmp_path / "boxes.csv", max_gap=gap).box(segment(), i, FILE, 456, 256) or [None])[0]
    assert [left(0, i) for i in (9, 10, 11, 20, 30)] == [None, 10, None, 20, None]
    assert [left(5, i) for i in (4, 5, 14, 15, 16, 25, 26, 30, 35)] == [None, 10, 10, 10, 20, 20, None, None, None]
    assert [left(1000, i) for i in (0, 500)] == [10, None]


def test_gaps_of_detections(tmp_path):
    frames = [message() for _ in range(40)]
    frames[10], frames[20] = message([hand(0.1, 0, 0.9, 0.9)]), message([hand(0.2, 0, 0.9, 0.9)])
    write(tmp_path / "P01_01.pkl", frames)
    left = lambda gap, i: (HandBoxes.from_epic(tmp_path, max_gap=gap).box(segment(), i, FILE, 100, 100) or [None])[0]
    assert [left(0, i) for i in (9, 10, 11, 20)] == [None, 10, None, 20]
    assert [left(5, i) for i in (4, 5, 14, 15, 16, 25, 26)] == [None, 10, 10, 10, 20, 20, None]
    assert left(9, 2) == 10 and left(9, 0) is None and left(30, 39) == 20


@pytest.mark.parametrize("box, expected", [
    ((10, 20, 40, 50), (10, 20, 40, 50)), ((-30, -5, 40, 50), (0, 0, 40, 50)), ((400, 200, 900, 900), (400, 200, 456, 256)),
    ((10, 20, 11, 50), None), ((10, 20, 12, 22), (10, 20, 12, 22)), ((10, 20, 40, 21), None), ((0, 0, 0, 0), None), ((10.4, 20.4, 11.6, 50), (10, 20, 12, 50)),
    ((10.4, 20, 11.4, 50), None), ((500, 20, 600, 50), None), ((455, 20, 600, 50), None), ((-40, 20, 1, 50), None), ((-9, -9, 999, 999), (0, 0, 456, 256))])
def test_boxes_in_the_frame(tmp_path, box, expected):
    write(tmp_path / "a.pkl", {"P01_01_0": {0: box}})
    found = HandBoxes.from_boxes(tmp_path / "a.pkl").box(segment(), 0, FILE, 456, 256)
    assert found == expected and (found is None or all(type(x) is int for x in found))


def test_boxes_of_another_picture_size(tmp_path):
    write(tmp_path / "a.pkl", {"P01_01_0": {0: (100, 20, 200, 256)}})
    scaled = HandBoxes.from_boxes(tmp_path / "a.pkl", size=(456, 256))
    assert scaled.box(segment(), 0, FILE, 1920, 1080) == (round(100 * 1920 / 456), round(20 * 1080 / 256), round(200 * 1920 / 456), 1080)
    assert scaled.box(segment(), 0, FILE, 456, 256) == HandBoxes.from_boxes(tmp_path / "a.pkl").box(segment(), 0, FILE, 1920, 1080) == (100, 20, 200, 256)


@settings(deadline=None)
@given(st.tuples(*[st.floats(-1e6, 1e6)] * 4), st.integers(2, 2000), st.integers(2, 2000))
def test_a_box_lies_within_the_frame(tmp_path_factory, box, width, height):
    left, top, right, bottom = min(box[0], box[2]), min(box[1], box[3]), max(box[0], box[2]), max(box[1], box[3])
    path = write(tmp_path_factory.getbasetemp() / "within.pkl", {"P01_01_0": {0: (left, top, right, bottom)}})
    found = HandBoxes.from_boxes(path).box(segment(), 0, FILE, width, height)
    if found is not None:
        assert 0 <= found[0] < found[2] - 1 < width and 0 <= found[1] < found[3] - 1 < height
        assert all(abs(a - min(max(b, 0), end)) <= 0.5 for a, b, end in zip(found, (left, top, right, bottom), (width, height) * 2))


# What else extraction relies on

def test_fingerprints(tmp_path):
    write(tmp_path / "P01/P01_01.pkl", marked(5))
    seen = {HandBoxes.from_epic(tmp_path).fingerprint}
    assert (HandBoxes.from_epic(tmp_path).source, HandBoxes.from_100doh(tmp_path).source) == ("epic", "100doh")  # part of the name of stored features

    def differs(boxes):
        assert boxes.fingerprint == boxes.fingerprint and boxes.fingerprint not in seen
        seen.add(boxes.fingerprint)

    assert HandBoxes.from_epic(str(tmp_path)).fingerprint in seen
    for boxes in (HandBoxes.from_epic(tmp_path, 0.7), HandBoxes.from_epic(tmp_path, 0.8, 0.02), HandBoxes.from_epic(tmp_path, max_gap=1),
                  HandBoxes.from_100doh(tmp_path, 0.8), replace(HandBoxes.from_epic(tmp_path), size=(456, 256)),
                  replace(HandBoxes.from_epic(tmp_path), official_rate=False), replace(HandBoxes.from_epic(tmp_path), relative=True),
                  replace(HandBoxes.from_epic(tmp_path), first_frame=0)):
        differs(boxes)
    write(tmp_path / "P01/P01_01.pkl", marked(6))
    differs(HandBoxes.from_epic(tmp_path))
    write(tmp_path / "P02/P02_01.pkl", marked(6))
    differs(HandBoxes.from_epic(tmp_path))
    (tmp_path / "P02/P02_01.pkl").rename(tmp_path / "P02/P02_02.pkl")
    differs(HandBoxes.from_epic(tmp_path))


@pytest.mark.parametrize("size", [100, 2**16, 2**16 + 100, 2**17, 2**20])
def test_fingerprints_of_files_that_keep_their_size(tmp_path, size):
    "A changed byte within 64 KB of either end is seen; the same bytes give the same fingerprint."
    def fingerprint(change=None):
        content = bytearray(size)
        if change is not None: content[change] = 1
        (tmp_path / "P01_01.pkl").write_bytes(content)
        return HandBoxes.from_epic(tmp_path).fingerprint
    places = sorted({0, min(size, 2**16) - 1, max(size - 2**16, 0), size - 1})
    assert fingerprint() == fingerprint() and len({fingerprint(), *map(fingerprint, places)}) == 1 + len(places)
    if size > 2**17: assert fingerprint(size // 2) == fingerprint()  # what lies between is not read


def test_a_corrected_file_of_boxes_is_read_anew(tmp_path):
    "Even one that has kept its size."
    path = tmp_path / "boxes.csv"
    path.write_text(f"{HEADER}P01_01_0,0,10,10,40,40\n")
    before = HandBoxes.from_boxes(path)
    assert before.box(segment(), 0, FILE, 456, 256) == (10, 10, 40, 40)
    fingerprint = before.fingerprint
    path.write_text(f"{HEADER}P01_01_0,0,20,10,40,40\n")
    after = HandBoxes.from_boxes(path)
    assert after.box(segment(), 0, FILE, 456, 256) == (20, 10, 40, 40) and after.fingerprint != fingerprint


def test_corrected_detections_are_read_anew(tmp_path):
    write(tmp_path / "P01_01.pkl", [message([hand(0.1, 0, 0.9, 0.9)])])
    assert HandBoxes.from_epic(tmp_path).box(segment(), 0, FILE, 100, 100)[0] == 10
    write(tmp_path / "P01_01.pkl", [message([hand(0.2, 0, 0.9, 0.9)])])
    assert HandBoxes.from_epic(tmp_path).box(segment(), 0, FILE, 100, 100)[0] == 20


def test_they_travel_to_workers(tmp_path):
    write(tmp_path / "P01_01.pkl", marked(3))
    write(tmp_path / "a.pkl", {"P01_01_0": {0: (1, 2, 30, 40)}})
    for boxes in (HandBoxes.from_epic(tmp_path), HandBoxes.from_boxes(tmp_path / "a.pkl", size=(456, 256))):
        copy = pickle.loads(pickle.dumps(boxes))
        assert copy == boxes and hash(copy) == hash(boxes) and copy.fingerprint == boxes.fingerprint
        assert copy.box(segment(), 0, FILE, 456, 256) == boxes.box(segment(), 0, FILE, 456, 256) is not None


def test_a_frame_is_found_without_looking_through_all_others(tmp_path):
    found = read_epic_hands(write(tmp_path / "P01_01.pkl", [message(number=n) for n in (1, 2, 3)]))

    class Counted(dict):
        def __iter__(self): raise AssertionError("all frames were looked through")
    found.places = Counted(found.places)
    assert len(found) == 3 and found[2] == ([], [])
