"""The attention block and X-MIC against the reference vectors, and what must hold whatever the weights are."""
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file

from xmic import attention
from xmic.adapter import XMIC, Batch, EgoSpatioTemporalAttention, ZeroShot, cosine_logits, trained_parameters, video_embedding
from xmic.attention import Block, Transformer, by_linear, linear
from xmic.encoders import ClassEmbeddings
from xmic.files import DataError

VARIANTS = {  # the release's name of an arrangement -> ours
    "attention_hand": dict(spatial_layers=0),
    "attention_full": dict(spatial_layers=0),
    "multigroup_attention_mean": dict(temporal_layers=0, positions="none"),
    "multigroup_attention_reshape": dict(merge="concat", positions="none"),
    "attention_with_full_frames_avg": dict(spatial_layers=0),
    "attention_with_full_frames": dict(spatial_layers=0, merge="concat", positions="as released"),
    "avg": dict(spatial_layers=0, temporal_layers=0, positions="none"),
    "max": dict(spatial_layers=0, temporal_layers=0, positions="none", merge="concat", pool="max"),
}
RENAMED = [("temporalModelling_intra_frame.", "adapter.spatial."), ("temporalModelling_inter_frame.", "adapter.temporal."),
           ("temporalModelling.", "adapter.temporal."), ("temporalEmbedding.weight", "adapter.temporal_embedding"),
           ("meta_net.linear1.", "mlp.0."), ("meta_net.linear2.", "mlp.2.")]


def our_name(name: str, variant: str = "") -> str:
    if variant == "multigroup_attention_mean":
        name = name.replace("temporalModelling.", "temporalModelling_intra_frame.")
    for old, new in RENAMED:
        if name.startswith(old):
            return name.replace(old, new, 1)
    return name


def build(tensors: dict, prefix: str, dtype: torch.dtype, variant: str = "", **settings) -> XMIC:
    "X-MIC with the reference's weights; every tensor that this variant uses is loaded, and no other."
    state = {our_name(k.removeprefix(prefix), variant): v for k, v in tensors.items() if k.startswith(prefix)}
    method = XMIC(tensors["in/class_embeddings"].shape[1], state["mlp.0.weight"].shape[1], frames=4, **settings)
    unused = set(state) - set(method.state_dict())
    assert unused <= {"adapter.temporal_embedding"} and (not unused or settings.get("positions") == "none")
    missing = method.load_state_dict({k: v for k, v in state.items() if k not in unused}, strict=False).missing_keys
    assert missing == ["scale"]
    return method.to(dtype)


def check(method: XMIC, tensors: dict, context: torch.Tensor, expected: str, dtype: torch.dtype,
          gradients: str, variant: str = "", gradient_tolerance: float | None = None) -> None:
    "Vector, logits, loss and every gradient agree with the reference's."
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    floor = 1e-3 if dtype == torch.float64 else 1.0  # float32 is compared absolutely below one: the reference's own float32 run is
    close = lambda a, b, rtol=tolerance: torch.testing.assert_close(  # up to 4e-6 off in the gradients
        a.double(), b.double(), rtol=rtol, atol=rtol * float(b.double().abs().max().clamp_min(floor)))
    batch = Batch(tensors["in/frames"].to(dtype), context.to(dtype))
    classes = ClassEmbeddings(tuple(map(str, range(len(tensors["in/class_embeddings"])))), tensors["in/class_embeddings"].to(dtype))
    logits = method(batch, classes)
    loss = F.cross_entropy(logits, tensors["in/labels"])
    close(method.vector(batch.context), tensors[f"{expected}a_v"])
    close(logits, tensors[f"{expected}logits"])
    close(loss, tensors[f"{expected}loss"])
    loss.backward()
    compared = set()
    for name, reference in tensors.items():
        if not name.startswith(gradients):
            continue
        ours = our_name(name.removeprefix(gradients), variant)
        gradient = dict(method.named_parameters())[ours].grad
        if ours.endswith("in_proj_bias"):  # the key third is zero in exact arithmetic
            width = len(reference) // 3
            assert gradient[width:2 * width].abs().max() < (1e-12 if dtype == torch.float64 else 1e-5)
            keep = [*range(width), *range(2 * width, 3 * width)]
            gradient, reference = gradient[keep], reference[keep]
        close(gradient, reference, gradient_tolerance or tolerance)
        compared.add(ours)
    stored = any(name.startswith(gradients) for name in tensors)  # the arrangements other than hand and full carry no gradients
    assert compared == ({n for n, p in method.named_parameters() if p.requires_grad} if stored else set())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_xmic_equals_the_reference(golden, dtype):
    tensors = load_file(golden / "xmic.safetensors")
    context = torch.stack([tensors["in/hand"], tensors["in/full"]], dim=2)
    method = build(tensors, "param/", dtype)
    check(method, tensors, context, "out/", dtype, "grad/")
    other = tensors["in/test_class_embeddings"].to(dtype)
    logits = method(Batch(tensors["in/frames"].to(dtype), context.to(dtype)), ClassEmbeddings(tuple("abcde"), other))
    torch.testing.assert_close(logits.double(), tensors["out/test_logits"], rtol=1e-10 if dtype == torch.float64 else 1e-5, atol=1e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", ["000", "100", "010", "001", "110", "101", "011", "111"])
def test_normalisations_equal_the_reference(golden, case, dtype):
    tensors = load_file(golden / "xmic_norms.safetensors")
    n1, n2, n3 = (digit == "1" for digit in case)
    method = build(tensors, "param/", dtype, norm_input=n1, norm_vector=n2, norm_text=n3)
    stream = tensors["in/adapter_stream"]
    context = stream.view(len(stream), -1, 2, stream.shape[-1])
    check(method, tensors, context, f"case_{case}/", dtype, f"case_{case}/grad/",
          gradient_tolerance=2e-6 if dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("variant", VARIANTS)
def test_arrangements_equal_the_reference(golden, variant, dtype):
    tensors = load_file(golden / "xmic_streams.safetensors")
    views = {"attention_hand": ["in/hand"], "attention_full": ["in/full"]}.get(variant, ["in/hand", "in/full"])
    context = torch.stack([tensors[view] for view in views], dim=2)
    prefix = "attention/param/" if len(views) == 1 else f"{variant}/param/"
    method = build(tensors, prefix, dtype, variant, **VARIANTS[variant])
    check(method, tensors, context, f"{variant}/", dtype, f"{variant}/grad/", variant)


def test_parameter_counts():
    assert trained_parameters(XMIC(512)) == 3_594_657
    assert trained_parameters(XMIC(512, 1024)) == 14_299_457
    assert trained_parameters(XMIC(512, train_logit_scale=False)) == 3_594_656
    assert trained_parameters(ZeroShot()) == 0


@settings(max_examples=50, deadline=None)
@given(c=st.integers(1, 9), b=st.integers(1, 9), d=st.integers(1, 40), size=st.floats(0.0, 30.0), seed=st.integers(0, 999))
def test_cosine_logits_equals_the_literal_sum(c, b, d, size, seed):
    g = torch.Generator().manual_seed(seed)
    text, vector, video = (torch.randn(n, d, generator=g, dtype=torch.float64) for n in (c, b, b))
    vector = (size * vector).requires_grad_()
    ours = cosine_logits(text, vector, video, 100.0)
    mine, = torch.autograd.grad(ours.square().sum(), vector)
    literal = 100 * torch.cosine_similarity(text[None] + vector[:, None], video[:, None], dim=-1, eps=1e-300)
    theirs, = torch.autograd.grad(literal.square().sum(), vector)
    torch.testing.assert_close(ours, literal, rtol=1e-8, atol=1e-7)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-4 * max(1.0, float(theirs.abs().max())))


def test_cosine_logits_stay_in_float32_under_autocast():
    text, vector, video = torch.randn(5, 64) * 10, torch.randn(3, 64), torch.randn(3, 64)
    exact = cosine_logits(text.double(), vector.double(), video.double(), 100.0)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cosine_logits(text, vector, video, 100.0)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_cosine_logits_of_stored_features_are_computed_in_float32(half):
    text, vector, video = torch.randn(5, 64), torch.randn(3, 64), torch.randn(3, 64).to(half)
    assert torch.equal(cosine_logits(text, vector, video, 100.0), cosine_logits(text, vector, video.float(), 100.0))


def test_frames_are_scaled_to_length_one_before_the_mean_where_asked():
    frames, classes = 3 * torch.randn(2, 4, 32) * torch.arange(1.0, 5.0)[:, None], ClassEmbeddings(("a", "b", "c"), torch.randn(3, 32))
    scaled = frames / frames.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(video_embedding(frames, True), scaled.mean(1))
    torch.testing.assert_close(video_embedding(frames), frames.mean(1))
    context = torch.randn(2, 4, 2, 32)
    xmic, clip, none = XMIC(32, frames=4, normalize_frames=True), ZeroShot(normalize_frames=True), torch.zeros(2, 32)
    torch.testing.assert_close(clip(Batch(frames), classes), cosine_logits(classes.text, none, scaled.mean(1), 100.0))
    wanted = cosine_logits(classes.text, 2.0 * xmic.vector(context), scaled.mean(1), 100.0)
    torch.testing.assert_close(xmic(Batch(frames, context), classes), wanted)
    assert not torch.allclose(clip(Batch(frames), classes), ZeroShot()(Batch(frames), classes), atol=0.1)


def test_a_batch_without_a_conditioning_stream_is_refused():
    with pytest.raises(DataError, match="X-MIC reads a conditioning stream, and this batch has none"):
        XMIC(32)(Batch(torch.randn(2, 16, 32)), ClassEmbeddings(("a",), torch.randn(1, 32)))


def test_cosine_logits_never_hold_a_class_by_dimension_tensor_per_video():
    b, c, d = 8, 50, 64
    largest = 0

    def remember(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda t: t):
        cosine_logits(torch.randn(c, d), torch.randn(b, d, requires_grad=True), torch.randn(b, d), 1.0).sum().backward()
    assert 0 < largest <= c * d < b * c * d


def test_without_any_attention_the_output_is_the_mean():
    x = torch.randn(3, 16, 2, 32)
    module = EgoSpatioTemporalAttention(32, spatial_layers=0, temporal_layers=0, positions="none")
    torch.testing.assert_close(module(x), x.mean((1, 2)))


def test_clean_positions_follow_time_in_a_concatenated_sequence():
    module = EgoSpatioTemporalAttention(32, frames=3, spatial_layers=0, temporal_layers=0, merge="concat")
    tokens = module.tokens(torch.zeros(1, 3, 2, 32))[0]
    torch.testing.assert_close(tokens, module.temporal_embedding.repeat_interleave(2, 0))


def test_conditioning_width_may_differ_from_clip():
    batch = Batch(torch.randn(2, 16, 24), torch.randn(2, 16, 2, 32))
    classes = ClassEmbeddings(("a", "b"), torch.randn(2, 24))
    for post_mlp in (True, False):
        assert XMIC(24, 32, post_mlp=post_mlp)(batch, classes).shape == (2, 2)


def test_attention_maps_are_distributions():
    maps = EgoSpatioTemporalAttention(32).attention(torch.randn(2, 16, 2, 32))
    assert {k: tuple(v.shape) for k, v in maps.items()} == {"spatial": (2, 16, 2, 2), "temporal": (2, 16, 16)}
    for weights in maps.values():
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert set(EgoSpatioTemporalAttention(32).attention(torch.randn(2, 16, 1, 32))) == {"temporal"}  # one view has nothing to look at
    assert set(EgoSpatioTemporalAttention(32, temporal_layers=0).attention(torch.randn(2, 16, 2, 32))) == {"spatial"}


def test_the_maximum_over_tokens_is_taken_where_asked():
    module = EgoSpatioTemporalAttention(32, merge="concat", pool="max")
    x = torch.randn(2, 16, 2, 32)
    torch.testing.assert_close(module(x), module.temporal(module.tokens(x)).max(1).values)


@pytest.mark.parametrize("settings, message", [
    (dict(merge="sum"), "merge='sum'"), (dict(positions="learned"), "positions='learned'"), (dict(heads=5), "heads=5")])
def test_wrong_settings_are_refused(settings, message):
    with pytest.raises(DataError, match=message):
        EgoSpatioTemporalAttention(32, **settings)


def test_another_number_of_frames_is_refused():
    with pytest.raises(DataError, match="built for 16 frames per video and was given 8"):
        EgoSpatioTemporalAttention(32)(torch.randn(1, 8, 2, 32))


def test_no_layers_is_the_identity():
    x = torch.randn(2, 5, 16)
    assert torch.equal(Transformer(16, 0)(x), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tokens", [1, 2, 3, 16])
def test_a_layer_equals_pytorchs_attention(tokens, dtype):
    block, x = Block(32).to(dtype), torch.randn(6, tokens, 32, dtype=dtype, requires_grad=True)
    torch.nn.init.normal_(block.attn.in_proj_bias)
    y = block.ln_1(x)
    halfway = x + block.attn(y, y, y, need_weights=False)[0]
    z = block.ln_2(halfway)
    plain = halfway + F.linear(block.mlp.gelu(F.linear(z, block.mlp.c_fc.weight, block.mlp.c_fc.bias)), block.mlp.c_proj.weight, block.mlp.c_proj.bias)
    tolerance = dict(rtol=1e-4, atol=1e-5) if dtype == torch.float32 else dict(rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(block(x), plain, **tolerance)
    wanted = [x, *block.parameters()]
    for ours, theirs in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (block(x), plain))):
        torch.testing.assert_close(ours, theirs, rtol=10 * tolerance["rtol"], atol=100 * tolerance["atol"])


@settings(max_examples=40, deadline=None)
@given(shape=st.lists(st.integers(0, 5), min_size=0, max_size=3), d=st.integers(1, 40), out=st.integers(1, 40), bias=st.booleans(), turned=st.booleans())
def test_linear_maps_equal_pytorchs(shape, d, out, bias, turned):
    x = torch.randn(d, *shape).movedim(0, -1) if turned else torch.randn(*shape, d)
    x, weight, bias = x.requires_grad_(), torch.randn(out, d, requires_grad=True), torch.randn(out, requires_grad=True) if bias else None
    given = [t for t in (x, weight, bias) if t is not None]
    (ours, mine), (theirs, expected) = ((y, torch.autograd.grad(y.square().sum(), given)) for y in (f(x, weight, bias) for f in (linear, F.linear)))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for a, b in zip(mine, expected):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_linear_maps_go_through_onednn_where_it_is(monkeypatch):
    asked = []
    monkeypatch.setattr(attention, "_product", lambda x, weight, bias=None: asked.append(x.dtype) or F.linear(x, weight, bias))
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        linear(torch.randn(4, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype))
    assert asked == ([torch.float32] if attention._HAS_ONEDNN else [])


@pytest.mark.parametrize("queries", [1, 3, 7])
def test_the_attention_of_a_tower_equals_pytorchs(queries):
    "With the tokens as queries, and with some of them alone, as in a last block whose class token is all that is needed."
    plain = torch.nn.Sequential(torch.nn.MultiheadAttention(32, 4, batch_first=True), torch.nn.Linear(32, 8))
    torch.nn.init.normal_(plain[0].in_proj_bias), torch.nn.init.normal_(plain[0].out_proj.bias)
    ours = by_linear(copy.deepcopy(plain))
    assert type(ours[0]) is not type(plain[0]) and type(ours[1]) is not torch.nn.Linear
    x = torch.randn(2, 7, 32)
    for query in (x, x[:, :queries], torch.randn(2, queries, 32)):
        (found, none), (wanted, _) = ours[0](query, x, x, need_weights=False), plain[0](query, x, x, need_weights=False)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours[1](found), plain[1](wanted), rtol=1e-4, atol=1e-5)
        assert none is None


def test_other_attentions_of_a_tower_stay_as_they_are():
    kept = torch.nn.Sequential(torch.nn.MultiheadAttention(32, 4), torch.nn.MultiheadAttention(32, 4, batch_first=True, bias=False),
                               torch.nn.MultiheadAttention(32, 4, batch_first=True, kdim=16, vdim=16))
    assert all(type(module) is torch.nn.MultiheadAttention for module in by_linear(kept))


def test_linear_maps_of_several_runs_at_once():
    x, weights, bias = torch.randn(3, 4, 5, 8), torch.randn(3, 6, 8, requires_grad=True), torch.randn(6)
    stacked = torch.func.vmap(linear, in_dims=(0, 0, None))(x, weights, bias)
    alone = torch.stack([F.linear(a, w, bias) for a, w in zip(x, weights)])
    torch.testing.assert_close(stacked, alone)
    for a, b in zip(*(torch.autograd.grad(out.square().sum(), weights) for out in (stacked, alone))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_linear_maps_leave_bf16_to_pytorch():
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16
    assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
