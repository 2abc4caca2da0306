"""What goes past the tables: every number against a slow computation by hand, on runs whose lines are drawn here."""
import itertools
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from xmic import analysis  # noqa: E402
from xmic.analysis import (action_accuracies, accuracies, actions, by_frequency, by_official_tail, by_participant, calibration,  # noqa: E402
                           calibration_error, class_frequencies, confusions, difference, neighbours, pair_runs, paired_draws,
                           plot_accuracies, plot_confusions, plot_differences, plot_reliability, predictions, reliability, tidy)
from xmic.classes import ClassSet  # noqa: E402
from xmic.files import DataError, from_root, project_root, read_json, whole_file, write_json  # noqa: E402
from xmic.paper import harmonic_mean  # noqa: E402
from xmic.segments import read_classes, read_segments  # noqa: E402

NOUNS, VERBS = ["tap:water", "pan", "cup", "lid", "rare"], ["take", "put"]
TRAINED = [0] * 50 + [1] * 32 + [2] * 11 + [3] * 7  # of the source: the first two reach 80 %, "rare" is never trained on


def write_epic(root: Path) -> None:
    root.mkdir()
    for kind, names in (("noun", NOUNS), ("verb", VERBS)):
        (root / f"EPIC_100_{kind}_classes.csv").write_text("id,key\n" + "".join(f"{i},{name}\n" for i, name in enumerate(names)))
    head = "narration_id,video_id,start_timestamp,stop_timestamp,start_frame,stop_frame,narration,verb_class,noun_class\n"
    for split, videos, nouns in (("train", ("P01_01",), TRAINED), ("validation", ("P01_02", "P18_01", "P18_101"), [0, 1, 2, 3, 4] * 30)):
        rows = [f"{videos[n % len(videos)]}_{n},{videos[n % len(videos)]},00:00:01.00,00:00:02.00,60,120,,{n % 3 % 2},{noun}\n" for n, noun in enumerate(nouns)]
        (root / f"EPIC_100_{split}.csv").write_text(head + "".join(rows))


def write_own(root: Path) -> None:
    root.mkdir()
    (root / "nouns.txt").write_text("cup\nwater tap\nrake\n")
    (root / "verbs.txt").write_text("take\ndig\n")
    rows = [f"v{n % 5},1,2,{('cup', 'water tap', 'rake')[n % 3]},{('take', 'dig')[n % 2]},{'test' if n < 120 else 'train'}\n" for n in range(150)]
    (root / "segments.csv").write_text("video_id,start_sec,stop_sec,noun,verb,split\n" + "".join(rows))


def write_run(root: Path, name: str, method: str, labels: str, seed: int, rng: np.random.Generator, right: float = 0.5, **config) -> Path:
    "A finished run with drawn lines, and the metrics that follow from them."
    folder, tables, results, classes = root / "runs" / name, [], {}, {}
    for dataset in ("epic", "csv"):
        segments = read_segments(dataset, root / dataset, "test")
        for kind in ("noun", "verb") if labels == "both" else (labels,):
            own = read_classes(dataset, root / dataset, kind)
            label = own.labels(segments[kind])
            hit = rng.random(len(label)) < right
            predicted = np.where(hit, label, (label + rng.integers(1, len(own), len(label))) % len(own))
            subset = np.full(len(label), "", dtype=object)
            if dataset == "csv":
                shared, _ = own.shared_with(read_classes("epic", root / "epic", kind))
                subset = np.where(np.isin(label, shared), "shared", "novel")
            restricted = np.where(subset == "", -1, np.where(rng.random(len(label)) < 0.5, label, predicted))
            sure, top5 = rng.uniform(0.05, 1, len(label)).round(6), hit | (rng.random(len(label)) < 0.3)
            tables.append(pd.DataFrame(dict(label=label, predicted=predicted, confidence=sure, top5=top5, subset=subset, restricted=restricted,
                                            dataset=dataset, kind=kind, segment_id=segments.segment_id)))
            results.setdefault(dataset, {})[kind] = dict(top1=dict(value=100 * (predicted == label).mean(), count=len(label), low=1.0, high=99.0))
            classes.setdefault(dataset, {})[kind] = dict(top1=len(own))
    folder.mkdir(parents=True)
    pd.concat(tables).to_csv(folder / "predictions.csv", index=False, float_format="%.6g")
    means = {kind: {"epic+csv": harmonic_mean(*(results[d][kind]["top1"]["value"] for d in results)), "csv shared+novel": 12.0} for kind in results["epic"]}
    places = dict(dataset="epic", data_root=str(root / "epic"), targets=["csv"], target_roots={"csv": str(root / "csv")}, name=name)
    write_json(folder / "config.json", places | dict(labels=labels, method=method, seed=seed, context_views=["hand", "full"], encoder="mini-clip",
                                                     context_encoder=None) | config)
    write_json(folder / "metrics.json", dict(results=results, harmonic_means=means, classes=classes, parameters=10, seconds=1.5, seconds_in_all=2.5,
                                             peak_memory=dict(process_mib=700), versions=dict(commit="abc", device="cpu")))
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> dict:
    root, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)
    write_epic(root / "epic")
    write_own(root / "csv")
    runs = {"zero_shot": write_run(root, "zero_shot", "zero_shot", "both", 0, rng, 0.3)}
    for kind, seed in itertools.product(("noun", "verb"), range(3)):
        runs[f"{kind}{seed}"] = write_run(root, f"xmic-{kind}-{seed}", "xmic", kind, seed, rng, 0.6)
    return dict(root=root, **runs)


def nouns(world) -> list[Path]:
    return [world["zero_shot"], *(world[f"noun{seed}"] for seed in range(3))]


def row(table: pd.DataFrame, **where) -> pd.Series:
    own = table[np.all([table[k] == v for k, v in where.items()], axis=0)]
    assert len(own) == 1, own
    return own.iloc[0]


# lines

def test_predictions_are_the_lines_of_the_runs(world):
    table = predictions(*nouns(world), fields=("context_views", "lr"))
    assert len(table) == 2 * 270 + 3 * 270 and table.right.dtype == bool
    assert set(table.context_views) == {"hand+full"} and table.lr.isna().all()
    assert (table[table.dataset == "epic"].subset == "").all() and set(table[table.dataset == "csv"].subset) == {"shared", "novel"}
    raw = pd.read_csv(world["noun1"] / "predictions.csv")
    own = table[table.run == "xmic-noun-1"]
    assert (own.right.to_numpy() == (raw.label == raw.predicted)).all() and (own.top5.to_numpy() == raw.top5).all()
    assert np.allclose(own.confidence, raw.confidence)


def test_columns_that_a_later_version_adds_are_kept(world, tmp_path):
    later = pd.read_csv(world["noun0"] / "predictions.csv", keep_default_na=False).assign(margin=0.5)
    later.to_csv(tmp_path / "predictions.csv", index=False)
    for name in ("config.json", "metrics.json"):
        (tmp_path / name).write_bytes((world["noun0"] / name).read_bytes())
    assert (predictions(tmp_path).margin == 0.5).all()


@pytest.mark.parametrize("fault, message", [
    ("no metrics", "must hold metrics.json"), ("no lines", "cannot be read"), ("a column", "no column restricted"),
    ("cut", "cannot be read"), ("twice", "stand twice"), ("none", "no run")])
def test_faulty_runs_are_refused(world, tmp_path, fault, message):
    for name in ("config.json", "metrics.json", "predictions.csv"):
        (tmp_path / name).write_bytes((world["noun0"] / name).read_bytes())
    lines = tmp_path / "predictions.csv"
    if fault == "no metrics": (tmp_path / "metrics.json").unlink()
    if fault == "no lines": lines.unlink()
    if fault == "a column": pd.read_csv(lines).drop(columns="restricted").to_csv(lines, index=False)
    if fault == "cut": lines.write_bytes(lines.read_bytes()[:-40])
    with pytest.raises(DataError, match=message):
        predictions(*dict(twice=[tmp_path, tmp_path], none=[]).get(fault, [tmp_path]))


# intervals

def test_several_seeds_have_students_interval_and_one_has_the_bootstrap(world):
    found = accuracies(predictions(*nouns(world)))
    runs = [pd.read_csv(world[f"noun{seed}"] / "predictions.csv") for seed in range(3)]
    for dataset in ("epic", "csv"):
        values = [100 * (run.label == run.predicted)[run.dataset == dataset].mean() for run in runs]
        several = row(found, method="xmic", dataset=dataset, measure="top1")
        reach = 4.302653 * np.std(values, ddof=1) / math.sqrt(3)
        assert several.value == pytest.approx(np.mean(values)) and several.seeds == 3 and several["count"] == (150 if dataset == "epic" else 120)
        assert (several.low, several.high) == pytest.approx((max(0, np.mean(values) - reach), min(100, np.mean(values) + reach)), abs=1e-4)
        one = row(found, method="zero_shot", dataset=dataset, kind="noun", measure="top1")
        p, n = one.value / 100, one["count"]
        assert one.seeds == 1 and abs((one.high - one.low) / 2 - 196 * math.sqrt(p * (1 - p) / n)) < 1.5


def test_mean_per_class_weighs_classes_alike(world):
    lines = pd.read_csv(world["zero_shot"] / "predictions.csv").query("dataset == 'csv' and kind == 'noun'")
    by_hand = np.mean([100 * (own.predicted == own.label).mean() for _, own in lines.groupby("label")])
    found = row(accuracies(predictions(world["zero_shot"])), dataset="csv", kind="noun", measure="mean_per_class")
    assert found.value == pytest.approx(by_hand) and found.classes == 3


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(world):
    other = write_run(world["root"], "xmic-noun-0-prompt", "xmic", "noun", 0, np.random.default_rng(5), template="a photo of a {}")
    with pytest.raises(DataError, match="name what differs"):
        accuracies(predictions(world["noun0"], other))
    apart = accuracies(predictions(world["noun0"], other, fields=("template",)), ("source", "method", "dataset", "kind", "template"))
    assert len(apart) == 2 * 2 * 2 and (apart.seeds == 1).all()
    (other / "metrics.json").unlink()


# actions

def test_an_action_is_right_where_both_are(world):
    found = row(action_accuracies(world["zero_shot"]), dataset="epic", measure="top1")
    lines = pd.read_csv(world["zero_shot"] / "predictions.csv").query("dataset == 'epic'")
    hits = {(r.segment_id, r.kind): r.label == r.predicted for r in lines.itertuples()}
    both = [hits[s, "noun"] and hits[s, "verb"] for s in lines.segment_id.unique()]
    assert found.value == pytest.approx(100 * np.mean(both)) and found["count"] == len(both) == 150 and found.low <= found.value <= found.high


def test_noun_and_verb_runs_are_joined_by_segment_and_seed(world):
    folders = [world[k] for k in ("verb2", "noun0", "noun2", "zero_shot", "verb0", "noun1")]
    assert {(n.name, v.name) for n, v in pair_runs(*folders)} == {("zero_shot", "zero_shot"), ("xmic-noun-0", "xmic-verb-0"), ("xmic-noun-2", "xmic-verb-2")}
    joined = actions(world["noun0"], world["verb0"])
    assert set(joined.run) == {"xmic-noun-0 & xmic-verb-0"} and set(joined.kind) == {"action"} and len(joined) == 270
    one = joined[joined.segment_id == "P18_01_1"].iloc[0]
    assert one.label == "1,1" and one.right == (one.noun and one.verb)
    several = row(action_accuracies(*folders), method="xmic", dataset="csv", measure="top1")
    assert several.seeds == 2


def test_runs_that_do_not_belong_together_are_refused(world):
    with pytest.raises(DataError, match="do not belong together.*'seed': 0.*'seed': 1"):
        actions(world["noun0"], world["verb1"])
    with pytest.raises(DataError, match="no noun run has a verb run"):
        action_accuracies(world["noun0"], world["verb1"])
    with pytest.raises(DataError, match="no segment with both"):
        actions(world["noun0"], world["noun0"])


# frequent, rare, absent, novel

def test_frequencies_follow_from_the_sources_training_counts(world):
    found = by_frequency(*nouns(world))
    lines = pd.read_csv(world["zero_shot"] / "predictions.csv").query("kind == 'noun'")
    groups = {"epic": dict(head=[0, 1], tail=[2, 3], absent=[4]), "csv": dict(head=[1], tail=[0], novel=[2])}
    for dataset, own in groups.items():
        table = found[(found.dataset == dataset) & (found.kind == "noun") & (found.method == "zero_shot") & (found.measure == "top1")]
        assert list(table.group) == list(own)
        for group, labels in own.items():
            part = lines[(lines.dataset == dataset) & lines.label.isin(labels)]
            assert row(table, group=group).value == pytest.approx(100 * (part.label == part.predicted).mean()) and row(table, group=group)["count"] == len(part)
    assert set(found[found.method == "xmic"].seeds) == {3}


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=12).filter(any))
def test_every_class_has_one_frequency(counts):
    source = ClassSet.from_names([f"s{i}" for i in range(len(counts))])
    target = ClassSet.from_names([f"s{i}" for i in range(0, len(counts), 2)] + ["other"])
    own, theirs = (class_frequencies(c, source, np.array(counts)) for c in (source, target))
    assert set(own) <= {"head", "tail", "absent"} and [f == "absent" for f in own] == [n == 0 for n in counts]
    assert theirs[-1] == "novel" and list(theirs[:-1]) == list(own[::2])


def test_unseen_participants_and_tail_by_the_official_files(world):
    root = world["root"] / "epic"
    assert set(by_participant(world["noun0"]).group) == {"no official list"} == set(by_official_tail(world["noun0"]).group)
    (root / "EPIC_100_unseen_participant_ids_validation.csv").write_text("participant_id\nP18\n")
    (root / "EPIC_100_tail_nouns.csv").write_text("noun\n2\n3\n")
    lines = pd.read_csv(world["noun0"] / "predictions.csv").query("dataset == 'epic'")
    for found, inside, names in ((by_participant(world["noun0"]), lines.segment_id.str.startswith("P18"), ("unseen", "seen")),
                                 (by_official_tail(world["noun0"]), lines.label.isin([2, 3]), ("tail", "many"))):
        for name, part in zip(names, (lines[inside], lines[~inside])):
            assert row(found, group=name, measure="top1").value == pytest.approx(100 * (part.label == part.predicted).mean())
            assert row(found, group=name, measure="top1")["count"] == len(part) > 0
    (root / "EPIC_100_unseen_participant_ids_validation.csv").write_text("participant_id\nP09\n")
    empty = row(by_participant(world["noun0"]), group="unseen", measure="top1")
    assert empty["count"] == 0 and empty.seeds == 0 and np.isnan(empty.value)
    plot_accuracies(by_participant(world["noun0"]))
    for path in root.glob("*[nl]_*"):
        if "unseen" in path.name or "tail" in path.name:
            path.unlink()


# calibration

def test_calibration_error_by_hand(world):
    lines = predictions(world["zero_shot"]).query("dataset == 'epic' and kind == 'noun'")
    error = 0.0
    for b in range(15):
        own = lines[(lines.confidence > b / 15) & (lines.confidence <= (b + 1) / 15)]
        if len(own):
            error += len(own) / len(lines) * abs(100 * own.right.mean() - 100 * own.confidence.mean())
    assert calibration_error(lines) == pytest.approx(error)
    assert row(calibration(world["zero_shot"]), dataset="epic", kind="noun").value == pytest.approx(error)
    table = reliability(lines)
    assert table["count"].sum() == len(lines) and len(table) == 15


def test_confidences_on_a_bound_belong_below_it():
    lines = pd.DataFrame(dict(confidence=[0.0, 0.2, 0.2000001, 1.0], right=[False, True, True, True]))
    assert reliability(lines, 5)["count"].tolist() == [2, 1, 0, 0, 1]


def test_a_sure_and_right_run_has_no_calibration_error():
    assert calibration_error(pd.DataFrame(dict(confidence=[1.0] * 4, right=[True] * 4))) == 0
    assert calibration_error(pd.DataFrame(dict(confidence=[1.0] * 4, right=[True, False] * 2))) == 50


# differences

def slow_difference(first: np.ndarray, second: np.ndarray, resamples: int, rng: np.random.Generator) -> tuple[float, float]:
    apart = first.mean(1) - second.mean(1)  # seeds averaged for each segment
    draws = [100 * apart[rng.integers(0, len(apart), len(apart))].mean() for _ in range(resamples)]
    return tuple(np.quantile(draws, [0.025, 0.975]))


@pytest.mark.parametrize("seeds", [(1, 1), (3, 1), (3, 3)])
def test_the_paired_bootstrap_is_that_of_resampled_segments(seeds):
    rng = np.random.default_rng(0)
    hard = rng.random((400, 1))
    first, second = hard * 0.5 + rng.random((400, seeds[0])) * 0.5 > 0.5, hard * 0.5 + rng.random((400, seeds[1])) * 0.5 > 0.55
    found = difference(first, second, 20_000)
    low, high = slow_difference(first, second, 20_000, rng)
    assert found["difference"] == pytest.approx(100 * (first.mean() - second.mean())) and found["count"] == 400
    assert (found["low"], found["high"]) == pytest.approx((low, high), abs=0.35)


def test_pairing_tells_apart_what_two_intervals_would_not():
    rng = np.random.default_rng(0)
    first = rng.random((1000, 1)) < 0.5
    second = first & (rng.random((1000, 1)) > 0.04)
    found = difference(first, second)
    assert found["verdict"] == "higher" and difference(second, first)["verdict"] == "lower"
    assert difference(first, first) == dict(difference=0.0, low=0.0, high=0.0, count=1000, verdict="not told apart")
    alone = 196 * math.sqrt(0.25 / 1000)
    assert found["difference"] < alone


def test_verdicts_on_nothing_are_rare():
    rng = np.random.default_rng(1)
    verdicts = [difference(rng.random((300, 2)) < 0.4, rng.random((300, 2)) < 0.4, 500, seed)["verdict"] for seed in range(200)]
    assert 0.9 <= np.mean([v == "not told apart" for v in verdicts]) < 1


def test_draws_have_the_right_spread():
    drawn = paired_draws(np.random.default_rng(0).random((500, 1)) < 0.3, np.random.default_rng(1), 5000)
    p = drawn.mean() / 100
    assert drawn.std() == pytest.approx(100 * math.sqrt(p * (1 - p) / 500), rel=0.05)


@pytest.fixture
def cells(world) -> pd.DataFrame:
    rows = [("ZS CLIP", ["zero_shot"]), ("X-MIC", [f"xmic-noun-{s}" for s in range(3)]), ("A5", ["nowhere"])]
    columns = {"epic": ("epic", "top1"), "csv": ("csv", "top1"), "hm": ("", "epic+csv"), "shared": ("csv", "shared"), "hm2": ("", "csv shared+novel")}
    return pd.DataFrame([dict(table=1, source="epic", method=m, variant="", kind="noun", column=c, dataset=d, measure=of, runs=names)
                         for c, (d, of) in columns.items() for m, names in rows])


def test_neighbours_are_compared_in_every_column(world, cells):
    found = neighbours(cells, world["root"] / "runs")
    assert len(found) == 2 * 5 and set(found[found.row == "A5"].verdict) == {"no run"} and found[found.row == "A5"].difference.isna().all()
    own = found[found.row == "X-MIC"].set_index("column")
    tables = [pd.read_csv(path / "predictions.csv", keep_default_na=False).query("kind == 'noun'") for path in nouns(world)]
    share = lambda d, hit, subset=("", "shared", "novel"): [100 * (t[hit] == t.label)[(t.dataset == d) & t.subset.isin(subset)].mean() for t in tables]
    apart = lambda values: np.mean(values[1:]) - values[0]
    assert own.difference["epic"] == pytest.approx(apart(share("epic", "predicted")))
    assert own.difference["shared"] == pytest.approx(apart(share("csv", "restricted", ("shared",)))) and own["count"]["shared"] == 80
    assert own.difference["hm"] == pytest.approx(apart([harmonic_mean(a, b) for a, b in zip(share("epic", "predicted"), share("csv", "predicted"))]))
    shared, novel = (share("csv", "restricted", (part,)) for part in ("shared", "novel"))
    assert own.difference["hm2"] == pytest.approx(apart([harmonic_mean(a, b) for a, b in zip(shared, novel)]))
    assert own["count"]["hm"] == 270 and (own.low <= own.difference).all() and (own.difference <= own.high).all() and own.verdict["epic"] == "higher"
    pd.testing.assert_frame_equal(found, neighbours(cells, world["root"] / "runs"))
    plot_differences(found)


def test_rows_can_be_compared_with_one_of_them(world, cells):
    found = neighbours(cells, world["root"] / "runs", against="ZS CLIP")
    assert set(found.other) == {"ZS CLIP"} and set(found.row) == {"X-MIC", "A5"}
    with pytest.raises(DataError, match="did you mean 'X-MIC'"):
        neighbours(cells, world["root"] / "runs", against="XMIC")


def test_only_segments_that_all_runs_have_are_compared(world, cells, tmp_path):
    for path in nouns(world):
        lines = pd.read_csv(path / "predictions.csv", keep_default_na=False)
        (tmp_path / path.name).mkdir()
        lines.iloc[40 if path.name == "zero_shot" else 0:].to_csv(tmp_path / path.name / "predictions.csv", index=False)
        for name in ("config.json", "metrics.json"):
            (tmp_path / path.name / name).write_bytes((path / name).read_bytes())
    assert neighbours(cells, tmp_path).query("row == 'X-MIC' and column == 'epic'")["count"].item() == 110


# confusions and the tidy table

def test_confusions_are_counted_by_name(world):
    lines = pd.read_csv(world["noun0"] / "predictions.csv").query("dataset == 'epic' and label != predicted")
    counts = lines.groupby(["label", "predicted"]).size()
    found = confusions(world["noun0"], top=100)
    names = ["water tap", "pan", "cup", "lid", "rare"]
    assert found.set_index(["label", "predicted"])["count"].to_dict() == {(names[a], names[b]): n for (a, b), n in counts.items()}
    assert found["count"].is_monotonic_decreasing and found.share.iloc[0] == pytest.approx(100 * found["count"].iloc[0] / 30)
    assert confusions(world["zero_shot"], "csv", "verb").label.isin(["take", "dig"]).all()
    with pytest.raises(DataError, match="no verb predictions for epic; it has: csv noun, epic noun"):
        confusions(world["noun0"], kind="verb")


def test_the_matrix_holds_every_segment_of_its_classes(world):
    figure = plot_confusions(world["noun0"], top=2)
    found = confusions(world["noun0"], top=2)
    shown = set(found.label) | set(found.predicted)
    assert sum(int(t.get_text()) for t in figure.axes[0].texts) == 30 * len(shown)


def test_the_tidy_table_loads_with_pandas_alone(world, tmp_path):
    table = tidy(world["root"] / "runs")
    table.to_csv(tmp_path / "tidy.csv", index=False)
    table = pd.read_csv(tmp_path / "tidy.csv")
    assert len(table) == 2 * (2 + 2) + 6 * (2 + 2) and not table.duplicated(["run", "dataset", "kind", "measure"]).any()
    metrics = read_json(world["verb1"] / "metrics.json")
    one = row(table, run="xmic-verb-1", dataset="csv", kind="verb", measure="top1")
    assert one.value == pytest.approx(metrics["results"]["csv"]["verb"]["top1"]["value"]) and (one["count"], one.classes, one.low, one.high) == (120, 2, 1, 99)
    assert (one.source, one.method, one.seed, one.context_views) == ("epic", "xmic", 1, "hand+full")
    assert (one.parameters, one.seconds, one.process_mib, one.commit) == (10, 1.5, 700, "abc")
    means = table[table.run == "xmic-verb-1"].set_index("measure").value
    assert means["harmonic_mean source+target"] == pytest.approx(metrics["harmonic_means"]["verb"]["epic+csv"]) and means["harmonic_mean shared+novel"] == 12


def test_the_report_writes_every_value_as_it_is(world, tmp_path):
    "The report's own cell, over runs whose learning rates have few digits before and many behind the point."
    for number, lr in enumerate((5e-4, 1e-6)):
        shutil.copytree(world[f"noun{number}"], tmp_path / "runs" / f"noun{number}")
        write_json(tmp_path / "runs" / f"noun{number}" / "config.json", read_json(world[f"noun{number}"] / "config.json") | dict(lr=lr))
    cells = json.loads((project_root() / "nbs/report.ipynb").read_text(encoding="utf-8"))["cells"]
    (code,) = [source for cell in cells if "runs.csv" in (source := "".join(cell["source"])) and "to_csv" in source]
    made, plan = SimpleNamespace(runs_root=tmp_path / "runs", reports=tmp_path), SimpleNamespace(runs=dict(noun0=None, noun1=None))
    exec(code, dict(analysis=analysis, made=made, plan=plan, changed={}, from_root=from_root, whole_file=whole_file, HTML=str))
    written, table = pd.read_csv(tmp_path / "runs.csv"), tidy(tmp_path / "runs")
    assert set(written.lr) == {5e-4, 1e-6}
    numbers = list(table.select_dtypes("number"))
    assert {"value", "low", "high", "count", "seconds", "parameters"} <= set(numbers)
    pd.testing.assert_frame_equal(written[numbers], table[numbers], check_dtype=False, rtol=0, atol=0)


def test_settings_that_differ_have_a_column(world, tmp_path):
    for name, scale in (("noun0", 1.0), ("noun1", 2.0)):
        for file in ("metrics.json", "predictions.csv"):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / file).write_bytes((world[name] / file).read_bytes())
        write_json(tmp_path / name / "config.json", read_json(world[name] / "config.json") | dict(scale=scale, heads=4))
    (tmp_path / "unfinished").mkdir()
    table = tidy(tmp_path)
    assert set(table.scale) == {1.0, 2.0} and "heads" not in table and set(table.run) == {"noun0", "noun1"} and "data_root" not in table
    with pytest.raises(DataError, match="no finished run"):
        tidy(tmp_path / "unfinished")


def test_figures_show_what_the_tables_say(world):
    table = predictions(*nouns(world))
    figure = plot_accuracies(accuracies(table))
    heights = sorted(bar.get_height() for ax in figure.axes for bar in ax.patches if not np.isnan(bar.get_height()))
    assert heights == pytest.approx(sorted(accuracies(table).query("measure == 'top1'").value))
    figure = plot_reliability(table[table.kind == "noun"])
    assert [ax.get_title() for ax in figure.axes[:2]] == ["source: epic", "target: csv"]
    shown = {t.get_text() for ax in figure.axes for t in ax.texts}
    assert {f"ECE {v:.1f}" for v in calibration(*nouns(world)).query("kind == 'noun'").value} == shown
    plt.close("all")
