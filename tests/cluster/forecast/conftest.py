"""Helpers beside the tests of this folder and of the one for Kubernetes."""

import sys
from pathlib import Path

for folder in (Path(__file__).parent, Path(__file__).parents[1] / "kubernetes"):
    sys.path.insert(0, str(folder))
