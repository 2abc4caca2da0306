"""Preprocess: the same 8-bit image as CLIP's own transform, boxes, bad input, and no torch."""
import hashlib
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

from xmic.files import DataError
from xmic.pixels import ALIASED, CLIP_MEAN, CLIP_STD, Preprocess, crop_box
from xmic.towers import device_squares

SIZES = [(256, 456), (1080, 1920), (456, 256), (224, 224), (225, 224), (224, 333), (223, 227), (480, 640), (97, 401),
         (101, 37), (31, 33), (720, 721), (1, 5), (7, 1), (256, 340)]


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@contextmanager
def as_pillow_did_before_13():
    "Across first, then down: from version 13 on Pillow resizes some tall pictures the other way round."
    resize = Image.Image.resize
    with patch.object(Image.Image, "resize", lambda self, size, *how: resize(resize(self, (size[0], self.height), *how), tuple(size), *how)): yield


@pytest.mark.parametrize("height, width, side, digest", [(390, 177, 64, "e75cda"), (900, 380, 224, "8f5895"), (610, 300, 224, "a43eee"),
                                                         (256, 456, 224, "334880"), (177, 390, 64, "ab7f7a")])
def test_tall_pictures_are_resized_as_by_older_versions_of_pillow(height, width, side, digest):
    "Digests of what Pillow 9.5, 10.4, 11.3 and 12.0 give; 13.0 gives others for the first three."
    assert hashlib.md5(Preprocess(side).pixels(noise(1, height, width, 3))[0].tobytes()).hexdigest()[:6] == digest


def reference(frame: np.ndarray, preprocess: Preprocess):
    "open_clip's inference transform: (its 8-bit image, its normalised tensor)."
    transform = open_clip.image_transform(preprocess.size, is_train=False, mean=preprocess.mean, std=preprocess.std,
                                          resize_mode=preprocess.resize, interpolation=preprocess.interpolation)
    image = Image.fromarray(frame)
    spatial = type(transform)(transform.transforms[:-2])
    with as_pillow_did_before_13(): return np.asarray(spatial(image)), transform(image)


def test_constants_are_clips():
    assert CLIP_MEAN == open_clip.OPENAI_DATASET_MEAN and CLIP_STD == open_clip.OPENAI_DATASET_STD


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("size", SIZES)
def test_equals_open_clip(size, resize):
    frame, preprocess = noise(*size, 3), Preprocess(resize=resize)
    image, normalised = reference(frame, preprocess)
    square = preprocess.pixels(frame[None])[0]
    assert np.array_equal(square, image)
    x = torch.from_numpy(square).permute(2, 0, 1) / 255
    x = (x - torch.tensor(preprocess.mean)[:, None, None]) / torch.tensor(preprocess.std)[:, None, None]
    assert (x - normalised).abs().max() < 1e-6


@given(st.integers(2, 90), st.integers(2, 90), st.integers(1, 70), st.sampled_from(["shortest", "squash"]),
       st.sampled_from(["bicubic", "bilinear"]))
@settings(max_examples=300, deadline=None)
def test_equals_open_clip_at_any_size(height, width, size, resize, interpolation):
    frame, preprocess = noise(height, width, 3, seed=height), Preprocess(size, resize, interpolation)
    assert np.array_equal(preprocess.pixels(frame[None])[0], reference(frame, preprocess)[0])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side, short", [(224, 256), (56, 57), (98, 112), (30, 30)])
def test_a_margin_is_torchvisions_resize_and_crop(size, side, short):
    frame = noise(*size, 3)
    with as_pillow_did_before_13(): theirs = Compose([Resize(short, InterpolationMode.BICUBIC, antialias=True), CenterCrop(side)])(Image.fromarray(frame))
    assert np.array_equal(Preprocess(side, short_side=short).pixels(frame[None])[0], np.asarray(theirs))


def test_a_margin_leaves_squash_alone_and_holds_for_crops():
    frame, box = noise(1, 120, 200, 3), (10, 20, 90, 110)
    assert np.array_equal(Preprocess(56, "squash", short_side=64).pixels(frame), Preprocess(56, "squash").pixels(frame))
    crop = np.ascontiguousarray(frame[:, 20:110, 10:90])
    assert np.array_equal(Preprocess(56, short_side=64).pixels(frame, [box]), Preprocess(56, short_side=64).pixels(crop))
    with pytest.raises(DataError, match="short_side=55"): Preprocess(56, short_side=55)


def test_settings_as_json_name_the_margin_only_where_there_is_one():
    plain = dict(size=224, resize="shortest", interpolation="bicubic", mean=list(CLIP_MEAN), std=list(CLIP_STD))
    assert Preprocess().as_dict() == plain and Preprocess(short_side=256).as_dict() == plain | dict(short_side=256)


def test_a_box_is_a_crop_and_then_the_whole_frame_rule():
    frames, boxes = noise(3, 120, 200, 3), [(10, 20, 90, 110), None, (0, 0, 200, 120)]
    preprocess = Preprocess(64)
    squares = preprocess.pixels(frames, boxes)
    assert np.array_equal(squares[0], reference(np.ascontiguousarray(frames[0, 20:110, 10:90]), preprocess)[0])
    assert np.array_equal(squares[1:], preprocess.pixels(frames[1:]))


def test_boxes_are_rounded_and_cut_at_the_edges():
    frame = noise(50, 80, 3)
    assert np.array_equal(crop_box(frame, (-3.2, 9.6, 85.0, 49.51)), frame[10:50, 0:80])
    assert np.array_equal(crop_box(frame, np.array([1, 2, 3, 4], np.int16)), frame[2:4, 1:3])


@pytest.mark.parametrize("box", [(90, 0, 100, 20), (0, 60, 10, 70), (10, 10, 10, 20), (20, 10, 10, 20), (-9, -9, -1, -1),
                                 (0, 0, float("nan"), 9), (0, 0, float("inf"), 9), (1, 2, 3), "box!", 7])
def test_a_box_without_pixels_is_refused(box):
    with pytest.raises(DataError, match="box"):
        Preprocess(32).pixels(noise(1, 50, 80, 3), [box])


@pytest.mark.parametrize("frames", [np.zeros((1, 8, 8, 3), np.float32), np.zeros((8, 8, 3), np.uint8),
                                    np.zeros((1, 3, 8, 8), np.uint8), np.zeros((1, 0, 8, 3), np.uint8), [[1, 2]], None])
def test_other_arrays_are_refused(frames):
    with pytest.raises(DataError, match="frames"):
        Preprocess().pixels(frames)


def test_settings_and_counts_are_checked():
    with pytest.raises(DataError, match="longest.*shortest"):
        Preprocess(resize="longest")
    with pytest.raises(DataError, match="nearest.*bicubic"):
        Preprocess(interpolation="nearest")
    with pytest.raises(DataError, match="1 boxes for 2 frames"):
        Preprocess().pixels(noise(2, 9, 9, 3), [None])


def test_no_frames_and_read_only_and_strided_frames():
    assert Preprocess(16).pixels(noise(0, 9, 9, 3)).shape == (0, 16, 16, 3)
    frames = noise(4, 40, 60, 3)
    frames.flags.writeable = False
    assert np.array_equal(Preprocess(16).pixels(frames[::2, :, ::-1]), Preprocess(16).pixels(frames[::2, :, ::-1].copy()))


def test_importing_pixels_imports_no_torch():
    code = "import sys, xmic.pixels; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[1]).returncode == 0


# On a device

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@given(size=st.tuples(st.integers(2, 300), st.integers(2, 300)), data=st.data(), resize=st.sampled_from(["shortest", "squash"]),
       interpolation=st.sampled_from(["bicubic", "bilinear", ALIASED]), margin=st.booleans(), smooth=st.booleans())
@settings(max_examples=150, deadline=None)
def test_squares_on_a_device_are_the_same(device, size, data, resize, interpolation, margin, smooth):
    height, width = size
    frames = noise(3, height, width, 3, seed=height)
    if smooth: frames = np.stack([np.asarray(Image.fromarray(frame[:8, :8]).resize((width, height))) for frame in frames])
    crops = [(1, None)]
    for _ in range(4):
        left, top = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
        crops.append((data.draw(st.integers(0, 2)), (left, top, data.draw(st.integers(left + 1, width)), data.draw(st.integers(top + 1, height)))))
    crops = [(n, e) for n, e in crops if e is None or 1 / 20 <= (e[3] - e[1]) / (e[2] - e[0]) <= 20]
    preprocess = Preprocess(size=32, resize=resize, interpolation=interpolation, short_side=40 if margin else None)
    there = device_squares(preprocess, torch.from_numpy(frames).to(device), crops)
    here = preprocess.pixels(frames[[n for n, _ in crops]], [edges for _, edges in crops])
    assert there.shape == here.shape and there.dtype == torch.uint8 and there.device.type == device
    assert (there.cpu().numpy() == here).all()
