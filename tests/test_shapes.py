"""Drawn objects: the same in every process, whole, different from each other, and changing with their state."""
import hashlib
import os
import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest

from xmic.classes import ClassSet, clean_ego4d, clean_egtea, clean_epic
from xmic.files import DataError
from xmic.shapes import EGO4D_NOUNS, EGTEA_NOUNS, EPIC_NOUNS, NOUNS, picture, sprite

EFFECTS = ["break", "wash", "pour", "mix", "peel", "wipe", "sprinkle", "heat", "squeeze", "apply"]


def composite(rgba):
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 128 * (1 - alpha)


def digest():
    return hashlib.sha256(b"".join(sprite(n, 3, 48, .6).tobytes() + picture(n, 3, 32).tobytes() for n in NOUNS)).hexdigest()


def test_another_process_draws_the_same():
    code = f"import sys; sys.path.insert(0, {str(__file__).rsplit('/', 1)[0]!r}); import test_shapes; print(test_shapes.digest())"
    for hash_seed in ("1", "2"):
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONHASHSEED": hash_seed})
        assert run.stdout.strip() == digest(), run.stderr


@pytest.mark.parametrize("noun", NOUNS)
def test_a_sprite_is_whole_in_every_state(noun):
    for seed in range(3):
        for state in (0, .3, .7, 1):
            image = sprite(noun, seed, 64, state)
            covered = image[..., 3] > 127
            assert image.shape == (64, 64, 4) and image.dtype == np.uint8
            assert .02 < covered.mean() < .97
            assert image[..., :3][covered].std() > 3


@pytest.mark.parametrize("noun", [n for n in NOUNS if NOUNS[n][1]])
def test_state_shows_and_moves_gradually(noun):
    images = [composite(sprite(noun, 5, 64, s)) for s in np.linspace(0, 1, 21)]
    assert abs(images[0] - images[-1]).mean() > .3
    assert max(abs(a - b).mean() for a, b in pairwise(images)) < 16


@pytest.mark.parametrize("noun", [n for n in NOUNS if not NOUNS[n][1]])
def test_a_noun_without_a_state_ignores_it(noun):
    assert (sprite(noun, 1, 64, 0) == sprite(noun, 1, 64, 1)).all()


def test_one_instance_at_every_size_and_under_every_verb():
    for noun in NOUNS:
        large = [sprite(noun, seed, 128).astype(float) for seed in (0, 1)]
        small, other = (image.reshape(64, 2, 64, 2, 4).mean((1, 3)) for image in large)
        same = abs(composite(sprite(noun, 0, 64)) - composite(small)).mean()
        assert same < 8 and same < .75 * abs(composite(other) - composite(small)).mean(), noun
        for verb in [*EFFECTS, "cut", "open", "turn on", "put", "take"]:
            assert (sprite(noun, 0, 48, 0.0, verb) == sprite(noun, 0, 48)).all(), (noun, verb)


def test_verbs_leave_their_effect():
    for verb in [*EFFECTS, "cut"]:
        for noun in ("plate", "carrot", "kettle"):
            plain, weak, strong = (composite(sprite(noun, 2, 64, s, verb)) for s in (0, .2, 1))
            assert abs(strong - plain).mean() > .5 and abs(strong - plain).mean() > abs(weak - plain).mean(), (verb, noun)
    assert (sprite("plate", 2, 64, .7, "put") == sprite("plate", 2, 64)).all()
    assert (sprite("carrot", 2, 64, .7, "put") == sprite("carrot", 2, 64)).all()


def test_verbs_drive_the_noun_forwards_and_backwards():
    assert (sprite("drawer", 2, 64, .8, "open") == sprite("drawer", 2, 64, .8)).all()
    assert (sprite("drawer", 2, 64, .75, "close") == sprite("drawer", 2, 64, .25)).all()
    assert (sprite("tap", 2, 64, .75, "turn off") == sprite("tap", 2, 64, .25)).all()
    assert (sprite("drawer", 2, 64, .8, "cut") != sprite("drawer", 2, 64, .8)).any()


def test_instances_differ():
    for noun in NOUNS:
        images = [composite(sprite(noun, seed, 48)) for seed in range(8)]
        assert min(abs(a - b).mean() for k, a in enumerate(images) for b in images[:k]) > .5, noun
        assert len({(sprite(noun, seed, 48)[..., 3] > 127).tobytes() for seed in range(8)}) == 8, noun


def test_no_two_nouns_have_one_silhouette():
    "Mean silhouettes of eight instances, compared by their overlap."
    means = {n: np.mean([sprite(n, seed, 32)[..., 3] > 127 for seed in range(8)], 0) for n in NOUNS}
    overlap = {(a, b): np.minimum(means[a], means[b]).sum() / np.maximum(means[a], means[b]).sum() for a in NOUNS for b in NOUNS if a < b}
    assert max(overlap.values()) < .97
    assert np.mean(list(overlap.values())) < .5


def test_colour_alone_does_not_decide():
    "The nearest mean colour names few instances rightly; the nearest small picture names most."
    def features(seed):
        images = [composite(sprite(n, seed, 24)) for n in NOUNS]
        colours = [sprite(n, seed, 24) for n in NOUNS]
        return np.array([c[..., :3][c[..., 3] > 127].mean(0) for c in colours]), np.array([i.ravel() for i in images])

    gallery, queries = [features(s) for s in range(12)], [features(s) for s in range(100, 104)]
    right = []
    for kind in (0, 1):
        known = np.concatenate([g[kind] for g in gallery])
        hits = [np.argmin(((known - q) ** 2).sum(1)) % len(NOUNS) == k for query in queries for k, q in enumerate(query[kind])]
        right.append(np.mean(hits))
    assert right[0] < .3 and right[1] > 2 * right[0]


def test_class_lists_share_and_differ():
    epic, ego4d, egtea = (ClassSet([clean(k) for k in keys], list(keys)) for clean, keys in
                          [(clean_epic, EPIC_NOUNS), (clean_ego4d, EGO4D_NOUNS), (clean_egtea, EGTEA_NOUNS)])
    counts = {(a, b): tuple(map(len, x.shared_with(y))) for a, x in zip("EOG", (epic, ego4d, egtea)) for b, y in zip("EOG", (epic, ego4d, egtea)) if a != b}
    assert counts == {("E", "O"): (22, 18), ("O", "E"): (22, 38), ("E", "G"): (11, 29), ("G", "E"): (11, 9), ("O", "G"): (14, 46), ("G", "O"): (14, 6)}
    assert all(len(set(c.names)) == len(c) for c in (epic, ego4d, egtea))
    for names in (EPIC_NOUNS, EGO4D_NOUNS, EGTEA_NOUNS):
        assert set(names.values()) <= set(NOUNS) and len(set(names.values())) == len(names)
    for a, x, keys_a in (("E", epic, EPIC_NOUNS), ("G", egtea, EGTEA_NOUNS)):
        for label in x.shared_with(ego4d)[0]:
            twin = ego4d.keys[ego4d.names.index(x.names[label])]
            assert keys_a[x.keys[label]] == EGO4D_NOUNS[twin], "one name, two drawings"


def test_keys_are_official(shared_data):
    epic = ClassSet.from_epic(shared_data / "epic_kitchens_100_annotations/EPIC_100_noun_classes.csv")
    ego4d = ClassSet.from_ego4d(next((shared_data / "ego4d_lta_taxonomy").rglob("fho_lta_taxonomy.json")), "noun")
    egtea = ClassSet.from_egtea(shared_data / "egtea_gaze_plus_annotations/noun_idx.txt")
    for official, ours in ((epic, EPIC_NOUNS), (ego4d, EGO4D_NOUNS), (egtea, EGTEA_NOUNS)):
        assert set(ours) <= set(official.keys)


def test_pictures_vary_and_show_their_noun():
    for noun in list(NOUNS)[::7]:
        images = np.stack([picture(noun, seed) for seed in range(6)]).astype(float)
        assert images.shape == (6, 64, 64, 3)
        assert min(abs(a - b).mean() for k, a in enumerate(images) for b in images[:k]) > 5
        assert (picture(noun, 0, verb="wash") != picture(noun, 0)).any()


def test_an_unknown_noun_is_named():
    for draw in (sprite, picture):
        with pytest.raises(DataError, match="'botle'; did you mean 'bottle'"):
            draw("botle", 0)
