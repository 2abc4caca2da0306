"""The printed tables: complete, faithful to the paper's text, and consistent but for the known misprints."""
import re
import statistics

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xmic.files import DataError, project_root
from xmic.paper import harmonic_mean, over_seeds, printed, t_quantile

KEY = ["table", "source", "method", "variant", "kind", "column"]
COUNTS = {1: 108, 2: 108, 3: 48, 4: 18, 5: 36, 6: 18, 7: 60, "poster": 157}
MISPRINTS = {(3, "ZS CLIP", "", "verb"): 3.91, (3, "X-MIC", "", "noun"): 31.23, (5, "X-MIC", "LaViLa ViT-L/14", "verb"): 16.40}


@pytest.fixture(scope="module")
def paper():
    return pd.concat([printed(table) for table in range(1, 8)], ignore_index=True)


@pytest.mark.parametrize("table, count", COUNTS.items())
def test_every_number_once(table, count):
    numbers = printed(table)
    assert len(numbers) == count and list(numbers) == [*KEY, "value", "note"]
    assert not numbers.duplicated(KEY).any()
    assert numbers["value"].between(0, 100).all()
    assert set(numbers["kind"]) <= {"noun", "verb"} and set(numbers["source"]) <= {"ego4d", "epic"}
    if table != "poster":
        assert set(numbers["table"]) == {table}


def test_rows_stand_in_the_text_of_the_paper(shared_data):
    texts = list((shared_data.parent / "paper").glob("001_*.txt"))
    if not texts:
        pytest.skip("needs the text of the paper beside the test data")
    text = "".join(texts[0].read_text(encoding="utf-8").split())
    for table in range(1, 8):
        numbers = pd.read_csv(project_root() / f"data/paper/table{table}.csv", dtype=str, keep_default_na=False)
        row = ["method"] if table <= 3 else ["method", "variant"] if table == 5 else ["variant"]
        for name, values in numbers.groupby(row, sort=False)["value"]:
            assert "".join(values) in text, (table, name)


def means(numbers):
    wide = numbers.pivot(index=[c for c in KEY if c != "column"], columns="column", values="value")
    wide = wide[wide["hm"].notna()]
    entries = wide.drop(columns="hm").apply(lambda row: row.dropna().tolist(), axis=1)
    assert (entries.map(len) == 2).all()
    return wide["hm"], pd.Series([harmonic_mean(*pair) for pair in entries], wide.index)


def test_printed_harmonic_means_follow_but_for_the_misprints(paper):
    said, computed = means(paper)
    wrong = {(table, method, variant, kind): round(computed[table, source, method, variant, kind], 2)
             for table, source, method, variant, kind in said.index[(said - computed).abs() > 0.015]}
    assert wrong == MISPRINTS
    assert len(said) == 124


def test_the_notes_give_the_misprints_and_what_the_entries_give(paper):
    notes = (project_root() / "docs/reproducibility.md").read_text(encoding="utf-8")
    line = next(row for row in notes.splitlines() if "harmonic means do not follow" in row)
    printed_means = paper[paper.column == "hm"].set_index(["table", "method", "variant", "kind"])
    said = [(f"{row.value:.2f}", f"{MISPRINTS[key]:.2f}") for key in MISPRINTS for row in printed_means.loc[[key]].itertuples() if row.note]
    assert re.findall(r"\((\d+\.\d\d); (?:the entries give )?(\d+\.\d\d)\)", line) == said
    assert {note for note in paper.note if "the entries give" in note} == {f"misprint: the entries give {value}" for _, value in said}


def test_misprints_and_only_they_are_noted_as_such(paper):
    noted = paper[paper["note"].str.startswith("misprint")]
    assert {tuple(row): float(note.split()[-1]) for row, note in
            zip(noted[["table", "method", "variant", "kind"]].itertuples(index=False), noted["note"])} == MISPRINTS


def test_tables_that_repeat_another_agree_or_say_so(paper):
    rows = ["source", "method", "kind", "column"]
    first = paper.query("table == 1").set_index(rows)["value"]
    for table, variant in [(3, ""), (4, "F+H"), (5, "CLIP ViT-B/16"), (6, "n1"), (7, "<class>")]:
        same = paper.query("table == @table and variant == @variant and column in ['ego4d', 'epic']").replace({"method": {"ZS": "ZS CLIP"}})
        differs = same["value"].to_numpy() != first.loc[list(same[rows].itertuples(index=False, name=None))].to_numpy()
        assert (same["note"].str.startswith("Table 1 prints") == differs).all(), table
        assert differs.sum() == (4 if table == 3 else 0)


def test_novel_verbs_are_counted_on_486_segments(paper):
    novel = paper.query("table == 2 and source == 'ego4d' and kind == 'verb' and column == 'novel'").set_index("method")["value"]
    correct = (novel * 4.86).round()
    assert list(novel[(correct / 4.86 - novel).abs() > 0.005].index) == ["Vita-CLIP"]
    assert correct["ZS CLIP"] == 21 and correct["X-MIC"] == 34


def test_poster_repeats_the_paper(paper):
    poster = printed("poster")
    both = poster.merge(paper, on=KEY, suffixes=("_poster", "_paper"))
    assert len(both) == len(poster)
    assert (both["value_poster"] == both["value_paper"]).all()
    assert (poster["note"] == "row inferred from Table 2").sum() == 13


@pytest.mark.parametrize("table", [0, 8, "8", "tables", ""])
def test_a_table_that_does_not_exist(table):
    with pytest.raises(DataError, match="tables 1 to 7"):
        printed(table)


def test_the_working_directory_does_not_matter(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert len(printed("1")) == len(printed(1)) == 108


accuracy = st.floats(0, 100)


@given(accuracy, accuracy)
def test_harmonic_mean_of_floats(a, b):
    mean = harmonic_mean(a, b)
    assert isinstance(mean, float) and mean == harmonic_mean(b, a)
    assert mean == pytest.approx(statistics.harmonic_mean([a, b]))


def test_harmonic_mean_of_arrays():
    a, b = np.array([[0.0], [0.5], [np.nan]]), np.array([0.0, 0.5])
    np.testing.assert_array_equal(harmonic_mean(a, b), [[0, 0], [0, 0.5], [np.nan, np.nan]])


@pytest.mark.parametrize("freedom, expected", [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (30, 2.042), (1000, 1.962)])
def test_t_is_the_one_of_the_printed_tables(freedom, expected):
    assert abs(t_quantile(freedom) - expected) < 6e-4
    assert t_quantile(freedom, 0.99) > t_quantile(freedom)


def test_an_interval_over_seeds_stays_within_0_and_100():
    assert over_seeds([0.0, 1.0])["low"] == 0 and over_seeds([99.0, 100.0])["high"] == 100
    assert over_seeds([5.0, 5.0]) == dict(value=5.0, low=5.0, high=5.0)
