"""Files that others' programs read: the citation, the issue forms, what pip installs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import yaml

import dpo
from dpo.methods import METHODS

ROOT = Path(__file__).parents[1]


def setup_arguments() -> dict:
    """The literal arguments of setup() in setup.py."""
    (call,) = [
        node.value for node in ast.parse((ROOT / "setup.py").read_text("utf-8")).body if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Call)
    ]  # fmt: skip
    found = {}
    for argument in call.keywords:
        try:
            found[argument.arg] = ast.literal_eval(argument.value)
        except ValueError:  # a call, such as that which reads README
            continue
    return found


def test_the_citation_is_of_this_version_and_of_the_papers():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert cited["version"] == dpo.__version__ == setup_arguments()["version"]
    assert f"version = {{{cited['version']}}}" in (ROOT / "README.md").read_text("utf-8")
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.findall(r"^## (\d\S*)", changes, re.MULTILINE)[0] == cited["version"]
    assert cited["license"] == setup_arguments()["license"]
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()
    papers = {
        (paper.title, f"https://arxiv.org/abs/{paper.arxiv}")
        for name in ("dpo", "dde")
        for paper in METHODS[name].papers
    }
    assert {(one["title"], one["url"]) for one in cited["references"]} == papers
    assert set(setup_arguments()["project_urls"].values()) == {address for _, address in papers}


def test_issue_forms_have_what_a_form_needs():
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("[!c]*.yml"))
    assert len(forms) == 3
    for form in forms:
        read = yaml.safe_load(form.read_text("utf-8"))
        assert {"name", "description", "body"} <= read.keys()
        assert [item["type"] for item in read["body"] if item["type"] not in ("textarea", "markdown")] == []
        ids = [item["id"] for item in read["body"] if item["type"] == "textarea"]
        assert len(ids) == len(set(ids)) > 1


def test_nothing_is_installed_that_only_an_extra_needs():
    given = setup_arguments()
    asked = [need for extra, needs in given["extras_require"].items() if extra != "test" for need in needs]
    assert [
        need for need in given["install_requires"] if need.split(">=")[0] in {one.split(">=")[0] for one in asked}
    ] == []
    assert set(given["extras_require"]["bitsandbytes"]) <= set(given["extras_require"]["test"])
