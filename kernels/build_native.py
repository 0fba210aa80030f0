"""Builds the C kernels when the package is installed. Without a compiler, or on another processor, there are none.

The library has a plain C ABI and no tie to Python's, so one wheel serves every Python and every PyTorch.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE = Path(__file__).parent / "bros_kernels"
LIBRARY = PACKAGE / "libbros.so"
# Never -ffast-math: loading such a library makes the whole process flush denormal numbers to zero, and breaks isnan.
# -ffp-contract=off: a product and a sum are rounded once where the source says so, and nowhere else.
FLAGS = "-O3 -std=gnu11 -shared -fPIC -pthread -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off"


class NativeBuildHook(BuildHookInterface):
    """Compiles `native/*.c` into the library beside the Python files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel, or an editable installation, is put together."""
        LIBRARY.unlink(missing_ok=True)
        if platform.machine() != "x86_64":
            self.app.display_warning("bros: the C kernels are for x86-64; PyTorch's are used")
            return
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if shutil.which(compiler[0]) is None:
            self.app.display_warning("bros: no C compiler (cc), so no C kernels; PyTorch's, which are slower, are used")
            return
        sources = sorted(str(path) for path in (PACKAGE / "native").glob("*.c"))
        built = subprocess.run(
            [*compiler, *FLAGS.split(), "-o", str(LIBRARY), *sources, "-lm"], capture_output=True, text=True
        )
        if built.returncode:
            self.app.display_warning(f"bros: the C kernels were not built:\n{built.stderr}")
            return
        build_data["artifacts"].append(str(LIBRARY.relative_to(self.root)))
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-linux_x86_64"
