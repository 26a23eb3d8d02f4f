"""The program of a chat template, changed so that what it makes goes through filters that pay (bounded_jinja.py)."""

from __future__ import annotations

from typing import Any, cast

from jinja2 import Environment, nodes

_STEP = 5  # what an operation costs


def cost(node: nodes.Node) -> int:
    """Return what a part of a template costs once: its operations, and the characters that it writes by itself."""
    return sum(_STEP + len(getattr(part, "data", "")) for part in node.find_all(nodes.Node))


def watch(node: nodes.Node, environment: Environment) -> None:
    """Have lists, joined texts, slices and comparisons pay, and sums pay once."""
    for child in node.iter_child_nodes():
        watch(child, environment)
    for name, value in node.iter_fields():
        if isinstance(value, list):
            setattr(node, name, [_watched(item, environment) for item in value])
        elif isinstance(value, nodes.Node):
            setattr(node, name, _watched(value, environment))


def _watched(node: Any, environment: Environment) -> Any:
    if isinstance(node, nodes.Concat):
        return filtered("_joined", nodes.List(node.nodes, lineno=node.lineno), environment)
    if isinstance(node, nodes.Add) and (before := _summands(node.left)):
        return filtered("_added", nodes.List([*before, node.right], lineno=node.lineno), environment)
    if isinstance(node, (nodes.List, nodes.Dict)) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
        return filtered("_literal", node, environment)
    if isinstance(node, nodes.Compare):
        for left, operand in zip([node.expr, *(each.expr for each in node.ops)], node.ops, strict=False):
            if not _is_short(operand.expr) and (operand.op in ("in", "notin") or not _is_short(left)):
                operand.expr = filtered("_compared", operand.expr, environment)
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice):
        return filtered("_slice", node, environment)
    return node


def _summands(node: nodes.Node) -> list[nodes.Expr]:
    """Return what is added up in the left side of a sum; [] if that is no sum."""
    if isinstance(node, nodes.Add):
        return [node.left, node.right]
    added = isinstance(node, nodes.Filter) and node.name == "_added" and node.node
    return added.items if isinstance(added, nodes.List) else []


def _is_short(node: nodes.Node) -> bool:
    """Whether a comparison with this reads no more than the template says."""
    return isinstance(node, nodes.Const) or (isinstance(node, nodes.Filter) and node.name == "_literal")


def filtered(name: str, node: nodes.Node, environment: Environment, *args: nodes.Expr) -> nodes.Filter:
    """Return a node that passes a value through a filter of the environment."""
    made = nodes.Filter(cast(nodes.Expr, node), name, list(args), [], None, None, lineno=node.lineno)
    made.set_environment(environment)
    return made
