"""Vita-CLIP against the reference vectors and against the literal token version; its texts; its pixels."""
import io

import open_clip
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from open_clip.model import CLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file
from torch import nn

from vita_literal import literal_vision
from xmic.adapter import ZeroShot, cosine_logits, trained_parameters
from xmic.encoders import ClassEmbeddings, Encoder
from xmic.files import DataError
from xmic.pixels import Preprocess
from xmic.streams import Batch
from xmic.vita import VitaCLIP, VitaVision

KINDS = ("global_prompts", "local_prompts", "summary")


def tower(width: int = 128, layers: int = 3, act_layer=QuickGELU, seed: int = 0, **settings) -> VisionTransformer:
    torch.manual_seed(seed)
    made = VisionTransformer(32, 8, width, layers, width // 32, 4.0, output_dim=48, act_layer=act_layer, **settings)
    for name, p in made.named_parameters():  # biases and gains away from zero and one
        if p.ndim == 1:
            p.data += 0.1 * torch.randn_like(p)
    return made


def small_encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    model = CLIP(48, dict(image_size=32, patch_size=8, width=64, layers=2, head_width=16),
                 dict(context_length=20, vocab_size=49408, width=32, heads=2, layers=2), quick_gelu=True)
    return Encoder("small", model, Preprocess(32), 48, {}, open_clip.SimpleTokenizer(context_length=20))


def some_pixels(b: int = 2, t: int = 4) -> torch.Tensor:
    return torch.randint(0, 256, (b, t, 32, 32, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def test_settings_reach_their_places():
    plain = VitaCLIP(small_encoder(), 4)
    assert [part.global_prompts.shape[0] for part in plain.vision.prompts] == [8, 8] and plain.logit_scale.requires_grad
    made = VitaCLIP(small_encoder(), 4, global_prompts=3, train_logit_scale=False)
    assert [part.global_prompts.shape[0] for part in made.vision.prompts] == [3, 3] and not made.logit_scale.requires_grad


# The reference

def reference_tower(tensors: dict) -> VisionTransformer:
    "The reference's backbone in open_clip's form: q, k and v in one matrix, and the bias of the patches in their positions."
    take = lambda name: tensors[f"param/{name}"].double()
    made = VisionTransformer(32, 8, 48, 2, 4, 4.0, output_dim=32, act_layer=QuickGELU)
    positions = take("pos_embed").clone()
    positions[1:] += take("patch_embed.proj.bias")
    state = {"class_embedding": take("cls_token"), "positional_embedding": positions, "proj": take("proj"),
             "conv1.weight": take("patch_embed.proj.weight")}
    for ours, theirs in (("ln_pre", "ln_pre"), ("ln_post", "ln_post")):
        state |= {f"{ours}.{k}": take(f"{theirs}.{k}") for k in ("weight", "bias")}
    for i in range(2):
        for ours, theirs in (("ln_1", "norm1"), ("ln_2", "norm2"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "attn.out_proj")):
            state |= {f"transformer.resblocks.{i}.{ours}.{k}": take(f"blocks.{i}.{theirs}.{k}") for k in ("weight", "bias")}
        for k in ("weight", "bias"):
            state[f"transformer.resblocks.{i}.attn.in_proj_{k}"] = torch.cat([take(f"blocks.{i}.attn.{z}_proj.{k}") for z in "qkv"])
    made.double().load_state_dict(state)
    return made


def reference_prompts(tensors: dict, prefix: str) -> dict[str, torch.Tensor]:
    "What is trained, by our names; of the gradients as well."
    state = {"time_embedding": tensors[f"{prefix}time_embed"]}
    for i in range(2):
        take = lambda name: tensors[f"{prefix}blocks.{i}.{name}"]
        ours = f"prompts.{i}."
        state[f"{ours}global_prompts"] = tensors[f"{prefix}global_prompts"][i]
        state[f"{ours}local_prompts"] = take("local_prompts")[0]
        for k in ("weight", "bias"):
            state[f"{ours}cls_proj.{k}"] = take(f"cls_proj.{k}")
            state[f"{ours}summary_ln.{k}"] = take(f"summary_ln.{k}")
            state[f"{ours}summary_attn.in_proj_{k}"] = torch.cat([take(f"summary_attn_layer.{z}_proj.{k}") for z in "qkv"])
            state[f"{ours}summary_attn.out_proj.{k}"] = take(f"summary_attn_layer.out_proj.{k}")
    return state


def reference_vision(tensors: dict, kinds: tuple[bool, bool, bool] = (True, True, True), train_cls_proj: bool = True) -> VitaVision:
    general, local, summary = kinds
    vision = VitaVision(reference_tower(tensors), 4, 3 if general else 0, local, summary, train_cls_proj).double()
    state = {k: v.double() for k, v in reference_prompts(tensors, "param/").items()}
    vision.load_state_dict({k: state[k] for k in vision.state_dict()})
    return vision


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_features_logits_and_gradients_equal_the_reference(golden, dtype):
    tensors = load_file(golden / "vita_clip.safetensors")
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    floor = 1e-3 if dtype == torch.float64 else 1.0
    close = lambda a, b: torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * float(b.abs().max().clamp_min(floor)))
    vision = reference_vision(tensors).to(dtype)
    scale = tensors["in/logit_scale"].to(dtype).requires_grad_()
    features = vision(tensors["in/clip"].to(dtype).transpose(1, 2))
    logits = cosine_logits(tensors["in/text_features"].to(dtype), None, features, scale.exp())
    loss = F.cross_entropy(logits, tensors["in/labels"])
    close(features, tensors["out/video_features"])
    close(logits, tensors["out/logits"])
    close(loss, tensors["out/loss"])
    loss.backward()
    close(scale.grad, tensors["grad/logit_scale"])
    expected = reference_prompts(tensors, "grad/")
    assert set(expected) == {n for n, p in vision.named_parameters() if p.requires_grad}
    for name, p in vision.named_parameters():
        gradient, reference = p.grad, expected[name]
        if name.endswith("in_proj_bias"):  # zero for the keys in exact arithmetic
            keys = slice(len(gradient) // 3, 2 * len(gradient) // 3)
            assert gradient[keys].abs().max() < (1e-14 if dtype == torch.float64 else 1e-6)
            gradient, reference = (torch.cat([g[:keys.start], g[keys.stop:]]) for g in (gradient, reference))
        close(gradient, reference)


@pytest.mark.parametrize("summary, local, general", [(s, l, g) for s in (0, 1) for l in (0, 1) for g in (0, 1) if s + l + g < 3])
def test_every_subset_of_prompts_equals_the_reference(golden, summary, local, general):
    tensors = load_file(golden / "vita_clip.safetensors")
    vision = reference_vision(tensors, (bool(general), bool(local), bool(summary)))
    expected = tensors[f"subset/summary{summary}_local{local}_global{general}/video_features"]
    torch.testing.assert_close(vision(tensors["in/clip"].double().transpose(1, 2)), expected, rtol=1e-10, atol=1e-12)


# The literal token version

@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 4), clips=st.integers(1, 3), general=st.integers(0, 3), local=st.booleans(), summary=st.booleans(),
       fused=st.booleans(), layers=st.integers(1, 3), quick=st.booleans(), scales=st.booleans(), seed=st.integers(0, 99))
def test_keys_and_values_alone_equal_the_literal_tokens(frames, clips, general, local, summary, fused, layers, quick, scales, seed):
    vision = VitaVision(tower(64, layers, QuickGELU if quick else nn.GELU, seed, ls_init_value=0.3 if scales else None),
                        frames, general, local, summary, train_cls_proj=True).double()
    x = torch.randn(clips, frames, 3, 32, 32, dtype=torch.float64)
    weights = torch.randn(clips, 48, dtype=torch.float64)
    trained = [p for p in vision.parameters() if p.requires_grad]
    ours, theirs = vision(x), literal_vision(vision, x, fused)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    mine, other = (torch.autograd.grad((y * weights).sum(), trained) for y in (ours, theirs))
    size = max(float(g.abs().max()) for g in other)
    for a, b in zip(mine, other):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * max(size, 1.0))


def test_fewer_numbers_are_kept_for_the_backward_pass_than_by_the_literal_tokens():
    vision, x = VitaVision(tower(), 4), torch.randn(2, 4, 3, 32, 32)
    kept = {}
    for name, run in (("ours", vision), ("literal", lambda x: literal_vision(vision, x)),
                      ("again", VitaVision(vision.tower, 4, recompute=True))):
        storages = {}
        def keep(t):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            run(x)
        frozen = {p.untyped_storage().data_ptr() for p in [*vision.tower.parameters(), *vision.parameters()]}
        kept[name] = sum(size for place, size in storages.items() if place not in frozen)
    assert kept["ours"] < 0.75 * kept["literal"] and kept["again"] < 0.3 * kept["ours"]


def test_recomputing_changes_no_gradient():
    x = torch.randn(2, 4, 3, 32, 32)
    plain = VitaVision(tower(), 4)
    again = VitaVision(plain.tower, 4, recompute=True)
    again.load_state_dict(plain.state_dict())
    for vision in (plain, again):
        vision(x).square().sum().backward()
    for a, b in zip(plain.parameters(), again.parameters()):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


# Identities

@pytest.mark.parametrize("act_layer", [QuickGELU, nn.GELU])
def test_with_its_prompts_off_it_is_clip(act_layer):
    vision = VitaVision(tower(act_layer=act_layer), 4, global_prompts=0, local_prompts=False, summary=False).double()
    vision.time_embedding.data.zero_()
    x = torch.randn(2, 4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(vision(x), vision.tower(x.flatten(0, 1)).view(2, 4, -1).mean(1), rtol=1e-12, atol=1e-12)
    assert [n for n, _ in vision.named_parameters()] == ["time_embedding"]


def test_the_whole_method_with_everything_off_is_zero_shot():
    encoder = small_encoder()
    method = VitaCLIP(encoder, 4, 0, False, False, text_prompts=0)
    method.vision.time_embedding.data.zero_()
    classes = ClassEmbeddings(("pan", "tap"), encoder.encode_text(["pan", "tap"]))
    features = encoder.encode_pixels(some_pixels().flatten(0, 1)).view(2, 4, -1)
    with torch.no_grad():
        torch.testing.assert_close(method(Batch(some_pixels()), classes), ZeroShot(encoder.logit_scale)(Batch(features), classes), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frames, count", [(8, 28_520_448), (16, 28_600_320)])
def test_parameter_counts(frames, count):
    with torch.device("meta"):
        vit = VisionTransformer(224, 16, 768, 12, 12, 4.0, output_dim=512, act_layer=QuickGELU)
        vision = VitaVision(vit, frames)
        assert trained_parameters(vision) == count
        assert trained_parameters(VitaVision(vit, frames, train_cls_proj=True)) == count + 7_087_104
        assert sum(p.numel() for p in vision.parameters()) == count + 7_087_104


def test_prompts_begin_as_released():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vit = VisionTransformer(32, 16, 768, 1, 12, 4.0, output_dim=512, act_layer=QuickGELU)
        vision = VitaVision(vit, 16)
    p = vision.prompts[0]
    for prompts in (p.global_prompts, p.local_prompts):
        assert 0.0620 < prompts.max() <= 0.0625 and -0.0625 <= prompts.min() < -0.0620
    assert abs(vision.time_embedding.std() - 0.02) < 5e-4
    bound = (6 / (2 * 768)) ** 0.5
    assert 0.98 * bound < p.summary_attn.in_proj_weight.abs().max() <= bound and 0.98 * bound < p.summary_attn.out_proj.weight.abs().max() <= bound
    assert not p.summary_attn.in_proj_bias.any() and not p.summary_attn.out_proj.bias.any()


# What is trained, what is saved

@pytest.mark.parametrize("train_cls_proj", [False, True])
def test_the_gradient_reaches_everything_trained_and_nothing_else(train_cls_proj):
    encoder = small_encoder()
    method = VitaCLIP(encoder, 4, train_cls_proj=train_cls_proj)
    classes = ClassEmbeddings(("pan", "chopping board"), torch.zeros(2, 48))
    F.cross_entropy(method(Batch(some_pixels()), classes), torch.tensor([0, 1])).backward()
    for name, p in method.named_parameters():
        frozen = "cls_proj" in name and not train_cls_proj
        assert (p.grad is None) == frozen, name
        assert frozen or p.grad.abs().sum() > 0, name
    assert all(p.grad is None and not p.requires_grad for p in encoder.model.parameters())


def test_the_towers_are_no_part_of_its_state_but_follow_it():
    encoder = small_encoder()
    method = VitaCLIP(encoder, 4)
    assert {name.split(".")[0] for name in method.state_dict()} == {"vision", "prompts", "logit_scale"}
    assert not any("tower" in name or "encoder" in name for name in method.state_dict())
    method.double()
    assert encoder.model.visual.conv1.weight.dtype == torch.float64 and encoder.mean.dtype == torch.float64
    assert method(Batch(some_pixels()), ClassEmbeddings(("pan",), torch.zeros(1, 48))).dtype == torch.float64
    file = io.BytesIO()
    torch.save(method.state_dict(), file)
    file.seek(0)
    other = VitaCLIP(encoder, 4).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    classes = ClassEmbeddings(("pan", "tap"), torch.zeros(2, 48))
    with torch.no_grad():
        torch.testing.assert_close(method(Batch(some_pixels()), classes), other(Batch(some_pixels()), classes))


def test_a_few_steps_tell_a_clip_from_the_same_one_backwards():
    torch.manual_seed(0)
    method = VitaCLIP(small_encoder(), 4)
    clips = torch.cat([some_pixels(1), some_pixels(1).flip(1)])
    labels = torch.tensor([0, 1])
    classes = ClassEmbeddings(("open", "close"), torch.zeros(2, 48))
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(150):
        loss = F.cross_entropy(method(Batch(clips), classes), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5  # without a look along time it could not fall below 0.69


def test_clips_of_a_batch_do_not_influence_each_other():
    method = VitaCLIP(small_encoder(), 4).double()
    classes = ClassEmbeddings(("pan", "tap"), torch.zeros(2, 48))
    clips = some_pixels(11)
    with torch.no_grad():
        together, alone = method(Batch(clips), classes), method(Batch(clips[9:]), classes)
    torch.testing.assert_close(together[9:], alone, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(together, method(Batch(clips), classes), rtol=1e-10, atol=1e-10)


def test_mixed_precision_trains_prompts_in_float32():
    method = VitaCLIP(small_encoder(), 4)
    classes = ClassEmbeddings(("pan", "tap"), torch.zeros(2, 48))
    exact = method(Batch(some_pixels()), classes)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = method(Batch(some_pixels()), classes)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, exact, rtol=0.05, atol=0.3)
    mixed.sum().backward()
    assert all(p.dtype == torch.float32 and (p.grad is None or p.grad.dtype == torch.float32) for p in method.parameters())


# The texts

def test_vectors_that_are_words_give_the_hand_prompt():
    method = VitaCLIP(encoder := small_encoder(), 4, text_prompts=4)
    method.prompts.vectors.data = encoder.model.token_embedding(encoder.tokenizer(["a photo of a"])[0, 1:5]).detach()
    names = ("pan", "chopping board", "x")
    by_hand = ClassEmbeddings(names, encoder.encode_text([f"a photo of a {n}." for n in names]))
    with torch.no_grad():
        expected = cosine_logits(by_hand.text, None, method.video(some_pixels()), method.logit_scale.exp())
        torch.testing.assert_close(method(Batch(some_pixels()), by_hand), expected, rtol=1e-4, atol=1e-4)


def test_new_classes_take_the_learned_vectors_and_leave_the_old_ones_alone():
    method, batch = VitaCLIP(small_encoder(), 4).double(), Batch(some_pixels())
    some, more = (ClassEmbeddings(names, torch.zeros(len(names), 48)) for names in (("pan",), ("pan", "a rather long name of a thing")))
    with torch.no_grad():
        torch.testing.assert_close(method(batch, more)[:, :1], method(batch, some), rtol=1e-11, atol=1e-11)


def test_texts_are_encoded_once_for_an_evaluation_and_again_after_a_step(monkeypatch):
    method = VitaCLIP(small_encoder(), 4)
    calls, encode = [], method.prompts.tower.features
    monkeypatch.setattr(method.prompts.tower, "features", lambda prompts, vectors: calls.append(prompts) or encode(prompts, vectors))
    nouns, batch = ClassEmbeddings(("pan", "tap"), torch.zeros(2, 48)), Batch(some_pixels())
    with torch.inference_mode():
        before = [method(batch, nouns) for _ in range(3)][-1]
    assert len(calls) == 1
    method(batch, nouns).sum().backward()
    torch.optim.SGD(method.prompts.parameters(), lr=1.0).step()
    with torch.inference_mode():
        assert not torch.allclose(method(batch, nouns), before)


# What is refused

def test_features_are_refused_as_pixels():
    method, classes = VitaCLIP(small_encoder(), 4), ClassEmbeddings(("pan",), torch.zeros(1, 48))
    with pytest.raises(DataError, match="reads pixels, uint8 of shape"):
        method(Batch(torch.randn(2, 4, 48)), classes)
    with pytest.raises(DataError, match="built for 4 frames"):
        method(Batch(some_pixels(2, 5)), classes)
    with pytest.raises(DataError, match=r"of shape \(N, 32, 32, 3\)"):
        method(Batch(some_pixels()[:, :, :16]), classes)


def test_other_towers_are_refused():
    with pytest.raises(DataError, match="is a Linear"):
        VitaVision(nn.Linear(3, 3))
    with pytest.raises(DataError, match="pooling 'avg'"):
        VitaVision(tower(pool_type="avg"))
    with pytest.raises(DataError, match="CustomResidualAttentionBlock"):
        VitaVision(tower(scale_heads=True))


def test_names_too_long_for_the_text_tower_are_refused():
    classes = ClassEmbeddings(("pan", "a b c d e f g h i j"), torch.zeros(2, 48))
    with pytest.raises(DataError, match="longer than the 20 tokens"):
        VitaCLIP(small_encoder(), 4, text_prompts=12)(Batch(some_pixels()), classes)


def test_learned_prompts_need_a_text_tower():
    encoder = small_encoder()
    encoder.tokenizer = None
    with pytest.raises(DataError, match="text_prompts=0"):
        VitaCLIP(encoder, 4)
    assert VitaCLIP(encoder, 4, text_prompts=0).prompts is None
