"""The documentation: its code blocks run or are checked, its claims name things that exist, and the site builds without a warning."""
import ast
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, fields
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import papermill
import pytest
from PIL import Image

import library
from xmic.costs import VITS, extraction_costs, vit_gflop
from xmic.features import ExtractConfig
from xmic.config import TrainConfig
from xmic.files import read_json

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BIN = Path(sys.executable).parent
ENV = os.environ | dict(PATH=f"{BIN}{os.pathsep}{os.environ['PATH']}", OMP_NUM_THREADS="1")


@dataclass
class Block:
    "A fenced code block; `reason` says why it is not run."

    page: Path
    language: str
    text: str
    reason: str | None


def blocks(page: Path) -> list[Block]:
    found = re.findall(r"(?ms)(?:^<!-- not run: ([^\n]*?) -->\n)?^```(\w+)\n(.*?)^```$", page.read_text(encoding="utf-8"))
    return [Block(page, language, text, reason or None) for reason, language, text in found if language in ("python", "sh")]


def commands(text: str) -> list[list[str]]:
    "The words of each command of a shell block."
    lines = text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


BLOCKS = [block for page in PAGES for block in blocks(page)]


def named(block: Block) -> str:
    return f"{block.page.parent.name}/{block.page.name}:{block.text.split(chr(10))[0][:40]}"


# What is run.

@pytest.fixture
def checkout(tmp_path) -> Path:
    "A folder in which the files of the repository are found, and what is written goes nowhere."
    for name in subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n"):
        top = name.split("/")[0].strip('"')
        if top and not (tmp_path / top).exists():
            (tmp_path / top).symlink_to(ROOT / top)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if any(not b.reason for b in blocks(page))], ids=lambda p: p.stem)
def test_code_blocks_run(page, checkout):
    for block in blocks(page):
        if block.reason:
            continue
        program = [sys.executable, "-c", block.text] if block.language == "python" else ["bash", "-euo", "pipefail", "-c", block.text]
        done = subprocess.run(program, cwd=checkout, env=ENV, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{named(block)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


# What cannot be run is looked at: files, parameters, options and names exist.

def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[a-zA-Z]", word)]


def check_make(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.search(r"(?m)^\.PHONY: (.*)$", makefile)[1].split()
    for word in words:
        name, equals, _ = word.partition("=")
        assert f"$({name})" in makefile or f"if $({name})" in makefile if equals else word in targets, f"make {word}"


def check_papermill(words: list[str]) -> None:
    notebook = next(word for word in words if word.endswith(".ipynb"))
    known = papermill.inspect_notebook(str(ROOT / notebook))
    for flag, name in zip(words, words[1:]):
        assert flag != "-p" or name in known, f"{notebook} has no parameter {name}"


def check_snakemake(words: list[str]) -> None:
    assert (ROOT / words[words.index("--profile") + 1] / "config.yaml").is_file()
    known = set(re.findall(r"config\.get\(\"(\w+)\"\)", (ROOT / "Snakefile").read_text(encoding="utf-8")))
    given = {word.partition("=")[0] for word in words[words.index("--config") + 1:] if "=" in word and not word.startswith("-")}
    assert given and given <= known, given - known


def check_python(words: list[str]) -> None:
    if words[:1] == ["-m"] and words[1].startswith("xmic."):
        assert (ROOT / f"{words[1].replace('.', '/')}.py").is_file(), words[1]
        assert words[1] != "xmic.distributed" or words[2] in importlib.import_module("xmic.distributed").COMMANDS
    elif words[:1] == ["-m"]:
        assert find_spec(words[1]), words[1]
        check_files(words[2:])
    else:
        source = (ROOT / words[0]).read_text(encoding="utf-8")
        for option in options(words):
            assert f'"{option}"' in source, f"{words[0]} has no option {option}"


def check_files(words: list[str]) -> None:
    for word in words:
        assert "/" not in word or word.startswith("/") or any(ROOT.glob(word)), f"no file {word}"


def check_xmic(words: list[str]) -> None:
    name = [words[0]] if words and not words[0].startswith("-") else []
    done = subprocess.run(["xmic", *name, "--help"], env=ENV | dict(COLUMNS="200", NO_COLOR="1", TERM="dumb"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    known = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", done.stdout))
    assert set(options(words)) <= known, set(options(words)) - known


def check(words: list[str]) -> None:
    "One command of a block that is not run."
    program, rest = words[0], words[1:]
    if program.endswith("python"):
        check_python(rest)
    elif program == "torchrun":
        check_python(rest[rest.index("-m"):])
    elif program == "sbatch":
        check(shlex.split(rest[rest.index("--wrap") + 1]))
    elif program in ("nbdev_test", "nbdev_export", "nbdev_clean", "jupyter"):
        assert shutil.which(program, path=ENV["PATH"]), program
        check_files(rest)
    elif program not in ("source", "git", "pip", "ego4d", "cd"):  # not ours
        {"make": check_make, "papermill": check_papermill, "snakemake": check_snakemake, "xmic": check_xmic}[program](rest)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "sh"], ids=named)
def test_commands_exist_with_their_options(block):
    done = subprocess.run(["bash", "-n", "-c", block.text], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for words in commands(block.text) if block.reason else []:
        check(words)


def test_every_python_block_runs():
    assert not [named(b) for b in BLOCKS if b.language == "python" and b.reason]


def test_benchmarks_have_the_options_that_are_named():
    text = (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8")
    found = [words for line in re.findall(r"(?m)^python benchmarks/.*$", text) for words in commands(line)]
    assert found
    for words in found:
        check(words)


# What is said.

def test_the_figure_of_the_benchmarks_shows_their_numbers():
    said = subprocess.run([sys.executable, "-c", "import figure; print(figure.digest())"], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True)
    assert Image.open(ROOT / "reports/bench/faster.png").info["ratios"] == said.stdout.strip(), "run python benchmarks/figure.py"


def rows_below(page: str, heading: str) -> list[list[str]]:
    "The cells of the first table below a heading, without its head."
    text = (ROOT / page).read_text(encoding="utf-8").split(f"\n## {heading}", 1)[1].split("\n## ", 1)[0]
    first = next(part for part in text.split("\n\n") if part.startswith("| ") and re.search(r"(?m)^\|[-|]+\|$", part))
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in first.splitlines()[2:]]


def is_rounded(text: str, value: float) -> bool:
    "The text gives the value, rounded to the digits that it has."
    digits = len(text.partition(".")[2])
    return abs(float(text.replace(",", "")) - value) <= 0.5 * 10.0**-digits + 1e-9


def test_growth_is_what_its_file_says():
    measured = read_json(ROOT / "reports/bench/growth.json")["exponents"]
    rows = rows_below("benchmarks/README.md", "`growth.py`")
    said = [pair.split(", ") for row in rows for pair in row[2].split("; ")]
    assert len(said) == len(measured)
    for pair, line in zip(said, measured):
        assert is_rounded(pair[0], line["time"]) and is_rounded(pair[1], line["memory"]), (pair, line)
    left = iter(measured)
    for row in rows:
        lines = [next(left) for _ in row[2].split("; ")]
        seconds, mib = re.fullmatch(r"([\d.]+) s, (\d+) MiB", row[3]).groups()
        assert is_rounded(seconds, max(line["largest_cpu_seconds"] for line in lines)) and is_rounded(mib, max(line["largest_mib"] for line in lines)), row


def test_the_cost_of_all_tables_is_what_its_file_says():
    found = read_json(ROOT / "reports/bench/tables.json")
    for name, *cells in rows_below("benchmarks/README.md", "`tables.py`"):
        assert all(map(is_rounded, cells, found["tables"][name].values())), name
        assert len(cells) == len(found["tables"][name])
    text, methods = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8"), found["methods"]
    said = r"Vita-CLIP's four runs take (\d+) % and CoCoOp's four (\d+) %.*All (\d+) runs of X-MIC together take ([\d.]+) %"
    vita, cocoop, runs, xmic = re.search(said, text).groups()
    whole = sum(method["training, PFLOP"] for method in methods.values())
    for said, name in ((vita, "vita_clip"), (cocoop, "cocoop"), (xmic, "xmic")):
        assert is_rounded(said, 100 * methods[name]["training, PFLOP"] / whole), name
    assert int(runs) == methods["xmic"]["runs"]


def test_the_cost_of_a_long_list_is_what_its_file_says():
    found = {(one["encoder"], how): one[key] for one in read_json(ROOT / "reports/bench/open_vocabulary.json")["results"]
             for how, key in (("in memory", "again"), ("from disk", "from disk"))}
    rows = rows_below("benchmarks/README.md", "`open_vocabulary.py`")
    assert len(rows) == len(found)
    for encoder, how, few, many, ratio, processor in rows:
        one = found[encoder.strip("`"), how]
        for said, value in ((few, one["median_seconds"]["300"]), (many, one["median_seconds"]["20000"]), (ratio, one["ratio"]), (processor, one["cpu_ratio"])):
            assert is_rounded(said.removesuffix(" s"), value), (encoder, how)


def test_the_cost_of_extraction_is_what_the_kit_computes():
    text = (ROOT / "docs/cluster.md").read_text(encoding="utf-8")
    head = re.search(r"every frame: ([\d.]+) M rows a view \| 8 a second: ([\d.]+) M \| 2 a second: ([\d.]+) M", text).groups()
    rows = re.findall(r"(?m)^\| (?:CLIP )?((?:DINOv2 )?ViT-./1\d), D = (\d+) \| (\d+) \| (.*) \|$", text)
    assert len(rows) == 3
    for encoder, width, gflop, cells in rows:
        assert int(width) == VITS[encoder][-1] and is_rounded(gflop, vit_gflop(*VITS[encoder][:-1]))
        for cell, million, fps in zip(cells.split(" | "), head, (None, 8.0, 2.0)):
            cost, (gigabytes, hours) = extraction_costs(encoder, fps).loc["all"], re.fullmatch(r"([\d.]+) GB, ([\d.]+) h", cell).groups()
            assert is_rounded(million, cost["million rows"]) and is_rounded(gigabytes, cost["GB"]) and is_rounded(hours, cost["GPU hours"]), (encoder, fps)


def test_readme_is_one_screen_with_one_small_picture():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(pictures) == 1 and (ROOT / pictures[0]).stat().st_size < 150_000
    assert len(text.splitlines()) <= 45 and "make env " in text and "make test " in text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_links_lead_to_files_of_the_repository(page):
    text = re.sub(r"(?ms)^```.*?^```$", "", page.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        assert re.match(r"https?:", link) or (page.parent / link).exists(), link


def test_messages_in_troubleshooting_are_those_of_the_kit():
    places = [*library.modules(), ROOT / "Makefile", ROOT / "Snakefile", ROOT / "tests" / "run", ROOT / "tests" / "readme.py"]
    known = "".join(p.read_text(encoding="utf-8") for p in places)
    known = re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}|\"\s*f?\"|\s+", " ", known.replace('"\n', '"'))
    foreign = {"operator torchvision::nms does not exist", "No module named 'execnb.nbio'", "settings.ini"}
    rows = re.findall(r"(?m)^\| (`[^|]+`) \|", (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"))
    parts = [part.strip() for row in rows for message in re.findall(r"`([^`]+)`", row) if message not in foreign for part in message.split("…")]
    assert len(parts) > 20
    plain = lambda text: re.sub(r"[^a-z0-9:;,]+", " ", text.lower()).strip()
    assert not [part for part in parts if plain(part) not in plain(known)]


def test_fields_in_the_reproducibility_notes_exist():
    text = (ROOT / "docs" / "reproducibility.md").read_text(encoding="utf-8")
    table = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")]
    ours = {f.name for config in (TrainConfig, ExtractConfig) for f in fields(config)}
    named_there = {name for line in table for name in re.findall(r"`([a-z_]+)`", line[-1])}
    assert len(named_there) > 25 and named_there <= ours, named_there - ours


# The site.

def test_comments_behind_parameters_are_read():
    pytest.importorskip("sphinx")
    sys.path.insert(0, str(ROOT / "docs"))
    described = importlib.import_module("pages").described
    function = "def f(\n    x: int,  # (N,) frames\n    y: float = 0.5,  # seconds\n    *,\n    z=None,\n) -> str:  # a name\n    'Does.'\n    return 1  # no\n"
    assert described(function) == ([("x", "int", "(N,) frames"), ("y", "float", "seconds"), ("z", "", "")], "str", "a name")
    method = "    def g(self, a: int, b: int) -> 'Tensor':  # (B, C)\n        # above\n        return a\n"
    assert described(method) == ([("a", "int", ""), ("b", "int", "")], "'Tensor'", "(B, C)")
    data = "@dataclass\nclass C:\n    'One.'\n    lr: float = 1e-3  # rate\n    names: tuple[str, ...] = ()\n    _own: int = 0  # hidden\n"
    assert described(data) == ([("lr", "float", "rate"), ("names", "tuple[str, ...]", "")], "", "")
    made = "class D:\n    def __init__(self,\n                 n: int,  # how many\n                ):\n        self.n = n  # kept\n"
    assert described(made) == ([("n", "int", "how many")], "", "")


class Page(HTMLParser):
    "Links, anchors and text of a page."

    def __init__(self, path: Path):
        super().__init__()
        self.links, self.ids, self.words = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        self.links += [found[key] for key in ("href", "src") if found.get(key)]

    def handle_data(self, data):
        self.words.append(data)

    def text(self) -> str:
        return letters("".join(self.words))


def letters(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9]", "", text)


def broken_links(site: Path) -> list[str]:
    pages = {path: Page(path) for path in site.rglob("*.html")}
    broken = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link) or link == "#":
                continue
            place, _, anchor = unquote(link).partition("#")
            target = (path.parent / place.split("?")[0]).resolve() if place else path
            if not target.exists() or (anchor and target in pages and anchor not in pages[target].ids):
                broken.append(f"{path.relative_to(site)}: {link}")
    return broken


def missing_comments(site: Path) -> list[str]:
    "Comments of parameters of public functions that their page does not show."
    from pages import described, symbols
    missing = []
    for module, notebook in library.notebooks().items():
        code = library.source(module).read_text(encoding="utf-8")
        page = (site / notebook.relative_to(ROOT)).with_suffix(".html")
        shown, names = Page(page).text(), [name for _, name in symbols(code)]
        for node in ast.parse(code).body:
            if getattr(node, "name", None) in names:
                parameters, _, result = described(ast.get_source_segment(code, node))
                missing += [f"{module}.{node.name}: {said}" for *_, said in [*parameters, ("", "", result)] if letters(said) not in shown]
    return missing


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_its_links_lead_somewhere(tmp_path):
    pytest.importorskip("sphinx", reason="needs the extra docs: sphinx, myst-nb and furo")
    pytest.importorskip("myst_nb", reason="needs the extra docs: sphinx, myst-nb and furo")
    sys.path.insert(0, str(ROOT / "docs"))
    site = tmp_path / "site"
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-n", "-c", "docs", "-d", tmp_path / "doctrees", ".", site],
                          cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    assert len(list(site.rglob("*.html"))) > 60
    assert not broken_links(site)
    assert not missing_comments(site)
    assert "{{" not in "".join("".join(Page(page).words) for page in (site / "docs").glob("*.html"))
    notebooks = [p for p in (ROOT / "nbs").rglob("*.ipynb") if p.name != "index.ipynb" and not {"report_template", ".ipynb_checkpoints"} & set(p.parts)]
    assert {p.relative_to(ROOT).with_suffix(".html") for p in notebooks} <= {p.relative_to(site) for p in site.rglob("*.html")}
    tables = (site / "docs" / "tables.html").read_text(encoding="utf-8")
    assert all(f"table{n}.svg" in tables for n in range(1, 1 + len(list((ROOT / "reports" / "mini").glob("table*.svg")))))
