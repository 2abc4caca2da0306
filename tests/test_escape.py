"""Texts from files, in pages and tables: shown as they are, whatever is in them."""
import html
import re

import numpy as np
import pandas as pd
import pytest
import yaml

from world import register_tiny
from xmic.encoders import create_encoder
from xmic.experiments import Plan, introduction, profile
from xmic.files import latex_text, markdown_code, markdown_text
from xmic.recognizer import Recognition, Recognizer
from xmic.reporting import links, to_html, to_latex, to_markdown
from xmic.timeline import Timeline
from xmic.config import TrainConfig, build_method, resolve

pytestmark = pytest.mark.filterwarnings("ignore:.*RANDOM weights")
NASTY = ['a_b & 50% $x$ \\input{/etc/passwd}', "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a | b\n# c\n---\nlicense: mit", "`code` [a](javascript:x) *b*",
         "'; touch /tmp/x #", "~^#{}"]


def tabulated(name: str) -> pd.DataFrame:
    rows = [dict(table=1, source=name, method=name, variant=name, kind=name, column=name, mean=29.5, std=np.nan, low=26.0, high=33.0, seeds=1, wanted=1,
                 segments="600", chance=1.67)]
    return pd.DataFrame(rows)


def read_latex(text: str) -> str:
    "What LaTeX sets of an escaped text; fails for anything that is a command."
    signs = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", **{f"\\{sign}": sign for sign in "&%$#_{}"}}
    parts = re.findall(r"\\text\w+\{\}|\\[&%$#_{}]|[^\\&%$#_{}~^]", text)
    assert "".join(parts) == text
    return "".join(signs.get(part, part) for part in parts)


@pytest.mark.parametrize("name", NASTY)
def test_texts_read_back_as_they_were(name):
    flat = " ".join(name.split())
    assert read_latex(latex_text(name)) == flat
    assert html.unescape(re.sub(r"\\(.)", r"\1", markdown_text(name))) == flat and "\n" not in markdown_text(name)
    assert not re.search(r"(?<!\\)[`*_\[\]|~$<>]", markdown_text(name))
    code = markdown_code(name)
    fence = re.match("`+", code)[0]
    assert flat in code and fence not in code[len(fence):-len(fence)]


@pytest.mark.parametrize("name", NASTY)
def test_tables(name):
    table = tabulated(name)
    page, text, tex = to_html(table), to_markdown(table, name, name), to_latex(table, name, name)
    assert not re.search(r"<(script|img)", page) and html.escape(name) in page
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("|")}
    assert len(widths) == 1 and "<script" not in text and "<img" not in text and "\n# c" not in text and "\n---\n" not in text
    assert "\\input" not in tex and "$x$" not in tex
    caption = re.search(r"\\caption\{(.*)\}\n", tex)[1]
    assert read_latex(caption).startswith(" ".join(name.split()).rstrip("."))


@pytest.mark.parametrize("name", NASTY)
def test_links_to_runs(name):
    cells = tabulated(name).assign(runs=[[name]])
    assert not re.search(r"<(script|img)", links(cells, "runs", "reports"))


@pytest.mark.parametrize("name", NASTY)
def test_introductions(name):
    p = profile()
    changed = type(p)(**{**p.__dict__, "name": "paper", "data": f"/data/{name}", "note": name})
    for made in (changed, type(p)(**{**p.__dict__, "note": name})):
        text = introduction(Plan(made, (1,), 1, {}, {}))
        assert not re.search(r"\n# c|\n---\n", text) and not re.search(r"<(script|img)", re.sub(r"(`+).*?\1", "", text))


@pytest.mark.parametrize("name", NASTY)
def test_model_cards(tmp_path, name):
    encoder = create_encoder(register_tiny(), "random", "cpu")
    config = resolve(TrainConfig(encoder=register_tiny(), weights="random", frames=4, template=re.sub(r" \| |[{}]", "", name) + " {}", name=name))
    config.dataset = name
    measured = {"noun": dict(results={name: {"noun": {"top1": dict(value=50.0, low=40.0, high=60.0, count=10)}}}, versions={name: name, "torch": name})}
    recognizer = Recognizer(encoder, {"noun": build_method(config, encoder.dim, encoder.dim, 100.0)}, {"noun": config}, encoder, measured)
    recognizer.save_pretrained(tmp_path / "saved", license=name, name=name)
    card = (tmp_path / "saved/README.md").read_text()
    begin, header, body = re.split(r"(?m)^---$", card, maxsplit=2)
    data = yaml.safe_load(header)
    assert not begin and data["license"] == name and data["model-index"][0]["name"] == name
    assert {result["dataset"]["name"].split(",")[0] for result in data["model-index"][0]["results"]} == {name.split(",")[0]}
    plain = re.sub(r"(?ms)^```.*?^```|(`+)(?!`).*?(?<!`)\1(?!`)", "", body)
    assert not re.search(r"<(script|img)", plain) and "\n# c" not in body and "\n---\n" not in body and not re.search(r"(?<!\\)\]\(javascript", plain)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert len(rows) == 3 and len({len(re.findall(r"(?<!\\)\|", line)) for line in rows}) == 1
    code = re.search(r"(?s)```python\n(.*?)\n```", body)[1]
    called = {}
    exec(code.replace("from xmic.recognizer import Recognizer", ""), {"Recognizer": type("R", (), {
        "from_pretrained": staticmethod(lambda given: called.update(name=given) or type("P", (), {"predict": lambda *a, **k: None})())})})
    assert called == {"name": name}


@pytest.mark.parametrize("name", NASTY)
def test_timelines(tmp_path, name):
    table = pd.DataFrame(dict(name=[name, "b"], score=[60.0, 40.0], zero_shot=[50.0, 50.0]))
    answer = Recognition(table, table, 0.0, 2.0, [0], [name], [None], {"noun": name, "verb": "xmic"}, {"noun": table, "verb": table})
    Timeline(f"/videos/{name}", [answer]).to_html(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"<(script|img)", page) and page.count(html.escape(name)) >= 4


@pytest.mark.parametrize("name", NASTY)
def test_explorer(name):
    pytest.importorskip("ipywidgets")
    import torch
    from xmic.explorer import attention_html, map_html, neighbours_html, ranking, ranking_html
    table = ranking([name, "b"], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), name)
    near = pd.DataFrame(dict(name=[name], before=[0.5], after=[0.4]))
    square = torch.full((2, 2), 0.5)
    for page in (ranking_html(table, (name, name)), neighbours_html(name, near, 1.0), map_html(square, name, (name, name)), attention_html({}, [name], name),
                 attention_html({"spatial": square[None], "temporal": square}, [name, name], name)):
        assert not re.search(r"<(script|img)", page)
