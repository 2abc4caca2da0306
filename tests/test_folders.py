"""Folders of frames: their names, numbers and rates."""
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from videos import number_of, numbered_frame, numbers_of, write_jpegs, write_video
from world import extract_config, register_tiny
from xmic.checks import check_data
from xmic.clips import segment_span, span_now, wanted_frames
from xmic.features import extract_dataset, read_shard
from xmic.files import DataError, read_json, write_json
from xmic.frames import store_dataset
from xmic.recognizer import Recognizer
from xmic.segments import read_csv, segments_sha256
from xmic.video import Backend, VideoError, probe, read_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights", "ignore:no hand boxes")


def pictures(folder: Path, names: dict[str, int]) -> Path:
    "Pictures that show these numbers."
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in names.items(): Image.fromarray(numbered_frame(number)).save(folder / name, quality=95) if name.endswith("jpg") else \
        Image.fromarray(numbered_frame(number)).save(folder / name)
    return folder


@pytest.mark.parametrize("pattern", ["frame_{:010d}.jpg", "frame_{:06d}.jpg", "img_{:05d}.png", "{:06d}.jpg", "{}.png", "a-b (1)_{:03d}.PNG", "v1.2_{:04d}.jpeg",
                                     "{{x}}_{:03d}.webp", "frame{:04d}.bmp", "00_{:03d}.tiff"])
@pytest.mark.parametrize("first", [0, 1])
def test_names_and_first_numbers(tmp_path, pattern, first):
    folder = pictures(tmp_path / "v", {pattern.format(n + first): n for n in range(12)})
    assert probe(folder).frames == 12 and numbers_of(read_frames(folder, [11, 0, 10, 9, 5])) == [11, 0, 10, 9, 5]
    (folder / pattern.format(7 + first)).unlink()
    assert numbers_of(read_frames(folder, [6, 8])) == [6, 8]
    with pytest.raises(VideoError, match="is missing") as e: read_frames(folder, [6, 7, 8])
    assert pattern.format(7 + first) in str(e.value) and e.value.frames == (7,)


def test_numbers_that_begin_elsewhere(tmp_path):
    folder = pictures(tmp_path / "v", {f"frame_{n:06d}.jpg": n - 100 for n in range(100, 110)})
    backend = Backend(first_frame=100)
    assert probe(folder, backend).frames == 10 and numbers_of(read_frames(folder, [0, 9], backend)) == [0, 9]
    with pytest.raises(VideoError, match="frame_000001.jpg is missing"): read_frames(folder, [0])
    assert number_of(read_frames(folder, [99])[0]) == 0  # number 100, where numbers count from 1
    with pytest.raises(VideoError, match="frame_000100.jpg comes before the first frame"): probe(folder, Backend(first_frame=105))
    zero = pictures(tmp_path / "z", {f"{n}.png": n for n in range(3)})
    with pytest.raises(VideoError, match="0.png comes before"): probe(zero, Backend(first_frame=1))
    for odd in (-1, 1.5, "a"):
        with pytest.raises(DataError, match="first_frame"): Backend(first_frame=odd)
    for odd in (0, -5.0, float("nan"), float("inf")):
        with pytest.raises(DataError, match="fps"): Backend(fps=odd)


def test_folders_that_are_not_one_video(tmp_path):
    kinds = pictures(tmp_path / "kinds", {"rgb_1.png": 0, "rgb_2.png": 1, "flow_1.png": 0, "flow_2.png": 1})
    with pytest.raises(VideoError, match="flow_1.png and rgb_1.png|rgb_1.png and flow_1.png"): probe(kinds)
    official = pictures(tmp_path / "official", {"frame_0000000001.jpg": 4, "thumbnail_1.png": 9, "2.png": 8})
    assert probe(official).frames == 1 and number_of(read_frames(official, [0])[0]) == 4
    twice = pictures(tmp_path / "twice", {"1.png": 0, "01.png": 1})
    with pytest.raises(VideoError, match="the same number"): probe(twice)
    with pytest.raises(VideoError, match="holds no pictures"): probe(pictures(tmp_path / "none", {"a.png": 1}))
    stamped = pictures(tmp_path / "stamped", {"1699999999123.png": 0})
    with pytest.raises(VideoError, match="no video is that long; say where the numbers begin"): probe(stamped)
    deep = tmp_path / "deep"
    deep.mkdir()
    Image.fromarray(np.arange(4096, dtype=np.uint16).reshape(64, 64)).save(deep / "1.png")
    with pytest.raises(VideoError, match="8 bits are read"): probe(deep)


def test_a_picture_that_is_to_be_turned(tmp_path):
    image = Image.fromarray(numbered_frame(5))
    exif = Image.Exif()
    exif[0x0112] = 3
    image.rotate(180).save(tmp_path / "1.jpg", exif=exif, quality=95)
    assert number_of(read_frames(tmp_path, [0])[0]) == 5


def test_rates(tmp_path):
    assert (probe(write_jpegs(tmp_path / "P01_101", 5)).fps, probe(write_jpegs(tmp_path / "P01_01", 5)).fps) == (50, 60)
    own = write_jpegs(tmp_path / "kitchen", 5)
    assert not probe(own).fps_known and probe(tmp_path / "P01_101").fps_known
    info = probe(own, Backend(fps=12.5))
    assert (info.fps, info.duration, info.fps_known) == (12.5, 0.4, True)


def world(folder: Path, text: str, frames: int = 60) -> Path:
    write_jpegs(folder / "videos" / "a", frames)
    write(folder, text)
    return folder


def write(folder: Path, text: str) -> None:
    "The list, with ids a_1, a_2, …"
    head, *rows = text.splitlines()
    (folder / "segments.csv").write_text("\n".join([f"segment_id,{head}", *(f"a_{n},{row}" for n, row in enumerate(rows, 1))]))


def frames_of(world: Path, features: Path, **changes) -> dict[str, list[int]]:
    register_tiny()
    store, report = extract_dataset(extract_config(world, features, splits=["train"], views=["full"], **changes))
    assert not report.failed, report.failed
    return {i: store.frames(i, "full").tolist() for i in store.view("full").place}


def test_a_list_of_ones_own_counts_from_zero_or_from_what_it_says(tmp_path):
    one = world(tmp_path / "one", "video_id,start_sec,stop_sec,start_frame,stop_frame,noun,split\na,0,1,10,20,pan,train\na,0,1,0,3,pan,train\n")
    assert frames_of(one, tmp_path / "f1") == {"a_1": list(range(10, 20)), "a_2": [0, 1, 2]}
    two = world(tmp_path / "two", "video_id,start_sec,stop_sec,start_frame,stop_frame,first_frame,noun,split\na,0,1,10,20,1,pan,train\n")
    assert frames_of(two, tmp_path / "f2") == {"a_1": list(range(9, 19))}
    write(two, "video_id,start_sec,stop_sec,start_frame,stop_frame,first_frame,noun,split\na,0,1,0,20,1,pan,train\n")
    _, report = extract_dataset(extract_config(two, tmp_path / "f3", splits=["train"], views=["full"]))
    assert "counted from 1" in report.failed["a_1"]


def test_segments_with_times_alone(tmp_path):
    text = "video_id,start_sec,stop_sec,fps,noun,split\na,0.5,1,30,pan,train\n"
    one = world(tmp_path / "one", text)
    assert frames_of(one, tmp_path / "f") == {"a_1": list(range(15, 30))}
    assert frames_of(one, tmp_path / "f10", feature_fps=10.0) == {"a_1": [15, 18, 21, 24, 27]}
    assert read_csv(one).fps.tolist() == [30] and segments_sha256(read_csv(one)) == segments_sha256(read_csv(one).drop(columns="fps"))
    write(one, text.replace("30", "20"))
    assert frames_of(one, tmp_path / "f") == {"a_1": list(range(10, 20))}  # the other rate is noticed
    write(one, "video_id,start_sec,stop_sec,noun,split\na,0.5,1,pan,train\n")
    _, report = extract_dataset(extract_config(one, tmp_path / "none", splits=["train"], views=["full"]))
    assert "column fps" in report.failed["a_1"]
    check = check_data("csv", one, progress=False)
    said = " ".join(str(check).split())
    assert not check.ok and "Nothing tells the rate of 1 folder of frames: a" in said and "behind" not in said
    _, report = extract_dataset(extract_config(one, tmp_path / "none", splits=["train"], views=["full"], backend=Backend(fps=30)))
    assert report.extracted == 1
    store, report = store_dataset(extract_config(one, tmp_path / "frames", splits=["train"], backend=Backend(fps=30)))
    assert report.extracted == 1 and store.origins["a_1"].span == "0.5 to 1 s at 30 a second"


def test_fewer_frames_a_second_need_a_rate(tmp_path):
    text = "video_id,start_sec,stop_sec,start_frame,stop_frame{},noun,split\na,0,1,0,30{},pan,train\n"
    one = world(tmp_path / "one", text.format("", ""))
    _, report = extract_dataset(extract_config(one, tmp_path / "f", splits=["train"], views=["full"], feature_fps=10.0))
    assert "nothing tells the rate" in report.failed["a_1"]
    write(one, text.format(",fps", ",30"))
    assert frames_of(one, tmp_path / "f", feature_fps=10.0) == {"a_1": list(range(0, 30, 3))}


@pytest.mark.parametrize("column, values, says", [
    ("fps", (30, 25), "fps differs within a video"), ("first_frame", (0, 1), "first_frame differs within a video"), ("fps", (0, 0), "fps must be above 0"),
    ("fps", ("x", "x"), "fps is not a number"), ("first_frame", (-3, -3), "first_frame must be at least 0"), ("first_frame", (1.5, 1.5), "not a whole number")])
def test_what_a_list_cannot_say_of_a_folder(tmp_path, column, values, says):
    one = world(tmp_path / "one", f"video_id,start_sec,stop_sec,{column}\n" + "".join(f"a,{i},{i + 1},{v}\n" for i, v in enumerate(values)))
    with pytest.raises(DataError, match=says): read_csv(one)


def test_the_extension_of_epic_at_its_own_rate(tmp_path):
    info = probe(write_jpegs(tmp_path / "P01_101", 200))
    row = SimpleNamespace(segment_id="s", video_id="P01_101", start_sec=0.0, stop_sec=4.0, start_frame=1, stop_frame=201)
    assert len(wanted_frames(info, row, 10.0)) == 40 and wanted_frames(info, row, 10.0).tolist() == list(range(0, 200, 5))
    # stores of every frame stay; those at fewer a second were made at the wrong rate
    assert span_now(row, "frames 1 to 201") == "frames 1 to 201" and span_now(row, "frames 1 to 201", True) == "frames 1 to 201 at 50 a second"
    old = SimpleNamespace(**vars(row) | dict(video_id="P01_01"))
    assert span_now(old, "frames 1 to 201", True) == segment_span(old, True) == "frames 1 to 201"


def test_stores_of_lists_that_were_counted_from_one_are_made_anew(tmp_path):
    "Until now, start_frame of a CSV was counted from 1 in a folder, against what its documentation said."
    one = world(tmp_path / "one", "video_id,start_sec,stop_sec,start_frame,stop_frame,noun,split\na,0,1,10,20,pan,train\n")
    row = next(read_csv(one).itertuples())
    assert span_now(row, "frames 10 to 20") == "frames 10 to 20 from 0"
    store, _ = extract_dataset(extract_config(one, tmp_path / "f", splits=["train"], views=["full"]))
    assert store.view("full").origins["a_1"].span == "frames 10 to 20 from 0" and store.changed(read_csv(one)).empty


def test_check_data_names_the_picture_that_is_missing(tmp_path):
    one = world(tmp_path / "one", "video_id,start_sec,stop_sec,start_frame,stop_frame,fps,noun,split\na,0,1,0,60,60,pan,train\n")
    assert "lack frames" not in str(check_data("csv", one, progress=False))
    (one / "videos" / "a" / "frame_0000000031.jpg").unlink()
    said = check_data("csv", one, progress=False)
    assert not said.ok and "1 of 1 lack frames: a." in " ".join(str(said).split()) and "The first: such as frame_0000000031.jpg" in " ".join(str(said).split())


def test_recognition_in_a_folder(tmp_path):
    folder, recognizer = write_jpegs(tmp_path / "v", 90), Recognizer.zero_shot(register_tiny(), "random", "cpu")
    answer = recognizer.predict(folder, ["pan"], backend=Backend(fps=30))
    assert (answer.start, answer.stop) == (0, 3) and not any("assumed" in note for note in answer.notes)
    answer = recognizer.predict(folder, ["pan"])
    assert answer.stop == 1.5 and any("60 frames per second are assumed" in note for note in answer.as_dict()["notes"])


def test_the_command_takes_a_rate_and_a_first_number(tmp_path):
    from test_cli import MINI, NAMES, call
    folder = pictures(tmp_path / "v", {f"img_{n:04d}.png": n for n in range(100, 190)})
    done = call(folder, *MINI, *NAMES, "--json", "--fps", "30", "--first-frame", "100", "--every", "all")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert (answer["start"], answer["stop"]) == (0, 3) and answer["frames"][0] == 2
    done = call(write_video(tmp_path / "a.mp4", 20), *MINI, *NAMES, "--fps", "30")
    assert done.exit_code == 1 and "a video file says its own rate" in done.output
