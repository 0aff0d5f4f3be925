import pytest

from tests.processing.tiny import write_dense_model, write_model


@pytest.fixture(scope="package")
def model_directory(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("evaluated") / "model")


@pytest.fixture(scope="package")
def dense_directory(tmp_path_factory):
    return write_dense_model(tmp_path_factory.mktemp("evaluated_dense") / "dense")


@pytest.fixture(scope="package")
def loaded(model_directory):
    """(model, processor) of a tiny two-branch model."""
    from metis_home.training.loading import load_model, load_processor

    return load_model(str(model_directory), device="cpu").eval(), load_processor(str(model_directory))
