"""Who may import whom: dependencies run one way, router -> protocol, shard -> kernels, kernels -> nobody."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGES = {
    "bros_router": REPOSITORY / "router" / "bros_router",
    "bros_shard": REPOSITORY / "shard" / "bros_shard",
    "bros_kernels": REPOSITORY / "kernels" / "bros_kernels",
}
#: The modules of the shard that load no torch: all that the router may know of it.
TORCH_FREE = {
    f"bros_shard.{module}"
    for module in ("protocol", "block_layout", "options", "exit_codes", "lifeline", "grammar_compiler")
}


def imports_of(package: str) -> set[str]:
    """Every module of ours that a file of the package imports."""
    found = set()
    for path in PACKAGES[package].rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                assert node.level == 0, f"{path.name} imports relatively"
                found.add(node.module)
    return {name for name in found if name.split(".")[0] in PACKAGES and name.split(".")[0] != package}


def test_dependencies_run_one_way():
    assert imports_of("bros_kernels") == set()
    assert {name.split(".")[0] for name in imports_of("bros_shard")} == {"bros_kernels"}
    assert imports_of("bros_router") <= TORCH_FREE


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.mark.parametrize("module", [*sorted(TORCH_FREE), "bros_router.server"])
def test_module_loads_no_torch(module):
    assert not {"torch", "transformers"} & loaded_by(f"import {module}")


def test_the_router_renders_no_template_and_compiles_no_grammar_itself():
    """Hostile ones belong into the helper processes."""
    assert not {"jinja2", "jsonschema", "llguidance"} & loaded_by("import bros_router.server")


def test_scheduling_core_is_pure():
    """No sockets, no event loop, no logging, no torch: the simulator runs these very modules."""
    impure = {"zmq", "aiohttp", "structlog", "logging", "torch", "prometheus_client"}
    core = "import bros_router.scheduling.scheduler, bros_router.scheduling.policies, bros_router.kv.kv_manager"
    assert not impure & (loaded_by(core) - loaded_by("import msgspec, enum, typing"))
