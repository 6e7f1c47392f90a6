"""The worked example of CONTRIBUTING.md, through the sweep that holds every layer to the contract."""

import re
from functools import partial
from pathlib import Path

import pytest
import test_contract
from sweep import LAYERS

TEXT = re.search(r"```python\n(.*?)```", (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)[1]


@pytest.fixture
def example(monkeypatch):
    "The notebook run from top to bottom, its layer added to the sweep."
    made = {}
    exec(TEXT, made)
    monkeypatch.setitem(LAYERS, "example", (partial(made["FadingAverages"], d_hidden=4), 3e-4))
    return "example"


def test_the_example_is_short():
    assert len(TEXT.splitlines()) < 60


@pytest.mark.parametrize("law", ("layer_pieces_and_steps", "layer_times", "layer_dtypes", "initial_condition_layer"))
def test_the_example_keeps_the_contract(example, law):
    getattr(test_contract, f"test_{law}")(example)


def test_the_example_in_a_model(example):
    test_contract.test_model("1d", example)
