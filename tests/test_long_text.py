"""A long text on the command line or in a setting is a list of names, or a path that is not there: never a system error."""
import warnings

import pytest
from typer.testing import CliRunner

from world import register_tiny
from xmic.checks import check_data
from xmic.cli import _names, app
from xmic.encoders import create_encoder
from xmic.features import ExtractConfig, extract_dataset
from xmic.files import DataError
from xmic.lavila import convert_checkpoint
from xmic.recognizer import Recognizer
from xmic.segments import read_classes, read_segments

LONG = ",".join(f"kitchen object {i}" for i in range(1000))


def test_a_long_list_of_names_is_a_list_of_names():
    for text in (LONG, LONG[:253], "a" * 300 + ",b"):
        assert _names(text, "noun").names == tuple(text.split(","))
    with pytest.raises(DataError, match="no such file"): _names("a" * 5000, "noun")


@pytest.mark.parametrize("options", [
    [LONG, "--encoder", "TINY", "--nouns", "a,b"], ["here.mp4", "--encoder", "TINY", "--nouns", "a,b", "--weights", LONG], ["here.mp4", "--encoder", "TINY", "--nouns", "a,b", "--boxes", LONG],
    ["here.mp4", "-m", LONG, "--nouns", "a,b"], ["here.mp4", "--encoder", "TINY", "--nouns", "x" * 3000], ["here.mp4", "--encoder", "TINY", "--verbs", "x" * 3000]],
    ids=["video", "weights", "boxes", "model", "nouns", "verbs"])
def test_on_the_command_line_it_is_one_error(tmp_path, options):
    register_tiny()
    (tmp_path / "here.mp4").touch()
    options = [str(tmp_path / o) if o == "here.mp4" else register_tiny() if o == "TINY" else o for o in options]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = CliRunner().invoke(app, ["predict", *options])
    assert done.exit_code and isinstance(done.exception, (DataError, SystemExit)), repr(done.exception)


@pytest.mark.parametrize("call", [
    lambda: create_encoder(register_tiny(), LONG), lambda: create_encoder(LONG), lambda: Recognizer.from_pretrained(LONG), lambda: read_segments("csv", LONG, "test"),
    lambda: read_classes("csv", LONG, "noun"), lambda: read_segments(LONG, ".", "test"), lambda: check_data("csv", LONG), lambda: check_data("weights", LONG), lambda: convert_checkpoint(LONG, None),
    lambda: extract_dataset(ExtractConfig(dataset="csv", data_root=LONG)), lambda: extract_dataset(ExtractConfig(dataset="epic", data_root=LONG, boxes=LONG))])
def test_in_python_it_is_a_data_error(call):
    with pytest.raises(DataError): call()
