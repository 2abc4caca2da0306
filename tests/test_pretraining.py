"""The small encoders: their files, their words, what they recognise, and the data and losses that they were made with."""
import hashlib
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from xmic import pretraining as P
from xmic.classes import ClassSet, clean_ego4d, clean_egtea, clean_epic
from xmic.encoders import create_encoder, embed_prompts, fill_token_table
from xmic.files import DataError, read_json
from xmic.mini import plan
from xmic.shapes import EGO4D_NOUNS, EGTEA_NOUNS, EPIC_NOUNS, NOUNS, picture

WEIGHTS = Path(__file__).resolve().parents[1] / "data" / "mini" / "weights"
SIZES = {"mini-clip": 64, "mini-clip-large": 60, "mini-dino": 56, "mini-lavila": 64}
CLIPS = [name for name in SIZES if "clip" in name]
LEVEL = {"mini-clip": 0.75, "mini-clip-large": 0.78}  # of 320 pictures; two standard errors below what was recorded
TABLE_7 = ["{}", "Image of a {}", "Video of a {}", "Egocentric image a {}", "Image of a hand holding a {}", "Egocentric image of a hand holding {}"]


@pytest.fixture(scope="module")
def encoders() -> dict:
    return {name: create_encoder(name, device="cpu") for name in SIZES}


@pytest.fixture(scope="module")
def unseen() -> P.Pictures:
    "Pictures that neither training nor the record of the weights has seen."
    return P.render(4, 2**42, size=72, workers=1)


@pytest.mark.parametrize("name", SIZES)
def test_an_encoder_needs_nothing_but_its_name(name, encoders, unseen):
    encoder = encoders[name]
    assert encoder.preprocess.size == SIZES[name] and encoder.dim % 4 == 0 and encoder.activation == ("QuickGELU" if name == "mini-lavila" else "GELU")
    features = encoder.encode_frames(unseen.pixels[:5])
    assert features.shape == (5, encoder.dim) and features.dtype == torch.float32 and features.isfinite().all()
    torch.testing.assert_close(encoder.encode_frames(unseen.pixels[:5], batch_size=2), features, rtol=1e-4, atol=1e-4)
    assert encoder.describe()["weights"] == f"{name}.safetensors" and not any(p.requires_grad for p in encoder.parameters())


@pytest.mark.parametrize("name", SIZES)
def test_the_record_is_that_of_the_file(name, encoders):
    record, file = read_json(WEIGHTS / f"{name}.record.json"), WEIGHTS / f"{name}.safetensors"
    assert record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() and record["bytes"] == file.stat().st_size
    assert record["fingerprint"] == encoders[name].fingerprint == create_encoder(name, device="cpu").fingerprint
    assert {"settings", "minutes", "versions", "command", "accuracy", "made"} <= record.keys() and "device" in record["versions"] and "seed" in record["settings"]
    assert all(t.dtype == torch.float16 for key, t in load_file(file).items() if key != "token_ids")


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.iterdir()) <= 12_000_000
    assert (WEIGHTS / "mini-lavila.safetensors").stat().st_size <= 2_000_000


def class_sets() -> list[ClassSet]:
    lists = ((clean_epic, EPIC_NOUNS), (clean_ego4d, EGO4D_NOUNS), (clean_egtea, EGTEA_NOUNS))
    return [ClassSet([clean(key) for key in keys], list(keys)) for clean, keys in lists]


@pytest.mark.parametrize("name", CLIPS)
def test_all_words_of_classes_and_prompts_have_a_row(name, encoders):
    known = set(load_file(WEIGHTS / f"{name}.safetensors")["token_ids"].tolist())
    texts = [prompt for classes in class_sets() for template in TABLE_7 for prompt in classes.prompts(template)]
    texts += [*P.GERUNDS, *P.GERUNDS.values(), *P.vocabulary(), "X X X X"]
    assert set(encoders[name].tokenizer(texts).unique().tolist()) <= known < set(range(49408))


def test_an_unknown_word_gets_the_mean_row(encoders):
    state, table = load_file(WEIGHTS / "mini-clip.safetensors"), encoders["mini-clip"].model.token_embedding.weight
    unknown = torch.ones(len(table), dtype=torch.bool)
    unknown[state["token_ids"].long()] = False
    assert (table[unknown] == state["token_embedding.weight"].float().mean(0)).all()
    assert (table[state["token_ids"].long()] == state["token_embedding.weight"].float()).all()


@pytest.mark.parametrize("ids", ([5, 5, 6], [5, 6], [-1, 5, 6], [5, 6, 49408]), ids=("twice", "too few", "negative", "too large"))
def test_token_ids_that_do_not_fit_are_refused(ids, encoders):
    state = {"token_ids": torch.tensor(ids), "token_embedding.weight": torch.ones(3, 128)}
    with pytest.raises(DataError, match="x.safetensors: its token_ids do not say"):
        fill_token_table(state, encoders["mini-clip"].model, "x.safetensors")


def top1(encoder, pictures, names) -> float:
    image, text = (F.normalize(x, dim=-1) for x in (encoder.encode_frames(pictures.pixels), encoder.encode_text(names)))
    return ((image @ text.T).argmax(1).numpy() == pictures.noun).mean()


@pytest.mark.parametrize("name", CLIPS)
def test_zero_shot_on_unseen_pictures(name, encoders, unseen):
    assert len(unseen) >= 200
    assert top1(encoders[name], unseen, list(NOUNS)) > LEVEL[name]
    assert top1(encoders[name], unseen, [f"Image of a {noun}" for noun in NOUNS]) > LEVEL[name] - 0.05


def test_dino_sees_more_than_random_weights(encoders, unseen):
    bank = P.render(12, P.TRAIN_SEED, size=72, workers=1)
    def nearest(encoder):
        a, b = (F.normalize(encoder.encode_frames(p.pixels), dim=-1) for p in (unseen, bank))
        return (bank.noun[(a @ b.T).argmax(1)] == unseen.noun).mean()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chance = nearest(create_encoder("mini-dino", "random", "cpu"))
    assert nearest(encoders["mini-dino"]) > chance + 0.1


def test_dino_has_no_text_side(encoders):
    with pytest.raises(DataError, match="mini-dino has no text side"): encoders["mini-dino"].encode_text(["cup"])


def test_random_weights_still_announce_themselves():
    with pytest.warns(UserWarning, match="RANDOM"): encoder = create_encoder("mini-dino", "random", "cpu")
    assert "random" in encoder.fingerprint


def test_pretraining_and_worlds_draw_other_instances():
    for noun in ("cup", "carrot"):
        assert (picture(noun, P.TRAIN_SEED) != picture(noun, 0)).any() and (picture(noun, P.HELD_OUT_SEED) != picture(noun, P.TRAIN_SEED)).any()
    assert min(P.TRAIN_SEED, P.HELD_OUT_SEED) >= 2**40 and P.HELD_OUT_SEED - P.TRAIN_SEED > 10**6


def test_captions_are_true_of_their_pictures():
    rng = np.random.default_rng(0)
    noun, verb = rng.integers(0, len(NOUNS), 500), rng.integers(-1, len(P.GERUNDS), 500)
    captions = P.describe(noun, verb, rng)
    match = P.matches(noun, verb, captions)
    assert match.diagonal().all() and match.float().mean() < 0.1
    bare = {text for text in captions.texts if text in NOUNS}
    assert len(bare) > 10  # class names stand alone now and then


def test_every_verb_of_the_lists_has_a_form():
    from xmic.scenes import VERBS
    assert set(VERBS) <= set(P.GERUNDS)


def test_pictures_come_from_the_cache_unchanged(tmp_path):
    first, again = (P.cached_pictures(tmp_path, 1, P.HELD_OUT_SEED, 32) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1 and all((a == b).all() for a, b in zip(vars(first).values(), vars(again).values()))


def test_clip_loss_is_cross_entropy_where_each_caption_is_true_of_one_picture():
    image, text = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    logits = 3 * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    want = (F.cross_entropy(logits, torch.arange(7)) + F.cross_entropy(logits.T, torch.arange(7))) / 2
    torch.testing.assert_close(P.clip_loss(image, text, torch.tensor(3.0), torch.eye(7, dtype=torch.bool)), want)


def test_crops_reach_no_further_than_asked_and_every_picture_its_own():
    ramp = torch.arange(32, dtype=torch.uint8).mul(8).expand(64, 32, 32)[..., None].expand(-1, -1, -1, 3)
    out = P.crop(ramp, 16, (0.5, 0.5), generator=torch.Generator().manual_seed(0))
    span = (out.amax((1, 2, 3)) - out.amin((1, 2, 3))) / (ramp.max() / 255)
    assert 0.3 < span.min() and span.max() < 0.62 and len({round(float(x.mean()), 4) for x in out}) > 50


def test_beyond_a_thing_there_is_only_ground():
    thing, ground = torch.zeros(8, 32, 32, 4, dtype=torch.uint8), torch.full((8, 24, 24, 3), 200, dtype=torch.uint8)
    thing[:, 8:24, 8:24] = torch.tensor([0, 0, 0, 255], dtype=torch.uint8)
    x = P.crop(thing, 32, (1.4, 1.4), 0.3, "zeros", torch.Generator().manual_seed(0))
    share = x[:, 3].mean((1, 2))
    assert (share > 0.08).all() and (share < 0.2).all() and not x[:, :3].any()
    view = P.pasted_view(thing, ground, 32, torch.Generator().manual_seed(0))
    assert (view.amax((1, 2, 3)) - view.amin((1, 2, 3)) > 0.3).all() and not torch.equal(view[0], view[1])


def test_recolouring_leaves_shape_and_range():
    x = torch.rand(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = P.recolour(x, 0.25, 0.3, 0.2, torch.Generator().manual_seed(0))
    grey = (out.std(1).amax((1, 2)) < 1e-6).sum()
    assert out.shape == x.shape and 0 <= out.min() and out.max() <= 1 and 2 <= grey <= 16
    torch.testing.assert_close(P.recolour(x, 0.0), x)


# --- first-person clips ---------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def unseen_clips() -> P.Clips:
    "Clips that neither training nor the record of the weights has seen."
    return P.render_clips(2, 2**45, size=72, workers=1)


def clip_top1(frames: int, clips: P.Clips, template: str, kind: str) -> float:
    encoder = create_encoder("mini-lavila", device="cpu", clip_frames=frames)
    names, right = (list(NOUNS), clips.noun) if kind == "noun" else (list(P.GERUNDS), clips.verb)
    shown = clips.pixels[:, 1] if frames == 1 else clips.pixels.reshape(-1, *clips.pixels.shape[2:])
    image, text = F.normalize(encoder.encode_frames(shown), dim=-1), F.normalize(embed_prompts(encoder, ClassSet.from_names(names), template).text, dim=-1)
    return ((image @ text.T).argmax(1).numpy() == right).mean()


def test_mini_lavila_knows_first_person_clips_from_one_frame_and_from_four(unseen_clips):
    recorded = read_json(WEIGHTS / "mini-lavila.record.json")["accuracy"]
    for frames in (1, 4):
        for template in ("{}", "#C C {} | #C {}"):
            level = recorded[f"noun '{template}', frames: {frames}"]
            assert clip_top1(frames, unseen_clips, template, "noun") > level - 3 * (level * (1 - level) / len(unseen_clips)) ** 0.5 > 0.1
    assert clip_top1(4, unseen_clips, "{}", "verb") > 0.08  # chance is 0.04


def test_all_words_of_narrators_have_a_row(encoders):
    known = set(load_file(WEIGHTS / "mini-lavila.safetensors")["token_ids"].tolist())
    texts = [prompt for classes in class_sets() for template in (*TABLE_7, "#C C {}", "#C {}") for prompt in classes.prompts(template)]
    said = P.narrate(np.repeat(np.arange(len(NOUNS)), 8), np.arange(8 * len(NOUNS)) % len(P.GERUNDS), np.random.default_rng(0)).texts
    assert set(encoders["mini-lavila"].tokenizer([*texts, *said, *P.narration_words(), "X X"]).unique().tolist()) <= known


def test_narrations_are_true_of_their_clips_and_every_verb_has_a_third_person():
    rng = np.random.default_rng(0)
    noun, verb = rng.integers(0, len(NOUNS), 500), rng.integers(0, len(P.GERUNDS), 500)
    said = P.narrate(noun, verb, rng)
    match = P.matches(noun, verb, said)
    assert match.diagonal().all() and match.float().mean() < 0.1
    assert {text for text in said.texts if text in NOUNS} and {text for text in said.texts if text in P.GERUNDS}
    forms = [P.third_person(verb) for verb in P.GERUNDS]
    assert {"takes", "washes", "mixes", "turns on", "squeezes"} <= set(forms) and len(set(forms)) == len(forms)


def test_clips_of_pretraining_are_none_of_a_worlds(unseen_clips):
    drawn = [n for reel in plan("large") for n in (reel.seed, *(s for a in reel.actions for s in (a.seed, a.thing)))]
    assert max(drawn) < 2**31 < P.CLIP_SEED < P.CLIP_SEED + 2**40 < P.HELD_OUT_CLIP_SEED
    assert (P.render_clips(1, P.CLIP_SEED, 16).pixels != P.render_clips(1, P.HELD_OUT_CLIP_SEED, 16).pixels).any()
    assert all(verb in P.done_verbs(list(NOUNS)[noun]) for noun, verb in zip(unseen_clips.noun, np.array(list(P.GERUNDS))[unseen_clips.verb]))
    assert (unseen_clips.pixels[:, 0] != unseen_clips.pixels[:, 3]).any((1, 2, 3)).all()


def test_clips_come_from_the_cache_unchanged(tmp_path):
    first, again = (P.cached_clips(tmp_path, 1, P.HELD_OUT_CLIP_SEED, 16) for _ in range(2))
    assert len(list(tmp_path.iterdir())) == 1 and all((a == b).all() for a, b in zip(vars(first).values(), vars(again).values()))
