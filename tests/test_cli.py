"""The command, as people call it."""
import json
import os
import shutil
import subprocess
import sys

from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from videos import write_jpegs, write_video
from world import register_tiny, write_world
from xmic.cli import _as_options, app, output_names, seconds, videos
from xmic.files import DataError, read_json

ROOT = Path(__file__).resolve().parents[1]
MINI = ["--model", str(ROOT / "data/mini/recognizer")]
NAMES = ["--nouns", "pan,knife,tap", "--verbs", "take,put"]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    "Two videos of six and three seconds, and one that is damaged between them."
    folder = tmp_path_factory.mktemp("films")
    write_video(folder / "a.mp4", 60, 10)
    (folder / "b.mp4").write_text("no video")
    write_video(folder / "c.mov", 30, 10)
    (folder / "notes.txt").write_text("not a video")
    return folder


def call(*arguments, **changes):
    return CliRunner().invoke(app, ["predict", *map(str, arguments)], **changes)


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_help_comes_before_anything_large_is_imported():
    code = ("import sys; sys.argv = ['xmic', '--help']\nfrom xmic.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code\n"
            "print([m for m in ('torch', 'pandas', 'numpy', 'open_clip', 'av', 'PIL') if m in sys.modules])")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "predict" in done.stdout and done.stdout.strip().endswith("[]"), done.stderr


def test_help_takes_less_than_half_a_second_of_the_processor():
    begin = os.times()
    for _ in range(3): subprocess.run([sys.executable, "-c", "from xmic.cli import main; main()", "--help"], capture_output=True, cwd=ROOT, check=True)
    end = os.times()
    assert (end.children_user + end.children_system - begin.children_user - begin.children_system) / 3 < 0.5


def test_the_installed_command_is_there():
    command = Path(sys.executable).with_name("xmic")
    if not command.exists(): pytest.skip("the package is not installed with its command")
    assert subprocess.run([command, "--version"], capture_output=True, text=True).stdout.strip() == __import__("xmic").__version__


def test_a_table_to_read(films):
    done = call(films / "a.mp4", *MINI, *NAMES, "--top", 2, "--every", "3s")
    assert done.exit_code == 0, done.output
    rows = done.stdout.splitlines()
    assert rows[0] == str(films / "a.mp4") and rows[1].strip().startswith("no hand boxes")
    (header,) = [row for row in rows if row.startswith("seconds")]
    assert all(title in header for title in ("verb, X-MIC", "verb, zero-shot", "noun, X-MIC", "noun, zero-shot", "action"))
    assert [row[:15].strip() for row in rows if " - " in row[:15]] == ["0.0 -    3.0", "3.0 -    6.0"]
    assert len(rows) == rows.index(header) + 1 + 4 and all(len(row) <= 140 for row in rows[rows.index(header):])


def test_json_lines_and_nothing_else_on_the_standard_output(films):
    done = call(films / "a.mp4", *MINI, *NAMES, "--json", "--top", 2)
    answers = lines(done.stdout)
    assert done.exit_code == 0 and [(a["start"], a["stop"]) for a in answers] == [(0, 2), (2, 4), (4, 6)]
    for a in answers:
        assert a["video"] == str(films / "a.mp4") and len(a["nouns"]) == len(a["verbs"]) == len(a["actions"]) == 2
        assert a["methods"] == {"noun": "xmic", "verb": "xmic"} and len(a["without_adapter"]["noun"]) == 2
        assert a["nouns"][0]["score"] >= a["nouns"][1]["score"] and len(a["frames"]) == len(a["boxes"]) == 16


def test_what_was_printed_stays_and_the_next_file_follows(films):
    done = call(films, *MINI, *NAMES, "--json")
    assert done.exit_code == 1
    assert [Path(a["video"]).name for a in lines(done.stdout)] == ["a.mp4"] * 3 + ["c.mov"] * 2
    (said,) = [line for line in done.stderr.splitlines() if "b.mp4" in line]
    assert said.startswith("xmic: ")


def test_a_file_that_breaks_off_leaves_what_came_before(films, tmp_path):
    from videos import overwrite
    broken = overwrite(write_video(tmp_path / "broken.mp4", 200, 10, gop=10), 0.7, 0.95)
    done = call(broken, *MINI, *NAMES, "--json", "--backend", "pyav")
    assert done.exit_code == 1 and len(lines(done.stdout)) >= 2 and done.stderr.startswith("xmic: ")


def test_a_part_of_a_video(films):
    done = call(films / "a.mp4", *MINI, *NAMES, "--json", "--start", "1s", "--stop", "0:05", "--every", "all")
    assert [(a["start"], a["stop"]) for a in lines(done.stdout)] == [(1, 5)]


def test_zero_shot_with_any_encoder_and_random_weights_says_so(films):
    name = register_tiny()
    done = call(films / "a.mp4", "--encoder", name, "--weights", "random", *NAMES, "--every", "all")
    assert done.exit_code == 0 and "RANDOM encoder weights: the answer means nothing" in done.stdout and "noun, zero-shot" in done.stdout
    assert "X-MIC" not in done.stdout and "xmic: " in done.stderr and "RANDOM weights" in done.stderr


def test_pages_and_annotated_videos(films, tmp_path):
    done = call(films / "a.mp4", *MINI, *NAMES, "--html", tmp_path / "a.html", "--video", tmp_path / "a.mp4")
    assert done.exit_code == 0 and "a.html written" in done.stderr and {p.name for p in tmp_path.iterdir()} == {"a.html", "a.mp4"}
    done = call(films / "a.mp4", films / "c.mov", *MINI, *NAMES, "--html", tmp_path / "pages")
    assert done.exit_code == 0 and {p.name for p in (tmp_path / "pages").iterdir()} == {"a.html", "c.html"}


def test_tables_subtitles_and_tiers(films, tmp_path):
    done = call(films / "a.mp4", *MINI, *NAMES, "--csv", tmp_path / "a.csv", "--srt", tmp_path / "a.srt", "--elan", tmp_path / "a.eaf", "--json")
    answers, table = lines(done.stdout), pd.read_csv(tmp_path / "a.csv")
    assert done.exit_code == 0 and all(f"a.{ending} written" in done.stderr for ending in ("csv", "srt", "eaf"))
    for kind in ("noun", "verb"):
        part = table[table.kind == kind]
        assert part.name.tolist() == [row["name"] for a in answers for row in a[f"{kind}s"]] and set(table.video) == {str(films / "a.mp4")}
        assert np.allclose(part.score, [row["score"] for a in answers for row in a[f"{kind}s"]], atol=1e-3)
        tiers = ElementTree.parse(tmp_path / "a.eaf").getroot().findall(f"TIER[@TIER_ID='{kind}']/ANNOTATION/ALIGNABLE_ANNOTATION/ANNOTATION_VALUE")
        assert [tier.text for tier in tiers] == [a[f"{kind}s"][0]["name"] for a in answers]
    subtitles = (tmp_path / "a.srt").read_text(encoding="utf-8")
    assert subtitles.count(" --> ") == 3 and f"noun: {answers[0]['nouns'][0]['name']}" in subtitles
    done = call(films / "a.mp4", films / "c.mov", *MINI, *NAMES, *[word for o in ("csv", "srt", "elan") for word in (f"--{o}", tmp_path / "all")])
    assert done.exit_code == 0 and {p.name for p in (tmp_path / "all").iterdir()} == {f"{name}.{ending}" for name in "ac" for ending in ("csv", "srt", "eaf")}


@pytest.mark.parametrize("option, ending", [("--csv", "csv"), ("--srt", "srt"), ("--elan", "eaf")])
def test_tables_subtitles_and_tiers_overwrite_nothing(films, tmp_path, monkeypatch, option, ending):
    monkeypatch.setattr("xmic.cli._recognizer", no_model)
    (tmp_path / f"a.{ending}").write_text("mine")
    shutil.copy(films / "a.mp4", tmp_path / f"video.{ending}")
    before = untouched(tmp_path)
    for arguments, message in (([films / "a.mp4", option, tmp_path], "exists already"), ([films / "a.mp4", option, tmp_path / f"a.{ending}"], "--overwrite"),
                               ([tmp_path / f"video.{ending}", option, tmp_path / f"video.{ending}", "--overwrite"], "is an input"),
                               ([films / "a.mp4", films / "c.mov", option, f"x.{ending}"], "name a folder")):
        done = call(*arguments, *MINI, *NAMES)
        assert done.exit_code == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1 and untouched(tmp_path) == before


def test_folders_are_searched_on_request(films, tmp_path, monkeypatch):
    for name in ("b/x.mp4", "a/x.mp4", "a/deep/er/Y.MOV", "a-b/x.mp4", "z.mp4", ".hidden/x.mp4", "a/._x.mp4", "a/.x.mp4", "a/notes.txt"):
        (tmp_path / "v" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(films / "a.mp4", tmp_path / "v" / name)
    write_jpegs(tmp_path / "v/m/frames", 3)
    (tmp_path / "v/circle").symlink_to(tmp_path / "v", target_is_directory=True)
    found = videos([str(tmp_path / "v")], recursive=True)
    assert [Path(one).relative_to(tmp_path / "v").as_posix() for one in found] == ["a/deep/er/Y.MOV", "a/x.mp4", "a-b/x.mp4", "b/x.mp4", "m/frames", "z.mp4"]
    walk = os.walk

    def backwards(top):
        for place, folders, names in walk(top):
            folders.reverse()
            yield place, folders, names[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert videos([str(tmp_path / "v")], recursive=True) == found  # whatever order the file system has
    monkeypatch.undo()
    assert output_names(found) == ["Y", "a-x", "a-b-x", "b-x", "frames", "z"]
    assert [Path(one).name for one in videos([str(tmp_path / "v")])] == ["z.mp4"]
    assert len(videos([str(tmp_path / "v/a/deep")], recursive=True)) == 1
    done = call(tmp_path / "v", "-r", *MINI, *NAMES, "--every", "all", "--csv", tmp_path / "out")
    assert done.exit_code == 0 and {p.name for p in (tmp_path / "out").iterdir()} == {f"{name}.csv" for name in ("Y", "a-x", "a-b-x", "b-x", "frames", "z")}
    done = call(tmp_path / "v/a/deep", *MINI, *NAMES)
    assert done.exit_code == 1 and "holds neither videos" in done.stderr and "--recursive" in done.stderr


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def no_model(*_):
    raise AssertionError("a model was loaded")


def test_recordings_are_never_overwritten(films, tmp_path, monkeypatch):
    own = tmp_path / "own"
    shutil.copytree(films, own)
    (own / "nouns.html").write_text("pan\nknife\n")
    (own / "link.mp4").symlink_to(own / "a.mp4")
    os.link(own / "a.mp4", tmp_path / "hard.mp4")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.mp4").symlink_to(own / "a.mp4")
    before = untouched(tmp_path)
    monkeypatch.setattr("xmic.cli._recognizer", no_model)
    monkeypatch.chdir(own)
    for arguments in ([".", "--video", "."], [own, "--video", own], ["a.mp4", "--video", "a.mp4"], ["a.mp4", "--video", own / "link.mp4"],
                      ["link.mp4", "--video", "a.mp4"], ["a.mp4", "--video", tmp_path / "hard.mp4"], ["a.mp4", "--video", tmp_path / "out"],
                      ["a.mp4", "--nouns", "nouns.html", "--html", "nouns.html"], ["c.mov", "a.mp4", "--video", "../own"]):
        for more in ([], ["--overwrite"]):
            done = call(*arguments, *MINI, *(NAMES if "--nouns" not in arguments else []), *more)
            assert done.exit_code == 1 and "is an input" in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout
            assert untouched(tmp_path) == before


def test_files_that_exist_are_overwritten_only_on_demand(films, tmp_path, monkeypatch):
    for name in ("a.html", "a.mp4"): (tmp_path / name).write_text("mine")
    ask = [films / "a.mp4", *MINI, *NAMES, "--every", "all"]
    with monkeypatch.context() as patch:
        patch.setattr("xmic.cli._recognizer", no_model)
        for wrong in (["--html", tmp_path / "a.html"], ["--html", tmp_path], ["--video", tmp_path / "a.mp4"]):
            done = call(*ask, *wrong)
            assert done.exit_code == 1 and "exists already" in done.stderr and "--overwrite" in done.stderr and str(tmp_path) in done.stderr
        done = call(*ask, "--html", tmp_path / "a.html" / "pages")
        assert done.exit_code == 1 and "is a file, not a folder" in done.stderr
    assert (tmp_path / "a.html").read_text() == (tmp_path / "a.mp4").read_text() == "mine"
    done = call(*ask, "--html", tmp_path / "a.html", "--video", tmp_path / "a.mp4", "--overwrite")
    assert done.exit_code == 0 and (tmp_path / "a.html").stat().st_size > 1000 and (tmp_path / "a.mp4").stat().st_size > 1000


def test_videos_of_one_name_get_pages_of_their_own(films, tmp_path):
    for folder, seconds in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "x.mp4", 10 * seconds, 10)
    write_video(tmp_path / "a/x.mov", 10, 10)
    done = call(tmp_path / "a", tmp_path / "b/x.mp4", *MINI, *NAMES, "--every", "all", "--html", tmp_path / "out", "--video", tmp_path / "out")
    assert done.exit_code == 0, done.stderr
    written = [line.split()[1] for line in done.stderr.splitlines() if line.endswith("written")]
    assert len(written) == len(set(written)) == 6 and {Path(w) for w in written} == set((tmp_path / "out").iterdir())
    ends = {name: (tmp_path / f"out/{name}.html").read_text().split("<title>")[1].split("stretches to ")[1].split()[0] for name in ("x", "x.mp4", "x.mov")
            if (tmp_path / f"out/{name}.html").exists()}
    assert ends == {"x.mp4": "2.0", "x.mov": "1.0", "x": "3.0"}


@pytest.mark.parametrize("given, names", [
    (["a/x.mp4", "b/x.mp4"], ["a-x", "b-x"]), (["x.mp4", "x.mov"], ["x.mp4", "x.mov"]), (["p/a/x.mp4", "q/a/x.mp4"], ["p-a-x", "q-a-x"]),
    (["a/X.mp4", "b/x.mp4"], ["a-X", "b-x"]), (["X.mp4", "x.mp4"], ["X.mp4", "x.mp4-2"]), (["/x.mp4", "/a/x.mp4"], ["x", "a-x"]),
    (["a/x.mp4", "b/x.mp4", "a-x.mp4"], ["a-x", "b-x", "a-x-2"]), (["rtsp://a/live", "rtsp://b/live"], ["a-live", "b-live"])])
def test_names_of_outputs(given, names):
    made = output_names(given)
    assert made == names and len({name.casefold() for name in made}) == len(given)


def test_a_video_given_twice_is_said_where_it_is_written(films):
    for given in (["a.mp4", "./a.mp4"], [".", "a.mp4"]):
        with pytest.raises(DataError, match="given twice"): output_names(videos([str(films / one) for one in given]))


def test_a_part_is_said_and_nothing_else_is_written(films, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    before = untouched(films)
    done = call(films / "a.mp4", *MINI, *NAMES, "--start", "1s", "--stop", "4s", "--video", tmp_path / "out.mp4")
    assert done.exit_code == 0 and f"{tmp_path / 'out.mp4'} written, the part from 1.0 to 4.0 s" in done.stderr
    call(films / "a.mp4", *MINI, *NAMES, "--json")
    assert untouched(films) == before and [p.name for p in tmp_path.iterdir() if p.name != "here"] == ["out.mp4"] and not list((tmp_path / "here").iterdir())


def test_given_hand_boxes(films, tmp_path):
    rows = [f"a,{frame},40,30,120,100" for frame in range(60)]
    (tmp_path / "hand_boxes.csv").write_text("\n".join(["segment_id,frame,left,top,right,bottom", *rows]))
    answer = lines(call(films / "a.mp4", *MINI, *NAMES, "--json", "--every", "all", "--boxes", tmp_path / "hand_boxes.csv").stdout)[0]
    assert answer["boxes"] == [[40, 30, 120, 100]] * 16 and answer["notes"][0] == "hand crops in 16 of 16 frames, as given"
    done = call(films / "c.mov", *MINI, *NAMES, "--every", "all", "--boxes", tmp_path / "hand_boxes.csv")
    assert done.exit_code == 0 and "hand_boxes.csv: has no boxes of 'c'; the first that it has are of 'a'" in done.stderr


def test_a_stream_from_the_standard_input(films):
    with open(films / "a.mp4", "rb") as stdin:
        done = subprocess.run([sys.executable, "-c", "from xmic.cli import main; main()", "predict", "-", *MINI, *NAMES, "--json"],
                              stdin=stdin, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert [(a["video"], a["start"], a["stop"]) for a in lines(done.stdout)] == [("-", 0, 2), ("-", 2, 4), ("-", 4, 6)]


def test_a_pipe_with_its_index_at_the_end_says_what_to_do(tmp_path):
    images = list(np.random.default_rng(0).integers(0, 256, (60, 120, 160, 3), np.uint8))  # too much to be held back until the index comes
    late = write_video(tmp_path / "late.mp4", 60, 10, images=images, faststart=False)
    done = subprocess.run([sys.executable, "-c", "from xmic.cli import main; main()", "predict", "-", *MINI, *NAMES],
                          input=late.read_bytes(), capture_output=True, cwd=ROOT)
    said = done.stderr.decode()
    assert done.returncode == 1 and not done.stdout and said.startswith("xmic: -: ") and "Matroska or MPEG-TS" in said and said.count("\n") == 1


def test_names_from_files_and_from_the_official_lists(films, tmp_path, shared_data):
    (tmp_path / "verbs.txt").write_text("take\nput\n")
    nouns = shared_data / "epic_kitchens_100_annotations/EPIC_100_noun_classes.csv"
    answer = lines(call(films / "c.mov", *MINI, "--nouns", nouns, "--verbs", tmp_path / "verbs.txt", "--json", "--every", "all").stdout)[0]
    assert len(answer["nouns"]) == 5 and {a["name"] for a in answer["verbs"]} == {"take", "put"}


@pytest.mark.parametrize("arguments, message", [
    (["a.mp4", *MINI], "say what to recognise"), (["a.mp4", *NAMES], "give --model"), (["a.mp4", *NAMES, *MINI, "--encoder", "ViT-B-32"], "not both"),
    (["a.mp4", *MINI, "--nouns", "nouns.txt"], "no such file; give a file with a name in each line"), (["a.mp4", *MINI, *NAMES, "--every", "soon"], "is no time"),
    (["a.mp4", *MINI, *NAMES, "--every", "0"], "above 0"), (["a.mp4", *MINI, *NAMES, "--start", "9s"], "no stretch"), (["missing.mp4", *MINI, *NAMES], "no such file"),
    (["a.mp4", "--model", "nowhere", *NAMES], "no such folder"), (["a.mp4", *MINI, *NAMES, "--boxes", "none.csv"], "no such file or folder"),
    (["a.mp4", *MINI, *NAMES, "--detector", "mediapip"], "did you mean 'mediapipe'"), (["a.mp4", "c.mov", *MINI, *NAMES, "--html", "x.html"], "name a folder"),
    (["-", *MINI, *NAMES, "--start", "1s"], "neither beginning nor end"), (["rtsp://127.0.0.1:9/x", *MINI, *NAMES], "cannot be opened"),
    (["-", *MINI, *NAMES, "--video", "x.mp4"], "--video needs a file"), (["a.mp4", *MINI, *NAMES, "--backend", "gstreamer"], "backend is")])
def test_what_is_wrong_is_one_line_and_exit_code_one(films, monkeypatch, arguments, message):
    monkeypatch.chdir(films)
    done = call(*arguments)
    assert done.exit_code == 1 and message in done.stderr and done.stderr.startswith("xmic: ") and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_wrong_options_are_refused_by_their_names(films):
    done = call(films / "a.mp4", "--tops", "3")
    assert done.exit_code == 2 and "--tops" in done.stderr


@pytest.mark.parametrize("text, value", [("2s", 2), ("2", 2), (".5", 0.5), ("500ms", 0.5), ("1.5m", 90), ("1:02.5", 62.5), ("1:00:00", 3600), (" 3 s ", 3)])
def test_times(text, value):
    assert seconds(text) == value


@pytest.mark.parametrize("text", ["", "s", "-1", "2x", "1:75", "1e3", "nan", "1:2:3:4"])
def test_no_times(text):
    with pytest.raises(DataError, match="is no time"): seconds(text)


def test_which_videos(films, tmp_path):
    assert [Path(v).name for v in videos([str(films)])] == ["a.mp4", "b.mp4", "c.mov"]
    write_jpegs(tmp_path / "frames", 3)
    assert videos([str(tmp_path / "frames"), "rtsp://a/b"]) == [str(tmp_path / "frames"), "rtsp://a/b"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither videos"): videos([str(tmp_path / "empty")])


def test_from_videos_to_a_recognizer_with_commands_alone(tmp_path):
    name, world = register_tiny(), write_world(tmp_path / "world", videos=6)
    common = ["dataset=csv", f"data_root={world}", f"encoder={name}", "weights=random", f"features_root={tmp_path / 'features'}", "device=cpu", "progress=false"]
    run = lambda *arguments: CliRunner().invoke(app, list(arguments))
    done = run("extract", *common, "workers=0")
    assert done.exit_code == 0, done.output
    done = run("train", *common, f"runs_root={tmp_path / 'runs'}", "epochs=2", "warmup_epochs=1", "batch_size=4", "labels=noun")
    assert done.exit_code == 0 and "top1" in done.stdout
    folder = Path(done.stdout.splitlines()[0])
    assert read_json(folder / "metrics.json")["results"]["csv"]["noun"]["top1"]["count"] == 6
    assert run("evaluate", f"run={folder}", "template=a photo of a {}", "device=cpu").exit_code == 0
    done = call(world / "videos/v0.mp4", "--model", folder, "--nouns", "pan,knife,tap", "--json")
    assert done.exit_code == 0 and np.isclose(sum(n["score"] for n in lines(done.stdout)[0]["nouns"]), 100, atol=0.01)
    for wrong, message in ((["epocs=3"], "did you mean 'epochs'"), (["epochs"], "name=value"), (["epochs=3", "epochs=4"], "each once")):
        done = run("train", *wrong)
        assert done.exit_code == 1 and message in done.stderr


def test_data_are_looked_at(tmp_path, monkeypatch):
    own, run = write_world(tmp_path / "mine", videos=4, frames=60), lambda *arguments: CliRunner().invoke(app, ["check-data", *map(str, arguments)])
    monkeypatch.chdir(tmp_path)
    done = run("csv", "mine", "--thorough", "--workers", 1)
    assert done.exit_code == 0 and done.stdout.startswith(f"Your videos: all is well\n{own}\n")
    (own / "videos/v0.mp4").unlink()
    done = run("csv", own, "--json")
    said = json.loads(done.stdout)
    assert done.exit_code == 1 and said["ok"] is False and said["facts"]["Videos"]["there"] == 3
    assert run("csv", own).exit_code == 1
    for wrong, message in ((["csv", own / "nowhere"], "no such folder"), (["epics", own], "did you mean 'epic'"),
                           (["csv", own, "--encoder", "ResNet"], "known of")):
        done = run(*wrong, "--json")
        assert done.exit_code == 1 and done.stderr.startswith("xmic: ") and message in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


@pytest.mark.parametrize("options, words", [
    (["missing.mp4", *MINI, *NAMES], "missing.mp4: no such file"), (["a.mp4", "missing.mp4", *MINI, *NAMES], "missing.mp4: no such file"), (["a.mp4", *MINI, *NAMES, "--every", "0"], "--every 0"),
    (["a.mp4", *MINI, *NAMES, "--start", "5", "--stop", "2"], "--stop 2 is not after --start 5"), (["a.mp4", "-m", "nowhere", *NAMES], "--model nowhere: no such folder"),
    (["a.mp4", *NAMES], "give --model"), (["a.mp4", *MINI, *NAMES, "--weights", "no.pt"], "--weights no.pt: no such file"), (["a.mp4", *MINI, "--nouns", "none.txt"], "--nouns none.txt"),
    (["a.mp4", *MINI, *NAMES, "--backend", "opencv"], "--backend is"), (["a.mp4", *MINI], "--nouns, --verbs, or both"), (["a.mp4", *MINI, *NAMES, "--fps", "3"], "--fps and --first-frame are for"),
    (["a.mp4", *MINI, *NAMES, "--boxes", "none.csv"], "--boxes none.csv")])
def test_what_is_wrong_is_told_without_loading_torch(tmp_path, options, words):
    (tmp_path / "a.mp4").touch()
    code = "import sys; from xmic.cli import main; sys.argv[1:] = sys.argv[2:] if sys.argv[1] == '--' else sys.argv[1:]\ntry: main()\nexcept SystemExit as e: print(e.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--", "predict", *options], capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "1 False" and words in done.stderr and "Traceback" not in done.stderr, (done.stdout, done.stderr)


@pytest.mark.parametrize("python, command", [
    ("fetch them: create_encoder('ViT-B-16-quickgelu', weights='/path/to/file')", "fetch them: --encoder ViT-B-16-quickgelu --weights /path/to/file"),
    ("Or pass a weight file, or weights='random'", "Or pass a weight file, or --weights random"), ("fps=0.0 must be a number", "--fps 0.0 must be a number"),
    ("backend='torchcodec' needs the package", "--backend torchcodec needs the package"), ("give it as Backend(fps=...)", "give it as --fps NUMBER"),
    ("it exists; overwrite=True overwrites it", "it exists; --overwrite overwrites it"), ("device 'mps', but torch", "--device 'mps', but torch"),
    ("backend is 'a' or 'b', code of your own as 'f.py:Name', or an object with open(path), not 'c'", "--backend is 'a' or 'b', code of your own as 'f.py:Name', not 'c'")])
def test_messages_name_options_of_the_command(python, command):
    assert _as_options(python) == command
