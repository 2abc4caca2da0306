"""Texts from files, in pages and tables: shown as they are, whatever is in them."""
import html
import re
from types import SimpleNamespace
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import matplotlib.text
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from world import register_tiny
from xmic import analysis, inspection, reporting
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


# Figures

PRICES = ("$x$", r"a $\frac$ and $5", "$5 and $6", r"\$a$", "plain")


def shown(fig) -> list[str]:
    "What a figure says, as it is drawn; fails where a text is set as a formula."
    fig.canvas.draw()
    texts = [(text._preprocess_math(text.get_text())) for text in fig.findobj(matplotlib.text.Text) if text.get_text() and text.get_visible()]
    assert not [text for text, formula in texts if formula]
    plt.close(fig)
    return [text for text, _ in texts]


def drawn(name: str) -> dict:
    "Figures that show a name, by the function that draws them."
    both = dict(source=name, dataset=name, kind=name, method=name, run="a", low=10.0, high=90.0)
    table = pd.DataFrame([dict(both, measure="top1", group=name, value=50.0, count=9)])
    predictions = pd.DataFrame([dict(both, confidence=50.0 + i, right=bool(i % 2), classes=3) for i in range(9)])
    differences = pd.DataFrame([dict(both, column=name, row=name, other=name, difference=1.0, verdict="higher")])
    scores = pd.DataFrame([dict(both, variant=name, column="epic", value=50.0)])
    lines = pd.DataFrame(dict(label=[name, "b"], predicted=["b", name], dataset=name, kind=name))
    pairs = pd.DataFrame(dict(label=[name], predicted=["b"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(analysis, "_confusions", lambda *_: (pairs, lines))
        confusions = analysis.plot_confusions("run")
    look = SimpleNamespace(degrees=torch.rand(4, 2), classes=SimpleNamespace(names=(name, "b")), attention={"spatial": torch.full((1, 1, 2, 2), 0.5), "temporal": torch.full((1, 3, 3), 1 / 3)},
                           views=("full", "hand"), labels=[0], segments=pd.DataFrame(dict(video_path=["nowhere.mp4"])),
                           best=lambda row: pd.DataFrame(dict(name=[name, "b"], share=[60.0, 40.0], right=[True, False])))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inspection, "hand_boxes", lambda config: None)
        answers = inspection.plot_answers(look, look, [0], None, (name, name))
    top = dict(top1=dict(value=50.0, low=40.0, high=60.0, count=9))
    return dict(accuracies=analysis.plot_accuracies(table), reliability=analysis.plot_reliability(predictions), differences=analysis.plot_differences(differences),
                confusions=confusions, table=reporting.plot_table(scores), degrees=inspection.plot_degrees({name: look}), attention=inspection.plot_attention({name: look}),
                answers=answers, run=reporting.plot_accuracies(SimpleNamespace(metrics=dict(results={name: {"noun": top}}))))


@pytest.mark.parametrize("name", PRICES)
def test_names_in_figures_are_no_formulas(name):
    for what, fig in drawn(name).items():
        assert any(name in text for text in shown(fig)), what


@pytest.mark.parametrize("name", NASTY)
def test_subtitles_and_tiers(tmp_path, name):
    table = pd.DataFrame(dict(name=[name, "b"], score=[60.0, 40.0], zero_shot=[50.0, 50.0]))
    line = Timeline(f"/videos/{name}", [Recognition(table, table, 0.0, 2.0, [0], [name], [None], {}, {"noun": table, "verb": table})])
    for write, ending in ((line.to_elan, "eaf"), (line.to_srt, "srt"), (line.to_csv, "csv")): write(tmp_path / f"x.{ending}")
    assert [one.text for one in ElementTree.parse(tmp_path / "x.eaf").iter("ANNOTATION_VALUE")] == [" ".join(name.split())] * 2
    assert not re.search("[<>]", (tmp_path / "x.srt").read_text().replace(" --> ", "")) and set(pd.read_csv(tmp_path / "x.csv").name[:2]) == {name, "b"}
