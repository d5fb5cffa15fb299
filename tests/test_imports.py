"""The import graph: layers look downwards only, data never touches JAX, and the command line starts quickly.

The graph is read from the source with `ast`, imports inside functions included: a lazy import can't hide a cycle.
"""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "ddt_jax"

# Top to bottom. Units on one line stand side by side: they may not import each other, except on the last line.
LAYERS = [
    {"cli"},
    {"cli_checkpoints", "cli_scaling"},
    {"fitting", "reporting", "sweeping"},
    {"exchange", "inspection", "judging", "ledger", "planning", "replaying", "tokenize"},
    {"planning_answers"},
    {"drawings", "generating"},
    {"speaking"},
    {"experiment"},
    {"looking", "monitoring"},
    {"scaling", "evaluation", "interop"},
    {"training"},
    {"multimodal", "tokenizers"},
    {"data"},
    {"diffusion"},
    {"nn"},
    {"mesh", "hosts", "peers", "io", "settings", "config", "errors", "host_memory"},
]
RANK = {unit: len(LAYERS) - i for i, layer in enumerate(LAYERS) for unit in layer}

# Units and modules that data workers import: nothing of JAX may come with them.
WITHOUT_JAX = {"data"}
WITHOUT_JAX |= {f"multimodal.{name}" for name in ("batches", "documents", "mixture", "packing")}
WITHOUT_JAX |= {"multimodal.records", "multimodal.sequence", "multimodal.vocabulary", "tokenizers.text"}
WITHOUT_JAX |= {"tokenizers.caption_ids"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


# Templates are files that an export copies, for programs without us: no modules of the package.
MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py")) if path.parent.name != "templates"}


def imports_of(tree: ast.AST, module: str, is_package: bool, *, at_import: bool = False) -> set[str]:
    """Names of the modules that a syntax tree imports.

    Args:
      module: dotted name of the module, which relative imports count from; is_package: whether it is an `__init__.py`.
      at_import: leave out imports inside functions.
    Returns:
      Dotted names. `from a import b` gives a.b as well as a: b may be a module.
    """
    found, pending = set(), [tree]
    while pending:
        node = pending.pop()
        if at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join(parents + ([base] if base else []))
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
        pending.extend(ast.iter_child_nodes(node))
    return found


def unit_of(module: str) -> str | None:
    """`ddt_jax.nn.params` -> "nn"; None for the package itself and for what is not ours."""
    parts = module.split(".")
    return parts[1] if parts[0] == "ddt_jax" and len(parts) > 1 else None


def upward_imports(module: str, imported: set[str]) -> list[str]:
    """The imports of a module that the layers forbid, one readable line each."""
    here = unit_of(module)
    wrong = set()
    for there in {unit_of(name) for name in imported} & set(RANK):
        sideways = RANK[here] == RANK[there] and here != there and RANK[here] > 1
        if sideways or RANK[there] > RANK[here]:
            wrong.add(f"{module} imports ddt_jax.{there}, which is not below {here}")
    return sorted(wrong)


def parse(module: str) -> tuple[ast.AST, bool]:
    path = MODULES[module]
    return ast.parse(path.read_text(encoding="utf-8"), str(path)), path.name == "__init__.py"


def reachable(start: str, graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """Every module that importing `start` imports, with the way there; packages of ours on the way count too."""
    ways, pending = {start: [start]}, [start]
    while pending:
        module = pending.pop()
        for name in graph.get(module, ()):
            parts = name.split(".")
            for step in (".".join(parts[: n + 1]) for n in range(len(parts))):
                if step not in ways:
                    ways[step] = [*ways[module], step]
                    pending.append(step)
    return ways


def child(code: str):
    """Runs code in a fresh interpreter without an accelerator and returns the JSON it prints last."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_unit_has_a_layer():
    units = {unit_of(module) for module in MODULES} - {None}
    assert units <= set(RANK), f"add {sorted(units - set(RANK))} to LAYERS"


@pytest.mark.smoke
def test_imports_go_downwards_only():
    wrong = []
    for module in MODULES:
        if unit_of(module):
            tree, is_package = parse(module)
            wrong += upward_imports(module, imports_of(tree, module, is_package))
    assert not wrong, "\n".join(wrong)


def test_package_root_imports_none_of_its_parts():
    tree, is_package = parse("ddt_jax")
    assert not {unit_of(name) for name in imports_of(tree, "ddt_jax", is_package)} & set(RANK)


@pytest.mark.parametrize(
    ("module", "source", "bad"),
    [
        ("ddt_jax.nn.params", "from ddt_jax.training import loop", True),
        ("ddt_jax.nn.params", "import ddt_jax.data.base", True),
        ("ddt_jax.nn.params", "from ddt_jax import data", True),
        ("ddt_jax.nn.params", "from ..tokenizers import ddt", True),
        ("ddt_jax.nn.params", "def f():\n  from ddt_jax.data import base", True),
        ("ddt_jax.evaluation.psnr", "import ddt_jax.interop.sd3", True),
        ("ddt_jax.nn.params", "from . import blocks\nfrom ddt_jax.io import paths\nimport numpy.data", False),
        ("ddt_jax.config", "from ddt_jax import settings", False),
        ("ddt_jax.cli", "import ddt_jax.errors", False),
    ],
)
def test_layer_rule_itself(module, source, bad):
    assert bool(upward_imports(module, imports_of(ast.parse(source), module, False))) is bad


def is_without_jax(module: str) -> bool:
    return bool({unit_of(module), module.removeprefix("ddt_jax.")} & WITHOUT_JAX)


def test_what_data_workers_import_leaves_jax_alone():
    """Even what it imports of ours, at any depth."""
    assert {name for name in WITHOUT_JAX if "." in name} <= {m.removeprefix("ddt_jax.") for m in MODULES}
    graph = {}
    for module in MODULES:
        tree, is_package = parse(module)
        # Such a module must not reach for JAX lazily either; elsewhere a lazy import is what keeps it out.
        graph[module] = imports_of(tree, module, is_package, at_import=not is_without_jax(module))
    for module in filter(is_without_jax, MODULES):
        ways = reachable(module, graph)
        for banned in {"jax", "flax", "optax", "orbax"} & set(ways):
            pytest.fail("a data worker would import JAX: " + " -> ".join(ways[banned]))


def test_importing_it_creates_no_jax_backend():
    modules = [m for m in MODULES if is_without_jax(m)]
    assert (
        child(f"""
import importlib, json, sys
for name in {modules}: importlib.import_module(name)
bridge = sys.modules.get("jax._src.xla_bridge")
print(json.dumps(bool(bridge and bridge.backends_are_initialized())))
""")
        is False
    )


@pytest.mark.smoke
def test_command_line_starts_without_heavy_imports():
    heavy = ["jax", "flax", "optax", "orbax", "grain", "tensorflow", "tensorflow_datasets", "pyarrow", "matplotlib"]
    assert child(f"import json, sys, ddt_jax.cli; print(json.dumps([m for m in {heavy} if m in sys.modules]))") == []


@pytest.mark.parametrize("module", ["ddt_jax", "ddt_jax.cli"])
def test_import_takes_less_than_1500_ms(module):
    code = f"import json, time; t = time.perf_counter(); import {module}; print(json.dumps(time.perf_counter() - t))"
    assert min(child(code) for _ in range(3)) < 1.5  # the best of three: other programs may be busy
