"""Parameters as a command line and papermill give them: text that means a list, a number or nothing, and cells of parameters that have lost their tag."""
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import papermill
import pytest

from xmic.config import TrainConfig
from xmic.features import ExtractConfig
from xmic.files import DataError, check_parameters, notebook_settings, settings

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Some:
    name: str = "epic"
    maybe: str | None = "epic"
    words: list[str] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    yes: bool = False
    perhaps: bool | None = None
    count: int = 1
    rate: float | None = 1.0


@pytest.mark.parametrize("name, given, meant", [
    *(("words", text, ["full", "hand"]) for text in ("full,hand", "full, hand", "[full, hand]", '["full", "hand"]', "['full', 'hand']", "[ full,hand ]", ["full", "hand"])),
    ("words", "full", ["full"]), ("words", '["full"]', ["full"]), ("words", "[]", []), ("words", "", []), ("words", "[no, 1, on]", ["no", "1", "on"]), ("words", [1, "a"], ["1", "a"]),
    ("numbers", "0.9,0.98", [0.9, 0.98]), ("numbers", "[1, 1e-3]", [1.0, 0.001]), ("numbers", [1, 0.5], [1.0, 0.5]),
    ("places", '{"a": "b"}', {"a": "b"}), ("places", "{a: b, c: /d}", {"a": "b", "c": "/d"}), ("places", "{}", {}),
    ("yes", "true", True), ("yes", "False", False), ("perhaps", "false", False), ("perhaps", "null", None), ("perhaps", None, None),
    ("count", "12", 12), ("rate", "2", 2.0), ("rate", "1e-06", 1e-6), ("rate", "null", None), ("maybe", "null", None), ("rate", 3, 3.0),
    ("name", 2024, "2024"), ("name", 1.5, "1.5"), ("name", "null", "null"), ("name", "[a]", "[a]"), ("name", "true", "true")])
def test_texts_mean_what_the_field_is(name, given, meant):
    value = getattr(settings(Some, {name: given}), name)
    assert value == meant and type(value) is type(meant)


@pytest.mark.parametrize("name, given", [
    ("words", "[full"), ("words", "{a: b}"), ("words", "[[a]]"), ("words", 3), ("places", "a,b"), ("places", "[a]"), ("places", "{a: [b]}"), ("numbers", "a,b"),
    ("yes", "yes"), ("yes", "null"), ("yes", 1), ("count", "1.5"), ("count", 1.5), ("count", True), ("count", "null"), ("rate", "fast"), ("name", True), ("name", None), ("name", ["a"]),
    ("words", "[!!python/object/apply:os.getcwd []]"), ("count", "0x10")])
def test_what_the_field_is_not_is_refused_by_name(name, given):
    with pytest.raises(DataError, match=f"Some: {name}="): settings(Some, {name: given})


@pytest.mark.parametrize("views", ["hands", '["hands"]', "full,hands"])
def test_an_unknown_view_is_refused_before_anything_is_read(views, tmp_path, monkeypatch):
    from xmic import features
    monkeypatch.setattr(features, "create_encoder", lambda *a, **k: pytest.fail("an encoder was made"))
    with pytest.raises(DataError, match="neither 'full' nor 'hand'"):
        features.extract_dataset(settings(ExtractConfig, dict(dataset="csv", data_root=str(tmp_path), views=views)))


def cells_without_tags(name: str, given: dict) -> list[str]:
    notebook = nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4)
    notebook.metadata["papermill"] = {}
    for cell in notebook.cells: cell.metadata["tags"] = []
    return [c.source for c in papermill.parameterize.parameterize_notebook(notebook, given).cells if c.cell_type == "code"]


@pytest.mark.parametrize("given", [dict(dataset="ego4d", method="zero_shot"), dict(datset="ego4d")], ids=["known", "misspelt"])
def test_values_that_came_before_the_cell_of_parameters_are_refused(given):
    space: dict = {}
    with pytest.raises(DataError, match=f"values of {min(given)}.*tag `parameters`"):
        for source in cells_without_tags("train", given):
            if "prepare(" in source: notebook_settings(TrainConfig, space, space["before"])
            exec(source, space)


@pytest.mark.parametrize("name", ["tables/table1", "report", "clips", "explore", "mini_pretrain", "tutorials/your_method"])
def test_so_are_those_of_notebooks_without_a_config(name):
    first = dict(size="tiny") if name != "mini_pretrain" else dict(steps=3)
    ran: list[str] = [""]
    for source in cells_without_tags(name, first):
        ran.append(source)
        if "check_parameters(globals())" in source: break
    with pytest.raises(DataError, match=f"values of {min(first)} .*tag `parameters`"): check_parameters({"In": ran})
    cells = [c for c in nbformat.read(ROOT / "nbs" / f"{name}.ipynb", 4).cells if c.cell_type == "code"]
    place = next(i for i, c in enumerate(cells) if "parameters" in c.metadata.get("tags", []))
    sources = [c.source for c in cells]
    check_parameters({"In": ["", *sources[:place + 1], "# Parameters\n" + "\n".join(f"{k} = {v!r}" for k, v in first.items()) + "\n", *sources[place + 1:]]})
    check_parameters({"In": ["", *sources]})


@pytest.mark.slow
def test_papermill_is_stopped_by_it(tmp_path):
    notebook = nbformat.read(ROOT / "nbs" / "tables" / "table1.ipynb", 4)
    for cell in notebook.cells: cell.metadata["tags"] = []
    nbformat.write(notebook, tmp_path / "table1.ipynb")
    with pytest.raises(papermill.PapermillExecutionError, match="values of seeds came before the cell of parameters"):
        papermill.execute_notebook(tmp_path / "table1.ipynb", tmp_path / "out.ipynb", dict(seeds=2), progress_bar=False, cwd=str(ROOT))
