"""The worked examples in docstrings are run."""
import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "ma_ppo", "termination"])
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0


def test_line_counts_of_the_readme():
    import ast
    import re
    from conftest import ROOT
    rows = re.findall(r"\| \[(\w+)\]\((\w+\.py)\) \| (\d+) \|", (ROOT / "README.md").read_text())
    assert len(rows) == 12
    for name, script, lines in rows:
        node = next(n for n in ast.parse((ROOT / script).read_text()).body if getattr(n, "name", None) == name)
        assert node.end_lineno - node.lineno + 1 == int(lines), f"{name} has {node.end_lineno - node.lineno + 1} lines"
