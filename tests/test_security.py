"""No pickle crosses a trust boundary: what reads code from data is listed, file by file."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: What turns data into running code.
READERS = {
    *("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"),
    *("torch.load", "numpy.load", "np.load", "yaml.load", "eval", "exec", "compile"),
}

#: Between processes of one run, which share their code (SECURITY.md).
ALLOWED = {
    "oracle/wire.py": {"pickle"},
    "oracle/world.py": {"pickle"},
    "oracle/torchrun.py": {"pickle"},
}


def _dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def _readers_in(tree: ast.AST) -> set[str]:
    """Modules of READERS that are imported, and functions of it that are called."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            found |= {module.split(".")[0]} | {f"{module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call):
            found.add(_dotted(node.func))
    return found & READERS


def test_what_reads_code_from_data_is_listed():
    """Pickle, torch.load, eval and exec stand where SECURITY.md says, and nowhere else."""
    found = {
        str(path.relative_to(ROOT)): readers
        for folder in ("reference", "optimized", "oracle", "examples")
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (readers := _readers_in(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert found == ALLOWED


def test_the_search_sees_each_way_to_use_one():
    """Imported whole, by name, or called through its module."""
    source = "import pickle\nfrom torch import load\nnp.load(f)\nexec(text)\nre.compile(p)\n"
    assert _readers_in(ast.parse(source)) == {"pickle", "torch.load", "np.load", "exec"}
