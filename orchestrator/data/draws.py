"""`orchestrator.keyed` under the name that the loader knows it by."""

from orchestrator.keyed import draws as draws
from orchestrator.keyed import philox as philox
