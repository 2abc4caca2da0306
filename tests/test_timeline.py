"""A video as a table, a page and an annotated video; streams."""
import base64
import csv
import html
import io
import os
import re
import shutil
import subprocess
import sys
from datetime import datetime
from fractions import Fraction
from html.parser import HTMLParser
from urllib.parse import unquote, urlparse
from xml.etree import ElementTree

import av
import numpy as np
import pandas as pd
import pytest

from videos import add_sound, beeps_of, numbered_frame, numbers_of, turn, write_jpegs, write_video
from world import register_tiny
from xmic.encoders import create_encoder
from xmic.files import DataError
from xmic.recognizer import Recognition, Recognizer
from xmic.names import is_stream
from xmic.timeline import Timeline, _codec, open_stream, timeline
from xmic.video import VideoError, frame_times, probe, read_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
NAMES = dict(nouns=["pan", "knife", "tap"], verbs=["take", "put"])


@pytest.fixture(scope="module")
def recognizer():
    return Recognizer.zero_shot(create_encoder(register_tiny(), "random", "cpu"))


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("film") / "film.mp4", 60, 10)


def answer(start=0.0, stop=2.0, names=("pan", "knife"), **changes) -> Recognition:
    table = lambda names, scores: pd.DataFrame(dict(name=list(names), score=scores, zero_shot=scores[::-1]))
    return Recognition(table(names, [90.0, 10.0]), table(("take", "put"), [70.0, 30.0]), start, stop, [0], ["no hand boxes"], [None],
                       **dict(dict(methods={"noun": "xmic", "verb": "zero_shot"},
                                   zero_shot={"noun": pd.DataFrame(dict(name=list(names)[::-1], score=[60.0, 40.0])),
                                              "verb": pd.DataFrame(dict(name=["take", "put"], score=[70.0, 30.0]))}) | changes))


class Tags(HTMLParser):
    "Checks that what is opened is closed, and keeps the text and the addresses."

    def __init__(self, page: str):
        super().__init__()
        self.open, self.text, self.addresses = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.addresses += [v for k, v in attributes if k in ("src", "href")]
        if tag not in ("meta", "img", "br"): self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_table_has_a_row_for_each_name_and_action(recognizer, film):
    table = timeline(recognizer, film, **NAMES, top=2).table()
    assert table.columns.tolist() == ["start", "stop", "kind", "rank", "name", "score", "zero_shot"]
    assert table.groupby(["start", "kind"]).size().tolist() == [2] * 9 and table.start.unique().tolist() == [0, 2, 4]
    for _, part in table.groupby(["start", "kind"]):
        assert part["rank"].tolist() == [1, 2] and part.score.is_monotonic_decreasing
    action = Timeline("v.mp4", [answer()]).table().query("kind == 'action'").iloc[0]
    assert (action["name"], action.score, action.zero_shot) == ("take pan", pytest.approx(63), pytest.approx(3))


def test_one_kind_alone_has_no_actions(recognizer, film):
    seen = timeline(recognizer, film, verbs=["take", "put"], every=None)
    assert set(seen.table().kind) == {"verb"} and len(seen.answers) == 1 and "actions" not in seen.answers[0].as_dict()


def test_the_page_needs_no_other_file_and_shows_both_rankings(recognizer, film, tmp_path):
    seen = timeline(recognizer, film, **NAMES)
    seen.to_html(tmp_path / "film.html")
    page = Tags((tmp_path / "film.html").read_text())
    assert len(page.addresses) == 3 and all(a.startswith("data:image/jpeg;base64,") for a in page.addresses)
    with av.open(io.BytesIO(base64.b64decode(page.addresses[0].split(",")[1]))) as picture:
        assert next(picture.decode(video=0)).width == 160
    assert any("RANDOM" in text for text in page.text)
    Timeline("v.mp4", [answer()]).to_html(tmp_path / "two.html")
    text = " ".join(Tags((tmp_path / "two.html").read_text()).text)
    assert text.index("nouns, X-MIC pan 90.0 % knife 10.0 %") < text.index("nouns, zero-shot knife 60.0 % pan 40.0 %")
    assert "verbs, zero-shot take 70.0 %" in text and text.count("zero-shot") == 2


def test_names_cannot_write_into_the_page(tmp_path):
    evil = "<script>alert(1)</script>"
    Timeline(f"{evil}.mp4", [answer(names=(evil, "\" onload=\"x"))]).to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page and html.escape(evil) in page and "onload" in "".join(Tags(page).text)


def test_notes_are_said_once_with_the_stretches_they_hold_for():
    answers = [answer(), answer(2, 4), answer(4, 6)]
    answers[1].notes.append("hand crops in 3 of 16 frames")
    assert Timeline("v.mp4", answers).notes == ["no hand boxes", "hand crops in 3 of 16 frames (1 of 3 stretches)"]


NASTY = ['a "quoted", name', "two\nlines\r\nand\ttabs", "ends --> here", "<i>x</i> {\\an8}", "a\x00b\x1b[0m\ud800", "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(A1)", "žluťoučký 茶 🍵", "a\u2028b", "]]>&amp;"]


def nasty(name: str) -> list[Recognition]:
    return [answer(names=(name, "pan")), answer(2.0, 3.2505, names=("pan", name))]


@pytest.mark.parametrize("name", NASTY)
def test_the_csv_reads_back_and_runs_no_formula(tmp_path, name):
    Timeline("-videos/x.mp4", nasty(name)).to_csv(tmp_path / "x.csv")
    with open(tmp_path / "x.csv", newline="", encoding="utf-8") as file: rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["video", "start", "stop", "kind", "rank", "name", "score", "zero_shot"] and len(rows) == 12
    assert {row["video"] for row in rows} == {"'-videos/x.mp4"} and rows[-1]["stop"] == "3.2505"
    written = name.encode("utf-8", "backslashreplace").decode()
    assert [row["name"].removeprefix("'") for row in rows if row["kind"] == "noun"] == [written, "pan", "pan", written]
    assert not [cell for row in rows for column in ("video", "kind", "name") if (cell := row[column])[0] in "=+-@\t\r\n"]
    assert ("'" + written in {row["name"] for row in rows}) == (name[0] in "=+-@")


def read_srt(text: str) -> list[tuple[float, float, list[str]]]:
    "What a player finds in an .srt file."
    found = []
    for number, block in enumerate(text.rstrip("\n").split("\n\n"), 1):
        index, times, *lines = block.split("\n")
        hours = re.fullmatch(r"(\d\d):([0-5]\d):([0-5]\d),(\d{3}) --> (\d\d):([0-5]\d):([0-5]\d),(\d{3})", times)
        a, b, c, d, e, f, g, h = map(int, hours.groups())
        assert index == str(number) and lines and not any("-->" in line or not line for line in lines)
        found.append((a * 3600 + b * 60 + c + d / 1000, e * 3600 + f * 60 + g + h / 1000, lines))
    return found


@pytest.mark.parametrize("name", NASTY)
def test_subtitles_are_one_block_a_stretch_whatever_the_names(tmp_path, name):
    Timeline("x.mp4", [*nasty(name), answer(3725.1, 3727.4)]).to_srt(tmp_path / "x.srt")
    text = (tmp_path / "x.srt").read_bytes().decode("utf-8")
    found = read_srt(text)
    assert [(start, stop) for start, stop, _ in found] == [(0, 2), (2, 3.25), (3725.1, 3727.4)]
    assert all([line.split(":")[0] for line in lines[1:]] == ["verb", "noun"] and len(lines) == 3 for *_, lines in found)
    assert found[2][2] == ["take pan  63 %".replace("  ", " "), "verb: take 70 % put 30 %", "noun: pan 90 % knife 10 %"]
    assert not re.search("[<>{}\x00-\x09\x0b-\x1f]", text.replace(" --> ", ""))


def read_eaf(path) -> dict:
    "The tiers of an .eaf file, checked against the structure of EAF 3.0."
    root = ElementTree.parse(path).getroot()
    assert root.tag == "ANNOTATION_DOCUMENT" and root.get("FORMAT") == "3.0" and root.get("VERSION") and root.get("AUTHOR") is not None
    assert datetime.fromisoformat(root.get("DATE")).tzinfo
    order = ["LICENSE", "HEADER", "TIME_ORDER", "TIER", "LINGUISTIC_TYPE", "LOCALE", "LANGUAGE", "CONSTRAINT", "CONTROLLED_VOCABULARY"]
    tags = [child.tag for child in root]
    assert tags == sorted(tags, key=order.index) and tags.count("HEADER") == tags.count("TIME_ORDER") == 1
    header = root.find("HEADER")
    assert header.get("TIME_UNITS") == "milliseconds" and [child.tag for child in header] in (["PROPERTY"], ["MEDIA_DESCRIPTOR", "PROPERTY"])
    slots = {slot.get("TIME_SLOT_ID"): int(slot.get("TIME_VALUE")) for slot in root.find("TIME_ORDER")}
    assert list(slots.values()) == sorted(slots.values()) and len(slots) == len(root.find("TIME_ORDER"))
    types = {one.get("LINGUISTIC_TYPE_ID") for one in root.findall("LINGUISTIC_TYPE")}
    tiers, ids, used = {}, [], []
    for tier in root.findall("TIER"):
        assert tier.get("LINGUISTIC_TYPE_REF") in types and tier.get("TIER_ID") not in tiers
        held = [one.find("ALIGNABLE_ANNOTATION") for one in tier.findall("ANNOTATION")]
        ids += [one.get("ANNOTATION_ID") for one in held]
        used += [one.get(f"TIME_SLOT_REF{i}") for one in held for i in (1, 2)]
        tiers[tier.get("TIER_ID")] = [(slots[one.get("TIME_SLOT_REF1")], slots[one.get("TIME_SLOT_REF2")], one.find("ANNOTATION_VALUE").text) for one in held]
        assert all(start < stop for start, stop, _ in tiers[tier.get("TIER_ID")])
    assert len({*ids, *slots}) == len(ids) + len(slots) and sorted(used) == sorted(slots)  # IDs are unique in the document, and each slot has one owner
    assert header.find("PROPERTY").get("NAME") == "lastUsedAnnotationId" and header.find("PROPERTY").text == str(len(ids))
    return tiers


@pytest.mark.parametrize("name", NASTY)
def test_tiers_for_elan_are_valid_whatever_the_names(tmp_path, name):
    Timeline("x.mp4", nasty(name)).to_elan(tmp_path / "x.eaf")
    plain = {"two\nlines\r\nand\ttabs": "two lines and tabs", "a\x00b\x1b[0m\ud800": "a\ufffdb\ufffd[0m\ufffd", "a\u2028b": "a b"}.get(name, name)
    assert read_eaf(tmp_path / "x.eaf") == {"verb": [(0, 2000, "take"), (2000, 3250, "take")], "noun": [(0, 2000, plain), (2000, 3250, "pan")]}


def test_tiers_name_the_video_by_its_place(recognizer, tmp_path):
    film = write_video(tmp_path / "a #1%.mp4", 20, 10)
    (tmp_path / "out").mkdir()
    timeline(recognizer, film, nouns=NAMES["nouns"], every=0.7).to_elan(tmp_path / "out/x.eaf")
    assert {kind: len(tier) for kind, tier in read_eaf(tmp_path / "out/x.eaf").items()} == {"noun": 3}
    media = ElementTree.parse(tmp_path / "out/x.eaf").getroot().find("HEADER/MEDIA_DESCRIPTOR")
    assert unquote(urlparse(media.get("MEDIA_URL")).path) == str(film) and media.get("MIME_TYPE") == "video/mp4"
    assert (tmp_path / "out" / unquote(media.get("RELATIVE_MEDIA_URL"))).samefile(film) and media.get("RELATIVE_MEDIA_URL").startswith("./")


def test_pixels_that_are_not_square_keep_their_shape(recognizer, film, tmp_path):
    with av.open(str(film)) as old, av.open(str(tmp_path / "wide.mp4"), "w") as new:
        stream = new.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 160, 120, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        for frame in old.decode(video=0):
            frame.pts = None
            new.mux(stream.encode(frame))
        new.mux(stream.encode())
    shutil.copy(tmp_path / "wide.mp4", tmp_path / "tall.mp4")
    turn(tmp_path / "tall.mp4")
    for name, aspect in (("wide.mp4", Fraction(4, 3)), ("tall.mp4", Fraction(3, 4)), (film, 1)):
        assert probe(tmp_path / name).aspect == pytest.approx(float(aspect))
        timeline(recognizer, tmp_path / name, **NAMES).annotate(tmp_path / "out.mp4", overwrite=True)
        with av.open(str(tmp_path / "out.mp4")) as made: assert (made.streams.video[0].sample_aspect_ratio or 1) == aspect


def test_the_annotated_video_has_the_frames_of_the_stretches_with_their_hand_boxes(recognizer, film, tmp_path):
    seen = timeline(recognizer, film, **NAMES, start=1.0, stop=5.0, boxes=lambda frames: [(20, 10, 60, 50)] * len(frames))
    seen.annotate(tmp_path / "out.mp4")
    info = probe(tmp_path / "out.mp4")
    assert (info.frames, info.width, info.height, round(info.fps)) == (40, 160, 120, 10)
    frames, source = read_frames(tmp_path / "out.mp4", [0, 39]), read_frames(film, [10, 49])
    left = frames[:, 15:45, 18:23].astype(int)  # the box is orange
    assert (left[..., 0] - left[..., 2]).max(axis=(1, 2)).min() > 90
    assert frames[:, 100:].mean() < 0.7 * source[:, 100:].mean()  # the band with the text is dark
    assert np.abs(frames[:, :8].astype(int) - source[:, :8].astype(int)).mean() < 12  # the rest is the video


def test_odd_sizes_folders_of_frames_and_irregular_rates_can_be_annotated(recognizer, tmp_path):
    odd = [numbered_frame(i, (162, 122))[:121, :161] for i in range(20)]
    write_jpegs(tmp_path / "frames", 30)
    write_video(tmp_path / "vfr.mkv", 30, 25, variable=True)
    from PIL import Image
    for i, image in enumerate(odd): Image.fromarray(image).save((tmp_path / "odd").mkdir(exist_ok=True) or tmp_path / "odd" / f"frame_{i + 1:010d}.jpg")
    for name, size in (("frames", (160, 120)), ("odd", (160, 120)), ("vfr.mkv", (160, 120))):
        timeline(recognizer, tmp_path / name, **NAMES, every=0.5).annotate(tmp_path / "out.mp4", overwrite=True)
        info, before = probe(tmp_path / "out.mp4"), probe(tmp_path / name)
        assert (info.width, info.height, info.frames) == (*size, before.frames)
        assert info.duration == pytest.approx(before.duration, rel=0.05)


def test_where_there_is_no_h264_it_is_written_as_mpeg4(recognizer, film, tmp_path, monkeypatch):
    monkeypatch.setattr("xmic.timeline._can_encode", lambda name: False)
    assert _codec() == "mpeg4"
    timeline(recognizer, film, **NAMES).annotate(tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "mpeg4" and sum(1 for _ in container.decode(video=0)) == 60


def streams(path) -> list[tuple[str, float, float]]:  # codec, seconds in which it begins and ends
    "The streams of a file; each one's packets must be in order, and those of all near each other in the file."
    with av.open(str(path)) as container:
        found = [(s.codec_context.name, float((s.start_time or 0) * s.time_base), float(((s.start_time or 0) + s.duration) * s.time_base)) for s in container.streams]
        last, latest = {}, 0.0
        for packet in container.demux():
            if packet.dts is None: continue
            assert packet.dts > last.get(packet.stream_index, -np.inf) and latest - packet.dts * packet.time_base < 0.5
            last[packet.stream_index], latest = packet.dts, max(latest, float(packet.dts * packet.time_base))
    return found


@pytest.mark.parametrize("codec, ending, written", [("aac", ".mp4", "aac"), ("aac", ".ts", "aac"), ("pcm_s16le", ".mov", "aac"), ("libopus", ".mkv", "opus"), ("flac", ".mkv", "flac")])
@pytest.mark.parametrize("late", [0.0, 0.7])
def test_sound_is_kept_and_in_step(film, tmp_path, codec, ending, written, late):
    source = add_sound(film, tmp_path / f"film{ending}", codec, late, rate=48_000)
    Timeline(str(source), [answer(late, 3), answer(3, 6 + late)]).annotate(tmp_path / "out.mp4", "pyav")
    (video, begin, end), (audio, start, stop) = streams(tmp_path / "out.mp4")
    assert (video, audio) == ("h264", written) and end - begin == pytest.approx(6, abs=0.1) and stop - start == pytest.approx(6, abs=0.1)
    assert begin - start == pytest.approx(late, abs=0.05) and min(begin, start) < 0.05
    assert np.allclose(beeps_of(tmp_path / "out.mp4"), range(6), atol=0.003)
    assert numbers_of(read_frames(tmp_path / "out.mp4", range(60), "pyav")) == list(range(60))


@pytest.mark.parametrize("codec", ["aac", "pcm_s16le"])
def test_a_part_has_the_sound_of_that_part(film, tmp_path, codec):
    source = add_sound(film, tmp_path / "film.mov", codec, 0.7, streams=2)
    Timeline(str(source), [answer(2.2, 3), answer(3, 5.2)]).annotate(tmp_path / "out.mp4")  # 1.5 to 4.5 s of the pictures
    found = streams(tmp_path / "out.mp4")
    assert [name for name, *_ in found] == ["h264", "aac", "aac"] and all(b < 0.03 and e == pytest.approx(3, abs=0.03) for _, b, e in found)
    for stream in (0, 1): assert np.allclose(beeps_of(tmp_path / "out.mp4", stream), [0.5, 1.5, 2.5], atol=0.003)
    assert numbers_of(read_frames(tmp_path / "out.mp4", range(30))) == list(range(15, 45))


def test_irregular_rates_and_turned_pictures_keep_their_sound(film, tmp_path):
    write_video(tmp_path / "irregular.mp4", 60, 25, variable=True)
    source = add_sound(tmp_path / "irregular.mp4", tmp_path / "with.mp4", late=0.3, seconds=4)
    Timeline(str(source), [answer(1.5, 10)]).annotate(tmp_path / "part.mp4", "pyav")
    times = frame_times(source, "pyav")
    times = times[np.searchsorted(times, 1.5, "right") - 1:]  # from the frame that is shown then
    assert np.allclose(frame_times(tmp_path / "part.mp4", "pyav"), times - times[0], atol=1e-4)
    assert np.allclose(beeps_of(tmp_path / "part.mp4"), np.arange(np.ceil(times[0] - 0.3), times[-1] - 0.3) - times[0] + 0.3, atol=0.003)
    (_, _, end), (_, _, stop) = streams(tmp_path / "part.mp4")
    assert end == pytest.approx(times[-1] - times[0], abs=0.12) and stop == pytest.approx(end, abs=0.12)
    upright = turn(add_sound(film, tmp_path / "upright.mp4"))
    Timeline(str(upright), [answer(0, 6)]).annotate(tmp_path / "turned.mp4")
    assert (probe(tmp_path / "turned.mp4").width, probe(tmp_path / "turned.mp4").height) == (120, 160)
    assert np.allclose(beeps_of(tmp_path / "turned.mp4"), range(6), atol=0.003)


@pytest.mark.parametrize("link", ["itself", "a symbolic link", "a hard link", "a detour"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_the_video_is_never_overwritten(tmp_path, link, overwrite):
    film = write_video(tmp_path / "film.mp4", 20, 10)
    path = tmp_path / "link.mp4"
    if link == "itself": path = film
    elif link == "a symbolic link": path.symlink_to(film)
    elif link == "a hard link": os.link(film, path)
    else: path = tmp_path / ".." / tmp_path.name / "film.mp4"
    before = film.read_bytes()
    seen = Timeline(str(film), [answer()])
    for write in (seen.annotate, seen.to_html, seen.to_csv, seen.to_srt, seen.to_elan):
        with pytest.raises(DataError, match="is an input.*never overwritten"): write(path, overwrite=overwrite)
    assert film.read_bytes() == before and not list(tmp_path.glob(".*"))


def test_files_that_exist_are_overwritten_only_on_demand(film, tmp_path):
    seen = Timeline(str(film), [answer(0, 6)])
    for write, name in ((seen.annotate, "notes.mp4"), (seen.to_html, "notes.html"), (seen.to_csv, "notes.csv"), (seen.to_srt, "notes.srt"), (seen.to_elan, "notes.eaf")):
        (tmp_path / name).write_text("mine")
        with pytest.raises(DataError, match=f"{name} exists already.*overwrite=True"): write(tmp_path / name)
        assert (tmp_path / name).read_text() == "mine"
        write(tmp_path / name, overwrite=True)
        assert (tmp_path / name).read_bytes() != b"mine"
    with pytest.raises(DataError, match="is a file, not a folder"): seen.to_html(tmp_path / "notes.html" / "page.html")
    write_jpegs(tmp_path / "frames", 3)
    with pytest.raises(DataError, match="is an input"): Timeline(str(tmp_path / "frames"), [answer()]).to_html(tmp_path / "frames/frame_0000000002.jpg", overwrite=True)


@pytest.mark.parametrize("video, path, message", [("nowhere.mp4", "out.mp4", "read again"), (__file__, "out.avi", "as .mp4"), (__file__, "out.mp4", "nothing was recognised")])
def test_what_cannot_be_annotated_is_said(video, path, message, tmp_path):
    with pytest.raises(DataError, match=message):
        Timeline(video, []).annotate(tmp_path / path)


def test_a_file_read_as_a_stream_gives_the_answers_of_the_file(recognizer, film):
    with open_stream(str(film)) as (fps, frames):
        streamed = list(recognizer.stream(frames, fps, **NAMES))
    read = timeline(recognizer, film, **NAMES, backend="pyav").answers
    assert fps == 10 and [a.frames for a in streamed] == [a.frames for a in read]
    for a, b in zip(streamed, read):
        assert a.nouns.name.tolist() == b.nouns.name.tolist() and np.allclose(a.nouns.score, b.nouns.score, rtol=1e-3)


def test_the_standard_input_is_a_stream(film):
    code = "from xmic.timeline import open_stream\nfrom videos import numbers_of\nimport numpy as np\nwith open_stream('-') as (fps, frames): print(fps, numbers_of(np.stack(list(frames))) == list(range(60)))"
    with open(film, "rb") as stdin:
        done = subprocess.run([sys.executable, "-c", code], stdin=stdin, capture_output=True, text=True, cwd=__file__.rsplit("/", 1)[0])
    assert done.stdout.strip() == "10.0 True", done.stderr


@pytest.mark.parametrize("source, message", [("rtsp://127.0.0.1:9/none", "cannot be opened"), ("/dev/video99", "cannot be opened"), (__file__, "cannot be opened")])
def test_streams_that_cannot_be_opened_are_said(source, message):
    with pytest.raises(VideoError, match=message):
        with open_stream(source): pass


def test_what_is_a_stream():
    assert all(map(is_stream, ("-", "rtsp://a/b", "http://a/b.mp4", "/dev/video0"))) and not any(map(is_stream, ("kitchen.mp4", "/data/x.mp4", "a-b")))
