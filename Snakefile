# Everything behind the tables: `make reproduce`, or `snakemake` with the settings below as --config.
# What is to be made is said in xmic.experiments; profiles/ holds how it is run (profiles/default always, profiles/slurm on a cluster).
import json
import os
import re
import signal
import sys
from functools import partial

from snakemake.logging import logger

from xmic import experiments, warm

PROFILE = experiments.profile(config.get("profile") or "mini", config.get("size") or "default", config.get("data") or None)
PLAN = experiments.plan(PROFILE, str(config.get("tables") or "all"), int(config.get("seeds") or 1))
MINI = PROFILE.name == "mini"
CHOICE = dict(profile=PROFILE.name, size=PROFILE.size or "default", data=PROFILE.data if not MINI else None, seeds=PLAN.seeds)
FIRST = experiments.runs(1, PROFILE, PLAN.seeds, experiments.FIRST) if 1 in PLAN.tables else {}
FIRST_STORES = {store.name for run in FIRST.values() for store in run.stores}
LONG = {name for name, run in PLAN.runs.items() if run.parameters.get("method") in PROFILE.one_seed}
# Reports may be there without their runs, in a fresh clone: what was made here has a file beside the runs that says so.
TABLES = [path for n in PLAN.tables for path in (f"{PROFILE.runs_root}/table{n}/done", f"{PROFILE.reports}/table{n}.md")]
CLIPS = [f"{PROFILE.runs_root}/clips/done", f"{PROFILE.reports}/clips.html"] * bool(FIRST)
SHARDS = int(config.get("shards") or 1)  # jobs for each store of features or frames, each with videos of its own
WORLD = f"{PROFILE.data}/world.json"
LIBRARY = ["xmic/reporting.py", "xmic/experiments.py"]
ANNOTATIONS = {} if MINI else {name: experiments.annotations(PROFILE, store) for name, store in PLAN.stores.items()}
if not MINI:  # the files' times say nothing, so what is done is taken back where their contents have changed
    for name in experiments.note_annotations(PLAN): print(f"The annotations behind {name} have changed: it is extracted again, as far as that is needed.", file=sys.stderr)

os.environ["OMP_NUM_THREADS"] = str(PROFILE.threads)
# Where no GPU is used, a fresh Python would import for longer than it trains: papermill and its kernels are forks there (xmic.warm).
FORKS = not PROFILE.gpus and sys.platform == "linux"
os.environ["JUPYTER_PATH"] = os.pathsep.join(filter(None, [os.path.abspath("profiles/jupyter"), os.environ.get("JUPYTER_PATH")]))
# A job waits for the one that a killed snakemake may have left behind; what a notebook prints is in the job's log.
PAPERMILL = ("python -m xmic.warm $(dirname {log.text})/job.lock papermill " + "-k warm " * FORKS +
             "--no-progress-bar --cwd . {input.notebook} {log.notebook} -y {params.settings:q} > {log.text} 2>&1")
INTERRUPTED = []  # the signals that came


def weights(store):
    "The kit's own encoders: other weights are other features."
    path = f"data/mini/weights/{PLAN.stores[store].parameters['encoder']}.safetensors"
    return [path] if os.path.exists(path) else []


def asks(gpu, memory, hours):
    "What a job asks a cluster for, in GB and hours; one that failed is given twice as much when it is tried again."
    return dict(gpu=gpu, mem_mb=lambda w, attempt: 1000 * memory * 2 ** (attempt - 1), runtime=lambda w, attempt: 60 * hours * 2 ** (attempt - 1))


def sources(w):
    "What a store is made from."
    return [WORLD, *weights(w.store)] if MINI else [ancient(path) for path in ANNOTATIONS[w.store]]


def one_of(names):
    return "|".join(map(re.escape, sorted(names))) or "(?!)"


wildcard_constraints:
    store=one_of(PLAN.stores),
    number=one_of(map(str, PLAN.tables)),
    part=r"\d+",


localrules: all, world, first_rows


rule all:
    input:
        f"{PROFILE.runs_root}/report/done", f"{PROFILE.reports}/index.html", [f"{PROFILE.runs_root}/first_rows.txt"] * bool(FIRST),
        [f"{PROFILE.runs_root}/{name}/metrics.json" for name in PLAN.runs],  # so that a run that was deleted is made again


rule world:
    message: f"the mini world, size {PROFILE.size}"
    output: WORLD
    params:
        call=f"from signal import *; signal(SIGINT, SIG_DFL); from xmic.mini import build; build(root={PROFILE.data!r}, size={PROFILE.size!r})",
        stale=PROFILE.features_root
    threads: workflow.cores or 1
    shell: "rm -rf {params.stale:q} && python -c {params.call:q}"


rule extract:
    message: "features: {wildcards.store}"
    wildcard_constraints: store=one_of(name for name, store in PLAN.stores.items() if store.notebook == "extract" and name not in FIRST_STORES)
    input:
        sources,
        lambda w: [f"{PROFILE.features_root}/jobs/{w.store}/part{i}of{SHARDS}" for i in range(SHARDS) if SHARDS > 1],
        notebook=lambda w: ancient(f"nbs/{PLAN.stores[w.store].notebook}.ipynb"),
    priority: 5
    output: touch(f"{PROFILE.features_root}/jobs/{{store}}/done")
    log: notebook=f"{PROFILE.features_root}/jobs/{{store}}/extract.ipynb", text=f"{PROFILE.features_root}/jobs/{{store}}/job.log"
    params: settings=lambda w: json.dumps(PLAN.stores[w.store].parameters)
    threads: PROFILE.threads
    resources: **asks(PROFILE.gpus, 32, 48 if SHARDS == 1 else 8)
    shell: PAPERMILL


use rule extract as extract_first with:
    wildcard_constraints: store=one_of(FIRST_STORES)
    priority: 9


use rule extract as store_frames with:
    message: "frames: {wildcards.store}"
    wildcard_constraints: store=one_of(name for name, store in PLAN.stores.items() if store.notebook == "store_frames")
    priority: 4
    resources: **asks(0, 32, 48 if SHARDS == 1 else 8)


rule part:
    message: "{wildcards.store}, part {wildcards.part} of {SHARDS}"
    input: sources
    output: touch(f"{PROFILE.features_root}/jobs/{{store}}/part{{part}}of{SHARDS}")
    log: text=f"{PROFILE.features_root}/jobs/{{store}}/part{{part}}of{SHARDS}.log"
    params:
        command=lambda w: PLAN.stores[w.store].notebook,
        settings=lambda w: json.dumps(PLAN.stores[w.store].parameters | dict(rank=int(w.part), world=SHARDS, progress=False)),
    priority: 6
    threads: PROFILE.threads
    resources: **(asks(0, 32, -(-48 // SHARDS)) | dict(gpu=lambda w: PROFILE.gpus if PLAN.stores[w.store].notebook == "extract" else 0))
    shell: "printf %s {params.settings:q} > {output}.json && python -m xmic.distributed {params.command} {output}.json > {log.text} 2>&1"


rule run:
    message: "run: {wildcards.run}"
    input:
        lambda w: [f"{PROFILE.features_root}/jobs/{s.name}/done" for s in PLAN.runs[w.run].stores],
        notebook=ancient("nbs/train.ipynb"),
    output: f"{PROFILE.runs_root}/{{run}}/metrics.json"
    log: notebook=f"{PROFILE.runs_root}/{{run}}/train.ipynb", text=f"{PROFILE.runs_root}/{{run}}/job.log"
    wildcard_constraints: run=one_of(set(PLAN.runs) - set(FIRST) - LONG)
    params: settings=lambda w: json.dumps(PLAN.runs[w.run].parameters)
    threads: PROFILE.threads
    resources: **asks(PROFILE.gpus, 64, 12)
    shell: PAPERMILL


use rule run as first_run with:
    wildcard_constraints: run=one_of(FIRST)
    priority: 10


use rule run as long_run with:  # early, so that no core is idle at the end
    wildcard_constraints: run=one_of(LONG)
    priority: 3
    resources: **asks(PROFILE.gpus, 64, 96)


rule first_rows:
    message: "the first rows of Table 1"
    priority: 20
    input: [f"{PROFILE.runs_root}/{name}/metrics.json" for name in FIRST]
    output: f"{PROFILE.runs_root}/first_rows.txt"
    params: call=f"from xmic.experiments import *; print(first_rows(profile({PROFILE.name!r}, {CHOICE['size']!r}, {CHOICE['data']!r}), {PLAN.seeds}))"
    shell: "python -c {params.call:q} > {output} && cat {output}"


rule table:
    message: "table {wildcards.number}"
    input:
        lambda w: [f"{PROFILE.runs_root}/{name}/metrics.json" for name in experiments.runs(int(w.number), PROFILE, PLAN.seeds)],
        LIBRARY,
        notebook="nbs/tables/table{number}.ipynb",
    output: [f"{PROFILE.reports}/table{{number}}.{ending}" for ending in ("md", "csv", "tex", "svg", "png")], touch(f"{PROFILE.runs_root}/table{{number}}/done")
    log: notebook=f"{PROFILE.runs_root}/table{{number}}/table.ipynb", text=f"{PROFILE.runs_root}/table{{number}}/job.log"
    params: settings=json.dumps(CHOICE)
    resources: **asks(0, 8, 1)
    shell: PAPERMILL


PAGE = (PAPERMILL + " && jupyter nbconvert --to html --no-input --TemplateExporter.exclude_raw=True --TemplateExporter.extra_template_basedirs=nbs"
        " --template report_template {log.notebook} --output-dir $(dirname {output[0]}) --output $(basename {output[0]}) >> {log.text} 2>&1")


rule report:
    message: "the report"
    input: TABLES, CLIPS, LIBRARY, "nbs/report_template/index.html.j2", notebook="nbs/report.ipynb"
    output: f"{PROFILE.reports}/index.html", f"{PROFILE.reports}/runs.csv", f"{PROFILE.reports}/differences.csv", touch(f"{PROFILE.runs_root}/report/done")
    log: notebook=f"{PROFILE.runs_root}/report/report.ipynb", text=f"{PROFILE.runs_root}/report/job.log"
    params: settings=json.dumps(dict(CHOICE, tables=" ".join(map(str, PLAN.tables))))
    resources: **asks(0, 16, 2)
    shell: PAGE


rule clips:
    message: "the clips that were won and lost"
    input:
        [f"{PROFILE.runs_root}/{name}/metrics.json" for name in FIRST], LIBRARY, "xmic/inspection.py", "nbs/report_template/index.html.j2",
        notebook="nbs/clips.ipynb",
    output: f"{PROFILE.reports}/clips.html", touch(f"{PROFILE.runs_root}/clips/done")
    log: notebook=f"{PROFILE.runs_root}/clips/clips.ipynb", text=f"{PROFILE.runs_root}/clips/job.log"
    params: settings=json.dumps({k: v for k, v in CHOICE.items() if k != "seeds"})
    resources: **asks(0, 16, 2)
    shell: PAGE


def interrupted(before, number, frame):
    "Says so once, before snakemake ends; what it would then say about the jobs that end with it is no failure of theirs."
    if not INTERRUPTED:
        logger.disabled = True
        os.write(2, b"\nInterrupted: no other job is begun. What is done is kept; the same command goes on from here.\n")
    INTERRUPTED.append(number)
    before(number, frame)


onstart:
    if FORKS and (address := warm.start()):
        os.environ[warm.ADDRESS] = address
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, partial(interrupted, signal.getsignal(number)))


onerror:
    if not INTERRUPTED:
        failed = experiments.failures(PLAN)
        print("\nThese jobs failed:" if len(failed) else "\nWhat failed is named above.")
        for job in failed.itertuples():
            print(f"  {job.job}\n    {job.cause}\n    see {job.notebook}")
        print("What did not depend on them is done. The same command goes on from here.")
