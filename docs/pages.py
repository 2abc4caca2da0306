"""What the site needs beyond Sphinx and MyST-NB: parameters from their comments, notebooks as pages, formulas, and the measured numbers."""
import ast
import inspect
import io
import json
import re
import textwrap
import tokenize
from pathlib import Path

from docutils import nodes
from docutils.utils import new_document
from docutils.utils.math import MathError, latex2mathml
from myst_parser.mocking import MockRSTParser
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).resolve().parents[1]
logger = logging.getLogger(__name__)


# Parameters are documented by the comment behind each.

def comments(source: str) -> dict[int, str]:
    "The comment of each line that ends in one."
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT and not t.line.lstrip().startswith("#")}


def colon(function: ast.FunctionDef, source: str) -> int:
    "The line in which the signature ends."
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.start[0] >= function.lineno and token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
            if token.string == ":" and not depth:
                return token.start[0]


def parameters(function: ast.FunctionDef, source: str) -> list[tuple[str, str, str]]:
    "Name, type and comment of each argument; a comment belongs to the last argument of its line."
    said, args = comments(source), [a for a in ast.walk(function.args) if isinstance(a, ast.arg)]
    args = sorted((a for a in args if a.arg not in ("self", "cls")), key=lambda a: (a.lineno, a.col_offset))
    ends = [b.lineno for b in args[1:]] + [colon(function, source)]
    return [(a.arg, ast.unparse(a.annotation) if a.annotation else "", " ".join(said[n] for n in range(a.lineno, end) if n in said))
            for a, end in zip(args, ends)]


def fields(tree: ast.ClassDef, source: str) -> list[tuple[str, str, str]]:
    "The same for the fields of a dataclass or named tuple."
    said = comments(source)
    return [(n.target.id, ast.unparse(n.annotation), " ".join(said[i] for i in range(n.lineno, n.end_lineno + 1) if i in said))
            for n in tree.body if isinstance(n, ast.AnnAssign) and not n.target.id.startswith("_")]


def described(source: str) -> tuple[list[tuple[str, str, str]], str, str]:
    "Parameters, type and comment of what is returned, of a function or class."
    source = textwrap.dedent(source)
    tree = ast.parse(source).body[0]
    if isinstance(tree, ast.ClassDef):
        made = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"]
        return parameters(made[0], source) if made else fields(tree, source), "", ""
    kind = ast.unparse(tree.returns) if tree.returns else ""
    return parameters(tree, source), kind, comments(source).get(colon(tree, source), "")


def as_rst(text: str) -> str:
    "Plain text with code in backticks, such as the docstrings are."
    parts = re.split(r"(`+[^`]+`+)", text)
    return "".join(f"``{p.strip('`')}``" if i % 2 else re.sub(r"([\\*_|])", r"\\\1", p) for i, p in enumerate(parts))


def describe(app, what, name, obj, options, lines):
    "Docstring, then parameters and result with their types."
    lines[:] = as_rst("\n".join(lines)).split("\n")
    try:
        found, kind, result = described(inspect.getsource(obj.fget if isinstance(obj, property) else obj))
    except (OSError, TypeError, SyntaxError):
        return
    lines.append("")
    for name, annotation, said in found:
        lines.append(f":param {name}: {as_rst(said)}")
        lines += [f":type {name}: {as_rst(annotation.strip(chr(39)))}"] * bool(annotation)
    if what != "class" and kind not in ("", "None"):
        lines += [f":returns: {as_rst(result)}"] * bool(result) + [f":rtype: {as_rst(kind.strip(chr(39)))}"]
    elif what != "class" and result:
        lines += ["", as_rst(result)]
    lines.append("")


def skip(app, what, name, obj, skipped, options):
    "Fields of named tuples stand among the parameters."
    return True if "Alias for field number" in (getattr(obj, "__doc__", None) or "") else None


# A library notebook becomes a page: each exported symbol gets its reference, with its code folded below.

def only_imports(code: str) -> bool:
    return all(isinstance(n, (ast.Import, ast.ImportFrom, ast.Try)) for n in ast.parse(code).body)


def symbols(code: str) -> list[tuple[str, str]]:
    "The public functions and classes of a cell."
    return [("class" if isinstance(n, ast.ClassDef) else "function", n.name) for n in ast.parse(code).body
            if isinstance(n, (ast.ClassDef, ast.FunctionDef)) and not n.name.startswith("_")]


def as_page(app, docname, source):
    "What nbdev's marks mean, applied to a notebook that is about to be read."
    if not docname.startswith("nbs/"):
        return
    notebook, cells, module = json.loads(source[0]), [], None
    fold = docname.endswith("/method")  # a page of pictures
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        marks = re.findall(r"(?m)^#\|\s*(\w+) ?(.*)$", text)
        named = dict(marks)
        module = named.get("default_exp", module)
        if cell["cell_type"] == "raw" or "hide" in named or "default_exp" in named:
            continue
        cell["source"] = re.sub(r"(?m)^(#\||# papermill_description).*\n?", "", text)
        if cell["cell_type"] == "code":
            cell["source"] = re.sub(r"\A(?=%%)", "# ", cell["source"])  # what follows is Python, and shown as such
        if "export" in named and only_imports(cell["source"]):
            continue
        if "export" in named and module:
            found = symbols(cell["source"])
            cell["metadata"]["tags"] = ["hide-input"]
            if found:
                lines = [f".. auto{kind}:: xmic.{module}.{name}" for kind, name in found]
                cells.append(dict(cell_type="markdown", id=f"reference-{len(cells)}", metadata={}, source="```{reference}\n" + "\n\n".join(lines) + "\n```"))
        if fold and cell["cell_type"] == "code":
            cell["metadata"]["tags"] = ["hide-input"]
        cells.append(cell)
    notebook["cells"] = cells
    source[0] = json.dumps(notebook)


class Reference(SphinxDirective):
    "autodoc in a notebook. (`eval-rst` would read ten thousand empty lines for each cell before it.)"

    has_content = True

    def run(self) -> list[nodes.Node]:
        part = new_document(self.state.document["source"], self.state.document.settings)
        part.reporter = self.state.document.reporter
        MockRSTParser().parse("\n".join(self.content), part)
        for node in part:
            if node["names"]:
                self.state.document.note_explicit_target(node, node)
        return part.children


def beside_readme(app, path, docname, content):
    "The README's links start at the root."
    if Path(path).name == "README.md":
        content[0] = re.sub(r"\]\((?!https?:|#|/)", "](../", content[0])


def by_module(app, docname, source):
    "A link to a module leads to the notebook that it is written from, whatever that one's number."
    def notebook(link: re.Match) -> str:
        *folders, name = link[2].split("/")
        found = sorted((ROOT / "nbs").glob("/".join([*(f"[0-9]*_{folder}" for folder in folders), f"[0-9]*_{name}.ipynb"])))
        return f"]({link[1]}{found[0].relative_to(ROOT).as_posix()})" if found else link[0]
    source[0] = re.sub(r"\]\(((?:\.\./)*)xmic/([\w/]+)\.py\)", notebook, source[0])


# Formulas as MathML, which every browser shows by itself.

def formula(self, node, block: bool):
    text = re.sub(r"\\[bB]igg?[lr]?(?![a-zA-Z])", "", node.astext()).replace(r"\dots", r"\ldots")
    try:
        self.body.append(latex2mathml.tex2mathml(text, as_block=block))
    except MathError as error:
        logger.warning("formula %r: %s", node.astext(), error, location=node)
    raise nodes.SkipNode


# Measured numbers, read when the site is built.

def digits(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def flat(value: dict, before: str = "") -> dict:
    found = {}
    for key, entry in value.items():
        name = f"{before}{key}".replace("_", " ")
        if isinstance(entry, dict):
            found |= flat(entry, f"{name} ")
        elif not isinstance(entry, list):
            found[name] = entry
    return found


def as_table(rows: list[dict]) -> str:
    rows = [flat(row) for row in rows]
    heads = list(dict.fromkeys(key for row in rows for key in row))
    lines = [heads, ["---"] * len(heads), *([digits(row.get(h, "")) for h in heads] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def records(value, name: str = "") -> list[tuple[str, str]]:
    "Every list of records in a JSON file: its name, and the same as a table."
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return [(name, as_table(value))]
    if isinstance(value, dict):
        return [found for key, entry in value.items() for found in records(entry, f"{name}_{key}".strip("_"))]
    return []


def made_with(found: dict) -> str:
    "Command, hardware, versions."
    hardware, versions = found.get("hardware", {}), found.get("versions", {})
    machine = [hardware.get("gpu") or hardware.get("cpu"), f"{hardware['cores']} cores" if "cores" in hardware else None,
               f"{hardware['memory_gib']} GiB" if "memory_gib" in hardware else None,
               f"on {versions['device']}" if "device" in versions else None, f"{versions['threads']} thread{'s' * (versions['threads'] != 1)}" if "threads" in versions else None]
    known = {**hardware, **versions, **found}
    software = [f"{name} {known[name]}" for name in ("python", "torch", "open_clip") if name in known]
    return "; ".join(filter(None, [*machine, *software, known.get("date", "")[:10] or None]))


def injected(kinds: list[dict]) -> str:
    "The harness's counts, a line for each thing that met faults."
    rows = []
    for place in dict.fromkeys(kind["met_by"] for kind in kinds):
        own = [kind for kind in kinds if kind["met_by"] == place]
        names = [f"{kind['fault']} ({kind['injected']})" if kind["injected"] > 1 else kind["fault"] for kind in own if kind["injected"] + kind["skipped"]]
        rows.append({"met by": place, "faults": "; ".join(names)} | {n: sum(kind[n] for kind in own) for n in ("injected", "survived", "said", "lost", "compared")})
    return as_table(rows)


def sentences(kinds: list[dict]) -> str:
    "One refusal for each thing that met faults."
    found = {kind["met_by"]: kind for kind in reversed(kinds) if kind["said"]}
    return "\n".join(f"- {kind['fault']}: `{kind['for_example']}`" for kind in reversed(found.values()))


def clones(lines: list[dict]) -> str:
    "What is the same in each clone as in the first."
    same = lambda line, kind: f"{line[kind]['same']} of {line[kind]['count']}" if kind in line else ""
    return as_table([{"jobs at a time": line["cores"], "seconds": line["seconds"]} | {f"same {kind}": same(line, kind) for kind in (
        "features", "weights", "metrics", "tables")} for line in lines])


def measurements(folder: Path) -> dict:
    "Each JSON file by its name, with `made_with`; `<name>_<list>` for its lists of records, however deep; and `all_benchmarks`, a section for each file."
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    sections, lists = [], {}
    for name, value in found.items():
        shown = {k: v for k, v in value.items() if k not in ("hardware", "versions", "command", "date", "load_average")}
        command = f"\n\n```\n{value['command']}\n```" if "command" in value else ""
        single = as_table([dict(what=k, value=v) for k, v in flat(shown).items()])
        sections.append("\n\n".join([f"### {name}.json", made_with(value) + command, single, *(f"*{key.replace('_', ' ')}*\n\n{table}" for key, table in records(shown))]))
        lists |= {f"{name}_{key}": table for key, table in records(shown)}
        for entry in [value, *value.values()]:
            if isinstance(entry, dict) and ("versions" in entry or "hardware" in entry):
                entry["made_with"] = f"*{made_with(entry)}*"
    kinds = found["faults"]["faults"]["kinds"]
    lists |= dict(faults_injected=injected(kinds), faults_said=sentences(kinds), clones_compared=clones(found["determinism"]["clones"]))
    return {**found, **lists, "all_benchmarks": "\n\n".join(sections)}


# Lists of notebooks, by what their first cells say; and the committed tables.

def opening(notebook: Path) -> tuple[str, str]:
    "Title, and the line below it."
    first = next("".join(c["source"]) for c in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if c["cell_type"] == "markdown")
    said = re.search(r"(?m)^> (.+)$", first)
    return re.search(r"(?m)^# (.+)$", first)[1], said[1] if said else ""


def contents(notebooks: list[Path]) -> str:
    "A table of notebooks, and the same for the site's menu."
    places = {path: "../" + path.relative_to(ROOT).as_posix() for path in notebooks}
    rows = ["| [{}]({}) | {} |".format(opening(path)[0], place, opening(path)[1]) for path, place in places.items()]
    menu = ["", "```{toctree}", ":hidden:", "", *(place.removesuffix(".ipynb") for place in places.values()), "```"]
    return "\n".join(["| notebook | what it holds |", "|---|---|", *rows, *menu]) if rows else ""


def committed_tables(folder: Path) -> str:
    "Each table of a report: its title, numbers, figure and notebook."
    sections = []
    for path in sorted(folder.glob("table*.md")):
        notebook, text = f"nbs/tables/{path.stem}.ipynb", re.sub(r"(?m)^#+ (.+)$", r"\1.", path.read_text(encoding="utf-8"))
        title = opening(ROOT / notebook)[0]
        figure = f"../{path.relative_to(ROOT).with_suffix('.svg').as_posix()}"
        sections.append(f"## {title}\n\n{text}\n\n![{title}, as a figure]({figure})\n\n[How it is made](../{notebook})")
    return "\n\n".join(sections)


def home(app, error):
    "The site's root leads to its first page."
    if not error and app.builder.name == "html":
        (Path(app.outdir) / "index.html").write_text('<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="0; url=docs/index.html">'
                                                     '<title>xmic</title><a href="docs/index.html">xmic</a>\n', encoding="utf-8")


def setup(app):
    app.add_directive("reference", Reference)
    app.connect("source-read", as_page)
    app.connect("source-read", by_module)
    app.connect("include-read", beside_readme)
    app.connect("autodoc-process-docstring", describe)
    app.connect("autodoc-skip-member", skip)
    app.connect("build-finished", home)
    app.add_html_math_renderer("mathml", (lambda self, node: formula(self, node, False), None), (lambda self, node: formula(self, node, True), None))
    return dict(parallel_read_safe=True, parallel_write_safe=True)
