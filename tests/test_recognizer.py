"""The recogniser on real and made videos, with class lists of its own."""
import shutil
import socket
import tracemalloc
import weakref
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors.torch import load_file
from torch import nn

from videos import numbered_frame, numbers_of
from videos import write_video as write_numbered
from world import register_tiny, write_world
from xmic import recognizer as recognizer_module
from xmic.adapter import cosine_logits
from xmic.classes import ClassSet
from xmic.encoders import create_encoder
from xmic.features import ExtractConfig, extract_dataset
from xmic.files import DataError, read_json
from xmic.hands import HandBoxes
from xmic.mini import LISTS, plan, write_reel
from xmic.classes import read_names
from xmic.recognizer import Recognition, Recognizer, _best_pairs
from xmic.config import TrainConfig
from xmic.streams import Batch
from xmic.training import load_trained, train
from xmic.video import VideoError, iter_frames

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def verb_run(run):
    return train(replace(run.config, labels="verb", name=None))


def make_run(folder, **changes):
    world = write_world(folder / "world", videos=6)
    common: dict = dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(folder / "features"),
                  device="cpu", progress=False) | changes
    extract_dataset(ExtractConfig(**common, workers=0))
    return train(TrainConfig(**common, runs_root=str(folder / "runs"), epochs=2, warmup_epochs=1, batch_size=4))


def test_real_clips_with_the_whole_epic_class_list(run, shared_data):
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    annotations = shared_data / "epic_kitchens_100_annotations"
    nouns, verbs = (ClassSet.from_epic(annotations / f"EPIC_100_{k}_classes.csv") for k in ("noun", "verb"))
    for name in ("epic_P01_01_take_salt", "epic_wall_r0c0", "ego4d_site_tokyo"):
        found = recognizer.predict(shared_data / f"real_clips/videos/{name}.mp4", nouns=nouns, verbs=verbs, top=5)
        assert len(found.nouns) == len(found.verbs) == len(found.actions) == 5 and len(found.frames) == 16
        assert set(found.nouns.name) <= set(nouns.names) and found.nouns.score.is_monotonic_decreasing
        assert any("zero-shot" in note for note in found.notes) and any("no hand boxes" in note for note in found.notes)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
def test_it_gives_what_evaluation_predicts(run, tmp_path, resize):
    if resize != "shortest":
        run = make_run(tmp_path, resize=resize)
    world = Path(run.config.data_root)
    predictions = pd.read_csv(run.folder / "predictions.csv")
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    segments = pd.read_csv(world / "segments.csv").set_index("segment_id")
    boxes = HandBoxes.from_boxes(world / "hand_boxes.csv")
    names = sorted(set(segments.noun))
    for row in predictions.itertuples():
        s = segments.loc[row.segment_id]

        class Named:  # the recogniser names a segment after its file; here the boxes are under the segment's own name
            box = staticmethod(lambda segment, *rest: boxes.box(replace_id(segment, row.segment_id), *rest))

        found = recognizer.predict(world / f"videos/{s.video_id}.mp4", nouns=names, start=s.start_sec, stop=s.stop_sec, boxes=Named)
        assert found.nouns.name[0] == names[row.predicted]
        np.testing.assert_allclose(found.nouns.score[0] / 100, row.confidence, rtol=2e-2)


def replace_id(segment, segment_id):
    segment.segment_id = segment_id
    return segment


def test_saved_and_loaded_it_answers_the_same(run, tmp_path):
    video = next(Path(run.config.data_root, "videos").glob("*.mp4"))
    recognizer = Recognizer.from_pretrained(run.folder, device="cpu")
    recognizer.save_pretrained(tmp_path / "saved")
    a, b = (r.predict(video, nouns=["pan", "cup"]) for r in (recognizer, Recognizer.from_pretrained(tmp_path / "saved", device="cpu")))
    assert a.nouns.equals(b.nouns)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(), DataError, "give a list of nouns"), (dict(nouns=[]), DataError, "no names|name"), (dict(nouns=["a"], start=99.0), DataError, "no stretch"),
    (dict(nouns=["a"], start=1.0, stop=0.5), DataError, "no stretch"), (dict(nouns=["pan", "pan"]), DataError, "pan")])
def test_wrong_questions_are_refused(run, arguments, error, message):
    video = next(Path(run.config.data_root, "videos").glob("*.mp4"))
    with pytest.raises(error, match=message):
        Recognizer.from_pretrained(run.folder, device="cpu").predict(video, **arguments)


def test_a_file_that_is_no_video_is_refused(tmp_path):
    (tmp_path / "x.mp4").write_text("no video")
    with pytest.raises(VideoError, match="x.mp4"):
        Recognizer(create_encoder(register_tiny(), "random", "cpu"), {}, {}).predict(tmp_path / "x.mp4", nouns=["pan"])


def test_a_folder_without_a_model_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text((run.folder / "config.json").read_text())
    with pytest.raises(DataError, match="neither a finished run"):
        Recognizer.from_pretrained(tmp_path, device="cpu")


ROOT = Path(__file__).resolve().parents[1]
NAMES = dict(nouns=["pan", "knife", "tap"], verbs=["take", "put"])


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    "Seven seconds whose frames carry their number, at 10 a second."
    return write_numbered(tmp_path_factory.mktemp("film") / "film.mp4", 70, 10)


@pytest.fixture(scope="module")
def plain():
    return Recognizer.zero_shot(create_encoder(register_tiny(), "random", "cpu"))


def same(a: Recognition, b: Recognition, rtol: float = 0) -> bool:
    return all(list(x.name) == list(y.name) and np.allclose(x.score, y.score, rtol=rtol, atol=0) for x, y in ((a.nouns, b.nouns), (a.verbs, b.verbs)))


@given(first=arrays(np.int8, st.integers(1, 12), elements=st.integers(0, 5)), second=arrays(np.int8, st.integers(1, 12), elements=st.integers(0, 5)), k=st.integers(1, 30))
def test_the_best_pairs_are_those_of_the_whole_table_in_its_order(first, second, k):
    first, second = -np.sort(-first.astype(float)), -np.sort(-second.astype(float))
    rows, columns = _best_pairs(first, second, k)
    order = np.argsort(-np.outer(first, second).ravel(), kind="stable")[:k]
    assert np.array_equal(rows * len(second) + columns, order)


def test_actions_of_twenty_thousand_nouns_and_verbs_take_no_table_of_all_pairs():
    rng, n = np.random.default_rng(0), 20_000
    table = lambda: pd.DataFrame(dict(name=[f"n{i}" for i in range(n)], score=-np.sort(-rng.dirichlet(np.ones(n)) * 100), zero_shot=np.full(n, 100 / n)))
    recognition = Recognition(table(), table(), 0, 1, [], [])
    tracemalloc.start()
    actions, (_, peak) = recognition.actions, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(actions) == n and actions.score.is_monotonic_decreasing and peak < 100e6  # bytes; a table of all pairs has 3.2e9


def test_a_noun_run_and_a_verb_run_become_one_recognizer(run, verb_run):
    video = next(Path(run.config.data_root, "videos").glob("*.mp4"))
    joined = Recognizer.from_pretrained([run.folder, verb_run.folder], "cpu").predict(video, **NAMES)
    nouns, verbs = (Recognizer.from_pretrained(folder, "cpu").predict(video, **NAMES) for folder in (run.folder, verb_run.folder))
    assert joined.nouns.equals(nouns.nouns) and joined.verbs.equals(verbs.verbs)
    assert joined.methods == {"noun": "xmic", "verb": "xmic"} and nouns.methods == {"noun": "xmic", "verb": "zero_shot"}
    assert not joined.verbs.equals(nouns.verbs) and joined.zero_shot["verb"].equals(nouns.verbs[["name", "score"]])
    with pytest.raises(DataError, match="holds an adapter for nouns, and so does a folder before it"):
        Recognizer.from_pretrained([run.folder, run.folder], "cpu")


def test_a_list_is_encoded_once_and_found_again_by_the_next_process(plain, film, monkeypatch, tmp_path):
    monkeypatch.setenv("XMIC_CACHE", str(tmp_path))
    encoded = []
    monkeypatch.setattr(type(plain.encoder), "encode_text", lambda self, texts, original=type(plain.encoder).encode_text: encoded.append(len(texts)) or original(self, texts))
    names = [f"thing {i}" for i in range(700)]
    first = Recognizer.zero_shot(plain.encoder)
    answers = list(first.predict_along(film, names, every=1.0))
    assert encoded == [700] and len(answers) == 7
    first.predict(film, list(names))
    again = Recognizer.zero_shot(plain.encoder).predict(film, names, stop=1.0)
    assert encoded == [700] and again.nouns.equals(answers[0].nouns)
    (kept,) = (tmp_path / "text").iterdir()
    kept.write_bytes(kept.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="made again"):
        mended = Recognizer.zero_shot(plain.encoder).predict(film, names, stop=1.0)
    assert encoded == [700, 700] and mended.nouns.equals(again.nouns)
    Recognizer.zero_shot(plain.encoder).predict(film, names, stop=1.0)
    assert encoded == [700, 700]


def test_without_a_place_to_keep_text_it_answers_all_the_same(plain, film, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XMIC_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="not kept"):
        answer = Recognizer.zero_shot(plain.encoder).predict(film, **NAMES)
    assert same(answer, plain.predict(film, **NAMES))


def test_along_a_video_each_frame_is_read_once_and_answered_as_by_itself(plain, film):
    seen = []
    def detector(frames):
        seen.append(numbers_of(frames))
        return [(0, 0, 80, 60) if n % 2 else None for n in seen[-1]]
    along = list(plain.predict_along(film, **NAMES, every=1.6, start=0.5, stop=6.5, boxes=detector))
    assert [(a.start, round(a.stop, 6)) for a in along] == [(0.5, 2.1), (2.1, 3.7), (3.7, 5.3), (5.3, 6.5)]
    numbers = [n for frames in seen for n in frames]
    assert numbers == sorted(set(numbers)) and all(set(a.frames) == set(frames) for a, frames in zip(along, seen))
    assert all(box == ((0, 0, 80, 60) if n % 2 else None) for a in along for n, box in zip(a.frames, a.boxes))
    for a in along:
        assert same(a, plain.predict(film, **NAMES, start=a.start, stop=a.stop, boxes=detector), rtol=1e-3)
    assert all("hand crops in" in a.notes[0] and "by the detector detector" in a.notes[0] for a in along)


def test_a_rest_below_half_a_stretch_lengthens_the_last(plain, film):
    assert [round(a.stop, 6) for a in plain.predict_along(film, **NAMES, every=3.2)] == [3.2, 7.0]
    assert [round(a.stop, 6) for a in plain.predict_along(film, **NAMES, every=100.0)] == [7.0]
    with pytest.raises(DataError, match="length above 0"):
        plain.predict_along(film, **NAMES, every=0.0)


def test_a_stream_answers_as_the_same_video_does_and_holds_what_it_looks_at(plain):
    made = 0
    buffer = np.empty((120, 160, 3), np.uint8)
    def camera():
        nonlocal made
        for i in range(10_000):
            made += 1
            buffer[:] = numbered_frame(i)  # the same memory for all frames
            yield buffer
    held = []
    def detector(frames):
        held.append(numbers_of(frames))
        return [None] * len(frames)
    stream = plain.stream(camera(), 40, **NAMES, every=2.0, boxes=detector)
    answers = [next(stream) for _ in range(3)]
    assert made == 240 and [a.start for a in answers] == [0.0, 2.0, 4.0] and answers[2].stop == 6.0
    assert held == [a.frames for a in answers] == [[80 * k + (2 * i + 1) * 80 // 32 for i in range(16)] for k in range(3)]
    assert "no hands found by the detector" in answers[0].notes[0]


@pytest.mark.parametrize("frames, lengths", [(60, [(0, 2), (2, 4), (4, 6)]), (69, [(0, 2), (2, 4), (4, 6)]), (70, [(0, 2), (2, 4), (4, 6), (6, 7)]),
                                             (29, [(0, 2)]), (8, [(0, 0.8)]), (1, [(0, 0.1)]), (0, [])])
def test_the_end_of_a_stream_counts_from_half_a_stretch_on(plain, frames, lengths):
    assert [(a.start, a.stop) for a in plain.stream((numbered_frame(i) for i in range(frames)), 10, **NAMES)] == lengths


@pytest.mark.parametrize("frames", [1, 2, 8, 15, 19, 31])
def test_a_stream_shorter_than_one_stretch_is_answered_as_its_frames_are(plain, frames):
    images = np.stack([numbered_frame(i) for i in range(frames)])
    seen = []
    detector = lambda given: seen.append(numbers_of(given)) or [None] * len(given)
    (streamed,), whole = plain.stream(iter(images), 10, **NAMES, every=3.2, boxes=detector), plain.predict(images, **NAMES, fps=10)
    assert streamed.frames == whole.frames and (streamed.start, streamed.stop) == (0, frames / 10) and same(streamed, whole, rtol=1e-4)
    assert seen == [sorted(set(whole.frames))]


def test_a_short_stream_holds_a_bounded_number_of_frames_spread_over_all_of_it(plain):
    alive, most = [0], 0
    class Frame(np.ndarray): pass
    def camera():
        nonlocal most
        for i in range(700):
            yield numbered_frame(i)
            most = max(most, alive[0])
    original = recognizer_module._frame_of_stream
    def keep(image, images):
        frame = original(image, images).view(Frame)
        alive[0] += 1
        weakref.finalize(frame, lambda: alive.__setitem__(0, alive[0] - 1))
        return frame
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recognizer_module, "_frame_of_stream", keep)
        (answer,) = plain.stream(camera(), 10, **NAMES, every=100.0)
    assert most <= 16 * 3 + 1 and answer.stop == 70 and np.abs(np.array(answer.frames) - (2 * np.arange(16) + 1) * 700 / 32).max() <= 17


@pytest.mark.parametrize("images, message", [([np.zeros((9, 9), np.uint8)], "uint8 of shape"), ([np.zeros((9, 9, 3))], "uint8 of shape"),
                                             ([np.zeros((9, 9, 3), np.uint8), np.zeros((9, 8, 3), np.uint8)], "changes its size")])
def test_frames_that_are_none_end_a_stream(plain, images, message):
    with pytest.raises(DataError, match=message):
        list(plain.stream(iter(images), 1, **NAMES))


@pytest.mark.parametrize("start, stop", [(None, None), (0.5, 3.0)])
def test_frames_in_memory_are_answered_as_their_file_is(plain, film, start, stop):
    images = np.concatenate([chunk for _, chunk in iter_frames(film, np.arange(70))])
    asked = dict(**NAMES, start=start, stop=stop)
    read = plain.predict(film, **asked)
    for frames in (images, torch.from_numpy(images), images[:, ::-1][:, ::-1]):
        answer = plain.predict(frames, fps=10, **asked)
        assert answer.frames == read.frames and (answer.start, answer.stop) == (read.start, read.stop) and same(answer, read)
    along, pieces = (list(plain.predict_along(one, **asked, every=1.0, **rate)) for one, rate in ((film, {}), (images, dict(fps=np.float32(10)))))
    assert [a.frames for a in along] == [a.frames for a in pieces] and all(map(same, along, pieces))


FRAMES = np.zeros((4, 8, 8, 3), np.uint8)


@pytest.mark.parametrize("asked, message", [
    (dict(video=3), "This is 3$"), (dict(video=None), "This is None$"), (dict(video=b"kitchen.mp4"), "This is a bytes$"), (dict(video={"a": 1}), "This is a dict$"),
    (dict(video=iter(["a.mp4"])), "This is a list_iterator$"), (dict(video=FRAMES), "fps, the number of frames per second, must be given and above 0, not None"),
    (dict(video=FRAMES, fps=0), "above 0, not 0"), (dict(video=FRAMES, fps="25"), "not a str"), (dict(video=FRAMES, fps=float("nan")), "above 0, not nan"),
    (dict(video=FRAMES.astype(float), fps=5), r"uint8 of shape \(T, H, W, 3\), RGB, at least one, not float64 of shape \(4, 8, 8, 3\)"),
    (dict(video=torch.zeros(4, 8, 8, 3), fps=5), r"not float32 of shape \(4, 8, 8, 3\)"), (dict(video=FRAMES[:0], fps=5), r"not uint8 of shape \(0, 8, 8, 3\)"),
    (dict(video=FRAMES[0], fps=5), r"of a single frame give frames\[None\]"), (dict(video=FRAMES.transpose(0, 3, 1, 2), fps=5), "colours come last"),
    (dict(video=[1, 2, 3]), "holds the paths of files, and this one 1;"), (dict(video=[FRAMES[0]]), r"this one an array of uint8 and shape \(8, 8, 3\)"),
    (dict(video="film.mp4", fps=5), "film.mp4: fps belongs to frames"), (dict(video=["film.mp4"], fps=5), "fps belongs to frames"),
    (dict(video=FRAMES, fps=5, nouns=3), "nouns must be a list of names.*not 3"), (dict(video=FRAMES, fps=5, nouns="pan"), "nouns must be a list of names.*not a str"),
    (dict(video=FRAMES, fps=5, nouns=[0, 1]), "nouns must be a list of names, and this one holds 0"), (dict(video=FRAMES, fps=5, nouns={"pan": 1}), "not a dict"),
    (dict(video=FRAMES, fps=5, nouns=np.zeros((2, 2))), r"not an array of float64 and shape \(2, 2\)"), (dict(video=FRAMES, fps=5, top=np.ones(900)), "top, how many.*not an array of float64"),
    (dict(video=FRAMES, fps=5, top=0), "at least 1, not 0"), (dict(video=FRAMES, fps=5, start="1"), "start is a number of seconds, not a str"),
    (dict(video=["film.mp4"], stop=[2]), "stop is a number of seconds, not a list")])
def test_what_is_of_a_wrong_type_is_said_in_one_line_without_its_content(plain, asked, message):
    with pytest.raises(DataError, match=message) as caught:
        plain.predict(**NAMES | asked)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 260


@pytest.mark.parametrize("asked, message", [(dict(frames=3), "a stream is frames.*not 3"), (dict(frames="rtsp://camera"), "open_stream"), (dict(frames=[], fps="5"), "fps is a number"),
                                            (dict(frames=[], fps=None), "frames per second"), (dict(frames=[], every=None), "above 0"), (dict(frames=[1]), "uint8 of shape")])
def test_a_stream_of_a_wrong_type_is_said(plain, asked, message):
    with pytest.raises(DataError, match=message):
        list(plain.stream(**NAMES | dict(fps=5) | asked))


def test_of_a_list_each_video_has_its_answer_or_its_error(plain, film, tmp_path):
    (tmp_path / "broken.mp4").write_text("no video")
    (tmp_path / "empty").mkdir()
    names = [film, tmp_path / "broken.mp4", str(film), tmp_path / "missing.mp4", tmp_path / "empty", "a\0b.mp4", "x" * 5000 + ".mp4", film]
    found = plain.predict(names, nouns=iter(NAMES["nouns"]), verbs=NAMES["verbs"], start=1.0)
    alone = plain.predict(film, **NAMES, start=1.0)
    assert [isinstance(one, DataError) for one in found] == [False, True, False, True, True, True, True, False]
    assert all(same(one, alone) for one in found[::2] if isinstance(one, Recognition)) and same(found[-1], alone)
    assert "broken.mp4" in str(found[1]) and all(one.__traceback__ is None for one in found if isinstance(one, DataError))
    assert plain.predict([], **NAMES) == [] and len(plain.predict((film,), **NAMES)) == 1
    with pytest.raises(DataError, match="give a list of nouns"):  # the question itself is refused at once
        plain.predict([film])
    late = plain.predict([film], **NAMES, start=99.0)
    assert isinstance(late[0], DataError) and "no stretch" in str(late[0])


class Tied(nn.Module):
    "Weights that share memory in every way: tied, a view, a transposed view, one number repeated."

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.second.weight = self.first.weight
        whole = torch.linspace(0, 1, 2 * width)
        self.register_buffer("part", whole[:width])
        self.register_buffer("other", whole.view(2, width).T[:, 0])
        self.register_buffer("repeated", torch.ones(1).expand(width))

    def forward(self, batch: Batch, classes) -> torch.Tensor:
        x = batch.video.mean(1)
        x = x + self.second(torch.tanh(self.first(x))) + self.part * self.other * self.repeated
        return cosine_logits(classes.text, None, x, 100.0)


def test_weights_that_share_memory_are_saved_and_give_the_same_answers(run, film, tmp_path):
    first = Recognizer.from_pretrained(run.folder, device="cpu")
    own = Recognizer(first.encoder, {"noun": Tied(first.encoder.dim)}, {"noun": run.config})
    with torch.no_grad(): own.methods["noun"].part.add_(0.5)
    own.save_pretrained(tmp_path / "saved")
    again = Tied(first.encoder.dim)
    load_trained(again, tmp_path / "saved/noun.safetensors")
    assert again.second.weight is again.first.weight
    assert own.predict(film, nouns=NAMES["nouns"]).nouns.equals(Recognizer(first.encoder, {"noun": again}, {"noun": run.config}).predict(film, nouns=NAMES["nouns"]).nouns)


TIED_CODE = """
import torch
from torch import nn
from xmic.adapter import cosine_logits

class Tied(nn.Module):
    def __init__(self, config, on):
        super().__init__()
        dim = on.dim
        self.first, self.second = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("part", torch.linspace(0, 1, 2 * dim)[:dim])
        self.register_buffer("repeated", torch.ones(1).expand(dim))

    def forward(self, batch, classes):
        x = batch.video.mean(1)
        return cosine_logits(classes.text, None, x + self.second(torch.tanh(self.first(x))) * self.repeated + self.part, 100.0)
"""


def test_an_own_method_that_ties_weights_is_trained_resumed_saved_and_loaded(run, film, tmp_path):
    (tmp_path / "own.py").write_text(TIED_CODE)
    config = replace(run.config, method=f"{tmp_path / 'own.py'}:Tied", name=None, runs_root=str(tmp_path / "runs"), epochs=3)
    whole = train(config)
    with pytest.MonkeyPatch.context() as patch:  # stopped in the middle, and run again
        patch.setattr("xmic.training._finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt): train(replace(config, runs_root=str(tmp_path / "again")))
    again = train(replace(config, runs_root=str(tmp_path / "again")))
    states = [load_file(one.folder / "model.safetensors") for one in (whole, again)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0]) and torch.equal(states[0]["first.weight"], states[0]["second.weight"])
    recognizer = Recognizer.from_pretrained(whole.folder, "cpu", trust_code=True)
    recognizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "own.py").unlink()  # its file is in the folder
    for folder in (tmp_path / "runs", tmp_path / "again"): shutil.rmtree(folder)
    reloaded = Recognizer.from_pretrained(tmp_path / "saved", "cpu", trust_code=True)
    with pytest.raises(DataError, match="nothing is run because a file names it"): Recognizer.from_pretrained(tmp_path / "saved", "cpu")
    assert not any(str(tmp_path) in text for text in (tmp_path / "saved/config.json").read_text().split('"') if text.endswith(":Tied"))
    assert recognizer.predict(film, nouns=NAMES["nouns"]).nouns.equals(reloaded.predict(film, nouns=NAMES["nouns"]).nouns)


def test_a_detector_that_gives_too_few_boxes_is_refused(plain, film):
    with pytest.raises(DataError, match="gave 1 boxes for 16 frames"):
        plain.predict(film, **NAMES, boxes=lambda frames: [None])


def test_given_boxes_that_are_of_other_videos_are_said(plain, film, tmp_path):
    (tmp_path / "hand_boxes.csv").write_text("segment_id,frame,left,top,right,bottom\nother,3,0,0,9,9\n")
    assert "among those given" in plain.predict(film, **NAMES, boxes=HandBoxes.from_boxes(tmp_path / "hand_boxes.csv")).notes[0]


def test_an_encoder_without_text_is_refused():
    with pytest.raises(DataError, match="no text tower"):
        Recognizer.zero_shot("mini-dino", device="cpu")


def test_lists_of_names(tmp_path, shared_data):
    (tmp_path / "own.txt").write_text("pan\n\n water tap \n")
    assert read_names(tmp_path / "own.txt", "noun").names == ("pan", "water tap")
    (tmp_path / "twice.txt").write_text("pan\npan\n")
    (tmp_path / "none.txt").write_text("\n")
    for name, message in (("twice.txt", "more than once"), ("none.txt", "holds no name"), ("missing.txt", "cannot be read")):
        with pytest.raises(DataError, match=message):
            read_names(tmp_path / name, "noun")
    assert len(read_names(shared_data / "epic_kitchens_100_annotations/EPIC_100_verb_classes.csv", "verb")) == 97
    egtea = next((shared_data / "egtea_gaze_plus_annotations").rglob("noun_idx.txt"))
    assert len(read_names(egtea, "noun")) == 53
    taxonomy = next(shared_data.rglob("fho_lta_taxonomy.json"))
    assert len(read_names(taxonomy, "noun")) == 521


def test_the_card_holds_what_the_run_has_measured_and_nothing_of_the_machine(run, verb_run, tmp_path):
    joined = Recognizer.from_pretrained([run.folder, verb_run.folder], "cpu")
    joined.save_pretrained(tmp_path / "saved", license="cc-by-4.0")
    card = huggingface_hub.ModelCard.load(tmp_path / "saved" / "README.md", ignore_metadata_errors=False)
    for kind, result in (("noun", run), ("verb", verb_run)):
        top1 = result.metrics["results"]["csv"][kind]["top1"]
        (line,) = [line for line in card.text.splitlines() if line.startswith(f"| {kind}s |")]
        assert f"{top1['value']:.1f} ({top1['count']})" in line and f"{top1['low']:.1f} to {top1['high']:.1f}" in line
    assert {r.metric_name: r.metric_value for r in card.data.eval_results} == {
        f"top-1 of {k}s": round(r.metrics["results"]["csv"][k]["top1"]["value"], 2) for k, r in (("noun", run), ("verb", verb_run))}
    assert card.data.license == "cc-by-4.0" and card.data.library_name == "xmic"
    written = (tmp_path / "saved/config.json").read_text() + card.content
    assert str(run.folder.parent) not in written and str(run.config.data_root) not in written
    again = Recognizer.from_pretrained(tmp_path / "saved", "cpu")
    again.save_pretrained(tmp_path / "again", license="cc-by-4.0", name="saved")
    assert (tmp_path / "again/README.md").read_text() == card.content


def test_saving_overwrites_nothing_unasked_and_never_what_it_was_read_from(run, tmp_path):
    recognizer, trained = Recognizer.from_pretrained(run.folder, "cpu"), {p.name: p.read_bytes() for p in run.folder.iterdir() if p.is_file()}
    (tmp_path / "link").symlink_to(run.folder)
    for folder in (run.folder, tmp_path / "link"):
        for overwrite in (False, True):
            with pytest.raises(DataError, match="config.json is an input|config.json \\(.*is an input|is an input"): recognizer.save_pretrained(folder, overwrite=overwrite)
    assert {p.name: p.read_bytes() for p in run.folder.iterdir() if p.is_file()} == trained
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "README.md").write_text("mine")
    with pytest.raises(DataError, match="README.md exists already.*overwrite=True"): recognizer.save_pretrained(saved)
    assert [p.name for p in saved.iterdir()] == ["README.md"] and (saved / "README.md").read_text() == "mine"
    recognizer.save_pretrained(saved, overwrite=True)
    assert (saved / "README.md").read_text() != "mine" and (saved / "noun.safetensors").exists()
    with pytest.raises(DataError, match="is an input"): Recognizer.from_pretrained(saved, "cpu").save_pretrained(saved, overwrite=True)


def test_a_card_without_numbers_says_so(run, tmp_path):
    loaded = Recognizer.from_pretrained(run.folder, "cpu")
    Recognizer(loaded.encoder, loaded.methods, loaded.configs).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Nothing is known of the accuracy on nouns" in card and "top-1" not in card


def test_damaged_numbers_are_found_before_anything_is_written(run, tmp_path):
    loaded = Recognizer.from_pretrained(run.folder, "cpu")
    with pytest.raises(DataError, match="measured for nouns are damaged"):
        Recognizer(loaded.encoder, loaded.methods, loaded.configs, metrics={"noun": {"results": {"csv": {"noun": {"top1": {"value": "much"}}}}}}).save_pretrained(tmp_path / "x")
    assert not (tmp_path / "x").exists()


class FakeHub:
    "What `push_to_hub` and `from_pretrained` use of the Hub, in a folder."

    def __init__(self, folder):
        self.folder, self.created = folder, []

    def __call__(self, token=None):  # HfApi(token=...)
        return self

    def create_repo(self, repo_id, private=None, exist_ok=False):
        self.created.append((repo_id, private, exist_ok))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, commit_message):
        for path in Path(folder_path).iterdir():
            (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
            (self.folder / repo_id / path.name).write_bytes(path.read_bytes())

    def snapshot_download(self, repo_id, allow_patterns):
        return str(self.folder / repo_id)


def test_pushed_and_fetched_it_answers_the_same(run, film, monkeypatch, tmp_path):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    recognizer = Recognizer.from_pretrained(run.folder, "cpu")
    assert recognizer.push_to_hub("someone/hands", private=True) == "https://huggingface.co/someone/hands"
    assert hub.created == [("someone/hands", True, True)]
    assert {p.name for p in (tmp_path / "someone/hands").iterdir()} == {"README.md", "config.json", "noun.safetensors"}
    assert '"someone/hands"' in (tmp_path / "someone/hands/README.md").read_text()
    monkeypatch.chdir(tmp_path / "someone")
    assert same(Recognizer.from_pretrained("someone/hands", "cpu").predict(film, **NAMES), recognizer.predict(film, **NAMES))


def test_weight_files_are_pushed_by_name_alone(run, monkeypatch, tmp_path):
    hub = FakeHub(tmp_path)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    loaded = Recognizer.from_pretrained(run.folder, "cpu")
    placed = {"noun": replace(loaded.configs["noun"], weights="/home/someone/ViT.pt")}
    Recognizer(loaded.encoder, loaded.methods, placed).push_to_hub("someone/hands")
    assert read_json(tmp_path / "someone/hands/config.json")["adapters"]["noun"]["weights"] == "ViT.pt"


def test_what_the_hub_refuses_is_one_error(run, monkeypatch):
    def refuse(*_, **__): raise huggingface_hub.errors.OfflineModeIsEnabled("offline")
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    with pytest.raises(DataError, match="someone/hands could not be written.*hf auth login"):
        Recognizer.from_pretrained(run.folder, "cpu").push_to_hub("someone/hands")


@pytest.mark.parametrize("name, message", [("someone/nothing", "HF_HUB_OFFLINE is set"), ("no/such/folder", "no such folder; give"), ("/nowhere", "no such folder; give")])
def test_models_that_are_not_here_are_said_so_at_once(name, message, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    with pytest.raises(DataError, match=message):
        Recognizer.from_pretrained(name, "cpu")


def test_the_mini_recognizer_knows_a_clip_that_it_has_not_seen(tmp_path):
    torch.manual_seed(0)
    recognizer = Recognizer.from_pretrained(ROOT / "data/mini/recognizer", "cpu")
    assert not any(str(value).startswith("/") for config in read_json(ROOT / "data/mini/recognizer/config.json")["adapters"].values()
                   for value in [*config.values(), *config["target_roots"].values()])
    reel = next(reel for reel in plan("tiny", seed=7) if reel.dataset == "epic" and reel.split == "validation")
    for _ in write_reel((tmp_path, reel)): pass
    nouns, verbs = (ClassSet.from_names([key.replace(":", " ") if kind == "noun" else verb for key, verb in getattr(LISTS["epic"], f"{kind}s").items()], kind)
                    for kind in ("noun", "verb"))
    right: dict[str, list] = {"noun": [], "verb": [], "noun zero-shot": [], "verb zero-shot": []}
    for action, keys in zip(reel.actions, reel.keys):
        rate = reel.footage.look.fps
        found = recognizer.predict(tmp_path / reel.path, nouns, verbs, 1, action.start / rate, (action.start + action.frames) / rate, HandBoxes.from_epic(tmp_path / "hand-objects"))
        assert "hand crops in" in found.notes[0] and "as given" in found.notes[0]
        for kind, table, key in (("noun", found.nouns, keys[1].replace(":", " ")), ("verb", found.verbs, action.verb)):
            right[kind].append(table.name[0] == key)
            right[f"{kind} zero-shot"].append(found.zero_shot[kind].name[0] == key)
    share = {name: np.mean(values) for name, values in right.items()}
    assert share["noun"] >= 5 * 1 / len(nouns) and share["verb"] >= 0.4 and share["noun"] > share["noun zero-shot"] and share["verb"] > share["verb zero-shot"], share
