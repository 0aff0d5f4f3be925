"""Fixtures of the model tests."""

import pytest
import torch

from metis_home import Branch
from tests.model.pico import dense_twin, pico_model


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(17)


@pytest.fixture(scope="session")
def model():
    """A tiny two-branch model; not to be changed."""
    return pico_model()


@pytest.fixture(scope="session")
def twins(model):
    """The dense twins of its two branches; not to be changed."""
    return [dense_twin(model, branch) for branch in Branch]
