"""The rules of the code that no tool knows: layers, banned names, sizes, docstrings, top level.

Each rule is a function over a parsed module that yields what breaks it; each is also shown a
module that does break it, because a rule that cannot fail holds nothing.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

TREE = Path(__file__).resolve().parents[1]
TOP_LEVEL = {"pyproject.toml", "nbdmirror", "tests", "deploy", "Makefile", "README.md"}
# What `make` leaves behind and .gitignore names.
MADE = {"run", "build", "nbdmirror.egg-info"}

# A layer may import itself and those to its left; ports are for the engine and what is outside.
LAYERS = ("errors", "config", "ports", "codec", "core", "engine", "edge")
# Modules at the package's top that belong to a layer of another name.
TOP_MODULES = {"configfile": "config", "configsecurity": "config", "tomltable": "config"}
TOP_MODULES |= {"__main__": "cli"}
CLI_IMPORTS = {"errors", "config", "cli"}
# What the command line imports only inside a function: starting it must stay cheap.
CLI_LAZY_IMPORTS = {"edge"}

MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70
BANNED_MODULES = {"time", "os", "socket", "threading", "uuid", "subprocess", "select"}
BANNED_CALLS = {"open", "id", "hash"}
BANNED_ATTRIBUTES = {"to_thread", "run_in_executor", "open_connection", "start_server"}
BANNED_ATTRIBUTES |= {"now", "utcnow", "today"}  # of datetime
DETERMINISTIC = ("codec", "core", "engine")
SETS = {"set", "frozenset"}

Rule = Callable[[str, ast.Module], Iterator[str]]


def layer_of(module: str) -> str:
    """The layer of a dotted module name below ``nbdmirror``."""
    first = module.split(".")[0]
    return TOP_MODULES.get(first, first)


def imports(module: str, tree: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    """Each absolute dotted name that is imported, relative ones resolved."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # A relative import starts at the package that the module is in.
            base = ["nbdmirror", *module.split(".")][: -node.level] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            if name == "nbdmirror":
                yield from ((f"{name}.{alias.name}", node) for alias in node.names)
            else:
                yield name, node


def lazy_nodes(tree: ast.Module) -> set[ast.AST]:
    """Everything inside functions and ``if TYPE_CHECKING`` blocks."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.If)
    return {inner for node in ast.walk(tree) if isinstance(node, kinds) for inner in ast.walk(node)}


def check_layers(module: str, tree: ast.Module) -> Iterator[str]:
    """errors <- config <- ports <- codec <- core <- engine <- edge; cli -> codec.admin."""
    own = layer_of(module)
    lazy = lazy_nodes(tree)
    for name, node in imports(module, tree):
        if not name.startswith("nbdmirror.") or module == "__init__":
            continue
        inner = name.removeprefix("nbdmirror.")
        target = layer_of(inner)
        if target == "__version__":
            continue
        if own == "cli":
            good = target in CLI_IMPORTS or inner.startswith("codec.admin")
            good = good or (target in CLI_LAZY_IMPORTS and node in lazy)
        elif target not in LAYERS or own not in LAYERS:
            good = False
        else:
            good = LAYERS.index(target) <= LAYERS.index(own)
        if not good:
            yield f"{own} imports {inner}"


def check_banned(module: str, tree: ast.Module) -> Iterator[str]:
    """Core and engine know the world through ``ports`` alone: no clock, no files, no threads."""
    if layer_of(module) not in ("core", "engine"):
        return
    for name, node in imports(module, tree):
        if name.split(".")[0] in BANNED_MODULES:
            yield f"imports {name}"
        # The type of Env.random is needed for annotations; its functions are not.
        if name == "random" and not (isinstance(node, ast.ImportFrom) and _only(node, "Random")):
            yield f"imports {name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES:
            yield f"uses {node.attr}"
        if isinstance(node, ast.Call) and name_of(node.func) in BANNED_CALLS:
            yield f"calls {name_of(node.func)}()"


def _only(node: ast.ImportFrom, name: str) -> bool:
    return [alias.name for alias in node.names] == [name]


def check_pure(module: str, tree: ast.Module) -> Iterator[str]:
    """Codec and core await nothing."""
    if layer_of(module) not in ("codec", "core"):
        return
    for name, _ in imports(module, tree):
        if name.split(".")[0] == "asyncio":
            yield "imports asyncio"
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            yield f"async def {node.name}"


def check_sets(module: str, tree: ast.Module) -> Iterator[str]:
    """Nothing is done in a set's order: neither of one written there nor of a declared one."""
    if layer_of(module) not in DETERMINISTIC:
        return
    declared = {
        name_of(node.target)
        for node in ast.walk(tree)
        if isinstance(node, ast.AnnAssign)
        and isinstance(node.annotation, ast.Subscript)
        and name_of(node.annotation.value) in SETS
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.For | ast.AsyncFor | ast.comprehension):
            continue
        called = name_of(node.iter.func) if isinstance(node.iter, ast.Call) else ""
        literal = isinstance(node.iter, ast.Set | ast.SetComp)
        if literal or called in SETS or name_of(node.iter) in declared:
            yield f"iterates a set in line {node.iter.lineno}"


def name_of(node: ast.expr) -> str:
    """``x`` for ``x``, ``.x`` for ``anything.x``, nothing for other expressions."""
    if isinstance(node, ast.Attribute):
        return f".{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def check_docstrings(module: str, tree: ast.Module) -> Iterator[str]:
    """Every module says what it is; so does everything public."""
    if ast.get_docstring(tree) is None:
        yield "has no docstring"
    for node in tree.body:
        if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if not node.name.startswith("_") and ast.get_docstring(node) is None:
            yield f"{node.name} has no docstring"


def check_functions(module: str, tree: ast.Module) -> Iterator[str]:
    """A function fits a screen."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                yield f"{node.name} has {lines} lines, more than {FUNCTION_LINES_MAX}"


RULES: list[Rule] = [
    check_layers,
    check_banned,
    check_pure,
    check_sets,
    check_docstrings,
    check_functions,
]


def modules() -> list[Path]:
    """Every module of the package."""
    return sorted((TREE / "nbdmirror").rglob("*.py"))


def module_name(path: Path) -> str:
    """``core.ring`` for nbdmirror/core/ring.py, ``core.__init__`` for the package."""
    return ".".join(path.relative_to(TREE / "nbdmirror").with_suffix("").parts)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__.removeprefix("check_"))
def test_rule(rule: Rule) -> None:
    """No module breaks the rule."""
    broken = [
        f"{path.relative_to(TREE)}: {what}"
        for path in modules()
        for what in rule(module_name(path), ast.parse(path.read_text(), str(path)))
    ]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize(
    ("rule", "module", "source"),
    [
        (check_layers, "core.ring", "from nbdmirror.engine import log"),
        (check_layers, "core.ring", "from ..engine.log import Log"),
        (check_layers, "core.ring", "from .. import engine"),
        (check_layers, "codec.repl", "import nbdmirror.core.ring"),
        (check_layers, "engine.log", "from nbdmirror import edge"),
        (check_layers, "cli.main", "from nbdmirror.edge.files import LinuxDisk"),
        (check_layers, "cli.main", "from nbdmirror.codec.repl import Hello"),
        (check_layers, "edge.files", "from nbdmirror.cli import main"),
        (check_banned, "engine.log", "import time"),
        (check_banned, "engine.log", "import random"),
        (check_banned, "core.ring", "from os import path"),
        (check_banned, "core.ring", "open('x')"),
        (check_banned, "engine.log", "asyncio.to_thread(f)"),
        (check_banned, "engine.log", "sorted(x, key=lambda y: id(y))"),
        (check_pure, "core.ring", "import asyncio"),
        (check_pure, "codec.repl", "async def f(): pass"),
        (check_sets, "core.ring", "for x in {1, 2}: pass"),
        (check_sets, "engine.log", "[x for x in set(y)]"),
        (check_sets, "engine.log", "self.a: set[int] = set()\nfor x in self.a: pass"),
        (check_banned, "engine.log", "datetime.now()"),
        (check_docstrings, "core.ring", "x = 1"),
        (check_docstrings, "core.ring", "'''A.'''\nclass A: pass"),
        (check_functions, "core.ring", "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX),
    ],
)
def test_rule_can_fail(rule: Rule, module: str, source: str) -> None:
    """Each rule finds what it is there to find."""
    assert list(rule(module, ast.parse(source)))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("engine.log", "from nbdmirror.core.ring import Ring"),
        ("engine.log", "from ..ports import Env"),
        ("core.ring", "from nbdmirror.errors import FormatError"),
        ("cli.main", "from nbdmirror.codec.admin import Json"),
        ("cli.local", "def f():\n    from nbdmirror.edge import attach"),
        ("__main__", "from nbdmirror.cli.main import main"),
    ],
)
def test_layers_allow(module: str, source: str) -> None:
    """What the layers are for is allowed."""
    assert not list(check_layers(module, ast.parse(source)))


@pytest.mark.parametrize("package", ["nbdmirror", "tests"])
def test_module_sizes(package: str) -> None:
    """No module is longer than a person reads in one go."""
    paths = sorted((TREE / package).rglob("*.py"))
    lengths = {str(path): len(path.read_text().splitlines()) for path in paths}
    assert not {path: length for path, length in lengths.items() if length > MODULE_LINES_MAX}


def test_top_level() -> None:
    """The tree's top level is fixed; hidden files and what `make` leaves behind aside."""
    names = {path.name for path in TREE.iterdir() if not path.name.startswith(".")}
    assert names - MADE <= TOP_LEVEL
