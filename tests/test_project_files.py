"""What the files for contributors name exists: files, targets of make, permissions, versions of actions."""

import re

import pytest
import yaml
from distributions import ROOT

PAGES = [ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "CODE_OF_CONDUCT", "SECURITY")]
YAML = [*(ROOT / ".github").rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text("utf-8")) for path in (ROOT / ".github/workflows").glob("*.yml")}
TARGETS = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text("utf-8"), re.M)[1].split())


@pytest.mark.parametrize("path", [*PAGES, *YAML], ids=lambda path: path.name)
def test_what_is_named_exists(path):
    text = path.read_text("utf-8")
    named = re.findall(r"(?:`|run: )make ([a-z-]+)", text)
    assert set(named) <= TARGETS
    for link in re.findall(r"\]\(([^)]+)\)", text) if path.suffix == ".md" else []:
        assert link.startswith("https://") or (path.parent / link).is_file(), link
    if path.suffix != ".md":
        assert yaml.safe_load(text)


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_may_read_and_only_publishing_more(name):
    assert WORKFLOWS[name]["permissions"] == {"contents": "read"}
    more = {job: steps["permissions"] for job, steps in WORKFLOWS[name]["jobs"].items() if "permissions" in steps}
    publishing = {
        "docs": {"deploy": {"pages": "write", "id-token": "write"}},
        "release": {"publish": {"id-token": "write"}},
    }
    assert more == publishing.get(name, {})
    for job in WORKFLOWS[name]["jobs"].values():
        for step in job.get("steps", []):
            assert re.fullmatch(r"[a-z-]+/[a-z-]+@(v|release/v)[0-9]+", step.get("uses", "actions/checkout@v5"))


def test_forms_ask_for_what_the_commands_print():
    forms = {path.stem: path.read_text("utf-8") for path in (ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml")}
    assert all("`rfclip doctor`" in forms[name] for name in ("bug", "gpu-results", "idea"))
    assert "`make gpu`" in forms["gpu-results"] and "build/gpu/report.md" in forms["gpu-results"]
