"""What the tests share: where the licensed test data lies, and that it may be absent."""
import os
from pathlib import Path
from typing import Iterator

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[1]
for name in ("XMIC_ROOT", "XMIC_DATA", "XMIC_CACHE"):  # whoever runs the tests may have data of their own
    os.environ.pop(name, None)
settings.register_profile("patient", deadline=None)  # of hypothesis: no example fails for its time
settings.load_profile("patient")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    "The folder of real annotation files and clips (`XMIC_TEST_DATA`); the test is skipped where it is absent."
    folder = Path(os.environ.get("XMIC_TEST_DATA", ROOT / "../shared/data")).resolve()
    if not folder.is_dir():
        pytest.skip(f"needs the licensed test data: {folder} does not exist (set XMIC_TEST_DATA)")
    return folder


@pytest.fixture(scope="session")
def golden() -> Path:
    "The folder of reference inputs, weights, outputs and gradients."
    return ROOT / "tests" / "golden"


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    "The cache folder of the tests: nobody's own."
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XMIC_CACHE", str(folder))
        yield folder
