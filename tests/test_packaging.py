"""The house: what is shipped, who imports whom, and how large a room may be."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("reference", "optimized", "oracle")

#: A folder may import itself and these folders of ours.
MAY_IMPORT = {
    "reference": set(),
    "optimized": {"reference"},
    "oracle": {"reference", "optimized"},
}
MAX_LINES = 350


def python_files(*folders: str) -> list[Path]:
    """Return the Python files below ``folders`` of the checkout, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    """Return the absolute names of all modules a file imports, wherever in the file it does so."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: a relative import"
            module = node.module or ""
            names.update(f"{module}.{alias.name}" for alias in node.names)
    return names


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Build a wheel from a copy of the checkout; return the names in it."""
    # A copy: setuptools leaves build/ and an egg-info beside the sources it builds from.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in (*FOLDERS, "tests", "ci"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=ignored)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index"]
    command += ["--no-build-isolation", "--wheel-dir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = target.glob("twinmoe-*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_the_wheel_ships_every_file(wheel_names: set[str]) -> None:
    """Modules, recordings, tables and type markers of the three folders, under twinmoe/."""
    files = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file())
    shipped = {path for path in files if "__pycache__" not in path.parts}
    assert {path.suffix for path in shipped} > {".py", ".typed", ".json", ".toml", ".safetensors"}
    assert {f"twinmoe/{path.relative_to(ROOT)}" for path in shipped} - wheel_names == set()
    assert any(name.endswith("licenses/LICENSE") for name in wheel_names)


@pytest.mark.slow
def test_the_wheel_ships_nothing_else(wheel_names: set[str]) -> None:
    """No test, no script of ci/: what is installed lies in twinmoe/'s three folders."""
    allowed = tuple(f"twinmoe/{folder}/" for folder in FOLDERS)
    strangers = {n for n in wheel_names if not n.startswith(allowed) and ".dist-info/" not in n}
    assert strangers == set()
    assert not any(Path(name).name.startswith(("test_", "conftest")) for name in wheel_names)


def test_every_package_folder_is_listed() -> None:
    """Each folder with modules has an __init__ and stands in pyproject.toml, and no other does."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    on_disk = {path.parent for path in python_files(*FOLDERS)}
    without_init = {path for path in on_disk if not (path / "__init__.py").exists()}
    names = {".".join(("twinmoe", *path.relative_to(ROOT).parts)) for path in on_disk}
    assert without_init == set()
    assert set(project["tool"]["setuptools"]["packages"]) == names


def test_links_and_mapping_agree() -> None:
    """ci/packages shows each tool the same folders as pyproject.toml maps."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    for package, folder in project["tool"]["setuptools"]["package-dir"].items():
        link = ROOT / "ci" / "packages" / Path(*package.split("."))
        assert link.resolve() == ROOT / folder


@pytest.mark.parametrize("folder", FOLDERS)
def test_imports_point_one_way(folder: str) -> None:
    """The reference knows nobody, optimized only the reference, and no product imports tests."""
    forbidden = {f"twinmoe.{other}" for other in FOLDERS} | {"tests"}
    forbidden -= {f"twinmoe.{other}" for other in MAY_IMPORT[folder] | {folder}}
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in python_files(folder)
        for name in sorted(imported_modules(path))
        if name.startswith(tuple(forbidden))
    ]
    assert wrong == []


def is_kernel(function: ast.FunctionDef) -> bool:
    """Return whether Triton compiles the function: its values have no Python types."""
    compilers = ("triton.jit", "triton.autotune", "triton.constexpr_function")
    return any(ast.unparse(found).startswith(compilers) for found in function.decorator_list)


def is_annotated(function: ast.FunctionDef) -> bool:
    """Return whether every argument but self, and the result, has a type."""
    given = function.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    typed = all(a is None or a.annotation or a.arg in ("self", "cls") for a in arguments)
    return typed and function.returns is not None


def test_only_kernels_lack_types() -> None:
    """Where mypy must let kernels pass untyped, every other function is annotated in full."""
    untyped = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in python_files("optimized")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and not is_kernel(node) and not is_annotated(node)
    ]
    assert untyped == []


def test_every_test_says_what_it_shows() -> None:
    """Each test function has a docstring."""
    silent = [
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"
        for path in python_files("tests")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        if not ast.get_docstring(node)
    ]
    assert silent == []


def test_rooms_stay_small() -> None:
    """No Python file has more lines than a reader holds in mind."""
    sizes = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in python_files(*FOLDERS, "tests", "ci")
    }
    assert {name: size for name, size in sizes.items() if size > MAX_LINES} == {}
