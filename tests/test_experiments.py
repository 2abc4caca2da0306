"""The plan of all tables: names, sharing, what is missing, and that snakemake plans it for the real annotation files."""
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pandas as pd
import pytest

import library
from generated import NOTE, link_official_files, make
from world import register_tiny, write_world
from xmic import experiments
from xmic.experiments import Plan, annotations, cells, failures, plan, prepare, profile, run, runs
from xmic.features import ExtractConfig
from xmic.files import DataError, settings, write_json
from xmic.paper import PRINTED, printed
from xmic.config import TrainConfig, resolve

ROOT = Path(__file__).resolve().parents[1]
PROFILES = {"mini": profile(), "large": profile(size="large"), "paper": profile("paper", data="/data")}


@pytest.mark.parametrize("name", PROFILES)
def test_every_run_and_extraction_can_be_built_from_its_parameters(name):
    made = plan(PROFILES[name], "all", 2)
    for job in made.runs.values():
        config = resolve(settings(TrainConfig, job.parameters))
        others = {config.encoder, config.context_encoder} - {None, PROFILES[name].encoders["clip"]["encoder"]}
        assert config.name == job.name and set(config.targets) == ({"epic", "ego4d"} if others else {"epic", "ego4d", "egtea"}) - {config.dataset}
    for store in made.stores.values():
        settings(ExtractConfig, store.parameters)


@pytest.mark.parametrize("name", PROFILES)
def test_a_run_finds_the_features_that_are_extracted_for_it(name):
    for job in plan(PROFILES[name], "all", 1).runs.values():
        p, made = job.parameters, [s.parameters for s in job.stores]
        held = {(s["dataset"], split) for s in made for split in s["splits"]}
        wanted = {(d, "test") for d in (p["dataset"], *p["targets"])} | ({(p["dataset"], "train")} if p.get("method") != "zero_shot" else set())
        assert held == wanted
        assert {s["encoder"] for s in made} == {p["encoder"], p.get("context_encoder") or p["encoder"]} and {s["features_root"] for s in made} == {p["features_root"]}
        assert all(s["data_root"] == (p["data_root"] if s["dataset"] == p["dataset"] else p["target_roots"][s["dataset"]]) for s in made)


def test_no_row_names_a_setting_that_is_the_default():
    "Else equal runs of two tables would have two names, and be trained twice."
    default = TrainConfig()
    for table, rows in experiments.TABLES.items():
        for row in rows:
            assert not [k for k, v in row.settings.items() if getattr(default, k) == v], (table, row)


def test_runs_of_equal_settings_have_one_name_and_others_differ():
    made = plan(profile(), "all", 3).runs
    keys = [json.dumps(r.parameters | dict(name=""), sort_keys=True) for r in made.values()]
    assert len(set(keys)) == len(made)
    bare = run(profile(), "ego4d", "noun", {}, 1)
    assert bare.name != run(replace(profile(), train=dict(profile().train, epochs=3)), "ego4d", "noun", {}, 1).name
    assert bare.name == run(replace(profile(), data="/elsewhere", runs_root="/runs"), "ego4d", "noun", {}, 1).name


@pytest.mark.parametrize("table", PRINTED)
def test_every_cell_of_our_rows_stands_in_the_printed_table(table):
    key = ["table", "source", "method", "variant", "kind", "column"]
    ours, theirs = cells(table, profile("paper", data="/data"), 2), printed(table)
    both = ours.merge(theirs, on=key, how="left", validate="one_to_one")
    unprinted = both[both.value.isna()]
    assert set(unprinted.column) <= ({"hm"} if table == 7 else set())  # Table 7 prints no harmonic mean of zero-shot
    assert {*map(tuple, both.dropna(subset="value")[key].values)} == {*map(tuple, theirs[key].values)}


def test_the_cells_know_their_runs():
    for table in experiments.TABLES:
        assert {n for names in cells(table, profile(), 3).runs for n in names} == set(runs(table, profile(), 3))


def test_seeds_multiply_trained_runs_only():
    one, three = plan(profile(), "all", 1).runs, plan(profile(), "all", 3).runs
    trained = sum(r.parameters.get("method") not in ("zero_shot", *profile().one_seed) for r in one.values())
    assert len(three) == len(one) + 2 * trained and set(one) < set(three)


@pytest.mark.parametrize("call, words", [
    (lambda: profile("papre", data="/x"), "did you mean 'paper'"),
    (lambda: profile(size="big"), "'default', 'large'"),
    (lambda: plan(profile(), "1 10"), "'10' is none of"),
    (lambda: plan(profile(), "1", 0), "must be at least 1"),
    (lambda: experiments.rows_of(10), "no table 10"),
])
def test_what_cannot_be_planned_is_said(call, words):
    with pytest.raises(DataError, match=words):
        call()


def test_failures_name_cause_and_place(tmp_path):
    made = plan(replace(profile(), runs_root=f"{tmp_path}/runs", features_root=f"{tmp_path}/features", reports=f"{tmp_path}/reports"), "3")
    error, killed, silent, done, *_ = [Path(made.folder(n)) for n in [*list(made.runs)[:3], *made.stores]]
    write_json(error / "train.ipynb", {"cells": [{"outputs": [{"output_type": "error", "ename": "DataError", "evalue": "no videos"}]}]})
    killed.mkdir(parents=True), (killed / "job.log").write_text("Executing\nKilled\n")
    silent.mkdir(parents=True), (silent / "job.log").write_text("")
    done.mkdir(parents=True), (done / "job.log").write_text("fine"), (done / "done").touch()
    table = tmp_path / "runs/table3"
    write_json(table / "table.ipynb", {"cells": [{"outputs": [{"output_type": "error", "ename": "KeyError", "evalue": "'hm'"}]}]})
    found = failures(made).set_index("job").cause
    assert found[error.name] == "DataError: no videos" and found[killed.name] == "Killed" and "ran out of memory" in found[silent.name]
    assert done.name not in found and found.table3 == "KeyError: 'hm'" and len(found) == 4


def test_planning_imports_no_torch():
    code = "import sys, xmic.experiments as e; e.plan(e.profile()); print([m for m in ('torch', 'matplotlib', 'open_clip') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stdout.strip() == "[]"


def real_root(shared_data: Path, root: Path) -> Path:
    "The official files in the official places: annotations only."
    there = link_official_files(shared_data, root) / "ego4d/v2/annotations"
    there.mkdir(parents=True)
    for split in ("train", "val"):
        (there / f"fho_lta_{split}.json").symlink_to(next(iter(sorted(shared_data.rglob(f"fho_lta_{split}*.json")))))
    return root


def dry_run(*choices: str, options: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "snakemake", "--dry-run", "--nolock", "--cores", "2", *options, "--config", *choices],
                          capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})


def planned(done: subprocess.CompletedProcess) -> dict[str, int]:
    "Jobs of each rule, from snakemake's own summary."
    assert done.returncode == 0, done.stdout + done.stderr
    words = [line.split() for line in (done.stdout + done.stderr).split("Job stats:")[1].splitlines()]
    return {w[0]: int(w[1]) for w in words if len(w) == 2 and w[1].isdecimal()}


@pytest.mark.slow
def test_the_paper_profile_plans_every_job_on_the_real_annotation_files(shared_data, tmp_path):
    root = real_root(shared_data, tmp_path / "data")
    made = plan(profile("paper", data=str(root)), "all", 3)
    assert all(Path(f).is_file() for s in made.stores.values() for f in annotations(made.profile, s))
    jobs = planned(dry_run("profile=paper", f"data={root}", "seeds=3"))
    assert jobs["run"] + jobs["first_run"] + jobs.get("long_run", 0) == len(made.runs) and sum(jobs.get(rule, 0) for rule in ("extract", "extract_first", "store_frames")) == len(made.stores) == 20 and jobs["table"] == len(experiments.TABLES)
    (root / "egtea/action_annotation/noun_idx.txt").unlink()
    failed = dry_run("profile=paper", f"data={root}")
    assert failed.returncode != 0 and "expected noun_idx.txt" in failed.stdout + failed.stderr


@pytest.mark.slow
def test_generated_features_go_through_every_method_at_the_real_class_counts(shared_data, tmp_path):
    done = make(tmp_path, shared_data, 48, 40, "3")
    assert done.returncode == 0, done.stderr[-3000:]
    table = pd.read_csv(tmp_path / "data/report/table3.csv")
    assert (table.seeds == 1).all() and set(table.verdict) <= {"inside", "outside"} and (table.note == NOTE).all()
    assert {(c.kind, c.column): round(100 / c.chance) for c in table[table.chance.notna()].itertuples()} == {
        ("noun", "ego4d"): 521, ("verb", "ego4d"): 117, ("noun", "egtea"): 53, ("verb", "egtea"): 19}
    zero_shot = table[(table.method == "ZS CLIP") & table.chance.notna()]
    assert zero_shot["mean"].sum() > 2 * zero_shot.chance.sum()  # labels and features of a segment belong together
    assert NOTE in (tmp_path / "data/report/index.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_mini_profile_plans_the_world_first(tmp_path):
    made = plan(profile(size="tiny"), "1 3")
    done = dry_run("size=tiny", "tables=1 3", options=("--forceall",))
    jobs = planned(done)
    assert jobs["world"] == 1 and jobs["first_run"] == 6 and jobs["run"] + jobs["first_run"] + jobs.get("long_run", 0) == len(made.runs) and jobs["table"] == 2 and jobs["first_rows"] == 1


def planned_paper(tmp_path: Path, reports: Path) -> Plan:
    "Table 3 of the paper profile, with files that stand for the annotations."
    made = plan(profile("paper", data=str(tmp_path)), "3")
    write_json(tmp_path / "profile.json", dict(runs_root=str(tmp_path / "runs"), features_root=str(tmp_path / "features"), reports=str(reports)))
    for store in made.stores.values():
        (tmp_path / store.parameters["dataset"]).mkdir(exist_ok=True)
    for file in ("epic/EPIC_100_train.csv", "epic/EPIC_100_validation.csv", "epic/EPIC_100_noun_classes.csv", "epic/EPIC_100_verb_classes.csv",
                 "ego4d/fho_lta_train.json", "ego4d/fho_lta_val.json", "egtea/noun_idx.txt", "egtea/verb_idx.txt",
                 *(f"egtea/test_split{i}.txt" for i in (1, 2, 3))):
        (tmp_path / file).touch()
    return made


@pytest.mark.slow
def test_a_run_that_was_deleted_is_made_again(tmp_path):
    made, runs, reports = planned_paper(tmp_path, tmp_path / "report"), tmp_path / "runs", tmp_path / "report"
    done = [*(tmp_path / "features" / "jobs" / name / "done" for name in made.stores), *(runs / name / "metrics.json" for name in made.runs),
            *(reports / f"table3.{ending}" for ending in ("md", "csv", "tex", "svg", "png")), runs / "table3" / "done",
            *(reports / name for name in ("index.html", "runs.csv", "differences.csv")), runs / "report" / "done"]
    newest = max(path.stat().st_mtime for path in [*library.modules(), *(ROOT / "nbs").rglob("*.ipynb"), *(ROOT / "nbs").rglob("*.j2")])
    for second, path in enumerate(done, int(newest) + 1):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        os.utime(path, (second, second))
    again = dry_run("profile=paper", f"data={tmp_path}", "tables=3")
    assert "Nothing to be done" in again.stdout + again.stderr
    (runs / next(iter(made.runs)) / "metrics.json").unlink()
    jobs = planned(dry_run("profile=paper", f"data={tmp_path}", "tables=3"))
    assert jobs["run"] == jobs["table"] == jobs["report"] == 1 and not any("extract" in rule or "store" in rule for rule in jobs)


@pytest.mark.slow
def test_a_report_that_is_there_without_its_runs_is_made_anew(tmp_path):
    "As in a fresh clone, which holds the committed report."
    assert (ROOT / "reports/mini/index.html").exists() and (ROOT / "reports/mini/table3.md").exists()
    shutil.copytree(ROOT / "reports/mini", tmp_path / "report")
    made = planned_paper(tmp_path, tmp_path / "report")
    jobs = planned(dry_run("profile=paper", f"data={tmp_path}", "tables=3"))
    assert jobs["run"] == len(made.runs) and sum(jobs.get(rule, 0) for rule in ("extract", "extract_first", "store_frames")) == len(made.stores) and jobs["table"] == jobs["report"] == 1


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("world"), videos=8)


def test_prepare_extracts_what_is_missing_and_nothing_else(world, tmp_path, capsys):
    config = TrainConfig(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(tmp_path), device="cpu", progress=False)
    ready = prepare(config)
    assert ready == resolve(config) and "16 of 16 segments have no features" in capsys.readouterr().out
    shards = sorted(tmp_path.rglob("*.safetensors"))
    assert len(shards) == 2 * 8
    shards[0].unlink()
    prepare(config)
    assert "2 of 16 segments have no features" in capsys.readouterr().out and shards[0].exists()
    times = {s: s.stat().st_mtime_ns for s in shards}
    prepare(config)
    assert capsys.readouterr().out == "" and times == {s: s.stat().st_mtime_ns for s in shards}


def test_prepare_goes_on_at_the_rate_that_the_store_has(world, tmp_path):
    from xmic.features import extract_dataset
    common = dict(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(tmp_path), device="cpu", progress=False)
    store, _ = extract_dataset(ExtractConfig(**common, feature_fps=5.0, workers=0))
    next(tmp_path.rglob("full/*.safetensors")).unlink()
    prepare(TrainConfig(**common))
    assert {m["feature_fps"] for m in store.manifest.values()} == {5.0}
    store.refresh()
    assert store.verify() == [] and len(list(tmp_path.rglob("*.safetensors"))) == 16


def test_prepare_leaves_features_without_videos_alone(world, tmp_path, capsys, monkeypatch):
    "Training needs no videos; what is missing is counted by the run."
    config = TrainConfig(dataset="csv", data_root=str(world), encoder=register_tiny(), weights="random", features_root=str(tmp_path), device="cpu", progress=False)
    prepare(config)
    next(tmp_path.rglob("hand/*.safetensors")).unlink()
    read = experiments.read_segments
    monkeypatch.setattr(experiments, "read_segments", lambda *a: read(*a).assign(video_path="/nowhere.mp4"))
    capsys.readouterr()
    prepare(config)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("given, root, encoder", [
    ({}, "data/mini/epic", "mini-clip"),
    (dict(encoder="ViT-B-32-quickgelu"), "data/mini/epic", "ViT-B-32-quickgelu"),
    (dict(data_root="data/mini-large/epic"), "data/mini-large/epic", "mini-clip"),
])
def test_without_data_the_mini_world_is_meant(monkeypatch, tmp_path, capsys, given, root, encoder):
    built = {}
    module = type(sys)("xmic.mini")
    module.build = lambda **k: built.update(k)
    monkeypatch.setitem(sys.modules, "xmic.mini", module)
    monkeypatch.setenv("XMIC_ROOT", str(tmp_path))
    monkeypatch.setattr(experiments, "_extract_missing", lambda *a: None)
    config = prepare(TrainConfig(**given))
    assert (config.data_root, config.encoder) == (root, encoder) and config.features_root == f"features/{Path(root).parent.name}"
    assert built["root"] == str(tmp_path / Path(root).parent) and built["size"] == experiments.world_size(root)
    assert ("mini world" in capsys.readouterr().out) == ("data_root" not in given)


def test_data_that_is_there_is_taken(monkeypatch, tmp_path):
    (tmp_path / "data/epic").mkdir(parents=True)
    monkeypatch.setenv("XMIC_ROOT", str(tmp_path))
    monkeypatch.setattr(experiments, "_extract_missing", lambda *a: None)
    config = prepare(TrainConfig())
    assert config.data_root is None and config.encoder == "ViT-B-16-quickgelu" and config.features_root == "features"


def test_table_notebooks_have_the_parameters_of_the_workflow():
    import ast
    import nbformat
    for table in experiments.TABLES:
        notebook = nbformat.read(ROOT / f"nbs/tables/table{table}.ipynb", 4)
        (cell,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
        assert [n.target.id for n in ast.parse(cell.source).body] == ["profile", "size", "data", "seeds", "runs_root", "out"] + ["rows"] * (table == 1)
        assert f"cells({table}, made, seeds" in "".join(c.source for c in notebook.cells)


@pytest.fixture
def paper_data(tmp_path) -> Path:
    "A folder that looks like the datasets, with empty annotation files and a place for all that is made."
    write_json(tmp_path / "profile.json", {k: str(tmp_path / k) for k in ("runs_root", "features_root", "reports")})
    for file in ("epic/EPIC_100_train.csv", "epic/EPIC_100_validation.csv", "epic/EPIC_100_noun_classes.csv", "epic/EPIC_100_verb_classes.csv",
                 "ego4d/fho_lta_train.json", "ego4d/fho_lta_val.json", "egtea/noun_idx.txt", "egtea/verb_idx.txt",
                 *(f"egtea/test_split{i}.txt" for i in (1, 2, 3))):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    return tmp_path


def asked(*choices: str, options: tuple[str, ...], snakefile: Path) -> tuple[dict[str, list[dict[str, str]]], str]:
    "By rule: the resources of its jobs in a dry run, which are said where a rule has no message of its own."
    snakefile.write_text(re.sub(r"(?m)^    message: .*\n", "", (ROOT / "Snakefile").read_text(encoding="utf-8")), encoding="utf-8")
    done = dry_run(*choices, options=("--snakefile", str(snakefile), "--directory", str(ROOT), *options))
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, list[dict[str, str]]] = {}
    for rule, words in re.findall(r"(?m)^(?:local)?rule (\w+):\n(?:    .*\n)*?    resources: (.*)$", done.stdout + done.stderr):
        found.setdefault(rule, []).append(dict(w.split("=", 1) for w in words.split(", ")))
    return found, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slurm", "local"])
def test_every_job_asks_for_gpu_memory_and_time(paper_data, name):
    there = name != "slurm" or find_spec("snakemake_executor_plugin_slurm")
    options = ("--profile", f"profiles/{name}") if there else ()  # without the plugin: what the rules say by themselves
    jobs, said = asked("profile=paper", f"data={paper_data}", "shards=8", "tables=1 2", options=options, snakefile=paper_data / "Snakefile")
    made = plan(profile("paper", data=str(paper_data)), "1 2")
    assert len(jobs["part"]) == 8 * len(made.stores) and len(jobs["run"]) + len(jobs["first_run"]) == len(made.runs)
    wanted = {"part": {"0", "1"}, "extract": {"1"}, "extract_first": {"1"}, "store_frames": {"0"}, "run": {"1"}, "first_run": {"1"}, "table": {"0"}}
    for rule, gpus in wanted.items():
        assert {j["gpu"] for j in jobs[rule]} == gpus and all(int(j["mem_mb"]) >= 8000 and int(j["runtime"]) >= 60 for j in jobs[rule])
    if name == "slurm" and there:
        assert {j["slurm_partition"] for j in jobs["part"]} == {"gpu"}


@pytest.mark.slow
def test_without_shards_a_store_is_one_job(paper_data):
    jobs = planned(dry_run("profile=paper", f"data={paper_data}", "tables=3"))
    assert "part" not in jobs and sum(jobs.get(rule, 0) for rule in ("extract", "extract_first", "store_frames")) == len(plan(profile("paper", data=str(paper_data)), "3").stores)
