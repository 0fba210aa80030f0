"""Builds the C kernels when the package is installed. Without a compiler, or on another processor, there are none.

There is a library for each set of instructions, made of the same sources. They have a plain C ABI and no tie to
Python's, so one wheel serves every Python and every PyTorch.
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
#: What each library is compiled with; `bros_kernels.native` chooses among them.
INSTRUCTION_SETS = {"avx512": (), "avx2": ("-DBROS_AVX2",)}
# Never -ffast-math: loading such a library makes the whole process flush denormal numbers to zero, and breaks isnan.
# -ffp-contract=off: a product and a sum are rounded once where the source says so, and nowhere else.
FLAGS = "-O3 -std=gnu11 -shared -fPIC -pthread -fvisibility=hidden -fno-math-errno -fno-trapping-math -ffp-contract=off"


class NativeBuildHook(BuildHookInterface):
    """Compiles `native/*.c` into the library beside the Python files."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Called before a wheel, or an editable installation, is put together."""
        libraries = {name: PACKAGE / f"libbros-{name}.so" for name in INSTRUCTION_SETS}
        for library in libraries.values():
            library.unlink(missing_ok=True)
        if platform.machine() != "x86_64":
            self.app.display_warning("bros: the C kernels are for x86-64; PyTorch's are used")
            return
        compiler = shlex.split(os.environ.get("CC", "cc"))
        if shutil.which(compiler[0]) is None:
            self.app.display_warning("bros: no C compiler (cc), so no C kernels; PyTorch's, which are slower, are used")
            return
        sources = sorted(str(path) for path in (PACKAGE / "native").glob("*.c"))
        # Beside each other: each takes seconds.
        compilations = {
            library: subprocess.Popen(
                [*compiler, *FLAGS.split(), *INSTRUCTION_SETS[name], "-o", str(library), *sources, "-lm"],
                stderr=subprocess.PIPE,
                text=True,
            )
            for name, library in libraries.items()
        }
        errors = {library: compilation.communicate()[1] for library, compilation in compilations.items()}
        for library, compilation in compilations.items():
            if compilation.returncode:
                self.app.display_warning(f"bros: {library.name} was not built:\n{errors[library]}")
                continue
            build_data["artifacts"].append(str(library.relative_to(self.root)))
            build_data["pure_python"] = False
            build_data["tag"] = "py3-none-linux_x86_64"
