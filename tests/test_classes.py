"""Class sets: the real taxonomies, and files that are wrong."""
import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmic.classes import ClassSet, clean_ego4d, clean_egtea, clean_epic
from xmic.files import DataError, read_table


@pytest.fixture(scope="module")
def real(shared_data):
    epic, ego4d, egtea = (shared_data / name for name in ("epic_kitchens_100_annotations", "ego4d_lta_taxonomy", "egtea_gaze_plus_annotations"))
    return {(dataset, kind): classes for kind in ("noun", "verb") for dataset, classes in {
        "epic": ClassSet.from_epic(epic / f"EPIC_100_{kind}_classes.csv"),
        "ego4d": ClassSet.from_ego4d(ego4d / "fho_lta_taxonomy.json", kind),
        "egtea": ClassSet.from_egtea(egtea / f"{kind}_idx.txt"),
    }.items()}


@pytest.mark.parametrize("dataset, kind, count", [
    ("epic", "noun", 300), ("epic", "verb", 97), ("ego4d", "noun", 521), ("ego4d", "verb", 117), ("egtea", "noun", 53), ("egtea", "verb", 19)])
def test_real_counts_and_distinct_names(real, dataset, kind, count):
    classes = real[dataset, kind]
    assert len(classes) == count and classes.kind == kind
    assert len(set(classes.names)) == count
    assert not any(set(name) & set(":-_/(") for name in classes.names)


@pytest.mark.parametrize("dataset, other, kind, shared, novel", [
    ("epic", "ego4d", "noun", 163, 137), ("epic", "ego4d", "verb", 51, 46),
    ("ego4d", "epic", "noun", 163, 358), ("ego4d", "epic", "verb", 51, 66)])
def test_real_shared_and_novel(real, dataset, other, kind, shared, novel):
    a, b = real[dataset, kind].shared_with(real[other, kind])
    assert (len(a), len(b)) == (shared, novel) and a.dtype == b.dtype == np.int64
    assert sorted([*a, *b]) == list(range(shared + novel))


@pytest.mark.parametrize("kind, shared, novel", [("noun", 7246, 2422), ("verb", 9182, 486)])
def test_real_validation_segments(real, shared_data, kind, shared, novel):
    labels = pd.read_csv(shared_data / "epic_kitchens_100_annotations/EPIC_100_validation.csv")[f"{kind}_class"]
    counts = [int(labels.isin(part).sum()) for part in real["epic", kind].shared_with(real["ego4d", kind])]
    assert counts == [shared, novel]


def test_real_labels_are_the_official_ids(real, shared_data):
    for classes in real.values():
        assert np.array_equal(classes.labels(classes.keys), np.arange(len(classes)))
        assert np.array_equal(classes.labels(classes.names), np.arange(len(classes)))
    for split in ("train", "val"):
        clips = json.loads((shared_data / f"ego4d_fho_sample_entries/fho_lta_{split}.sample.json").read_text())["clips"]
        for kind in ("noun", "verb"):
            assert list(real["ego4d", kind].labels([clip[kind] for clip in clips])) == [clip[f"{kind}_label"] for clip in clips]


def test_real_longer_list_keeps_the_ids(real, shared_data):
    longer = ClassSet.from_epic(shared_data / "epic_kitchens_100_annotations/EPIC_100_noun_classes_v2.csv")
    assert len(longer) == 305 and longer.keys[:300] == real["epic", "noun"].keys


@pytest.mark.parametrize("clean, key, name", [
    (clean_epic, "board:chopping", "chopping board"), (clean_epic, "machine:sous:vide", "vide sous machine"), (clean_epic, "let-go", "let go"),
    (clean_epic, "use-to", "use"), (clean_epic, "end-of", "end"), (clean_epic, "bring-into", "bring"),
    (clean_ego4d, "nut_(food)", "nut"), (clean_ego4d, "nut_(tool)", "nut tool"), (clean_ego4d, "bat_(sports)", "bat sports"),
    (clean_ego4d, "bat_(tool)", "bat tool"), (clean_ego4d, "chip_(wood'_metal),", "chip wood"), (clean_ego4d, "chip_(wood,_metal)", "chip metal"),
    (clean_ego4d, "chip_(food)", "chip"), (clean_ego4d, "pot_(planter)", "planter"), (clean_ego4d, "turn_on_(switch_on,_start)", "turn on"),
    (clean_egtea, "Divide/Pull Apart", "divide pull apart"), (clean_egtea, "bell_pepper", "bell pepper")])
def test_cleaning(clean, key, name):
    assert clean(key) == name


names = st.lists(st.text("abc ", min_size=1, max_size=4).map(str.strip).filter(bool), min_size=1, max_size=12,
                 unique_by=lambda name: " ".join(name.split()))


@given(names, names)
def test_shared_classes_pair_up(left, right):
    a, b = ClassSet.from_names(left), ClassSet.from_names(right)
    (shared_a, novel_a), (shared_b, _) = a.shared_with(b), b.shared_with(a)
    assert sorted([*shared_a, *novel_a]) == list(range(len(a)))
    assert {a.names[i] for i in shared_a} == {b.names[i] for i in shared_b} == set(left) & set(right)


@given(names, st.data())
def test_labels_invert_names(wanted, data):
    classes = ClassSet.from_names(wanted)
    drawn = data.draw(st.lists(st.sampled_from([*wanted, "", None, float("nan")])))
    assert list(classes.labels(drawn)) == [wanted.index(key) if key in wanted else -1 for key in drawn]


def test_labels_of_a_single_key_and_of_a_series():
    classes = ClassSet.from_names(["cup", "pan"])
    assert list(classes.labels("pan")) == [1]
    assert list(classes.labels(pd.Series(["pan", " cup ", None], index=[7, 8, 9]))) == [1, 0, -1]
    assert classes.labels([]).dtype == np.int64


def test_labels_prefer_keys_and_refuse_ambiguous_names():
    classes = ClassSet(names=["x", "x", "b"], keys=["k1", "k2", "x2"])
    with pytest.raises(DataError, match="'x'"):
        classes.labels(["x"])
    swapped = ClassSet(names=["b", "a"], keys=["a", "b"])
    assert list(swapped.labels(["a", "b"])) == [0, 1]


def test_unknown_labels_name_rows_and_neighbours():
    with pytest.raises(DataError) as e:
        ClassSet(names=["water tap", "spoon"], keys=["tap:water", "spoon"]).labels(["spoon"] + ["spoom", "tap;water"] * 10)
    message = str(e.value)
    assert "(20 rows)" in message and "row 2: 'spoom'; did you mean 'spoon'?" in message and "'tap:water'" in message and "and 15 more" in message


@pytest.mark.parametrize("template", ["", "a photo", "{} and {}", "{name}", "{0}"])
def test_a_template_has_one_gap(template):
    with pytest.raises(DataError, match="exactly one"):
        ClassSet.from_names(["cup"]).prompts(template)


def test_prompts_keep_what_names_and_templates_hold():
    assert ClassSet.from_names(["{cup}", "50% milk"]).prompts("{a} {}.") == ["{a} {cup}.", "{a} 50% milk."]
    empty = ClassSet(names=["", "cup"], keys=["", "cup"])
    assert empty.prompts() == ["", "cup"] and empty.prompts("a {} held") == ["a held", "a cup held"]


def test_class_sets_are_frozen_and_comparable():
    classes = ClassSet.from_names(["cup"])
    with pytest.raises(AttributeError):
        classes.kind = "verb"
    assert classes == ClassSet.from_names(["cup "]) and classes != ClassSet.from_names(["cup"], "verb") and len({classes, classes}) == 1


@pytest.mark.parametrize("wanted", [["cup", " cup"], ["cup", " "], []])
def test_bad_own_names(wanted):
    with pytest.raises(DataError):
        ClassSet.from_names(wanted)


@pytest.mark.parametrize("content, says", [
    (b"", "not readable as CSV"), (b"id,name\n0,tap\n", "no column key; found: id, name"),
    (b"id,key\n", "lists no class"), (b"id,key\n0,tap\n0,cup\n", "'cup' has id 0, expected 1"), (b"id,key\n1,tap\n", "expected 0"),
    (b"id,key\n0,tap\nx,cup\n", "whole numbers"), (b"id,key\n0,tap\n1,tap\n", "more than once"), (b"id,key\n0,caf\xe9\n", "line 2 is not UTF-8"),
    ("id,key\n0,tap\n".encode("utf-16"), "NUL byte in line 1"), (b"id,key\n0,tap\n\0\0\0\0", "NUL byte in line 3"),
    (b'id,key\n0,"tap\n1,cup\n', "not readable as CSV"), (b"id,key\n0,tap,x\n1,cup,y\n", "more fields than the header"),
    (b"id,key\n0,tap\n1,cup,y\n", "not readable as CSV")])
def test_bad_epic_lists(tmp_path, content, says):
    path = tmp_path / "EPIC_100_noun_classes.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match="noun|EPIC_100_noun_classes.csv") as e:
        ClassSet.from_epic(path)
    assert says in str(e.value)


def test_lists_that_are_not_there_or_say_no_kind(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        ClassSet.from_epic(tmp_path / "EPIC_100_noun_classes.csv")
    (tmp_path / "classes.csv").write_text("id,key\n0,tap\n")
    with pytest.raises(DataError, match="kind='noun'"):
        ClassSet.from_epic(tmp_path / "classes.csv")
    assert ClassSet.from_epic(tmp_path / "classes.csv", kind="noun").kind == "noun"


def test_tables_with_a_byte_order_mark_and_spaces(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid , key\r\n0,NA\r\n")
    assert read_table(tmp_path / "a.csv", ["id", "key"]).to_dict("list") == {"id": ["0"], "key": ["NA"]}


def write_ego4d(path, clips):
    path.write_text(json.dumps({"clips": [dict(zip(("noun", "noun_label"), clip)) for clip in clips]}))
    return path


def test_ego4d_from_annotations(tmp_path):
    train = write_ego4d(tmp_path / "train.json", [("dough", 2), ("apple", 0), ("dough", 2)])
    val = write_ego4d(tmp_path / "val.json", [("arm", 1), ("dough", 2)])
    assert ClassSet.from_ego4d([train, val], "noun").keys == ("apple", "arm", "dough")
    assert ClassSet.from_ego4d(train, "noun").keys == ("apple", "dough")
    unlabelled = write_ego4d(tmp_path / "raw.json", [("b",), ("a",), ("b",)])
    assert ClassSet.from_ego4d(unlabelled, "noun").keys == ("a", "b")


@pytest.mark.parametrize("clips", [[("dough", 1), ("dough", 2)], [("dough", 1), ("arm", 1)], []])
def test_ego4d_ids_that_contradict_each_other(tmp_path, clips):
    with pytest.raises(DataError, match="bad.json"):
        ClassSet.from_ego4d(write_ego4d(tmp_path / "bad.json", clips), "noun")


def test_ego4d_files_that_are_something_else(tmp_path, shared_data):
    with pytest.raises(DataError, match="neither a taxonomy"):
        ClassSet.from_ego4d(shared_data / "ego4d_fho_sample_entries/fho_lta_test_unannotated.sample.json", "noun")
    with pytest.raises(DataError, match="neither a taxonomy"):
        ClassSet.from_ego4d(shared_data / "ego4d_fho_sample_entries/fho_main.sample.json", "noun")
    with pytest.raises(DataError, match="not 'action'"):
        ClassSet.from_ego4d(shared_data / "ego4d_lta_taxonomy/fho_lta_taxonomy.json", "action")


def test_real_egtea_with_the_empty_class(shared_data):
    folder = shared_data / "egtea_gaze_plus_annotations"
    released = ClassSet.from_egtea(folder / "noun_idx.txt", empty_class=True)
    assert len(released) == 54 and released.names[0] == "" and released.labels(["recipe", "strainer"]).tolist() == [1, 53]
    assert ClassSet.from_egtea(folder / "verb_idx.txt").names[:5] == ("inspect read", "open", "take", "cut", "turn on")
    assert len(ClassSet.from_egtea(folder / "action_idx.txt", kind="action")) == 106


@pytest.mark.parametrize("text", ["fridge\n", "fridge 0\n", "fridge 1\ntomato 3\n", "fridge 1\ntomato 1\n", "", "fridge one\n"])
def test_bad_egtea_lists(tmp_path, text):
    (tmp_path / "noun_idx.txt").write_text(text)
    with pytest.raises(DataError, match="noun_idx.txt"):
        ClassSet.from_egtea(tmp_path / "noun_idx.txt")
