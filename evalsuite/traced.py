"""A score that NumPy computes, as an ONNX graph: the formula is followed while it runs, and so is written once, by its author.

`Traced` is an array that knows which node of a graph gives it. What NumPy does with it is computed as ever and recorded
besides. What the graph cannot have (an item that is set, a loop over rows, another library) raises `Untraceable`;
what a trace cannot see (a branch taken because of the values, the number of rows as a constant) shows when the graph is
compared with the score on other rows, which whoever deploys one has to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

OPSET, IR_VERSION = 18, 9
"""Of ONNX 1.15, which ONNX Runtime has read since 1.17."""

_UFUNCS = {
    "add": "Add", "subtract": "Sub", "multiply": "Mul", "divide": "Div", "matmul": "MatMul", "maximum": "Max", "minimum": "Min",
    "negative": "Neg", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "absolute": "Abs", "power": "Pow", "tanh": "Tanh",
    "greater": "Greater", "greater_equal": "GreaterOrEqual", "less": "Less", "less_equal": "LessOrEqual", "equal": "Equal",
}  # fmt: skip
_REDUCTIONS = {"add": "ReduceSum", "maximum": "ReduceMax", "minimum": "ReduceMin"}


class Untraceable(ValueError):
    """The score does something that a graph cannot have."""


class Graph:
    """Nodes and arrays of a graph while it is recorded."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.arrays: list[Any] = []
        self.inputs: dict[str, Traced] = {}
        self._names: dict[int, str] = {}
        self._kept: list[np.ndarray] = []  # whose addresses are names, so that none is taken again

    def input(self, name: str, value: Float[np.ndarray, "n d"]) -> Traced:
        """An input of the graph, and what it is while the score runs."""
        self.inputs[name] = made = _traced(np.asarray(value), self, name)
        return made

    def node(self, kind: str, inputs: Sequence[str], value: np.ndarray, **attributes: Any) -> Traced:
        """What a node of this kind makes of these inputs, and its value here."""
        from onnx import helper

        name = f"{kind.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return _traced(np.asarray(value), self, name)

    def constant(self, value: Any) -> str:
        """The name of an array that is part of the graph."""
        from onnx import numpy_helper

        array = np.ascontiguousarray(value)
        known = self._names.get(id(value))
        if known is None:
            known = f"array_{len(self.arrays)}"
            self.arrays.append(numpy_helper.from_array(array.reshape(np.shape(value)), known))
            self._names[id(value)] = known
            self._kept.append(value)
        return known

    def model(self, output: Traced, name: str, described: Mapping[str, str]) -> Any:
        """The recorded graph, an ONNX model, whose output is that one."""
        from onnx import helper

        last = self.node("Identity", [_name(output, self)], output)
        last_name, self.nodes[-1].output[0] = last.name, name
        assert last_name
        graph = helper.make_graph(
            self.nodes,
            "score",
            [
                helper.make_tensor_value_info(each, _kind(of.dtype), ["batch", *of.shape[1:]])
                for each, of in self.inputs.items()
            ],
            [helper.make_tensor_value_info(name, _kind(output.dtype), ["batch", *output.shape[1:]])],
            self.arrays,
        )
        made = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="featcache"
        )
        helper.set_model_props(made, dict(described))
        return made


class Traced(np.ndarray):
    """An array, and the name of what gives it in a `graph`; "" where NumPy made it without being followed."""

    graph: Graph | None
    name: str

    def __array_finalize__(self, of: Any) -> None:
        self.graph, self.name = None, ""

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **given: Any) -> Any:
        graph = _graph(inputs)
        value = getattr(ufunc, method)(*map(_plain, inputs), **{key: _plain(each) for key, each in given.items()})
        given = {key: each for key, each in given.items() if not (each is None or (key == "where" and each is True))}
        if method == "reduce" and ufunc.__name__ in _REDUCTIONS and given.keys() <= {"axis", "keepdims", "dtype"}:
            axis, keep = given.get("axis", 0), given.get("keepdims", False)
            return _reduced(graph, _REDUCTIONS[ufunc.__name__], inputs[0], axis, keep, value)
        if method != "__call__" or given.keys() - {"dtype"}:
            raise Untraceable(f"np.{ufunc.__name__} with {', '.join([method, *given])}")
        if ufunc.__name__ == "square":
            return graph.node("Mul", [_name(inputs[0], graph)] * 2, value)
        if ufunc.__name__ not in _UFUNCS:
            raise Untraceable(f"np.{ufunc.__name__}")
        if ufunc.__name__ != "matmul":
            _refuse_rows(inputs)
        plain = [_plain(each) for each in inputs]
        compared = value.dtype == bool
        dtype = np.result_type(*plain) if compared else value.dtype
        return graph.node(_UFUNCS[ufunc.__name__], [_name(each, graph, dtype) for each in inputs], value)

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        known = _FUNCTIONS.get(function.__name__)
        if known is None:
            raise Untraceable(f"np.{function.__name__}")
        return known(*args, **kwargs)

    def __getitem__(self, key: Any) -> Any:
        return _item(self, key if isinstance(key, tuple) else (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        raise Untraceable("an item that is set")

    def astype(self, dtype: Any, *args: Any, **kwargs: Any) -> Any:
        return _cast(self, np.dtype(dtype))

    def argmax(self, axis: Any = None, *args: Any, **kwargs: Any) -> Any:
        graph, value = _graph([self]), _plain(self).argmax(axis)
        return graph.node("ArgMax", [_name(self, graph)], value, axis=_axis(axis), keepdims=0)

    def mean(self, axis: Any = None, *args: Any, **kwargs: Any) -> Any:
        graph, value = _graph([self]), _plain(self).mean(axis)
        return _reduced(graph, "ReduceMean", self, axis, False, value)

    def nearest(self, bank: Float[np.ndarray, "b d"], k: int) -> tuple[Traced, Traced]:
        """`evalsuite.neighbours.exact.search` in a bank that becomes part of the graph: cosines, float32, and rows."""
        from evalsuite.neighbours.exact import search

        graph, d = _graph([self]), self.shape[1]
        similarity, row = search([bank.astype(np.float32)], _plain(self), k)
        rows = _unit_nodes(graph, graph.constant(bank), bank)
        query = _unit_nodes(graph, _name(self, graph), _plain(self))
        across = graph.node("Transpose", [rows.name], np.zeros((d, len(bank))), perm=[1, 0])
        cosines = graph.node("MatMul", [query.name, across.name], np.zeros((len(self), len(bank))))
        within = graph.node("Max", [cosines.name, graph.constant(np.array(-1.0))], cosines)
        within = graph.node("Min", [within.name, graph.constant(np.array(1.0))], cosines)
        narrow = _cast(within, np.dtype(np.float32))  # ties of float32 go to the lower row, as there
        found = graph.node("TopK", [narrow.name, graph.constant(np.array([k]))], similarity, axis=1)
        graph.nodes[-1].output.append(f"{found.name}_row")
        return found, _traced(row, graph, f"{found.name}_row")


def score_graph(
    score: Callable[..., np.ndarray], rows: Mapping[str, Float[np.ndarray, "n _"]], described: Mapping[str, str]
) -> Any:
    """An ONNX model of `score`, a function of these fields, given by name with the values of a few rows.

    Raises `Untraceable` where a graph cannot have what it does.
    """
    graph = Graph()
    inputs = [graph.input(name, value) for name, value in rows.items()]
    found = score(*inputs)
    n = len(inputs[0])
    if not (isinstance(found, Traced) and found.name) or found.shape != (n,):
        raise Untraceable("a score that is not made of its rows by NumPy")
    return graph.model(_cast(found, np.dtype(np.float64)), "score", described)


def _traced(value: np.ndarray, graph: Graph, name: str) -> Traced:
    made = value.view(Traced)
    made.graph, made.name = graph, name
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return type(value)(map(_plain, value))
    return value.view(np.ndarray) if isinstance(value, Traced) else value


def _graph(values: Sequence[Any]) -> Graph:
    for each in values:
        if isinstance(each, Traced) and each.graph:
            return each.graph
    raise Untraceable("a view of an array")


def _refuse_rows(values: Sequence[Any]) -> None:
    """An array of the graph's own that has a row for each of the rows was made of them, in a way that was not followed."""
    traced = next(each for each in values if isinstance(each, Traced))
    for each in values:
        plain = isinstance(each, np.ndarray) and not isinstance(each, Traced)
        if plain and each.ndim == traced.ndim > 0 and 1 < len(each) == len(traced):
            raise Untraceable("rows of an array that are chosen by a row's values")


def _kind(dtype: np.dtype[Any]) -> int:
    from onnx import helper

    return int(helper.np_dtype_to_tensor_dtype(dtype))


def _name(value: Any, graph: Graph, dtype: np.dtype[Any] | None = None) -> str:
    """What gives a value in the graph, as that dtype: its node, or an array that the graph holds."""
    if isinstance(value, Traced):
        if not value.name:
            raise Untraceable("a view of an array")
        return _cast(value, dtype).name if dtype is not None else value.name
    if isinstance(value, np.ndarray) and value.dtype == dtype:
        return graph.constant(value)
    return graph.constant(np.asarray(value, dtype))


def _cast(value: Traced, dtype: np.dtype[Any]) -> Traced:
    if value.dtype == dtype:
        return value
    graph = _graph([value])
    return graph.node("Cast", [_name(value, graph)], _plain(value).astype(dtype), to=_kind(dtype))


def _axis(axis: Any) -> int:
    if isinstance(axis, int) and axis != 0:
        return axis
    raise Untraceable("a sum or an extreme over rows")


def _reduced(graph: Graph, kind: str, of: Any, axis: Any, keep: bool, value: Any) -> Traced:
    axes = graph.constant(np.array([_axis(axis)]))
    return graph.node(kind, [_name(of, graph, np.asarray(value).dtype), axes], value, keepdims=int(keep))


def _item(of: Traced, key: tuple[Any, ...]) -> Traced:
    """Slices and single columns; all rows."""
    graph, value = _graph([of]), _plain(of)
    name = _name(of, graph)
    if not all(each is None or isinstance(each, slice | int | np.integer) for each in key):
        raise Untraceable("rows or columns chosen by an array")
    axis = 0
    dropped: list[int] = []
    added: list[int] = []
    for place, each in enumerate(key):
        if each is None:
            added.append(place - len(dropped))
            continue
        size = value.shape[axis]
        if isinstance(each, slice):
            start, stop, step = each.indices(size)
        else:
            start, stop, step = each % size, each % size + 1, 1
            dropped.append(axis)
        if axis == 0 and ((start, stop, step) != (0, size, 1) or dropped):
            raise Untraceable("some of the rows")
        if (start, stop, step) != (0, size, 1) and step == 1:
            parts = [graph.constant(np.array([number])) for number in (start, stop, axis)]
            name = graph.node("Slice", [name, *parts], value).name
        elif step != 1:
            raise Untraceable("a slice with steps")
        axis += 1
    if dropped:
        name = graph.node("Squeeze", [name, graph.constant(np.array(dropped))], value).name
    if added:
        name = graph.node("Unsqueeze", [name, graph.constant(np.array(added))], value).name
    return _traced(np.ascontiguousarray(value[key]), graph, name)


def _unit_nodes(graph: Graph, name: str, rows: np.ndarray) -> Traced:
    """`featcache.geometry.unit_rows`, and in float64 again."""
    wide = graph.node("Cast", [name], rows, to=_kind(np.dtype(np.float64)))
    norm = graph.node("ReduceL2", [wide.name, graph.constant(np.array([1]))], rows[:, :1], keepdims=1)
    zero = graph.node("Equal", [norm.name, graph.constant(np.zeros(1))], rows[:, :1])
    length = graph.node("Where", [zero.name, graph.constant(np.ones(1)), norm.name], rows[:, :1])
    scaled = graph.node("Div", [wide.name, length.name], rows)
    narrow = graph.node("Cast", [scaled.name], rows, to=_kind(np.dtype(np.float32)))
    return graph.node("Cast", [narrow.name], rows, to=_kind(np.dtype(np.float64)))


def _where(condition: Any, one: Any, other: Any) -> Traced:
    graph, values = _graph([condition, one, other]), [_plain(each) for each in (condition, one, other)]
    _refuse_rows([condition, one, other])
    value = np.where(*values)
    names = [
        _name(each, graph, kind)
        for each, kind in ((condition, np.dtype(bool)), (one, value.dtype), (other, value.dtype))
    ]
    return graph.node("Where", names, value)


def _concatenate(parts: Sequence[Any], axis: int = 0) -> Any:
    if len(parts) == 1:
        return parts[0]
    graph, value = _graph(parts), np.concatenate([_plain(each) for each in parts], axis)
    if axis == 0:
        raise Untraceable("rows after rows")
    return graph.node("Concat", [_name(each, graph, value.dtype) for each in parts], value, axis=axis)


def _stack(parts: Sequence[Any], axis: int = 0) -> Any:
    """Along a new axis, which comes after the rows."""
    return _concatenate([part[(slice(None),) * _axis(axis) + (None,)] for part in parts], axis)


def _sort(of: Traced, axis: int = -1) -> Traced:
    graph, value = _graph([of]), np.sort(_plain(of), axis)
    width = graph.constant(np.array([value.shape[_axis(axis)]]))
    return _two(graph, graph.node("TopK", [_name(of, graph), width], value, axis=_axis(axis), largest=0))


def _two(graph: Graph, first: Traced) -> Traced:
    """TopK has a second output."""
    graph.nodes[-1].output.append(f"{first.name}_row")
    return first


def _norm(x: Traced, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Traced:
    if ord not in (None, 2):
        raise Untraceable(f"a norm of order {ord}")
    return _reduced(_graph([x]), "ReduceL2", x, axis, keepdims, np.linalg.norm(_plain(x), axis=axis, keepdims=keepdims))


def _take(of: Any, index: Any, axis: int | None = None) -> Traced:
    """Rows of an array of the graph's own."""
    if isinstance(of, Traced) or axis != 0:
        raise Untraceable("values chosen by an array")
    graph = _graph([index])
    return graph.node("Gather", [graph.constant(of), _name(index, graph)], np.take(of, _plain(index), 0), axis=0)


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "where": _where, "concatenate": _concatenate, "sort": _sort, "stack": _stack, "norm": _norm, "take": _take,
}  # fmt: skip
