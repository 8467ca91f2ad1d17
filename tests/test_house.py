"""The floors hold, and words that belong to one room stay there. Reads source only."""

from __future__ import annotations

import ast
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from talkhead_cli.cli.memory import keep_freed_memory

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "talkhead_cli"
FILES = sorted(p.relative_to(ROOT) for p in PACKAGE.rglob("*.py"))
WORKSHOPS = ("march", "blocks", "track", "media", "store")
# What the modules of a room may import of ours, beside the room itself and `__version__`.
FLOORS = {
    "contracts.py": (),
    "__init__.py": (),
    **{room: ("contracts",) for room in WORKSHOPS},
    "avatars": ("contracts", "blocks"),
    "jobs": ("contracts", *WORKSHOPS, "avatars"),
    "cli": ("contracts",),  # and jobs and store inside a function's body
}
CLI_INSIDE = ("contracts", "jobs", "store")
# Checkpoints are read and written in the store; the speech encoder reads its own weights.
TORCH_FILES = ("talkhead_cli/store/",)
TENSORS_ALONE = "talkhead_cli/store/pickles.py"  # a pickle reader that knows no names but these

Rule = Callable[[ast.Module, Path], Iterator[str]]


def room_of(file: Path) -> str:
    """talkhead_cli/march/rays.py -> march"""
    return file.parts[1]


def imports(tree: ast.AST, file: Path) -> Iterator[tuple[str, int]]:
    """Dotted names that are imported, relative ones resolved, with their lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node.lineno) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = list(file.parts[: -node.level]) if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from ((f"{base}.{name.name}", node.lineno) for name in node.names)


def at_module_level(tree: ast.Module, file: Path) -> set[tuple[str, int]]:
    """Imports that run when the module is imported; those for type checkers do not."""
    inside: set[tuple[str, int]] = set()
    for node in ast.walk(tree):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        checker = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if late or checker:
            inside |= set(imports(node, file))
    return set(imports(tree, file)) - inside


def within(name: str, *packages: str) -> bool:
    return any(name == p or name.startswith(p + ".") for p in packages)


def our_rooms(found: set[tuple[str, int]]) -> Iterator[tuple[str, int]]:
    for name, line in found:
        if within(name, "talkhead_cli") and name != "talkhead_cli.__version__":
            yield name.split(".")[1] if "." in name else "", line


def floors(tree: ast.Module, file: Path) -> Iterator[str]:
    """Imports go down only, and workshops are strangers to each other."""
    room = room_of(file)
    allowed = {*FLOORS[room], room}
    late = allowed | set(CLI_INSIDE) if room == "cli" else allowed
    first = at_module_level(tree, file)
    for target, line in our_rooms(set(imports(tree, file))):
        if target not in late:
            yield f"{file}:{line} imports {target or 'the package'}"
    for target, line in our_rooms(first):
        if target not in allowed and target in late:
            yield f"{file}:{line} imports {target} outside a function"


def only_in(places: tuple[str, ...], *packages: str) -> Rule:
    def rule(tree: ast.Module, file: Path) -> Iterator[str]:
        if not str(file).startswith(tuple(f"talkhead_cli/{p}" for p in places)):
            for name, line in imports(tree, file):
                if within(name, *packages):
                    yield f"{file}:{line} imports {name}"

    return rule


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def backward_in_the_loop(tree: ast.Module, file: Path) -> Iterator[str]:
    if str(file) != "talkhead_cli/jobs/stage_loop.py":
        for name, node in calls(tree):
            if name.endswith(".backward"):
                yield f"{file}:{node.lineno} {name}()"


def print_in_cli(tree: ast.Module, file: Path) -> Iterator[str]:
    if room_of(file) != "cli":
        for name, node in calls(tree):
            if name in ("print", "input", "sys.stdout.write", "sys.stderr.write"):
                yield f"{file}:{node.lineno} {name}()"


def nothing_is_run_from_text(tree: ast.Module, file: Path) -> Iterator[str]:
    for name, node in calls(tree):
        if name in ("eval", "exec", "os.system", "os.popen", "builtins.eval", "builtins.exec",
                    "pickle.load", "pickle.loads", "pickle.Unpickler"):  # fmt: skip
            yield f"{file}:{node.lineno} {name}()"
        for word in node.keywords:
            value = word.value
            harmless = isinstance(value, ast.Constant) and not value.value
            if word.arg in ("shell", "allow_pickle") and not harmless:
                yield f"{file}:{node.lineno} {word.arg}={ast.unparse(value)}"
    for name, line in imports(tree, file):
        if name == "pickle" and str(file) == TENSORS_ALONE:  # the module, for a reader of its own
            continue
        if within(name, "pickle", "cPickle", "dill", "marshal", "shelve", "os.system", "os.popen"):
            yield f"{file}:{line} imports {name}"


def torch_load_is_safe(tree: ast.Module, file: Path) -> Iterator[str]:
    for name, node in calls(tree):
        if name not in ("torch.load", "torch.save"):
            continue
        if not str(file).startswith(TORCH_FILES) or (
            name == "torch.save" and room_of(file) != "store"
        ):
            yield f"{file}:{node.lineno} {name}() outside store/"
        words = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if name == "torch.load" and words.get("weights_only") != "True":
            yield f"{file}:{node.lineno} torch.load without weights_only=True"
    for name, line in imports(tree, file):
        if name in ("torch.load", "torch.save"):
            yield f"{file}:{line} imports {name} by name"


def cli_starts_light(tree: ast.Module, file: Path) -> Iterator[str]:
    if room_of(file) == "cli":
        for name, line in sorted(at_module_level(tree, file)):
            if within(name, "torch", "numpy", "cv2", "scipy", "mediapipe", "pydantic", "yaml"):
                yield f"{file}:{line} imports {name} at module level"


# Each rule with a file that breaks it: a rule that sees nothing there would hold nothing.
RULES: dict[str, tuple[Rule, str, str]] = {
    "contracts import nothing of ours": (
        floors, "talkhead_cli/contracts.py", "from talkhead_cli.store import Run"),
    "workshops are strangers": (
        floors, "talkhead_cli/march/rays.py", "def f():\n    from ..track import face"),
    "avatars know no marcher": (
        floors, "talkhead_cli/avatars/base.py", "import talkhead_cli.march"),
    "jobs know no command line": (
        floors, "talkhead_cli/jobs/fit.py", "from talkhead_cli.cli import console"),
    "commands import jobs late": (
        floors, "talkhead_cli/cli/app.py", "from talkhead_cli.jobs import fit"),
    "commands know no workshop but the store": (
        floors, "talkhead_cli/cli/app.py", "def f():\n    from talkhead_cli import track"),
    "nerfacc in march/cuda.py": (
        only_in(("march/cuda.py",), "nerfacc"),
        "talkhead_cli/march/dense.py", "def f():\n    from nerfacc import volrend"),
    "other programs in media/": (
        only_in(("media/",), "subprocess", "ffmpeg", "imageio_ffmpeg"),
        "talkhead_cli/jobs/render.py", "import subprocess as s"),
    "yaml in jobs/preset.py": (
        only_in(("jobs/preset.py",), "yaml"), "talkhead_cli/store/files.py", "import yaml"),
    "safetensors in store/": (
        only_in(("store/",), "safetensors"),
        "talkhead_cli/jobs/fit.py", "from safetensors.torch import save_file"),
    "rich and typer in cli/": (
        only_in(("cli/",), "rich", "typer"), "talkhead_cli/jobs/fit.py", "import rich.console"),
    "print in cli/": (print_in_cli, "talkhead_cli/jobs/fit.py", "print(1)"),
    "backward in jobs/stage_loop.py": (
        backward_in_the_loop, "talkhead_cli/jobs/render.py", "loss.sum().backward()"),
    "nothing is run from text": (
        nothing_is_run_from_text, "talkhead_cli/media/ffmpeg.py", "run(x, shell=True)"),
    "no eval": (nothing_is_run_from_text, "talkhead_cli/jobs/fit.py", "eval('1')"),
    "no os.system": (nothing_is_run_from_text, "talkhead_cli/jobs/fit.py", "os.system('ls')"),
    "no pickle's own reader": (nothing_is_run_from_text, TENSORS_ALONE, "pickle.load(file)"),
    "no part of pickle by name": (
        nothing_is_run_from_text, TENSORS_ALONE, "from pickle import load"),
    "no pickle": (nothing_is_run_from_text, "talkhead_cli/store/files.py", "import pickle"),
    "torch.load is safe": (
        torch_load_is_safe, "talkhead_cli/store/checkpoint.py", "torch.load(path)"),
    "torch.load in store/": (
        torch_load_is_safe, "talkhead_cli/jobs/fit.py", "torch.load(path, weights_only=True)"),
    "the command line starts light": (
        cli_starts_light, "talkhead_cli/cli/console.py", "import torch.nn"),
}  # fmt: skip


@pytest.fixture(scope="module")
def trees() -> dict[Path, ast.Module]:
    return {file: ast.parse((ROOT / file).read_text(encoding="utf-8")) for file in FILES}


def test_every_file_has_a_floor() -> None:
    assert {room_of(file) for file in FILES} <= set(FLOORS)


@pytest.mark.parametrize("name", RULES)
def test_the_house_keeps_the_rule(name: str, trees: dict[Path, ast.Module]) -> None:
    rule = RULES[name][0]
    assert [fault for file, tree in trees.items() for fault in rule(tree, file)] == []


@pytest.mark.parametrize("name", RULES)
def test_the_rule_catches_its_violation(name: str) -> None:
    rule, file, source = RULES[name]
    assert list(rule(ast.parse(source), Path(file)))


def test_imports_for_the_type_checker_do_not_count_as_run() -> None:
    source = "if TYPE_CHECKING:\n    import torch\nimport json"
    found = at_module_level(ast.parse(source), Path("talkhead_cli/cli/app.py"))
    assert {name for name, _ in found} == {"json"}


def test_readme_maps_every_folder_of_the_package() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    folders = {file.parent.name for file in FILES if len(file.parts) == 3}
    assert [folder for folder in sorted(folders) if f"{folder}/" not in text] == []


def test_help_is_quick_and_loads_nothing_heavy() -> None:
    probe = (
        "import sys\n"
        "from talkhead_cli.cli.app import app\n"
        "try:\n    app(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'numpy', 'cv2', 'mediapipe', 'pydantic', 'scipy'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True, check=False
        )
        seconds.append(time.monotonic() - began)
        assert done.returncode == 0, done.stderr
        assert "preprocess" in done.stdout
    assert min(seconds) < 1.5


def test_freed_memory_is_kept_where_the_c_library_can() -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")


def test_tables_of_figures_are_those_of_the_results() -> None:
    asked = [sys.executable, str(ROOT / "benchmarks" / "tables.py"), "--check"]
    done = subprocess.run(asked, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    for text, n_tables in (("README.md", 1), ("benchmarks/README.md", 2)):
        parts = re.split("<!-- (?:table .*|end) -->\n", (ROOT / text).read_text())
        tables, around = parts[1::2], parts[::2]
        assert len(tables) == n_tables and all(len(part) > 500 for part in around), text
        for table in tables:
            assert table.startswith("| preset") and table.count("\n| `lokitalk` |") == 2, text
