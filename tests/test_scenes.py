"""The renderer: the same seed gives the same frames anywhere, motions run backwards exactly, boxes are where things are drawn."""
import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from xmic.files import DataError
from xmic.scenes import BACKWARDS, LOOKS, MOTIONS, VERBS, Action, Footage, Patch, Variety, clip, draw, keyed, placed, pose
from xmic.shapes import NOUNS

NAMES = sorted(NOUNS)


def digest() -> str:
    "Of some frames of each dataset."
    frames = [clip(verb, noun, dataset, seed).image(frame) for seed, (verb, noun, dataset) in enumerate(
        [("open", "jar", "epic"), ("wash", "plate", "ego4d"), ("pour", "kettle", "egtea")]) for frame in (0, 7, 15)]
    return hashlib.sha256(b"".join(frame.tobytes() for frame in frames)).hexdigest()


def test_the_same_seed_gives_the_same_frames_in_another_process():
    code = "import sys; sys.path.insert(0, sys.argv[1]); from test_scenes import digest; print(digest())"
    folder = __file__.rsplit("/", 1)[0]
    other = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True, cwd=folder + "/..")
    assert other.stdout.strip() == digest()


def test_frames_do_not_depend_on_the_order_in_which_they_are_asked_for():
    look, actions = LOOKS["ego4d"], [Action("cut", "carrot", 4, 20, 1, 1), Action("lift", "bowl", 30, 20, 2, 2)]
    forward, backward = Footage(look, actions, 54, 3), Footage(look, actions, 54, 3)
    images = [forward.image(frame) for frame in range(54)]
    assert all(np.array_equal(backward.image(frame), images[frame]) for frame in reversed(range(54)))


@pytest.mark.parametrize("verb", BACKWARDS)
def test_backwards_is_backwards(verb: str):
    rng = np.random.default_rng(0)
    for variety in (Variety(), Variety(*rng.uniform(0.8, 1.2, 3))):
        for t in rng.random(20):
            assert pose(verb, t, variety) == pose(BACKWARDS[verb], 1 - t, variety)
    one, two = clip(verb, "book", seed=4).scene(0), clip(BACKWARDS[verb], "book", seed=4).scene(0)
    still = np.eye(3)
    for t in rng.random(10):
        assert one.truth(t, still) == two.truth(1 - t, still)
        assert np.array_equal(draw(one, t, still), draw(two, 1 - t, still))


def path(verb: str) -> np.ndarray:  # (50, 9)
    poses = [pose(verb, t) for t in np.linspace(0, 1, 50)]
    return np.array([[p.x, p.y, p.angle / 60, p.scale, p.width, p.height, p.state, *np.clip(p.hand, -2, 2)] for p in poses])


def test_every_motion_moves_and_differs_from_every_other():
    paths = {verb: path(verb) for verb in VERBS}
    assert len(VERBS) == len(set(VERBS)) == 24
    for verb in VERBS:
        assert np.ptp(paths[verb], 0).max() > 0.4, verb
        for other in VERBS:
            if other != verb:
                assert np.abs(paths[verb] - paths[other]).mean(0).max() > 0.05, (verb, other)


def test_motions_do_not_jump():
    for verb in VERBS:
        fine = np.array([[p.x, p.y, p.scale, p.width, *p.hand] for p in (pose(verb, t) for t in np.linspace(0, 1, 2001))])
        assert np.abs(np.diff(fine, axis=0)).max() < 0.03, verb


def test_keyed_stays_between_its_keys():
    values = [float(keyed(t, (0.2, 1.0), (0.4, 3.0), (0.4001, 3.0), (0.9, -1.0))) for t in np.linspace(-1, 2, 500)]
    assert values[0] == 1.0 and values[-1] == -1.0 and max(values) <= 3.0 and min(values) >= -1.0
    assert np.abs(np.diff(values)).max() < 0.1


def drawn_box(patches: list[Patch], matrix: np.ndarray, shape: tuple) -> np.ndarray | None:
    "Around the pixels that patches cover when they are drawn white on black."
    frame = np.zeros(shape, np.uint8)
    for patch in patches:
        white = patch.pixels.copy()
        white[..., :3] = white[..., 3:]
        patch._replace(pixels=white).paste(frame, matrix)
    y, x = np.nonzero(frame[..., 0] > 128)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) if len(x) else None


def close(drawn: np.ndarray, box: tuple, shape: tuple, pixels: float = 3) -> bool:
    "Whether a box fits; where the frame's edge cuts a thing, its outline may reach further than what is left of it."
    cut = box[0] <= 0 or box[1] <= 0 or box[2] >= shape[1] or box[3] >= shape[0]
    slack = drawn - np.array(box)
    return bool((slack[:2] > -pixels).all() and (slack[2:] < pixels).all() and (cut or np.abs(slack).max() < pixels))


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("dataset", LOOKS)
def test_boxes_are_where_things_are_drawn(verb: str, dataset: str):
    seen = 0
    for seed in range(3):
        footage = clip(verb, NAMES[(7 * seed + VERBS.index(verb)) % len(NAMES)], dataset, seed)
        scene, shape = footage.scene(0), (footage.look.height, footage.look.width, 3)
        for frame in range(0, footage.frames, 5):
            camera, (_, t) = footage.camera(frame), footage.at(frame)
            truth, p = footage.truth(frame), pose(verb, t, scene.variety)
            if truth.object is not None:
                patch, matrix = scene.thing(p)
                if (box := drawn_box([patch], camera @ matrix, shape)) is not None:
                    assert close(box, truth.object, shape)
                    seen += 1
            for own, wanted in ((1, scene.side), (-1, -scene.side)):
                hands = [hand for hand in truth.hands if hand.own and hand.side == int(wanted == 1)]
                if hands:
                    layers, matrix = scene.hand(p, own)
                    assert close(drawn_box(list(layers), camera @ matrix, shape), hands[0].box, shape)
                    seen += 1
            for hand in truth.hands:
                left, top, right, bottom = hand.box
                assert 0 <= left < right <= shape[1] and 0 <= top < bottom <= shape[0] and hand.contact in (0, 3, 4)
    assert seen > 6


def test_the_object_is_drawn_where_its_box_is():
    changed = 0
    for seed in range(6):
        footage = clip("inspect", "book", "egtea", seed)
        scene = footage.scene(0)
        camera, still = np.eye(3), scene.truth(1.0, np.eye(3)).object
        full, scene._patch = draw(scene, 1.0, camera), lambda state: Patch(np.zeros((64, 64, 4), np.uint8), np.zeros((1, 2)))
        y, x = np.nonzero(np.abs(full.astype(int) - draw(scene, 1.0, camera)).max(-1) > 8)
        left, top, right, bottom = still
        changed += len(x)
        assert np.mean((x >= left - 2) & (x <= right + 2) & (y >= top - 2) & (y <= bottom + 2)) > 0.99
    assert changed > 3000


def test_other_people_are_told_from_oneself():
    look = replace(LOOKS["epic"], others=1.0)
    footage = Footage(look, [Action("mix", "bowl", 0, 30, 8, 1)], 30, 8)
    hands = [hand for frame in range(30) for hand in footage.truth(frame).hands]
    assert any(not hand.own for hand in hands) and any(hand.own for hand in hands)
    assert all(hand.contact == 0 for hand in hands if not hand.own)


def test_scenes_change_only_while_the_head_is_turned():
    look = LOOKS["ego4d"]
    actions = [Action("take", "cup", 4 + 32 * k, 24, k, k) for k in range(5)]
    footage = Footage(look, actions, 170, 0)
    numbers = [footage.at(frame)[0] for frame in range(170)]
    assert sorted(set(numbers)) == list(range(5)) and numbers == sorted(numbers)
    for frame in np.flatnonzero(np.diff(numbers)):
        assert footage.swing(frame) > 0.5 and footage.swing(frame + 1) < -0.5
    for action in actions:
        assert all(footage.swing(frame) == 0 for frame in range(action.start, action.start + action.frames))
        assert {footage.at(frame)[0] for frame in range(action.start, action.start + action.frames)} == {actions.index(action)}


def test_paste_is_the_usual_blending():
    rng = np.random.default_rng(0)
    rgba, frame = rng.integers(0, 256, (20, 20, 4), dtype=np.uint8), rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    expected = frame.astype(float)
    alpha = rgba[..., 3:] / 255
    expected[10:30, 15:35] = rgba[..., :3] * alpha + expected[10:30, 15:35] * (1 - alpha)
    Patch.of(rgba).paste(frame, placed((0, 0), (15, 10)))
    assert np.abs(frame - expected).max() <= 2


def test_paste_outside_the_frame_changes_nothing():
    frame = np.full((30, 30, 3), 7, np.uint8)
    for at in ((-100, 5), (5, 200), (1000, 1000)):
        Patch.of(np.full((10, 10, 4), 255, np.uint8)).paste(frame, placed((0, 0), at))
    assert (frame == 7).all()


def test_datasets_have_looks_of_their_own():
    colours = {dataset: np.array([clip("put", "plate", dataset, seed).image(2).mean((0, 1)) for seed in range(24)]) for dataset in LOOKS}
    assert len({(look.width, look.height) for look in LOOKS.values()}) == 3
    assert colours["egtea"].mean() > colours["epic"].mean() + 15 > colours["ego4d"].mean() + 30
    warmth = {dataset: (c[:, 0] - c[:, 2]).mean() for dataset, c in colours.items()}
    assert warmth["epic"] > warmth["ego4d"] + 15


def test_unknown_names_are_refused():
    with pytest.raises(DataError, match="no motion for 'fly'"):
        clip("fly", "cup").image(0)
    with pytest.raises(DataError):
        clip("take", "dragon").image(0)
    with pytest.raises(DataError):
        Footage(LOOKS["epic"], [], 5)
    assert set(MOTIONS) | set(BACKWARDS) == set(VERBS)
