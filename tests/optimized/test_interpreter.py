"""Triton's interpreter: mended where these versions do not fit, refused where that fails."""

import operator
from types import SimpleNamespace

import numpy
import pytest

from twinmoe.optimized import interpreter as ours

triton_interpreter = pytest.importorskip("triton.runtime.interpreter")


class Scope:
    """Keeps what a patch of the language sets."""

    def __init__(self):
        self.given = {}

    def set_attr(self, _tensor, name, value):
        """Keep the attribute."""
        self.given[name] = value


def as_triton_3_6(tensor, scope):
    """Give tensors the ``__index__`` of Triton 3.6, which refuses its arrays under NumPy 2.4."""

    def index(self):
        if self.handle.data.ndim:
            raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
        return int(self.handle.data)

    scope.set_attr(tensor, "__index__", index)


@pytest.fixture
def fresh():
    """Let each test ask anew, and nothing of it be remembered."""
    ours.trouble.cache_clear()
    yield
    ours.trouble.cache_clear()


def test_a_loaded_count_is_converted_whatever_the_versions(monkeypatch, fresh):
    """Triton 3.6 beside NumPy 2.4: the conversion is mended, and kernels loop over counts."""
    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", as_triton_3_6)
    assert ours.trouble() is None
    scope = Scope()
    triton_interpreter._patch_lang_tensor(object(), scope)
    handle = SimpleNamespace(data=numpy.array([7], dtype=numpy.int32))
    assert scope.given["__index__"](SimpleNamespace(handle=handle)) == 7


def test_a_conversion_that_works_is_left_alone(monkeypatch, fresh):
    """A Triton that converts is not touched, nor is a mended one mended again."""
    ours.prepare()
    before = triton_interpreter._patch_lang_tensor
    ours.prepare()
    assert triton_interpreter._patch_lang_tensor is before


def test_versions_that_do_not_fit_are_named(monkeypatch, fresh):
    """An interpreter that cannot loop is trouble, with both versions and what it said."""
    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", as_triton_3_6)
    monkeypatch.setattr(ours, "_convert_single_elements", lambda _interpreter: None)
    reason = ours.trouble()
    assert f"NumPy {numpy.__version__}" in reason
    assert "Triton " in reason
    assert "0-dimensional" in reason


def test_an_interpreter_that_computes_wrongly_is_named(monkeypatch, fresh):
    """A count that comes out wrong is trouble too."""

    def never(tensor, scope):
        scope.set_attr(tensor, "__index__", lambda self: operator.index(0))

    monkeypatch.setattr(triton_interpreter, "_patch_lang_tensor", never)
    monkeypatch.setattr(ours, "_convert_single_elements", lambda _interpreter: None)
    assert "counted 0, not 3" in ours.trouble()
