"""docs/http.md names a test or a wire file for each requirement; all of them have to exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "http.md").read_text()
ROWS = [line for line in PAGE.partition("## Fuzzed")[0].splitlines() if re.match(r"\| (?!§ |what )", line)]
TESTS = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", PAGE)))
FILES = sorted(set(re.findall(r"`((?:accept|refuse)/\w+)`", PAGE)))


def test_page_is_read():
    """Otherwise an empty list of parameters would pass for a proof."""
    assert len(ROWS) > 100
    assert len(TESTS) > 50
    assert len(FILES) > 100


@pytest.mark.parametrize(("file", "name"), TESTS)
def test_named_test_exists(file, name):
    tree = ast.parse((ROOT / file).read_text())

    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("name", FILES)
def test_named_wire_file_exists(name):
    assert (ROOT / "tests" / "corpus" / f"{name}.http").is_file()


@pytest.mark.parametrize("row", ROWS)
def test_each_requirement_is_shown_or_is_the_applications(row):
    assert "::test_" in row or re.search(r"`(accept|refuse)/", row) or "*application*" in row.lower()
