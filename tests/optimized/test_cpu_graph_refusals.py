"""What the stand-in for CUDA graphs refuses, as a capture on a GPU would."""

import pytest
import torch

from tests.optimized.exact import error_of
from twinmoe.optimized import launch
from twinmoe.optimized.cpu_graph import CaptureError, CpuGraph


def finished(function):
    """Capture ``function`` and return the graph."""
    graph = CpuGraph()
    with graph.capture():
        function()
    return graph


HOST_READS = {
    "item": (lambda x: x.sum().item(), "aten._local_scalar_dense.default"),
    "int": (lambda x: int(x[0]), "aten._local_scalar_dense.default"),
    "bool": (lambda x: bool((x > 1).any()), "aten._local_scalar_dense.default"),
    "slice": (lambda x: x[: (x > 1).sum()], "aten._local_scalar_dense.default"),
    "tolist": (lambda x: x.tolist(), "Tensor.tolist"),
    "numpy": (lambda x: x.numpy(), "Tensor.numpy"),
    "nonzero": (lambda x: x.nonzero(), "aten.nonzero.default"),
    "where": (lambda x: torch.where(x > 1), "aten.nonzero.default"),
    "mask": (lambda x: x[x > 1], "aten.index.Tensor"),
    "write by mask": (lambda x: x.index_put_((x > 1,), x[:2] + 1), "aten.index_put_.default"),
    "masked_select": (lambda x: x.masked_select(x > 1), "aten.masked_select.default"),
    "unique": (lambda x: x.unique(), "aten._unique2.default"),
    "unique rows": (lambda x: x.unique(dim=0), "aten.unique_dim.default"),
    "bincount": (lambda x: x.long().bincount(), "aten.bincount.default"),
    "repeat": (lambda x: x.repeat_interleave(x.long()), "aten.repeat_interleave.Tensor"),
    "equal": (lambda x: torch.equal(x, x + 1), "aten.equal.default"),
    "allclose": (lambda x: torch.allclose(x, x + 1), "aten.allclose.default"),
}


@pytest.mark.parametrize("name", HOST_READS)
def test_a_host_read_is_refused_by_name(name):
    """Whatever needs a value, or a size, on the host raises; the graph cannot be replayed."""
    function, operation = HOST_READS[name]
    graph, x = CpuGraph(), torch.arange(4.0)
    with pytest.raises(CaptureError) as caught, graph.capture():
        function(x)
    assert str(caught.value).startswith(f"{operation} needs a value on the host")
    assert "keep counts and masks on the device" in str(caught.value)
    assert not launch.capturing()
    function(x)
    assert "nothing to replay" in error_of(graph.replay)


def test_host_reads_inside_a_launch_are_its_own_affair():
    """A kernel or collective may do what it likes: it is repeated as a whole."""
    x, seen = torch.arange(3.0), []
    graph = finished(lambda: launch.run("reader", lambda: seen.append(x.tolist())))
    x.add_(1)
    graph.replay()
    assert seen == [[0, 1, 2], [1, 2, 3]]


def test_captures_do_not_nest():
    """A capture inside a capture is refused, and so is a replay; the outer one is over, too."""
    done = finished(lambda: torch.ones(1) + 1)
    for inner in (lambda: finished(lambda: None), done.replay):
        outer = CpuGraph()
        with pytest.raises(CaptureError, match="end it first"), outer.capture():
            inner()
        assert not launch.capturing()


def test_a_graph_holds_one_capture():
    """A second capture would be appended to the first; nothing captured cannot be replayed."""
    assert "nothing to replay" in error_of(CpuGraph().replay)
    graph = finished(lambda: torch.ones(1) + 1)
    with pytest.raises(CaptureError, match="captured already"), graph.capture():
        pass


def test_an_exception_ends_the_capture():
    """The error comes out as it is; nothing is recorded any more, and the next capture works."""
    graph = CpuGraph()
    with pytest.raises(KeyError, match="body"), graph.capture():
        torch.ones(2).add_({}["body"])
    assert not launch.capturing()
    assert "nothing to replay" in error_of(graph.replay)
    x = torch.ones(2)
    with graph.capture():
        output = x * 3
    x.fill_(2)
    graph.replay()
    assert output.tolist() == [6, 6]
