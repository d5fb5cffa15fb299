"""setup.py declares what the package imports, and what the documents promise."""

import ast
import importlib.metadata
import re
import sys

import pytest

from tests.test_imports import MODULES, ROOT, imports_of, parse


def literal(name: str):
    """A constant of setup.py, read without running it: a new Python's environments have no setuptools."""
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == name:
            return ast.literal_eval(node.value)
    raise KeyError(name)


def distribution(requirement: str) -> str:
    """`Etils[epath]>=1.15` -> "etils"."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement).group()).lower()


REQUIRES = {distribution(r) for r in literal("REQUIRES")}
EXTRAS = {name: {distribution(r) for r in wanted} for name, wanted in literal("EXTRAS").items()}
OPTIONAL = set().union(*(wanted for name, wanted in EXTRAS.items() if name != "test"))
PROVIDERS = importlib.metadata.packages_distributions()


def undeclared(imported: set[str], declared: set[str]) -> set[str]:
    """Top-level names among imports that no declared distribution provides."""
    names = {name.split(".")[0] for name in imported} - {*sys.stdlib_module_names, "ddt_jax", "tests", ""}
    # A package that is not installed here, such as wandb, is taken to be named like its module.
    return {name for name in names if not {distribution(d) for d in PROVIDERS.get(name, [name])} & declared}


@pytest.mark.parametrize("module", MODULES)
def test_every_third_party_import_is_declared(module):
    tree, is_package = parse(module)
    at_import = imports_of(tree, module, is_package, at_import=True)
    assert not undeclared(at_import, REQUIRES), "add it to REQUIRES in setup.py"
    # Imports inside functions may be optional, but then an extra must name them.
    anywhere = imports_of(tree, module, is_package)
    assert not undeclared(anywhere, REQUIRES | OPTIONAL), "add it to REQUIRES or an extra in setup.py"


@pytest.mark.parametrize("path", sorted((ROOT / "ddt_jax").rglob("templates/*.py")), ids=lambda p: p.name)
def test_templates_are_installed_and_need_pytorch_only(path):
    package = ".".join(path.parent.parent.relative_to(ROOT).parts)
    patterns = literal("PACKAGE_DATA")[package]
    assert any(path in (ROOT / path.parent.parent).glob(pattern) for pattern in patterns), "add it to PACKAGE_DATA"
    imported = imports_of(ast.parse(path.read_text(encoding="utf-8")), path.stem, False)
    assert {name.split(".")[0] for name in imported} <= {*sys.stdlib_module_names, "torch"}


@pytest.mark.parametrize("path", sorted([*ROOT.glob("tests/**/*.py"), *ROOT.glob("tools/*.py")]), ids=lambda p: p.name)
def test_tests_and_tools_import_what_the_test_extra_brings(path):
    imported = imports_of(ast.parse(path.read_text(encoding="utf-8")), path.stem, False)
    beside = {p.stem for p in ROOT.glob("tools/*.py")}
    found = undeclared(imported, REQUIRES | EXTRAS["test"]) - beside
    assert not found, "add it to the test extra in setup.py"


def test_an_undeclared_import_is_found():
    assert undeclared({"numpy.linalg", "os", "yaml"}, {"numpy"}) == {"yaml"}


@pytest.mark.parametrize("extra", ["tpu", "cuda", "torch", "test", "kernels", "digits", "wandb"])
def test_extra_exists(extra):
    assert EXTRAS[extra]


def test_everyday_environment_has_no_libtpu():
    assert not any(d.startswith(("libtpu", "jax[tpu]")) for d in literal("REQUIRES") + literal("EXTRAS")["test"])


def test_every_requirement_has_both_bounds():
    for requirement in sum(literal("EXTRAS").values(), literal("REQUIRES")):
        assert re.fullmatch(r"[\w.-]+(\[[\w,-]+\])?>=[\d.]+,<[\d.]+", requirement), requirement


@pytest.mark.smoke
def test_installed_command_runs_our_main():
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="ddt-jax")
    assert entry.value == "ddt_jax.cli:console"
    assert callable(entry.load())


def test_version_is_the_installed_one():
    import ddt_jax

    assert importlib.metadata.version("ddt-jax") == ddt_jax.__version__
