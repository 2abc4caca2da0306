"""The text tower for learned prompts against the full pass over all positions, on open_clip's own modules."""
import json
import tempfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given, settings, strategies as st
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

import xmic.text as text_module
from xmic.files import DataError
from xmic.text import TextTower, pack

SOT, EOT, LENGTH = 48, 49, 24


def tokenizer(texts: list[str]) -> Tensor:
    "Each letter is a token."
    rows = [[SOT, *(ord(c) - 96 for c in t), EOT][:LENGTH] for t in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


def make_text(width: int = 16, layers: int = 3, **settings) -> TextTransformer:
    "A small text tower with lively random weights, in float64, frozen."
    torch.manual_seed(0)
    text = TextTransformer(LENGTH, 50, width, 2, layers, output_dim=12, **{"act_layer": QuickGELU, **settings}).double()
    for parameter in text.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.3)
    return text.requires_grad_(False)


def plain_features(text: nn.Module, rows: list[list[int]], vectors: Tensor) -> Tensor:  # (C, D)
    "The plain way: every prompt with SOT, EOT and padding at all positions, through open_clip's own transformer."
    length, embedded = len(text.positional_embedding), []
    for row in rows:
        x = text.token_embedding(torch.tensor([max(s, 0) for s in row] + [0] * (length - len(row))))
        if learned := [i for i, s in enumerate(row) if s < 0]:
            x = x.index_put((torch.tensor(learned),), vectors[[~row[i] for i in learned]].to(x.dtype))
        embedded.append(x)
    x = torch.stack(embedded) + text.positional_embedding
    x = text.ln_final(text.transformer(x, attn_mask=text.attn_mask.to(x.dtype)))
    return x[torch.arange(len(rows)), [len(row) - 1 for row in rows]] @ text.text_projection


TEXT = make_text()
symbol = st.integers(1, 4) | st.integers(-6, -1)  # few of them, so that beginnings are shared
prompts_of = st.lists(st.lists(symbol, max_size=9), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(prompts=prompts_of, parts=st.booleans(), sets=st.sampled_from([0, 1, 3]))
def test_any_prompts_give_the_features_and_gradients_of_the_full_pass(prompts, parts, sets):
    tower = TextTower(TEXT, tokenizer, memory=1e-5 if parts else 1.0)
    vectors = torch.randn(*([sets] if sets else []), 6, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    rows = [[SOT, *p, EOT] for p in prompts]
    literal = plain_features(TEXT, rows, vectors) if not sets else torch.stack([plain_features(TEXT, rows, v) for v in vectors])
    found = tower.features(prompts, vectors)
    assert len(next(iter(tower._ready.values()))[0]) == (len(set(map(tuple, rows))) if parts else 1)
    torch.testing.assert_close(found, literal, rtol=1e-10, atol=1e-12)
    if any(s < 0 for p in prompts for s in p):
        weights = torch.randn(literal.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        expected, gradient = (torch.autograd.grad((f * weights).sum(), vectors)[0] for f in (literal, found))
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(prompts=prompts_of)
def test_each_node_sees_its_own_prompt_and_nothing_else(prompts):
    packed = pack([[SOT, *p, EOT] for p in prompts], 16)
    (frozen, stem), blocks, size = packed.stem, *packed.visible.shape[:2]
    before = packed.visible.shape[2] - size - stem
    for i, row in enumerate(packed.rows):
        block, at = divmod(int(packed.order[i]), packed.ends.shape[1])
        seen = packed.visible[block, packed.ends[block, at]]
        kept = [packed.kept[block][j] for j in np.flatnonzero(seen[:before])]
        own = stem + block * size + np.flatnonzero(seen[before + stem:])
        nodes = np.concatenate([np.flatnonzero(seen[before:before + stem]), own])
        place = {len(b) - 1: b[-1] for b in kept} | dict(zip(packed.positions[nodes].tolist(), packed.symbols[nodes].tolist()))
        assert [place[j] for j in sorted(place)] == list(row) and len(place) == len(kept) + len(nodes) == len(row)


def test_vectors_before_all_names_and_sot_are_computed_once_for_all_classes():
    prompts = [[~0, ~1, ~2, *name] for name in ([1, 2], [1, 3], [4, 5, 6])]
    packed = pack([[SOT, *p, EOT] for p in prompts], 512)
    assert packed.stem == (1, 3) and {b for block in packed.kept for b in block} == {(SOT,)}
    assert packed.nodes == 3 + len({(1,), (1, 2), (1, 3), (4,), (4, 5), (4, 5, 6)}) + 3  # one EOT each


def test_names_in_front_of_the_vectors_are_kept(monkeypatch):
    calls, original = [], text_module._beginnings
    monkeypatch.setattr(text_module, "_beginnings", lambda text, rows: calls.extend(rows) or original(text, rows))
    tower, vectors = TextTower(TEXT, tokenizer), torch.zeros(2, 16, dtype=torch.float64)
    names = ([1, 2], [1, 3], [4])
    for _ in range(3):
        tower.features([[*name, ~0, ~1] for name in names], vectors)
    assert set(calls) == {(SOT,), (SOT, 1), (SOT, 1, 2), (SOT, 1, 3), (SOT, 4)} and len(calls) == 5
    tower.features([[~0, 5]], vectors)
    assert len(calls) == 5  # SOT is known


@pytest.mark.parametrize("changes", [dict(act_layer=nn.GELU), dict(ls_init_value=0.3), dict(pool_type="eos", eos_id=EOT), dict(proj_bias=True), dict(layers=1)])
def test_every_causal_tower_of_open_clip_is_followed(changes):
    text = make_text(**changes)
    tower, texts = TextTower(text, tokenizer), ["cup", "cutlery", "a", "plate rack".replace(" ", "")]
    expected = text(tokenizer(texts))
    torch.testing.assert_close(tower.features(tower.tokens(texts), torch.empty(0, 16)), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("layout", ["CLIP", "CustomTextCLIP"])
def test_both_model_classes_of_open_clip(layout):
    config = {"embed_dim": 24, "custom_text": layout == "CustomTextCLIP", "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
              "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}}
    folder = Path(tempfile.mkdtemp())
    (folder / f"texttower{layout}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)
    model = open_clip.create_model(f"texttower{layout}").double().requires_grad_(False)
    assert type(model).__name__ == layout
    tower, texts = TextTower(model, open_clip.get_tokenizer(f"texttower{layout}")), ["cup", "chopping board", "(pan)"]
    assert tower.context_length == 77 and (tower.sot, tower.eot) == (49406, 49407)
    torch.testing.assert_close(tower.features(tower.tokens(texts), torch.empty(0, 32)), model.encode_text(tower.tokenizer(texts)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes, reason", [
    (dict(no_causal_mask=True), "see those that follow"), (dict(pool_type="last"), "not read at EOT"), (dict(embed_cls=True), "not read at EOT"),
    (dict(scale_attn=True), "its blocks are CustomResidualAttentionBlock")])
def test_other_towers_are_refused_with_the_reason(changes, reason):
    with pytest.raises(DataError, match=reason):
        TextTower(make_text(**changes), tokenizer)


def test_a_tower_that_is_not_frozen_or_is_none_is_refused():
    with pytest.raises(DataError, match="requires_grad_"):
        TextTower(make_text().requires_grad_(True), tokenizer)
    with pytest.raises(DataError, match="token_embedding"):
        TextTower(nn.Linear(2, 2), tokenizer)


def test_a_prompt_that_is_too_long_is_named():
    tower = TextTower(TEXT, tokenizer)
    with pytest.raises(DataError, match=f"(?s){LENGTH} tokens.*class 1: {LENGTH + 1} tokens"):
        tower.features([[1], [~0] * (LENGTH - 1)], torch.zeros(1, 16))
    assert tower.features([[~0] * (LENGTH - 2)], torch.zeros(1, 16)).shape == (1, 12)


def test_the_same_name_twice_gives_the_same_feature_twice():
    tower, vectors = TextTower(TEXT, tokenizer), torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    a, b, c = tower.features([[~0, 3], [~1, 4], [~0, 3]], vectors)
    assert torch.equal(a, c) and not torch.equal(a, b)
    torch.testing.assert_close(*(torch.autograd.grad(f.sum(), vectors, retain_graph=True)[0] for f in (a + c, 2 * a)))


def test_used_first_without_gradients_it_still_trains():
    tower, vectors = TextTower(TEXT, tokenizer), torch.randn(2, 16, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        expected = tower.features([[~0, ~1, 3], [~0, ~1, 4]], vectors)
    found = tower.features([[~0, ~1, 3], [~0, ~1, 4]], vectors)
    found.sum().backward()
    assert torch.equal(found, expected) and vectors.grad.abs().sum() > 0


def test_moved_to_another_precision_it_starts_afresh():
    text = make_text()
    tower, vectors, prompts = TextTower(text, tokenizer), torch.randn(1, 16), [[~0, 3], [~0, 4], [5, ~0]]
    exact = tower.features(prompts, vectors)
    text.float()
    single = tower.features(prompts, vectors)
    assert exact.dtype == torch.float64 and single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-4, atol=1e-4)
    text.double()  # other weights than before: rounded to float32 on the way
    torch.testing.assert_close(tower.features(prompts, vectors), plain_features(text, [[SOT, *p, EOT] for p in prompts], vectors.double()), rtol=1e-10, atol=1e-12)


def test_under_mixed_precision_vectors_and_gradients_stay_float32():
    text = make_text().float()
    tower, vectors = TextTower(text, tokenizer), torch.randn(3, 16, requires_grad=True)
    prompts = [[~0, ~1, 3], [~0, ~1, 4, 5], [6, ~2]]
    exact = tower.features(prompts, vectors)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = tower.features(prompts, vectors)
    mixed.float().sum().backward()
    assert vectors.grad.dtype == vectors.dtype == torch.float32
    assert 0 < (mixed.float() - exact).abs().max() < 0.05 * exact.abs().max()


def held(tower: TextTower, prompts: list[list[int]], vectors: Tensor) -> int:
    "Bytes that are kept for the backward pass, frozen weights aside."
    kept, frozen = {}, {p.untyped_storage().data_ptr() for p in tower.text.parameters()}
    def note(x):
        if x.untyped_storage().data_ptr() not in frozen:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        features = tower.features(prompts, vectors)
    features.sum().backward()
    return sum(kept.values())


def test_memory_is_what_is_reckoned_and_parts_bound_it(monkeypatch):
    text = make_text(width=128, layers=4).float()
    prompts, vectors = [[~0, ~1, 1 + i % 7, 1 + i // 7] for i in range(49)], torch.randn(8, 2, 128, requires_grad=True)
    tower, reckoned = TextTower(text, tokenizer), 8 * (3 + 49 * 3) * 128 * 4 * 13 * 4
    whole = held(tower, prompts, vectors)
    assert 0.5 * reckoned < whole < 1.1 * reckoned
    tower.memory = reckoned / 7 / 2**30
    assert held(tower, prompts, vectors) < 0.05 * whole


def test_class_lists_are_packed_once_and_old_ones_forgotten(monkeypatch):
    calls = []
    monkeypatch.setattr(text_module, "pack", lambda rows, width: calls.append(rows) or pack(rows, width))
    tower = TextTower(TEXT, tokenizer)
    for _ in range(3):
        tower.features([[~0, 3], [~0, 4]], torch.zeros(1, 16))
    assert len(calls) == 1
    for i in range(1, 20):
        tower.features([[~0, i]], torch.zeros(1, 16))
    assert len(tower._ready) == 8
