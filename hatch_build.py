"""Build the decoding kernel into the wheel, with a compiler from PyPI where the machine has none.

Where neither can be had the wheel is pure Python.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface  # pyright: ignore[reportMissingImports]


class KernelHook(BuildHookInterface):
    PLUGIN_NAME = "custom"

    def dependencies(self) -> list[str]:
        return self._builder().build_needs()

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        reason = self._builder().build_kernel()
        if reason is not None:
            self.app.display_warning(f"kernel not built: {reason}; images are decoded by wheels from PyPI")
            return
        build_data["artifacts"].append("orchestrator/data/native/kernel-*.so")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"

    def _builder(self) -> Any:
        source = Path(self.root) / "orchestrator" / "data" / "native" / "build.py"
        spec = importlib.util.spec_from_file_location("build_kernel", source)
        assert spec is not None
        assert spec.loader is not None
        build = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(build)
        return build
