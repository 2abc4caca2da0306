"""The explorer: it answers as the runs did, computes only what is new, draws what it says, and keeps what it shows when something is wrong."""
import re
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("ipywidgets")

from world import register_tiny, write_world  # noqa: E402
from xmic import explorer as module  # noqa: E402
from xmic.experiments import prepare  # noqa: E402
from xmic.explorer import (OUTCOMES, ZERO_SHOT, Bench, Choice, Explorer, Film, OpenRun, Picture, Recent, Vocabulary, attention_html, compare,  # noqa: E402
                           map_html, neighbours, neighbours_html, ranking, ranking_html, read_names, strip_html)
from xmic.files import DataError, read_json, write_json  # noqa: E402
from xmic.inspection import look, won_and_lost  # noqa: E402
from xmic.recognizer import Recognizer  # noqa: E402
from xmic.config import TrainConfig
from xmic.training import train  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
METHODS = dict(xmic=dict(epochs=2, warmup_epochs=0, labels="both"), zero_shot=dict(method="zero_shot", labels="both"),
               coop=dict(method="coop", epochs=2, warmup_epochs=0, prompt_length=4), clip_adapter=dict(method="clip_adapter", epochs=2, warmup_epochs=0))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    "Finished runs of four methods on filmed clips."
    world = write_world(tmp_path_factory.mktemp("world"), videos=6, frames=60)
    common = dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(world / "features"),
                  runs_root=str(world / "runs"), device="cpu", progress=False, frames=4)
    for name, own in METHODS.items():
        train(prepare(TrainConfig(**common, **own, name=name)))
    return world / "runs"


@pytest.fixture(scope="module")
def bench(root):
    return Bench(root, "cpu")


@pytest.fixture
def explorer(bench):
    shown = Explorer(bench)
    yield shown
    shown.close()


def plain(html: str) -> str:
    return " ".join(re.sub(r"<[^>]*>", " ", html).split())


# -- answers

@pytest.mark.parametrize("name, kind", [("xmic", "noun"), ("xmic", "verb"), ("zero_shot", "noun"), ("coop", "noun"), ("clip_adapter", "noun")])
def test_outcomes_and_single_clips_are_those_of_the_run(root, name, kind):
    run, said = OpenRun(root / name, "cpu"), pd.read_csv(root / name / "predictions.csv")
    said = said[said.kind == kind].set_index("segment_id")
    found = run.outcomes("csv", "test", kind).set_index("segment_id")
    assert (found.right == (said.predicted == said.label)[found.index]).all() and len(found) == len(said)
    names = run.classes("csv", kind).names
    for segment in said.index:
        clip = run.clip("csv", "test", segment)
        logits = run.logits(clip.batch, run.names(names))[0]
        assert int(logits.argmax()) == said.predicted[segment] and clip.labels[kind] == names[said.label[segment]]
        assert abs(float(logits.softmax(-1).max()) - said.confidence[segment]) < 1e-5


def test_zero_shot_needs_no_run_of_its_own(bench):
    there, made = (bench.open("zero_shot").outcomes("csv", "test", "noun"), bench.open("xmic").outcomes("csv", "test", "noun", plain=True))
    assert there.segment_id.tolist() == made.segment_id.tolist() and np.allclose(there.margin, made.margin, atol=1e-6)


def test_won_and_lost_are_those_of_inspection(root, bench):
    before, after = look(root / "zero_shot"), look(root / "xmic")
    won, lost = won_and_lost(before, after, 99)
    found = bench.outcomes(bench.settle(Choice(after="xmic"))).groupby("outcome").segment_id.apply(list).to_dict()
    assert found.get("won", []) == [after.segments.segment_id[i] for i in won]
    assert found.get("lost", []) == [after.segments.segment_id[i] for i in lost]
    assert set(found) <= set(OUTCOMES) and sum(map(len, found.values())) == len(after.labels)


def test_attention_is_that_of_inspection(root, bench):
    seen, run = look(root / "xmic"), bench.open("xmic")
    for row, segment in enumerate(seen.segments.segment_id):
        maps = run.attention(run.clip("csv", "test", segment))
        assert torch.allclose(maps["spatial"], seen.attention["spatial"][row], atol=1e-5)
        assert torch.allclose(maps["temporal"], seen.attention["temporal"][row], atol=1e-5)
    assert bench.open("coop").attention(bench.open("coop").clip("csv", "test", segment)) == {}


def test_views_that_lie_side_by_side_in_time_are_added_up_by_frame(root, tmp_path):
    config = TrainConfig(**{**read_json(root / "xmic" / "config.json"), "merge": "concat", "name": "concat", "runs_root": str(tmp_path)})
    run = OpenRun(train(config).folder, "cpu")
    maps = run.attention(run.clip("csv", "test", run.split("csv", "test").segments.segment_id[0]))
    assert maps["temporal"].shape == (4, 4) and torch.allclose(maps["temporal"].sum(-1), torch.ones(4), atol=1e-5)


def test_the_frames_shown_are_those_that_were_sampled(bench):
    run, choice = bench.open("xmic"), bench.settle(Choice(after="xmic"))
    clip, split = bench.clip(choice, "xmic"), run.split("csv", "test")
    stored = run.data.store(run.data.encoder, "csv").frames(choice.segment, "hand").numpy()
    assert clip.frames.tolist() == stored[split.rows(4)[0][0]].tolist() and len(bench.pictures(choice)) == 4
    assert [p.seconds for p in bench.pictures(choice)] == [n / 25 for n in clip.frames]
    assert all(p.box is None or all(0 <= v <= 100 for v in p.box) for p in bench.pictures(choice)) and any(p.box for p in bench.pictures(choice))


def test_a_video_of_ones_own_is_recognised_as_the_recognizer_does(root, bench):
    video, names = root.parent / "videos" / "v5.mp4", ("tap", "kettle", "pan")
    said = Recognizer.from_pretrained(root / "xmic", "cpu").predict(video, nouns=names, start=0.5, stop=1.5)
    choice = bench.settle(Choice(after="xmic", film=Film(str(video), 0.5, 1.5), names=names))
    found = bench.ranking(choice)
    assert found["name"].tolist() == said.nouns["name"].tolist() and bench.clip(choice, "xmic").frames.tolist() == said.frames
    assert np.allclose(found.after, said.nouns.score, atol=1e-3) and np.allclose(found.before, said.nouns.zero_shot, atol=1e-3)
    assert not found.right.any()


def test_hand_boxes_of_ones_own_are_shown_and_cropped(root, bench, tmp_path):
    boxes = tmp_path / "boxes.csv"
    boxes.write_text("segment_id,frame,left,top,right,bottom\n" + "".join(f"v5,{n},32,24,96,72\n" for n in range(60)))
    video = str(root.parent / "videos" / "v5.mp4")
    with_boxes, without = (bench.settle(Choice(after="xmic", film=Film(video, 0.5, 1.5, b))) for b in (str(boxes), ""))
    assert [p.box for p in bench.pictures(with_boxes)] == [(25, 25, 50, 50)] * 4 and [p.box for p in bench.pictures(without)] == [None] * 4
    assert not np.allclose(bench.ranking(with_boxes).after, bench.ranking(without).after)


# -- names

def test_only_new_names_are_embedded(bench):
    run = bench.open("xmic")
    names = run.classes("csv", "noun").names
    before, calls = run.names.computed, []
    encode = run.data.encoder.encode_text
    run.data.encoder.encode_text = lambda texts, *rest: calls.append(list(texts)) or encode(texts, *rest)
    try:
        first = run.names([*names, "a first new one"])
        run.names(["a first new one", *names[:1], "a second"])
        run.names(["a second"])
    finally:
        del run.data.encoder.encode_text
    assert calls == [["a first new one"], ["a second"]] and run.names.computed == before + 2
    assert torch.equal(first.text[:-1], run.data.text["csv"]["noun"].text) and torch.allclose(first.text[-1:], encode(["a first new one"]))


def test_the_order_of_the_names_changes_no_share(bench):
    choice = bench.settle(Choice(after="xmic"))
    names = bench.names(choice)
    one, two = (bench.ranking(replace(choice, names=n)).set_index("name") for n in (names, names[::-1]))
    assert np.allclose(one.after, two.after[one.index], atol=1e-4)


def test_a_vocabulary_forgets_what_is_not_asked_for(bench):
    words = Vocabulary(bench.open("xmic").data.encoder, keep=5)
    words(["a", "b", "c", "d"])
    kept = words(["d", "e", "f"])
    assert set(words.place) == {"d", "e", "f"} and len(words.text) == 3
    assert torch.equal(kept.text[0], words(["d"]).text[0]) and words.computed == 6


def test_long_lists_are_kept_on_disk(bench, tmp_path):
    names, encoder = [f"thing {i}" for i in range(300)], bench.open("xmic").data.encoder
    Vocabulary(encoder, cache=tmp_path)(names)
    Vocabulary(encoder, cache=tmp_path)(["one"])
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("text", ["", "  \n\t\n"])
def test_an_empty_class_list_is_refused(text):
    with pytest.raises(DataError, match="class list is empty"):
        read_names(text)


def test_ranks_shares_and_the_right_name():
    table = ranking(["a", "b", "c"], torch.tensor([3.0, 2, 1]), torch.tensor([1.0, 3, 2]), "c").set_index("name")
    assert table.rank_before.to_dict() == dict(a=1, b=2, c=3) and table.rank_after.to_dict() == dict(b=1, c=2, a=3)
    assert table.right.to_dict() == dict(a=False, b=False, c=True) and abs(table.after.sum() - 100) < 1e-4


def test_neighbours_before_and_after_the_shift():
    text, vector = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), torch.full((8,), 0.7)
    found = neighbours("x", ["a", "x", "c"], text[[1, 0, 1, 3]], vector).set_index("name")
    assert list(found.index) == ["a", "c"]
    assert abs(found.before["c"] - F.cosine_similarity(text[1], text[3], dim=0)) < 1e-6
    assert abs(found.after["c"] - F.cosine_similarity(text[1] + vector, text[3] + vector, dim=0)) < 1e-6
    still = neighbours("x", ["a", "c"], text[[1, 0, 3]], torch.zeros(8))
    assert np.allclose(still.before, still.after)


# -- what is drawn

def test_names_are_text_and_never_markup():
    bad = '<script>alert(1)</script>"&'
    table = ranking([bad, "b"], torch.tensor([1.0, 0]), torch.tensor([1.0, 0]), bad)
    html = ranking_html(table, (bad, bad)) + neighbours_html(bad, pd.DataFrame(dict(name=[bad], before=[0.5], after=[0.5])), 3.0)
    html += map_html(torch.eye(2), bad, (bad, bad)) + attention_html({}, (), bad)
    assert "<script" not in html and html.count("&lt;script&gt;") >= 6


def test_bars_boxes_and_titles_say_the_numbers():
    shown = [Picture(b"x", (10.0, 20.0, 30.0, 40.0), 1.25), Picture(b"y", None, 2.5)]
    maps = dict(spatial=torch.tensor([[[0.7, 0.3], [0.4, 0.6]]] * 2), temporal=torch.tensor([[0.9, 0.1], [0.6, 0.4]]))
    html = strip_html(shown, maps, ("hand", "full"))
    assert html.count("<img") == 2 and html.count("<i ") == 1 and "left:10.0%;top:20.0%;width:30.0%;height:40.0%" in html
    assert "hand looks at hand 70 %, full 30 %" in html and "receives 1.50 of an even share" in html and "height:33%" in html
    assert "xmic-time" not in strip_html(shown)
    assert "70 %" in map_html(maps["spatial"].mean(0), "t", ("hand", "full")) and "strongest: 90 %, even: 50 %" in map_html(maps["temporal"], "t")


# -- what can be chosen

def test_recent_keeps_what_was_used_last():
    recent = Recent(2)
    assert [recent.of(key, lambda: key.upper()) for key in "abac"] == ["A", "B", "A", "C"] and list(recent) == ["a", "c"]


def test_little_is_kept(bench):
    for name in METHODS:
        bench.ranking(bench.settle(Choice(after=name)))
    assert len(bench._open) == 2 and len(bench._encoders) == 1
    assert bench.open("xmic").data.encoder is bench.open("zero_shot").data.encoder


def test_datasets_of_one_name_are_told_apart(root, tmp_path):
    other = write_world(tmp_path / "other", videos=4, frames=50)
    for name, place in (("here", root.parent), ("there", other)):
        shutil.copytree(root / "xmic", tmp_path / "runs" / name)
        write_json(tmp_path / "runs" / name / "config.json", read_json(root / "xmic" / "config.json") | dict(data_root=str(place)))
    found = Bench(tmp_path / "runs")
    assert len(found.datasets) == 2 and all(f"csv in {p.parent}" in found.datasets for p in (root.parent, other))
    assert sorted(found.runs_of(d, "noun")[0] for d in found.datasets) == ["here", "there"]


def test_an_unreadable_run_is_left_out(root, tmp_path):
    shutil.copytree(root, tmp_path / "runs")
    (tmp_path / "runs" / "coop" / "config.json").write_text("{")
    assert set(Bench(tmp_path / "runs").runs) == set(METHODS) - {"coop"}
    (tmp_path / "runs" / "xmic" / "model.safetensors").write_bytes(b"short")
    explorer = Explorer(Bench(tmp_path / "runs", "cpu"))  # begins with the next
    assert explorer.choice.after != "xmic"
    before = {name: part.value for name, part in explorer.shown.items()}
    explorer.controls["after"].value = "xmic"
    assert "not the weights of this run" in explorer.fault and explorer.controls["after"].value == explorer.choice.after != "xmic"
    assert {n: p.value for n, p in explorer.shown.items() if n != "message"} == {n: v for n, v in before.items() if n != "message"}


def test_no_run_at_all(tmp_path):
    with pytest.raises(DataError, match="no finished run"):
        Bench(tmp_path)


# -- the widgets

def test_every_control_changes_what_it_should(explorer):
    c, shown = explorer.controls, explorer.shown
    value = lambda: {name: part.value for name, part in shown.items()}
    changed = lambda before: {name for name in before if before[name] != shown[name].value}
    assert c["after"].value == "xmic" and c["before"].value == ZERO_SHOT and len(c["segment"].options) == 6

    before = value()
    c["segment"].value = c["segment"].options[3][1]
    assert {"title", "strip", "maps", "ranking"} <= changed(before) and c["segment"].value in shown["title"].value

    before = value()
    c["names"].value += "\nteapot"
    assert changed(before) <= {"message", "ranking", "names", "neighbours"} and "4 names compete; 1 embedded just now" in shown["names"].value
    c["names"].value = "teapot\npan"
    assert "2 names compete" in shown["names"].value and "embedded" not in shown["names"].value and "teapot" in shown["ranking"].value
    explorer.own_names.click()
    assert explorer.choice.names is None and "teapot" not in c["names"].value

    before = value()
    explorer.attention.value = False
    assert changed(before) >= {"maps", "strip"} and shown["maps"].value == "" and "xmic-time" not in shown["strip"].value
    explorer.attention.value = True
    assert shown["strip"].value == before["strip"] and shown["maps"].value == before["maps"]

    before = value()
    c["about"].value = " a wooden spoon "
    assert changed(before) <= {"neighbours", "message", "names"} and "a wooden spoon" in shown["neighbours"].value

    c["kind"].value = "verb"
    assert set(c["names"].value.split()) == {"take", "put"} and "2 names compete" in shown["names"].value and c["about"].value == ""
    assert list(c["after"].options) == ["xmic", "zero_shot"]
    c["split"].value = "train"
    assert len(c["segment"].options) == 6 and explorer.choice.segment not in before["title"]


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_each_outcome_lists_its_clips_or_says_that_there_are_none(explorer, outcome):
    explorer.choose(split="train")
    counts = explorer.bench.outcomes(explorer.choice).outcome.value_counts()
    explorer.controls["outcome"].value = outcome
    if outcome in counts:
        assert len(explorer.controls["segment"].options) == counts[outcome] and f"{counts[outcome]} {outcome}" in plain(explorer.shown["message"].value)
    else:
        assert "there is no train clip" in explorer.fault and explorer.controls["outcome"].value == ""


def test_two_runs_of_any_kind_can_be_compared(explorer):
    for before, after in (("zero_shot", "coop"), ("coop", "xmic"), ("clip_adapter", "clip_adapter")):
        assert explorer.choose(before=before, after=after), explorer.fault
        assert f"<h4>{before}</h4>" in explorer.shown["ranking"].value and f"<h4>{after}</h4>" in explorer.shown["ranking"].value
    assert "clip_adapter has no attention" in explorer.shown["maps"].value and "after the shift" not in explorer.shown["neighbours"].value


FAULTS = {
    "an empty list": ("names", "\n \n", "class list is empty"),
    "a name with a control character": ("names", "pan\ncup\x07", "control characters"),
    "a name that is far too long": ("names", "pan\n" + 600 * "x", "500 characters"),
    "neighbours of a control character": ("about", "\x00", "control characters"),
}


@pytest.mark.parametrize("control, value, message", FAULTS.values(), ids=FAULTS)
def test_bad_names_leave_one_line_and_everything_else(explorer, capsys, control, value, message):
    before = {name: part.value for name, part in explorer.shown.items() if name != "message"}
    choice = explorer.choice
    explorer.controls[control].value = value
    assert message in plain(explorer.shown["message"].value) and "\n" not in explorer.shown["message"].value and explorer.choice == choice
    assert {name: part.value for name, part in explorer.shown.items() if name != "message"} == before
    assert capsys.readouterr() == ("", "")


FILMS = {
    "no such file": (dict(path="/nowhere/kitchen.mp4"), "there is no file /nowhere/kitchen.mp4"),
    "no video": (dict(path=__file__), "test_explorer.py"),
    "no number": (dict(path="{video}", start="two"), "give seconds as numbers"),
    "backwards": (dict(path="{video}", start="2", stop="1"), "no stretch"),
    "beyond its end": (dict(path="{video}", start="20"), "no stretch"),
    "no time at all": (dict(path="{video}", start="nan"), "no stretch"),
    "no such boxes": (dict(path="{video}", boxes="/nowhere/boxes.csv"), "no file of hand boxes"),
    "no boxes": (dict(path="{video}", boxes="{video}"), ""),
}


@pytest.mark.parametrize("given, message", FILMS.values(), ids=FILMS)
def test_a_bad_video_leaves_one_line_and_everything_else(explorer, root, capsys, given, message):
    before = {name: part.value for name, part in explorer.shown.items() if name != "message"}
    explorer.source.value = explorer.source.options[1]
    for name, value in reversed(given.items()):
        explorer.film[name].value = value.format(video=root.parent / "videos" / "v5.mp4")
    line = plain(explorer.shown["message"].value)
    assert "fault" in explorer.shown["message"].value and message in line and "Traceback" not in line and explorer.choice.film is None
    after = {name: part.value for name, part in explorer.shown.items() if name != "message"}
    assert after == before and capsys.readouterr() == ("", "")


def test_to_a_video_of_ones_own_and_back(explorer, root):
    before = explorer.shown["title"].value
    explorer.source.value = explorer.source.options[1]
    assert "name a video file" in explorer.shown["message"].value and explorer.shown["title"].value == before
    explorer.film["path"].value = str(root.parent / "videos" / "v5.mp4")
    assert "v5.mp4" in explorer.shown["title"].value and explorer._of_dataset.layout.display == "none" and "xmic-right" not in explorer.shown["ranking"].value
    explorer.film["start"].value = "1"
    assert "1.00 to 2.40 s" in explorer.shown["title"].value
    explorer.source.value = explorer.source.options[0]
    assert explorer.shown["title"].value == before and explorer._of_film.layout.display == "none"


def test_videos_that_are_gone_leave_the_rest(root, tmp_path):
    shutil.copytree(root.parent, tmp_path / "world")
    for name in METHODS:
        path = tmp_path / "world" / "runs" / name / "config.json"
        write_json(path, read_json(path) | dict(data_root=str(tmp_path / "world"), features_root=str(tmp_path / "world" / "features")))
    shutil.rmtree(tmp_path / "world" / "videos")
    explorer = Explorer(Bench(tmp_path / "world" / "runs", "cpu"))
    assert "frames cannot be shown" in plain(explorer.shown["strip"].value) and "xmic-ranking" in explorer.shown["ranking"].value
    assert "xmic-map" in explorer.shown["maps"].value


def test_a_fault_of_the_kit_is_a_line_too(explorer, monkeypatch):
    monkeypatch.setattr(module, "ranking", lambda *_: 1 / 0)
    before = explorer.shown["ranking"].value
    explorer.controls["names"].value = "cup\npot"
    assert "ZeroDivisionError" in plain(explorer.shown["message"].value) and explorer.shown["ranking"].value == before


def test_long_lists_of_clips_are_cut(explorer, monkeypatch):
    monkeypatch.setattr(module, "LISTED", 2)
    last = explorer.controls["segment"].options[-1][1]
    explorer.choose(segment=last)
    assert len(explorer.controls["segment"].options) == 3 and explorer.controls["segment"].value == last


def test_segments_that_one_run_lacks_are_left_out_of_the_comparison():
    one = pd.DataFrame(dict(segment_id=["a", "b"], right=[True, True], margin=[0.1, 0.2]))
    two = pd.DataFrame(dict(segment_id=["b", "c"], right=[False, True], margin=[-0.4, 0.2]))
    assert compare(one, two).values.tolist() == [["b", "lost", pytest.approx(-0.6)]]
