"""Imports go one way, planning never loads torch, and the command line starts at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "plans": set(),
    "cost_models": {"plans"},
    "planner": {"plans", "cost_models"},
    "runtime": {"plans"},
    "profiler": {"plans", "cost_models", "runtime"},
}
HEAVY = {"torch", "megatron", "transformers", "safetensors"}

FLOORS = {
    "cost_models": (
        *("candidates", "distinct", "stages", "packing", "slots", "tables", "engines", "terms", "time", "memory"),
        *("holdings", "relations", "reallocation", "simulate", "checkpoint", "estimate", "calibration", "provenance"),
        "validation",
    ),
    "planner": (
        *("text", "request", "measured", "search", "space", "best", "remedies", "baselines", "pictures", "explanation"),
        *("doctor", "cli"),
    ),
    "plans": (
        *(
            "errors",
            "files",
            "terminal",
            "problems",
            "documents",
            "flat_tensors",
            "seals",
            "host_memory",
            "run_output",
            "yaml_text",
            "shapes",
            "graph",
            "algorithms",
        ),
        *(
            "lengths",
            "lengthsfile",
            "cluster",
            "rope",
            "config_keys",
            "lora",
            "model",
            "routes",
            "decoder",
            "planned_families",
            "families",
            "kvcache",
            "huggingface",
        ),
        *("library", "timeline", "workload", "strategy", "layout", "checkpoint", "plan", "batches", "checks"),
        *(
            "planfile",
            "program",
            "reallocation",
            "render",
            "runnable",
            "graphfile",
            "codec",
            "legal",
            "hyperparameters",
            "runfile",
            "run_checks",
        ),
        "checkpoint_files",
    ),
    "profiler": (
        *(
            "alone",
            "cases",
            "devices",
            "timers",
            "decoding",
            "layers",
            "results",
            "collectives",
            "profile",
            "command",
            "speeds",
        ),
    ),
    "runtime": (
        *("sequences", "routes", "reports", "processes", "algorithms", "batches", "models", "groups", "passes"),
        *("generation",),
        *("job", "calls", "weights", "executor", "evaluation", "checkpoints", "worker", "launching", "machines", "cli"),
    ),
}
"""Rooms of a package from the ground up: a room imports only those before it."""


def imported_files(path: Path) -> set[str]:
    """The modules of this project that a file imports, inside functions too, but not for type checkers alone."""
    tree = ast.parse(path.read_text())
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            inside = ROOT / node.module.replace(".", "/")
            for alias in node.names:
                file = (inside / f"{alias.name}.py").exists() or (inside / alias.name / "__init__.py").exists()
                found.add(f"{node.module}.{alias.name}" if file else node.module)
    return {name for name in found if name.split(".")[0] in ALLOWED}


@cache
def import_graph() -> nx.DiGraph[str]:
    """File -> files it imports, as modules."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    for package in ALLOWED:
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            graph.add_edges_from((name, other) for other in imported_files(path) if other != name)
    return graph


def test_no_file_imports_in_a_circle() -> None:
    circles = [sorted(files) for files in nx.strongly_connected_components(import_graph()) if len(files) > 1]
    assert not circles


@pytest.mark.parametrize("package", FLOORS)
def test_rooms_stand_on_those_before_them(package: str) -> None:
    order = FLOORS[package]

    def floor(module: str) -> int:
        return order.index((module.split(".")[1:] or [order[0]])[0])

    here = {path.stem for path in (ROOT / package).iterdir() if path.suffix == ".py" or list(path.glob("*.py"))}
    assert here - {"__init__"} == set(order)
    inside = [edge for edge in import_graph().edges if all(f"{name}.".startswith(f"{package}.") for name in edge)]
    assert not [f"{source} imports {target}" for source, target in inside if floor(target) > floor(source)]


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_go_one_way(package: str) -> None:
    wrong = []
    for path in sorted((ROOT / package).rglob("*.py")):
        may = ALLOWED[package] | {package}
        if package == "planner" and "cli" in path.parts:
            may = may | {"profiler"}
        wrong += [
            f"{path.relative_to(ROOT)} imports {name}" for name in imports(path) & set(ALLOWED) if name not in may
        ]
    assert not wrong


@pytest.mark.parametrize("package", ["plans", "cost_models", "planner"])
def test_planning_imports_no_torch(package: str) -> None:
    for path in sorted((ROOT / package).rglob("*.py")):
        assert not imports(path) & HEAVY, path


def test_a_search_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom planner.cli.app import app\n"
        "args = ['search', '--model', 'llama-7b', '--gpus', '8', '--seconds', '1', '-o', "
        f"r'{tmp_path / 'plan.json'}']\n"
        "app(args, standalone_mode=False)\n"
        "assert not {'torch', 'megatron'} & set(sys.modules), 'torch was loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "plan.json").exists()


@pytest.mark.parametrize("command", ["planner.cli", "runtime.cli"])
def test_help_loads_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom contextlib import suppress\n"
        f"import {command} as cli\nsys.argv = ['x', '--help']\n"
        "with suppress(SystemExit):\n    cli.main()\n"
        "heavy = {'torch', 'megatron', 'numpy', 'scipy', 'pandas', 'ortools', 'numba', 'networkx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_launcher_of_a_run_loads_no_torch(tmp_path: Path) -> None:
    """Its ranks do, in processes of their own; weights and their shapes are checked without it."""
    plan = ROOT / "tests" / "fixtures" / "before" / "tiny.json"
    weights = ROOT / "tests" / "fixtures" / "tiny-llama"
    code = (
        "import sys\nfrom pathlib import Path\nimport runtime.launching.launch\n"
        "import runtime.launching.preparation as preparation\n"
        "preparation.prepare_ranks = lambda *_: None\n"
        "words = preparation.Words(allow_stale=True)\n"
        f"settings = [{f'output={tmp_path}'!r}, {f'weights={weights}'!r}]\n"
        f"preparation.checked(preparation.read(Path({str(plan)!r}), settings, None, words), words)\n"
        "heavy = {'torch', 'megatron', 'scipy', 'pandas', 'ortools', 'numba'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_plan_of_dense_models_is_shown_without_the_search() -> None:
    plan = ROOT / "tests" / "fixtures" / "before" / "ppo-tail.json"
    code = (
        "import sys\nfrom planner.cli.app import app\n"
        f"app(['show', {str(plan)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'pandas', 'scipy', 'ortools', 'numba', 'networkx'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_path_of_a_machine_and_no_todo() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.md", "*.sh", "*.yaml"], capture_output=True, text=True, cwd=ROOT
    )
    for name in tracked.stdout.split():
        text = (ROOT / name).read_text()
        if name != "tests/test_architecture.py":
            assert "/work/" not in text and "/tmp/" not in text, name
            assert "TODO" not in text and "FIXME" not in text, name


def test_every_text_file_is_utf_8_whatever_the_locale() -> None:
    """`read_text` here is a method of a path: the function of plans.documents takes bytes."""
    for package in ALLOWED:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                function, said = node.func, ast.unparse(node)
                name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
                method = isinstance(function, ast.Attribute) and not said.startswith(("os.", "socket."))
                reads = name in ("read_text", "write_text", "open") and (method or name == "open")
                if reads and not said.startswith(("os.", "webbrowser.")):
                    assert "utf-8" in said or "'rb'" in said or "'wb'" in said, f"{path}:{node.lineno}: {said}"


def test_files_are_asked_after_without_an_error() -> None:
    """Methods of a path raise for names that are too long; `os.path` says that there is no such file."""
    for package in ("plans", "cost_models", "planner", "runtime", "profiler"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and path.name != "files.py":
                    assert node.func.attr not in ("exists", "is_file", "is_dir") or "os.path" in ast.unparse(node), path
