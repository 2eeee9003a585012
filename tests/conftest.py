"""Tests import the modules that lie in the root of the repository, and compute with one thread."""

import os
import pathlib
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are tiny: a second thread costs more than it saves
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="how many training processes test_resume.py kills, at least")
    text = "how many wrong values test_untrusted.py puts in each place of a checkpoint"
    parser.addoption("--forgeries", type=int, default=0, help=text)


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "cuda" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
