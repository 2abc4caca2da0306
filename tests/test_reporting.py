"""Tables from metrics.json files alone: values, spread, what is missing, the printed numbers, and every form they are written in."""
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from xmic import experiments  # noqa: E402
from xmic.experiments import cells, plan, profile  # noqa: E402
from xmic.files import read_json, write_json  # noqa: E402
from xmic.paper import PRINTED, harmonic_mean, printed  # noqa: E402
from xmic.reporting import compare, layout, links, plot_table, scores, tabulate, to_html, to_latex, to_markdown, write_table  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {"epic": {"noun": 40, "verb": 14}, "ego4d": {"noun": 60, "verb": 18}, "egtea": {"noun": 20, "verb": 10}}
SEGMENTS = {"epic": 150, "ego4d": 148, "egtea": 151}


def write_run(folder: Path, config: dict, rng: np.random.Generator) -> dict:
    "A metrics.json of the form that training writes, with drawn accuracies."
    value = lambda n: dict(value=100 * rng.integers(1, n) / n, count=n, low=0.0, high=100.0)
    kinds = ["noun", "verb"] if config["labels"] == "both" else [config["labels"]]
    results, means, classes = {}, {k: {} for k in kinds}, {}
    for dataset in (config["dataset"], *config["targets"]):
        results[dataset] = {k: dict(top1=value(SEGMENTS[dataset])) for k in kinds}
        classes[dataset] = {k: dict(top1=CLASSES[dataset][k]) for k in kinds}
        for k in kinds if dataset != config["dataset"] else ():
            results[dataset][k] |= dict(shared=value(100), novel=value(50))
            classes[dataset][k] |= dict(shared=9, novel=CLASSES[dataset][k] - 9)
            r = results[dataset][k]
            means[k][f"{config['dataset']}+{dataset}"] = harmonic_mean(results[config["dataset"]][k]["top1"]["value"], r["top1"]["value"])
            means[k][f"{dataset} shared+novel"] = harmonic_mean(r["shared"]["value"], r["novel"]["value"])
    write_json(folder / "metrics.json", dict(results=results, harmonic_means=means, classes=classes))
    return results


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> tuple:
    "All runs of all tables, three seeds."
    root, rng = tmp_path_factory.mktemp("runs"), np.random.default_rng(0)
    made = plan(profile(), "all", 3)
    return made, root, {n: write_run(root / n, r.parameters, rng) for n, r in made.runs.items()}


@pytest.mark.parametrize("number", experiments.TABLES)
def test_every_cell_is_the_mean_over_its_runs(world, number):
    made, root, results = world
    table = tabulate(cells(number, made.profile, 3), root)
    assert len(table) == len(cells(number, made.profile, 3)) and (table.seeds == table.wanted).all()
    for row, cell in zip(table.itertuples(), cells(number, made.profile, 3).itertuples()):
        if cell.dataset:
            found = [results[n][cell.dataset][cell.kind][cell.measure] for n in cell.runs]
            values = [f["value"] for f in found]
            assert row.segments == str(found[0]["count"])
            allowed = {"top1": CLASSES[cell.dataset][cell.kind], "shared": 9, "novel": CLASSES[cell.dataset][cell.kind] - 9}[cell.measure]
            assert math.isclose(row.chance, 100 / allowed)
        else:
            a, b = [c for c in cells(number, made.profile, 3).itertuples()
                    if c[1:6] == cell[1:6] and c.dataset]
            pick = lambda n, c: results[n][c.dataset][c.kind][c.measure]["value"]
            values = [harmonic_mean(pick(n, a), pick(n, b)) for n in cell.runs]
            assert row.segments == "" and np.isnan(row.chance)
        assert math.isclose(row.mean, np.mean(values))
        assert np.isnan(row.std) if len(values) == 1 else math.isclose(row.std, np.std(values, ddof=1))


def test_rows_that_two_tables_share_agree(world):
    made, root, _ = world
    pick = lambda n, **where: tabulate(cells(n, made.profile, 3), root).query(" and ".join(f"{k} == {v!r}" for k, v in where.items()))["mean"].tolist()
    main = pick(1, source="ego4d", method="X-MIC")
    assert pick(4, variant="F+H") == main == pick(7, method="X-MIC", variant="<class>")
    assert pick(6, variant="n1") == main[:3]


def test_a_cell_without_a_run_says_so_everywhere(world, tmp_path):
    made, root, _ = world
    lacking = cells(4, made.profile, 3)
    lacking["runs"] = [["nowhere"] if v == "H" else r for v, r in zip(lacking.variant, lacking.runs)]
    table = tabulate(lacking, root)
    assert table[table.variant == "H"]["mean"].isna().all() and (table[table.variant == "H"].seeds == 0).all()
    for text in (to_markdown(table), to_html(table), to_latex(table)):
        assert text.count("no run") == 6
    figure = plot_table(scores(lacking, root))
    assert sum("no run" in t.get_text() for ax in figure.axes for t in ax.texts) == 2
    write_table(table, figure, tmp_path, "t", "n")
    assert pd.read_csv(tmp_path / "table4.csv").query("variant == 'H'")["mean"].isna().all()


def test_a_table_without_any_run_can_be_drawn(tmp_path):
    empty = cells(1, profile(), 1)
    table = tabulate(empty, tmp_path)
    assert (table.seeds == 0).all()
    assert len(write_table(table, plot_table(scores(empty, tmp_path)), tmp_path, "t", "n")) == 5


def test_missing_seeds_are_counted(world, tmp_path):
    made, root, _ = world
    some = cells(3, made.profile, 3)
    some["runs"] = [[*r[:2], "nowhere"] if len(r) == 3 else r for r in some.runs]
    table = tabulate(some, root)
    assert set(table[table.method == "X-MIC"].seeds) == {2} and "(2 of 3 seeds)" in to_markdown(table)


def test_segments_that_differ_between_runs_are_shown_as_a_range(world, tmp_path):
    made, root, _ = world
    lines = cells(4, made.profile, 1)
    for name in {n for names in lines.runs for n in names}:
        metrics = read_json(root / name / "metrics.json")
        if "views=full" in name:
            metrics["results"]["ego4d"]["noun" if "noun" in name else "verb"]["top1"]["count"] = 100
        write_json(tmp_path / name / "metrics.json", metrics)
    lines["runs"] = [sorted({n for names in lines.runs for n in names if k in n}) for k in lines.kind]
    assert set(tabulate(lines, tmp_path).query("column == 'ego4d'").segments) == {"100–148"}


def test_best_and_second_are_marked_by_what_is_shown(world):
    made, root, _ = world
    table = tabulate(cells(6, made.profile, 1), root)
    table["mean"] = [10.004 if v == "n1" else 10.001 if v == "none" else 9.0 if v == "n2,n3" else 1.0 for v in table.variant]
    page = layout(table)["ego4d"][("noun", "epic")]
    assert page["X-MIC n1"] == page["X-MIC none"] == "**10.00**" and page["X-MIC n2,n3"] == "<u>9.00</u>" and page["X-MIC n1,n2"] == "1.00"
    lone = layout(table[table.variant == "n1"])["ego4d"][("noun", "epic")]
    assert lone["X-MIC n1"] == "10.00"


@pytest.mark.parametrize("number", PRINTED)
def test_the_printed_numbers_stand_beside_ours_with_the_difference(world, number):
    made, root, _ = world
    table = compare(tabulate(cells(number, replace(made.profile, shown={}), 3), root))
    theirs = printed(number).set_index(["source", "method", "variant", "kind", "column"]).value
    for row in table.itertuples():
        value = theirs.get((row.source, row.method, row.variant, row.kind, row.column), float("nan"))
        assert row.paper == value or np.isnan(row.paper) and np.isnan(value)
        assert np.isnan(value) or math.isclose(row.difference, row.mean - value)
        assert row.verdict == ("" if np.isnan(value) else "inside" if round(row.low, 2) <= value <= round(row.high, 2) else "outside")
    assert f"/ {table.paper.dropna().iloc[0]:.2f} / " in to_markdown(table)


def test_our_own_tables_and_the_poster_can_be_compared_too(world):
    made, root, _ = world
    paper = replace(made.profile, shown={})
    assert compare(tabulate(cells(8, paper, 3), root)).paper.isna().all()
    poster = printed("poster")
    found = pd.concat([compare(tabulate(lines, root), "poster") for lines in experiments.poster_cells(paper, 3).values()])
    assert found.paper.notna().sum() == len(poster) and math.isclose(found.paper.sum(), poster.value.sum())


def test_intervals_are_students_over_seeds_and_of_the_segments_for_one(world):
    made, root, results = world
    one, three = (tabulate(cells(6, made.profile, seeds), root).query("column == 'ego4d'") for seeds in (1, 3))
    assert (one.low == 0).all() and (one.high == 100).all()  # as the runs say
    reach = 4.3027 * three["std"] / 3**0.5
    assert np.allclose(three.high, (three["mean"] + reach).clip(upper=100), rtol=1e-3) and np.allclose(three.low, (three["mean"] - reach).clip(lower=0), rtol=1e-3)


def test_the_interval_of_a_harmonic_mean_is_that_of_resampled_segments(tmp_path):
    lines = cells(2, profile(), 1).query("method == 'X-MIC' and source == 'ego4d' and kind == 'noun'")
    name, shares = lines.runs.iloc[0][0], dict(shared=(30, 120), novel=(9, 40))
    answers = {m: dict(value=100 * r / n, count=n, low=0, high=1) for m, (r, n) in shares.items()}
    write_json(tmp_path / name / "metrics.json", dict(
        results={"epic": {"noun": answers}}, harmonic_means={"noun": {"epic shared+novel": harmonic_mean(25, 22.5)}}, classes={}))
    found = tabulate(lines, tmp_path).set_index("column").loc["hm"]
    rng = np.random.default_rng(1)
    right = [np.arange(n) < r for r, n in shares.values()]
    draws = [harmonic_mean(*(100 * rng.choice(x, len(x)).mean() for x in right)) for _ in range(4000)]
    assert np.allclose([found.low, found.high], np.quantile(draws, [0.025, 0.975]), atol=0.6) and found.low < found["mean"] < found.high


def test_a_printed_number_stands_where_we_have_no_run(tmp_path):
    text = to_markdown(compare(tabulate(cells(4, profile(), 1), tmp_path)))
    assert "no run / 31.68 |" in text and "nan" not in text


def test_mini_tables_show_no_number_of_the_paper(world, tmp_path):
    made, root, _ = world
    for number in made.tables:
        lines = cells(number, made.profile, 3)
        table = tabulate(lines, root)
        assert "paper" not in table
        for path in write_table(table, plot_table(scores(lines, root)), tmp_path, experiments.TITLES[number], made.profile.note):
            if path.suffix in (".csv", ".md", ".tex"):
                assert "rendered world" in path.read_text(encoding="utf-8")
        plt.close("all")


def test_tables_are_written_the_same_twice(world, tmp_path):
    made, root, _ = world
    lines = cells(2, made.profile, 3)
    twice = [[p.read_bytes() for p in write_table(tabulate(lines, root), plot_table(scores(lines, root)), tmp_path / str(i), "t", "n")] for i in range(2)]
    assert twice[0] == twice[1]


def test_prompts_survive_html_and_latex(world):
    made, root, _ = world
    table = tabulate(cells(7, made.profile, 1), root)
    assert "Image of a &lt;class&gt;" in to_html(table) and "<class>" not in to_html(table)
    latex = to_latex(table, "100 %")
    assert not re.search(r"(?<!\\)_", latex.split("\\begin{tabular}")[1]) and "\\bottomrule" in latex and "100 \\%" in latex


def test_every_row_links_to_its_runs(world):
    made, root, _ = world
    lines = cells(1, made.profile, 3)
    names = {n for r in lines.runs for n in r}
    page = links(lines, "runs/mini", "reports/mini")
    assert all(f'../../runs/mini/{n}/train.ipynb"' in page.replace("%3D", "=") for n in names)


def test_reporting_needs_no_torch():
    code = "import sys, xmic.reporting; print([m for m in ('torch', 'open_clip') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"
