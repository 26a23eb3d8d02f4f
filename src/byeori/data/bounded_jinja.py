"""Chat templates are programs of strangers: Jinja in transformers' sandbox, with bounded work.

    template ──> a loop, a call, a filter, + * % ** ~ [...] ──> pays for what it is about to make ──> text

The sandbox keeps a template away from the system, not from `'a' * 10**10`, loops inside loops, or a macro that calls
itself twice. Here everything that takes time or memory is paid in advance from a budget that grows with the
conversation; today's templates use a tenth of it at most. What is rendered is what transformers renders.
"""

from __future__ import annotations

import functools
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from jinja2 import Environment, nodes, pass_context, pass_environment
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from byeori.data.jinja_nodes import cost, filtered, watch
from byeori.errors import ByeoriError, ModelError, TemplateError
from byeori.support.text_files import one_line

_SOURCE = 1_000_000  # characters of a template; the longest of a known model has 20,000
_WORK, _WORK_EACH = 50_000_000, 3_000  # characters made or read, and for each character of the messages
_ONE, _ONE_EACH = 1_000_000, 20  # characters or items of one value
_CALL = 50  # what it costs to come here, beside what is made
_BITS = 4_096
_FILTERS_LEFT_OUT = ("urlize", "wordwrap", "xmlattr", "pprint")  # quadratic in their input
# Marks a template as compiled here: transformers keeps compiled templates by their text. `+` keeps a line break behind.
_MARK = "{# bounded +#}"
_MANY: tuple[Any, ...] = (list, tuple, type({}.items()), type({}.values()), type({}.keys()))
_SIZED = (str, dict, bytes, range, *_MANY)
_WIDE = re.compile(r"\d{4,}|\*")
_OF_DICT = frozenset(dir(dict))
_OF_STR = frozenset(name for name in dir(str) if not name.startswith(("_", "format")))
_OF_LOOP = frozenset(name for name in dir(LoopContext) if not name.startswith("_"))
_TEXT = {str}
_PLAIN = (str, int, bool, list, dict)
_lock = threading.RLock()


class _Budget:
    """given, left: what may be spent on this text, altogether and still. one: how large one value may be.

    There is one, since one text is rendered at a time.
    """

    __slots__ = ("given", "left", "one")

    def __init__(self) -> None:
        self.begin(0)

    def begin(self, size: int) -> None:
        self.given = self.left = _WORK + _WORK_EACH * size
        self.one = _ONE + _ONE_EACH * size

    def spend(self, units: int, size: int = 0) -> None:
        self.left -= units + size
        if self.left < 0 or size > self.one:
            raise ModelError(
                "the tokenizer's chat template does far more work than one conversation needs (an endless loop, or a "
                "huge text); give another one with --chat_template"
            )


_budget = _Budget()


def render(tokenizer: Any, messages: Sequence[Any], *, chat_template: str | None = None, **options: Any) -> str:
    """Return the text of `tokenizer.apply_chat_template(messages, tokenize=False, **options)`.

    Raises:
        ModelError: if the template does too much work.
        TemplateError: if it refuses the messages.
    """
    from transformers.utils import chat_template_utils

    template = None
    if getattr(tokenizer, "chat_template", None):  # a tokenizer of another library writes its turns itself
        template = _marked(str(tokenizer.get_chat_template(chat_template, options.get("tools"))))
    try:
        with _lock:
            _budget.begin(sum(map(_characters, messages)) + len(str(options.get("tools"))))
            chat_template_utils.ImmutableSandboxedEnvironment = _BoundedEnvironment
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
            finally:
                chat_template_utils.ImmutableSandboxedEnvironment = ImmutableSandboxedEnvironment
    except ByeoriError:
        raise
    except Exception as error:  # whatever a stranger's program can raise, and the compiler on its source
        reason = one_line(error) or type(error).__name__
        raise TemplateError(f"the tokenizer's chat template refuses these messages: {reason}") from None
    return str(text)


@functools.lru_cache(16)
def _marked(template: str) -> str:
    if len(template) > _SOURCE:
        raise ModelError(f"the chat template has {len(template):,} characters, more than {_SOURCE:,}")
    return _MARK + template


def _characters(message: Any) -> int:
    """Return about how long a message is in Python's notation, which is slow to write."""
    if not isinstance(message, dict):
        return len(str(message))
    lengths = [len(value) if type(value) is str else len(str(value)) for value in message.values()]
    return sum(lengths) + 16 * len(lengths)


def spent() -> float:
    """Return the share of the budget that the last text took."""
    return 1 - _budget.left / _budget.given


class _BoundedEnvironment(ImmutableSandboxedEnvironment):
    """Nothing is folded into a constant: what a template makes, it makes and pays while it is rendered."""

    intercepted_binops = frozenset({"+", "*", "**", "%", "//"})

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, finalize=_shown, optimized=False, **kwargs)
        del self.globals["lipsum"]
        kept = {name: made for name, made in self.filters.items() if name not in _FILTERS_LEFT_OUT}
        own = {made.__name__: made for made in (_each, _literal, _joined, _added, _slice, _compared)}
        self.filters = _Filters({name: _paid(name, made) for name, made in kept.items()} | own)
        self.body: dict[str, int] = {}  # of each macro, and of the whole template ("")

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        self.body = {"": cost(source), "caller": sum(map(cost, source.find_all(nodes.CallBlock)))}
        self.body |= {macro.name: cost(macro) for macro in source.find_all(nodes.Macro)}
        for loop in source.find_all(nodes.For):
            loop.iter = filtered("_each", loop.iter, self, nodes.Const(cost(loop)))
        watch(source, self)
        return super()._generate(source, *args, **kwargs)

    def getattr(self, obj: Any, attribute: str) -> Any:
        # what the sandbox finds after a long search, which pays for the counting here
        if type(obj) is dict and attribute in obj and attribute not in _OF_DICT:
            return obj[attribute]
        if (type(obj) is str and attribute in _OF_STR) or (type(obj) is LoopContext and attribute in _OF_LOOP):
            return getattr(obj, attribute)
        if isinstance(obj, Namespace) and attribute[0] != "_":
            found = getattr(obj, attribute, None)
            if type(found) in _PLAIN:
                return found
        return super().getattr(obj, attribute)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:  # the most frequent one by far
            _budget.spend(_CALL, len(left) + len(right))
            return left + right
        _budget.spend(_CALL, _size_of_binop(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __called: Any, *args: Any, **kwargs: Any) -> Any:
        args = _read(args)
        values = (*args, *_read(kwargs.values()))
        if isinstance(__called, Macro):
            _budget.spend(__self.body.get(__called.name, 0))
        if isinstance(__called, LoopContext):
            _budget.spend(_size(values[0]) * __self.body[""])
        if isinstance(getattr(__called, "__self__", None), (str, bytes, int)):
            _check_method(__called, values)
        return _made(super().call(__context, __called, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Any:
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        @functools.wraps(wrapped)
        def formatted(*args: Any, **kwargs: Any) -> str:
            text = value.__self__
            if _WIDE.search(text) or re.search(r"\{[^{}]*\{", text.replace("{{", "")):
                _budget.spend(0, _budget.one + 1)  # a width that is computed, or of 1,000
            _budget.spend(0, len(text) + text.count("{") * _expanded([args, kwargs], _budget.one))
            return str(wrapped(*args, **kwargs))

        return formatted


class _Filters(dict[str, Any]):
    """A filter that is added later (transformers' tojson) pays as well."""

    def __setitem__(self, name: str, made: Any) -> None:
        super().__setitem__(name, _paid(name, made))


def _paid(name: str, made: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that pays for what it reads and makes."""

    @functools.wraps(made)  # with the mark of filters that are given the context
    def filtered(*args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and type(args[0]) is str:  # `content | trim`
            _budget.spend(_CALL + len(args[0]))
            return _made(made(args[0]))
        args = _read(args)
        given = args[1:] if isinstance(args[0], (Context, nodes.EvalContext, Environment)) else args
        if more := (*given[1:], *kwargs.values()):
            _check_filter(name, given[0], more)
        elif name in ("join", "sum", "string", "list", "tojson", "upper", "lower"):
            _budget.spend(0, _expanded(given, _budget.one))
        return _made(made(*args, **kwargs))

    return filtered


def _check_filter(name: str, read: Any, more: Sequence[Any]) -> None:
    """Pay for what the arguments of a filter ask for, before it is made."""
    wide = max(abs(value) if isinstance(value, int) else _size(value) for value in more)
    size = _expanded([read], _budget.one)
    if name == "replace" and len(more) > 1:
        _budget.spend(0, size + str(read).count(str(more[0])) * _size(more[1]))
    elif name == "format":
        _budget.spend(0, _formatted(str(read), more))
    elif name == "indent":
        _budget.spend(0, size + wide * (str(read).count("\n") + 1))
    elif name in ("tojson", "join"):
        _budget.spend(0, size + wide * (size if name == "tojson" else _size(read)))
    else:
        _budget.spend(0, size + wide)


def _check_method(called: Any, values: Sequence[Any]) -> None:
    """Pay for what the arguments of a method of a text or number ask for, before it is made."""
    owner, name = called.__self__, called.__name__
    _budget.spend(_size(owner), sum(abs(value) for value in values if isinstance(value, int)))
    if not isinstance(owner, (str, bytes)) or not values:
        return
    first = values[0]
    if name == "replace" and len(values) > 1:  # of other types it raises
        _budget.spend(0, len(owner) + called.__self__.count(first) * _size(values[1]))
    elif name == "join":
        _budget.spend(0, _expanded(values, _budget.one) + len(owner) * _size(first))
    elif name == "expandtabs" and isinstance(first, int):
        _budget.spend(0, len(owner) * abs(first))
    elif name == "translate":
        texts = first.values() if isinstance(first, dict) else ()
        _budget.spend(0, len(owner) * max(map(_size, texts), default=1))


def _size_of_binop(operator: str, left: Any, right: Any) -> int:
    """Return how large the result of an operator may be."""
    both = (left, right)
    if operator == "%" and isinstance(left, (str, bytes)):
        return _formatted(str(left), right if isinstance(right, tuple) else [right])
    if operator == "+":
        return _size(left) + _size(right)
    if operator == "*":
        for many, times in (both, both[::-1]):
            if isinstance(many, (str, bytes, list, tuple)) and isinstance(times, int):
                return _expanded([many], _budget.one) * max(0, times)
    bits = [value.bit_length() for value in both if isinstance(value, int)]
    if operator == "**" and isinstance(right, int):
        bits.append(sum(bits[:1]) * abs(right))
    return _budget.one + 1 if max(bits, default=0) > _BITS else 0


def _formatted(text: str, values: Sequence[Any]) -> int:
    """Return how long a text may be that is formatted by `%`."""
    if any(_WIDE.search(field) for field in re.findall(r"%(?:\([^)]*\))?([^a-zA-Z%]*)", text)):
        return _budget.one + 1
    return len(text) + text.count("%") * (1_000 + _expanded(values, _budget.one))


@pass_context
def _each(context: Context, values: Any, cost: int) -> Any:
    """What a loop goes over. cost: of one turn."""
    if not hasattr(values, "__len__"):
        values = _listed(iter(values))
    _budget.spend(len(values) * cost)
    return values


def _read(values: Iterable[Any]) -> tuple[Any, ...]:
    """Pay for a call that reads values; returns them, with lists for iterators."""
    units, read = _CALL, []
    for value in values:
        if type(value) is str:
            units += len(value)
        else:
            value = _listed(value)
            units += _size(value)
        read.append(value)
    _budget.spend(units)
    return tuple(read)


def _listed(value: Any) -> Any:
    """An iterator as a list, which is paid item by item; any other value as it is."""
    if not hasattr(type(value), "__next__") or isinstance(value, LoopContext):
        return value
    found = []
    for item in value:
        _budget.spend(_CALL)
        found.append(item)
    return found


def _literal(values: Any) -> Any:
    """A list, tuple or object that the template writes: it may hold the same value many times over."""
    _budget.spend(_CALL, _expanded([values], _budget.one))
    return values


def _joined(values: list[Any]) -> str:
    _budget.spend(_CALL, _expanded(values, _budget.one))
    return "".join(map(str, values))


@pass_environment
def _added(environment: _BoundedEnvironment, values: list[Any]) -> Any:
    """The sum of several values: of texts, as they are most often, in one go."""
    if set(map(type, values)) == _TEXT:
        _budget.spend(_CALL, sum(map(len, values)))
        return "".join(values)
    return functools.reduce(lambda left, right: environment.call_binop(None, "+", left, right), values)


def _compared(value: Any) -> Any:
    """What is searched, or compared with something that is not written out in the template."""
    _budget.spend(_CALL + (len(value) if type(value) is str else _expanded([value], _budget.one)))
    return value


def _slice(values: Any) -> Any:
    _budget.spend(_CALL + _size(values))
    return values


def _made(value: Any) -> Any:
    if type(value) is str:
        _budget.spend(0, len(value))
        return value
    _budget.spend(0, _expanded([value], _budget.one) if isinstance(value, (list, tuple, dict)) else _size(value))
    return value


@pass_context
def _shown(context: Context, value: Any) -> Any:
    """What is written into the text."""
    _budget.spend(_CALL, len(value) if type(value) is str else _expanded([value], _budget.one))
    return value


def _size(value: Any) -> int:
    return len(value) if isinstance(value, _SIZED) else 1


def _expanded(values: Iterable[Any], limit: int) -> int:
    """How many characters and items there are in values and in what they hold, counted to no more than a limit."""
    total, left = 0, list(values)
    while left and total <= limit:
        value = left.pop()
        total += 1
        if isinstance(value, (str, bytes)):
            total += len(value)
        elif isinstance(value, dict):
            left += value.keys()
            left += value.values()
        elif isinstance(value, _MANY):
            left += value
        elif isinstance(value, Namespace):  # written out it shows all that it holds, which no template wants
            total += 1 + limit
    return total
