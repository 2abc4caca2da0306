"""The project is described in pyproject.toml. This adds the printed numbers, data/paper, to the wheel."""
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithPrinted(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # a clone has data/paper itself
            shutil.copytree("data/paper", Path(self.build_lib, "xmic/_paper"), ignore=lambda _, names: [n for n in names if not n.endswith(".csv")],
                            dirs_exist_ok=True)


setup(cmdclass={"build_py": BuildWithPrinted})
