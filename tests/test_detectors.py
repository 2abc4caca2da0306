"""Hands found by MediaPipe: against its interface, and, where the package is installed, its real classes."""
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmic.detectors import HAND_MODEL, MARGIN, MediaPipeHands, create_detector, hands_box
from xmic.files import DataError

share = st.floats(-0.2, 1.2)
hand = st.lists(st.builds(SimpleNamespace, x=share, y=share), min_size=21, max_size=21)


def fake_mediapipe(found) -> ModuleType:
    "The part of MediaPipe's interface that is used; `found` gives the landmarks of each image."
    class HandLandmarker:
        @classmethod
        def create_from_options(cls, options):
            module.options = options
            if not options.base_options.model_asset_path.endswith(".task"): raise RuntimeError("Unable to open zip archive.")
            return cls()

        def detect(self, image):
            assert image.image_format == "SRGB" and image.data.dtype == np.uint8 and image.data.flags.c_contiguous
            return SimpleNamespace(hand_landmarks=found(image.data))

    module = ModuleType("mediapipe")
    module.Image, module.ImageFormat = SimpleNamespace, SimpleNamespace(SRGB="SRGB")
    module.tasks = SimpleNamespace(BaseOptions=SimpleNamespace, vision=SimpleNamespace(HandLandmarker=HandLandmarker, HandLandmarkerOptions=SimpleNamespace))
    return module


def bright(image: np.ndarray) -> list:
    "A hand at the two corners of what is bright."
    y, x = np.nonzero(image.max(-1) > 128)
    if not len(x): return []
    return [[SimpleNamespace(x=x.min() / image.shape[1], y=y.min() / image.shape[0]), SimpleNamespace(x=(x.max() + 1) / image.shape[1], y=(y.max() + 1) / image.shape[0])]]


@given(hands=st.lists(hand, max_size=3), width=st.integers(16, 600), height=st.integers(16, 600))
def test_the_box_lies_in_the_frame_and_holds_every_landmark_that_does(hands, width, height):
    box = hands_box(hands, width, height)
    if box is None: return
    left, top, right, bottom = box
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    inside = [(p.x * width, p.y * height) for points in hands for p in points if 0 <= p.x <= 1 and 0 <= p.y <= 1]
    assert all(left - 1 <= x <= right + 1 and top - 1 <= y <= bottom + 1 for x, y in inside)


def test_each_frame_has_the_box_of_its_own_hands(monkeypatch, tmp_path):
    module = fake_mediapipe(bright)
    monkeypatch.setitem(sys.modules, "mediapipe", module)
    (tmp_path / "hand_landmarker.task").write_bytes(b"x")
    detector = create_detector("mediapipe", tmp_path / "hand_landmarker.task")
    frames = np.zeros((3, 100, 200, 3), np.uint8)
    frames[0, 40:60, 50:80] = 255
    frames[2, 0:100, 0:10] = 255
    wider = MARGIN * 30
    assert detector(frames) == [(50 - wider, 40 - wider, 80 + wider, 60 + wider), None, (0, 0, 10 + MARGIN * 100, 100)]
    assert module.options.num_hands == 2 and module.options.base_options.model_asset_path == str(tmp_path / "hand_landmarker.task")


def test_the_model_is_looked_for_in_the_cache_folder_and_the_error_says_from_where_to_where(monkeypatch, tmp_path):
    monkeypatch.setenv("XMIC_CACHE", str(tmp_path))
    monkeypatch.setitem(sys.modules, "mediapipe", fake_mediapipe(bright))
    with pytest.raises(DataError) as error:
        create_detector("mediapipe")
    assert HAND_MODEL in str(error.value) and str(tmp_path / "hand_landmarker.task") in str(error.value)
    (tmp_path / "hand_landmarker.task").write_bytes(b"x")
    assert MediaPipeHands().name == "mediapipe"


def test_a_file_that_is_no_model_is_one_error(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mediapipe", fake_mediapipe(bright))
    (tmp_path / "model.zip").write_bytes(b"x")
    with pytest.raises(DataError, match="cannot use it as its hand model"):
        create_detector("mediapipe", tmp_path / "model.zip")


def test_without_the_package_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "mediapipe", None)
    with pytest.raises(DataError, match=r"pip install 'xmic\[hands\]'"):
        create_detector("mediapipe")


def test_unknown_detectors_are_refused():
    with pytest.raises(DataError, match="did you mean 'mediapipe'"): create_detector("mediapip")
    with pytest.raises(DataError, match="any function from frames to boxes"): create_detector("yolo")


def test_the_real_package_refuses_a_damaged_model_with_the_same_error(tmp_path):
    pytest.importorskip("mediapipe", reason="needs mediapipe (pip install 'xmic[hands]')")
    (tmp_path / "hand_landmarker.task").write_bytes(b"nonsense")
    with pytest.raises(DataError, match="cannot use it as its hand model.*download"):
        create_detector("mediapipe", tmp_path / "hand_landmarker.task")
    with pytest.raises(DataError, match="is not there"):
        create_detector("mediapipe", tmp_path / "nowhere.task")
