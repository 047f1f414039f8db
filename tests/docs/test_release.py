"""What a release states about itself agrees, and the workflow runs what CI runs."""

import re
from pathlib import Path

import pytest

import attnpool_kernels

ROOT = Path(__file__).parents[2]


def test_one_version_everywhere():
    newest = re.search(r"^## \[(\d[^]]*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[1]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    assert newest == cited == attnpool_kernels.__version__


def test_the_workflow_runs_what_ci_runs():
    yaml = pytest.importorskip("yaml")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert ".ci/run" in [step.get("run") for step in jobs["run"]["steps"]]
    oldest = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert oldest in jobs["python"]["strategy"]["matrix"]["python"]
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["cff-version"] == "1.2.0"
