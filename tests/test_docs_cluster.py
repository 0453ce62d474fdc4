"""docs/cluster.md names a test for each member and event of Node's cluster; all of them have to exist, and all tests be named."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "cluster"
TABLES = (ROOT / "docs" / "cluster.md").read_text().partition("## How Node's cluster compares")[2]
ROWS = [line for line in TABLES.splitlines() if re.match(r"\| (?!Node \|)", line)]
NAMED = sorted(set(re.findall(r"`(\w+\.py)::(test_\w+)`", TABLES)))

# Of what the table calls the same, there are tests from more than one side.
FILES = sorted(path.name for path in FOLDER.glob("test_conformance_*.py"))


def names_in(name):
    tree = ast.parse((FOLDER / name).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_page_is_read():
    """Otherwise an empty list of parameters would pass for a proof."""
    assert len(ROWS) > 70
    assert len(NAMED) > 100
    assert len(FILES) == 5


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_named_test_exists(file, name):
    assert name in names_in(file)


@pytest.mark.parametrize("row", ROWS)
def test_each_row_is_shown(row):
    assert "::test_" in row


@pytest.mark.parametrize("file", FILES)
def test_each_conformance_test_stands_in_the_table(file):
    """What is pinned and not written down is found by nobody."""
    assert names_in(file) - {name for named, name in NAMED if named == file} == set()
