"""The stand-in for CUDA graphs: replays repeat operations on the same tensors, and only those."""

import pytest
import torch

from twinmoe.optimized.cpu_graph import CpuGraph


def integers(*shape):
    """Distinct small numbers as floats, in an order that is neither up nor down."""
    count = torch.Size(shape).numel()
    return (torch.arange(count) * 7 % count).float().view(shape)


def captured(function, *inputs):
    """Capture ``function`` of ``inputs``; return the graph and what the function returned."""
    graph = CpuGraph()
    with graph.capture():
        outputs = function(*inputs)
    return graph, outputs if isinstance(outputs, (tuple, list)) else (outputs,)


def in_place(x):
    """Change fresh tensors in place, by operator and by method."""
    y = x * 2
    y += 1
    y.mul_(x).clamp_(min=-3)
    y[0] = 5
    return y


def through_views(x):
    """Write through views of a fresh tensor, and read it through others."""
    y = torch.zeros(6)
    matrix = y.view(2, 3)
    matrix[1].copy_(x[0, :3])
    matrix.t()[2] += 10
    return y, matrix.t(), y[1::2].expand(2, 3), matrix.unsqueeze(0).transpose(0, 2).reshape(6)


def into_given_tensors(x):
    """Use out= variants, alone and chained."""
    total, product = torch.empty(4, 6), torch.empty(4, 4)
    torch.add(x, 1, out=total)
    torch.matmul(total, x.t(), out=product)
    values, indices = torch.empty(4, 2), torch.empty(4, 2, dtype=torch.int64)
    torch.topk(product, 2, out=(values, indices))
    return total, product, values, indices


def several_outputs(x):
    """Use operations that return more than one tensor, also as a list."""
    values, order = x.sort(dim=1)
    best, where = x.topk(3, dim=1)
    halves = (x + 1).split(3, dim=1)
    top, at = x.max(dim=0)
    return values, order, best, where, *halves, top, at, *torch.aminmax(x)


def aliases_of_inputs(x):
    """Use operations that return their input, or a view of it, where there is nothing to do."""
    return x.contiguous() + 1, x.to(torch.float32) * 2, x.view(-1)[3:], x.detach().reshape(4, 6)


def allocations(x):
    """Fill memory of every kind of allocation."""
    made = [
        torch.empty(4, 6),
        torch.empty_like(x),
        x.new_empty(4, 6),
        x.new_empty_strided((4, 6), (6, 1)),
        torch.empty_strided((4, 6), (1, 4)),
        torch.empty_permuted((4, 6), (1, 0)),
    ]
    for i, tensor in enumerate(made):
        tensor.copy_(x).add_(i)
    return (*made, x.new_zeros(3) + x[0, 0], x.new_full((2,), 7))


def masks_on_the_device(x):
    """Select by truth without a count: where, masked fill, a single value by mask."""
    y = x.clone()
    y[y > 9] = 0
    return y, torch.where(x > 3, x, -x), x.masked_fill(x < 5, 1), x.masked_scatter(x > 3, x + 1)


def indices_on_the_device(x):
    """Gather and scatter by computed indices."""
    order = x[:, 0].argsort()
    y = torch.zeros(4, 6)
    y[order] = x
    y.index_add_(0, order, x)
    return x[order], x.index_select(0, order), y, y.scatter(1, order[:, None], 3.0), order.bool()


@pytest.mark.parametrize(
    "function",
    [
        in_place,
        through_views,
        into_given_tensors,
        several_outputs,
        aliases_of_inputs,
        allocations,
        masks_on_the_device,
        indices_on_the_device,
    ],
)
def test_a_replay_repeats_the_operations_on_the_same_tensors(function):
    """New content of the input, the same output tensors: what the function would return for it."""
    x = integers(4, 6)
    graph, outputs = captured(function, x)
    addresses = [output.data_ptr() for output in outputs]
    for step in range(1, 4):
        x.copy_((integers(4, 6) * step + 5) % 23)
        graph.replay()
        expected = function(x.clone())
        expected = expected if isinstance(expected, (tuple, list)) else (expected,)
        for output, wanted in zip(outputs, expected, strict=True):
            assert torch.equal(output, wanted)
    assert [output.data_ptr() for output in outputs] == addresses


def test_inputs_changed_in_place_change_again():
    """A graph that adds to its input adds on each replay: state lives in tensors."""
    counter = torch.zeros(1)
    graph, _ = captured(lambda: counter.add_(1))
    assert counter.item() == 1
    for _ in range(3):
        graph.replay()
    assert counter.item() == 4


def test_python_does_not_run_again():
    """Calls, branches and numbers of the capture are frozen into it."""
    calls, settings, x = [], {"negate": False, "factor": 2}, torch.ones(2)

    def function():
        calls.append(1)
        y = x * settings["factor"]
        return -y if settings["negate"] else y

    graph, (output,) = captured(function)
    settings.update(negate=True, factor=5)
    graph.replay()
    assert len(calls) == 1
    assert output.tolist() == [2, 2]


def test_a_replaced_tensor_is_not_seen():
    """The tape holds tensors, not names: only new content in the old storage reaches a replay."""
    state = {"x": torch.ones(2)}
    graph, (output,) = captured(lambda: state["x"] + 1)
    old, state["x"] = state["x"], torch.full((2,), 9.0)
    graph.replay()
    assert output.tolist() == [2, 2]
    old.fill_(4)
    graph.replay()
    assert output.tolist() == [5, 5]


def test_memory_without_content_keeps_what_the_last_replay_left():
    """As at a fixed address on a GPU: a row that is not written again is stale, not new."""
    rows = torch.zeros(2, dtype=torch.int64)

    def function():
        out = torch.empty(3)
        out[rows] = 1.0
        return out

    graph, (out,) = captured(function)
    out.fill_(7)
    graph.replay()
    assert out.tolist() == [1, 7, 7]


def test_nothing_outside_the_body_is_recorded():
    """Operations before and after belong to nobody."""
    x = torch.ones(1)
    x.add_(1)
    graph, _ = captured(lambda: x.mul_(2))
    x.add_(1)
    graph.replay()
    assert x.item() == 10


def test_a_replay_keeps_no_gradients():
    """A parameter among the captured tensors does not turn outputs into a growing history."""
    weight = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        graph, (output,) = captured(lambda: weight * 2)
    graph.replay()
    assert not output.requires_grad
