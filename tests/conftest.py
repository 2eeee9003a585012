"""Tests import the modules that lie in the root of the repository."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="how many training processes test_resume.py kills, at least")
