"""What all tests may ask for: bundles that many only read, each written and loaded once a test run, and patience.

A test that changes a bundle copies it."""

import os
from collections.abc import Callable

import pytest
import torch
import waiting
from tiny_bundle import write_tiny_bundle

from fairref.bundle.loading import load_bundle


def pytest_configure(config: pytest.Config) -> None:
    """Workers that share the cores take one thread each, and so do the processes that they start."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ.setdefault("OMP_NUM_THREADS", "1")))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The tiny bundle's folder, without judges of faces."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="session")
def loaded_tiny(tiny_folder):
    """The same, loaded."""
    return load_bundle(tiny_folder)


@pytest.fixture(scope="session")
def tiny_faces_folder(tmp_path_factory):
    """The tiny bundle's folder, with all judges."""
    return write_tiny_bundle(tmp_path_factory.mktemp("tiny-faces") / "bundle", faces=True)


@pytest.fixture(scope="session")
def loaded_tiny_faces(tiny_faces_folder):
    """The same, loaded."""
    return load_bundle(tiny_faces_folder)


@pytest.fixture(scope="session")
def loaded_emoji():
    """The committed small bundle."""
    return load_bundle("weights/emoji")


@pytest.fixture(scope="session")
def patience() -> Callable[[float], float]:
    """Seconds on two quiet cores -> the seconds that the same takes on this machine, measured once."""
    waiting.slowness()
    return waiting.patience
