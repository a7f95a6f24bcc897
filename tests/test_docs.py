"""The worked examples in docstrings are run."""
import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["sft", "reward", "ppo", "ma_ppo", "termination"])
def test_doctests(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0 and result.failed == 0
