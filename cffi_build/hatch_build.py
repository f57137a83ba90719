# hatch_build.py: the hook through which `pip install` builds the extension and the guests.
"""Hatchling's custom build hook. Everything it does is in build.py beside it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NativeBuildHook(BuildHookInterface):  # type: ignore[misc, type-arg, unused-ignore]
    """Builds before the wheel is packed, and marks the wheel as this Python's and this machine's."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called by hatchling before it collects the files."""
        sys.path.insert(0, str(Path(self.root) / "cffi_build"))
        import build  # type: ignore[import-not-found, unused-ignore]

        if self.target_name == "wheel":
            build.main()
            build_data["pure_python"] = False
            build_data["infer_tag"] = True
