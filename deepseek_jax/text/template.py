"""Chat templates: Jinja programs that arrive with a checkpoint, and so are run as hostile input.

What is refused: attribute escapes (Jinja's immutable sandbox), every callable, method and filter that is not
on the short lists below, includes, imports, blocks, autoescape and recursive loops.

What is bounded: the template's size, and the work of one rendering. Work is counted in characters and list
elements made, plus the syntax-tree nodes of each loop iteration and macro call; the allowance grows linearly
with the size of the conversation. Operations whose result can be far larger than their operands (`*`, `**`,
`join`, `replace`, `range`, `indent`) are charged before they run. Output and live memory are therefore
bounded too, at a small multiple (tens of bytes) of the allowance.

What is not bounded exactly: wall-clock time. A unit of work is a fraction of a microsecond to a few
microseconds of Python, so the worst template spends some seconds before it is stopped. Compiling is bounded
only by the template's size (some seconds and some hundred megabytes at worst), and happens once for each.
"""

import contextvars
import functools
import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.filters
import jinja2.nodes as nodes
import jinja2.tests
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MAX_TEMPLATE_CHARS = 131_072
"""Longest template accepted; the longest published ones are about a tenth of it."""
BASE_WORK = 4_000_000
"""Work allowed to a rendering whatever its input."""
WORK_PER_INPUT = 50
"""Further work allowed for each character or element of the messages and variables."""
MAX_DEPTH = 100
"""Deepest nesting of lists and dictionaries."""
_MAX_INT_BITS = 1024
_MAX_PADDING = 64

_METHODS = frozenset(
    (
        "capitalize casefold count endswith find get index isalnum isalpha isdecimal isdigit islower"
        " isnumeric isspace istitle isupper items join keys lower lstrip partition removeprefix"
        " removesuffix replace rfind rindex rpartition rsplit rstrip split splitlines startswith strip"
        " swapcase title upper values"
    ).split()
)
_LOOP_METHODS = frozenset(["cycle", "changed"])
_REFUSED_NODES = (
    nodes.Block,
    nodes.Extends,
    nodes.FromImport,
    nodes.Import,
    nodes.Include,
    nodes.ScopedEvalContextModifier,
)
# A space keeps these names out of the reach of `x | name`.
_EACH, _SIZE, _STEPS, _CONCAT, _SLICED = "each step", "spend size", "spend steps", "concat all", "spend slice"


class _Meter:
    """What one rendering may still spend."""

    def __init__(self, allowance: int):
        self.allowance = allowance
        self.left = allowance

    def spend(self, amount: int) -> None:
        if amount < 0:
            raise SecurityError(f"got a negative amount of work {amount}")
        self.left -= amount
        if self.left < 0:
            raise SecurityError(
                f"it needs more than the {self.allowance} units of work (characters made, loop steps)"
                " allowed for this conversation"
            )


_METER: contextvars.ContextVar[_Meter] = contextvars.ContextVar("template_meter")


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str,
    eos_token: str,
    add_generation_prompt: bool,
    **extra: Any,
) -> str:
    """Renders a conversation with a checkpoint's chat template.

    Args:
      template: Jinja source, as in `tokenizer_config.json` or `chat_template.jinja`.
      messages: one mapping a message, of JSON values only: "role" and, for all but tool calls, "content".
      bos_token: text of the begin-of-sequence token, "" when there is none.
      eos_token: text of the end-of-sequence token, "" when there is none.
      add_generation_prompt: ends the text with the opening of the assistant's turn.
      **extra: further variables of JSON values (tools, documents, switches such as `thinking`).

    Returns:
      The prompt's text.

    Raises:
      ValueError: the messages are malformed, the template is too long or not valid Jinja, it refuses the
        conversation (`raise_exception`), or it does what a chat template may not (see the module's
        docstring).

    Source: huggingface/transformers, `utils/chat_template_utils.py` (environment and its globals).
    Differs: calls, filters and work are restricted; dictionary views are lists. Published templates render
      the same (tests/text/test_tokenizer_oracle.py).
    """
    check_messages(messages)
    variables = {
        "messages": list(messages),
        "bos_token": bos_token,
        "eos_token": eos_token,
        "add_generation_prompt": add_generation_prompt,
        **extra,
    }
    try:
        meter = _Meter(BASE_WORK + WORK_PER_INPUT * _weigh(variables, strict=True))
    except SecurityError as error:
        raise ValueError(f"chat template variables: {error}; pass strings, numbers, lists and dicts") from error
    compiled = _compile(template)
    token = _METER.set(meter)
    try:
        return compiled.render(variables)
    except Exception as error:  # Whatever a hostile template provokes, its caller sees one kind of error.
        raise ValueError(_explain("refused to render", error)) from error
    finally:
        _METER.reset(token)


def check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuses what is not a conversation.

    Args:
      messages: one mapping a message.

    Raises:
      ValueError: not a list of mappings with a string "role", a "content" of the wrong type, or no messages.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages: got {type(messages).__name__}, wanted a list of {{'role': ..., 'content': ...}};"
            " wrap a single message in a list"
        )
    if not messages:
        raise ValueError("messages: got an empty list, wanted at least one message; add the user's turn")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(
                f"messages[{index}]: got {type(message).__name__}, wanted a dict with 'role' and 'content'; build one"
            )
        if "role" not in message or not isinstance(message["role"], str):
            raise ValueError(
                f"messages[{index}]['role']: got {message.get('role')!r}, wanted a string such as 'user';"
                " give every message its role"
            )
        content = message.get("content")
        if content is None and "tool_calls" not in message:
            raise ValueError(
                f"messages[{index}]['content']: got nothing, wanted text; only a message with 'tool_calls' goes without"
            )
        if not isinstance(content, str | list | None):
            raise ValueError(
                f"messages[{index}]['content']: got {type(content).__name__}, wanted a string or a list of"
                " parts; convert it"
            )


def _explain(what: str, error: Exception) -> str:
    reason = str(error).partition("\n")[0][:300] or type(error).__name__
    where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
    return f"chat template{where}: {what}: {reason}; correct the conversation or the checkpoint's chat template"


@functools.lru_cache(maxsize=8)
def _compile(template: str) -> jinja2.Template:
    if len(template) > MAX_TEMPLATE_CHARS:
        raise ValueError(
            f"chat template: got {len(template)} characters, wanted at most {MAX_TEMPLATE_CHARS};"
            " check that the checkpoint's chat_template is a template"
        )
    environment = _environment()
    try:
        tree = _Metered(environment).visit(environment.parse(template))
        return environment.from_string(tree)
    except Exception as error:  # Hostile source reaches RecursionError, SyntaxError and MemoryError too.
        raise ValueError(_explain("does not compile", error)) from error


class _Metered:
    """Rewrites a syntax tree in place so that whatever loops, compares or copies is charged."""

    def __init__(self, environment: jinja2.Environment):
        self.environment = environment

    def visit(self, node: nodes.Node) -> nodes.Node:
        if isinstance(node, _REFUSED_NODES):
            raise SecurityError(f"{type(node).__name__.lower()} on line {node.lineno} is not allowed")
        if isinstance(node, nodes.For) and node.recursive:
            raise SecurityError(f"the recursive loop on line {node.lineno} is not allowed")
        cost = 1 + sum(1 for _ in node.find_all(nodes.Node)) if _repeats(node) else 0
        for field, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, field, [self.visit(x) if isinstance(x, nodes.Node) else x for x in value])
            elif isinstance(value, nodes.Node):
                setattr(node, field, self.visit(value))
        return self._charge(node, cost)

    def _charge(self, node: nodes.Node, cost: int) -> nodes.Node:
        match node:
            case nodes.For():
                node.iter = self._filter(node.iter, _EACH, cost)
            case nodes.Macro() | nodes.CallBlock():
                steps = self._filter(nodes.Const(cost, lineno=node.lineno), _STEPS)
                node.body.insert(0, nodes.ExprStmt(steps, lineno=node.lineno))
            case nodes.Compare():
                node.expr = self._filter(node.expr, _SIZE)
            case nodes.Operand():
                node.expr = self._filter(node.expr, _SIZE)
            case nodes.Pair() if not isinstance(node.key, nodes.Const):
                node.key = self._filter(node.key, _SIZE)
            case nodes.Getitem() if isinstance(node.arg, nodes.Slice):
                return self._filter(node, _SLICED)
            case nodes.Concat():
                return self._filter(nodes.List(node.nodes, lineno=node.lineno), _CONCAT)
            case nodes.TemplateData():
                # Only expressions pass through `finalize`, where output is charged.
                return nodes.Const(node.data, lineno=node.lineno)
        return node

    def _filter(self, node: nodes.Expr, name: str, *args: int) -> nodes.Filter:
        constants = [nodes.Const(value, lineno=node.lineno) for value in args]
        new = nodes.Filter(node, name, constants, [], None, None, lineno=node.lineno)
        return new.set_environment(self.environment)


def _repeats(node: nodes.Node) -> bool:
    return isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock)


def _weigh(value: Any, *, strict: bool) -> int:
    """Size of a value written out, shared parts counted each time; stops when a running meter is exceeded."""
    meter = _METER.get(None)
    limit = meter.left if meter is not None else None
    total = 0
    stack = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        total += 1
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, int):
            total += item.bit_length() // 8
        elif isinstance(item, Mapping | list | tuple):
            if depth == MAX_DEPTH:
                raise SecurityError(f"lists and dicts are nested more than {MAX_DEPTH} deep")
            total += len(item)
            children = [*item.keys(), *item.values()] if isinstance(item, Mapping) else item
            stack.extend((child, depth + 1) for child in children)
        elif strict and not (item is None or isinstance(item, float | Undefined)):
            raise SecurityError(f"got a {type(item).__name__}, wanted plain data")
        if meter is not None and total > limit:
            meter.spend(total)
    return total


def _spend_size(value: Any) -> Any:
    _METER.get().spend(_weigh(value, strict=False))
    return value


def _spend_plain(value: Any) -> Any:
    _METER.get().spend(_weigh(value, strict=True))
    return value


def _spend_length(value: Any) -> Any:
    _METER.get().spend(1 + (len(value) if isinstance(value, str | list | tuple | dict) else 0))
    return value


def _each(iterable: Iterable[Any], cost: int = 1) -> Iterator[Any]:
    meter = _METER.get()
    for item in iterable:
        meter.spend(cost)
        yield item


def _concat(values: list[Any]) -> str:
    return "".join(str(_spend_plain(value)) for value in values)


@jinja2.pass_environment
def _join(environment: jinja2.Environment, value: Iterable[Any], d: str = "", attribute: str | None = None) -> str:
    items = _each(value)
    if attribute is not None:
        items = map(jinja2.filters.make_attrgetter(environment, attribute), items)
    pieces = [str(_spend_plain(item)) for item in items]
    separator = str(_spend_plain(d))
    _METER.get().spend(len(separator) * len(pieces))
    return separator.join(pieces)


def _replace(text: str, old: str, new: str, count: int | None = None) -> str:
    text, old, new = (str(_spend_plain(value)) for value in (text, old, new))
    limit = -1 if count is None else count
    found = text.count(old)
    _METER.get().spend(len(text) + len(new) * (found if limit < 0 else min(found, limit)))
    return text.replace(old, new, limit)


def _strip(method: Callable[..., str], text: str, chars: str | None = None) -> str:
    # Python looks for each character of the text in all of `chars`.
    _METER.get().spend(len(text) * (1 if chars is None else len(chars)))
    return method(chars)


def _trim(value: str, chars: str | None = None) -> str:
    text = str(_spend_plain(value))
    return _strip(text.strip, text, chars)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    if (indent is not None and not 0 <= indent <= _MAX_PADDING) or any(len(s) > 8 for s in separators or ()):
        raise SecurityError(f"tojson: got indent {indent!r} or separators too large")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    _spend_plain(value)
    return "".join(_spend_size(piece) for piece in encoder.iterencode(value))


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    padding = len(width) if isinstance(width, str) else width
    if padding > _MAX_PADDING:
        raise SecurityError(f"indent: got a width of {padding}, wanted at most {_MAX_PADDING}")
    text = str(_spend_plain(text))
    _METER.get().spend(padding * (1 + len(text.splitlines())))
    return jinja2.filters.do_indent(text, width, first, blank)


def _plain_list(value: Any) -> Any:
    """Turns lazy sequences into lists, so that they can be weighed."""
    return list(value) if isinstance(value, Iterator) else value


def _charged(function: Callable[..., Any], spend: Callable[[Any], Any], repeats: int = 1) -> Callable[..., Any]:
    """A filter or test that pays `repeats` times for its arguments, and once for its result."""
    skipped = 1 if "jinja_pass_arg" in vars(function) else 0

    # Keeps `jinja_pass_arg`, by which Jinja knows to pass the environment first.
    @functools.wraps(function, assigned=("__name__",))
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if spend is _spend_plain:
            args = tuple(_plain_list(arg) for arg in args)
        for argument in (*args[skipped:], *kwargs.values()):
            for _ in range(repeats):
                spend(argument)
        result = function(*args, **kwargs)
        return _each(result) if isinstance(result, Iterator) else _spend_length(result)

    return wrapper


def _filters() -> dict[str, Callable[..., Any]]:
    known = jinja2.filters.FILTERS
    shallow = "abs count d default first items last length list map reverse safe"
    shallow += " reject rejectattr select selectattr"
    deep = "capitalize dictsort e escape float int lower max min string title unique upper"
    own = {"tojson": _tojson, "indent": _indent, "join": _join, "replace": _replace, "trim": _trim}
    return {
        **{name: _charged(_python(known[name]), _spend_length) for name in shallow.split()},
        **{name: _charged(_python(known[name]), _spend_plain) for name in deep.split()},
        # Sorting compares each item about log2(n) times.
        "sort": _charged(known["sort"], _spend_plain, repeats=20),
        **own,
        _EACH: _each,
        _SIZE: _spend_size,
        _STEPS: lambda steps: _METER.get().spend(steps),
        _CONCAT: _concat,
        _SLICED: _spend_length,
    }


def _tests() -> dict[str, Callable[..., Any]]:
    structural = "boolean callable defined divisibleby even false float integer iterable mapping none number odd"
    structural += " sameas sequence string true undefined"
    shallow = frozenset(structural.split())
    return {
        name: _charged(_python(function), _spend_length if name in shallow else _spend_size)
        for name, function in jinja2.tests.TESTS.items()
        if name not in ("filter", "test", "escaped")
    }


def _python(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps built-ins such as `len`, whose attributes `functools.wraps` cannot copy."""
    if isinstance(function, types.FunctionType):
        return function
    return lambda *args, **kwargs: function(*args, **kwargs)


def _range(*args: int) -> list[int]:
    numbers = range(*args)
    _METER.get().spend(len(numbers))
    return list(numbers)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(str(_spend_plain(message)))


def _strftime_now(form: str) -> str:
    # Widths such as %999999Y are an extension of some C libraries.
    if len(form) > 100 or re.search(r"%[^A-Za-z%]", form):
        raise SecurityError("strftime_now: got a format that is too long or has widths")
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*(_plain_list(arg) for arg in args), **kwargs)


class _Namespace(Namespace):
    """Jinja's namespace without private names, by which objects could pose as other types."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _Namespace._check(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: str) -> None:
        if str(name).startswith("_"):
            raise SecurityError(f"got the namespace attribute {name!r}, wanted no leading underscore")


class _Environment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox, with callables on a list and operators on a meter."""

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "**", "%"])

    def call(self, context: Any, function: Any, *args: Any, **kwargs: Any) -> Any:
        # Jinja adds the enclosing scopes, which only its own callables take.
        given = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
        for value in (*args, *given.values()):
            _spend_size(value)
        if isinstance(function, types.BuiltinMethodType | types.MethodType):
            return self._call_method(function.__self__, function.__name__, function, args, given)
        known = any(function is allowed for allowed in _GLOBALS.values())
        if not known and not isinstance(function, Macro | Undefined):
            raise SecurityError(f"a call of {type(function).__name__} is not allowed")
        return super().call(context, function, *args, **kwargs)

    def _call_method(self, owner: Any, name: str, method: Any, args: tuple, kwargs: dict) -> Any:
        allowed = _LOOP_METHODS if isinstance(owner, LoopContext) else _METHODS
        if not isinstance(owner, str | list | tuple | dict | LoopContext) or name not in allowed:
            raise SecurityError(f"a call of the method {name!r} of {type(owner).__name__} is not allowed")
        if isinstance(owner, str) and name == "join":
            return _join(self, *args, d=owner, **kwargs)
        if isinstance(owner, str) and name == "replace":
            return _replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name in ("strip", "lstrip", "rstrip"):
            return _strip(method, owner, *args)
        if isinstance(owner, dict):
            _spend_length(owner)
        elif not isinstance(owner, LoopContext):
            _spend_size(owner)
        result = method(*args, **kwargs)
        if isinstance(owner, str):
            return _spend_size(result)
        # Views would escape weighing.
        return list(result) if name in ("items", "keys", "values") else result

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        meter = _METER.get()
        meter.spend(1)
        sequence = str | list | tuple
        if operator == "+" and isinstance(left, sequence) and isinstance(right, sequence):
            meter.spend(len(left) + len(right))
        elif operator == "*" and isinstance(left, sequence) != isinstance(right, sequence):
            many, times = (left, right) if isinstance(left, sequence) else (right, left)
            meter.spend(len(many) * max(times, 0) if isinstance(times, int) else 0)
        elif operator == "%" and isinstance(left, str):
            if not re.fullmatch(r"(?:[^%]|%[%sdir])*", left):
                raise SecurityError("'%' formatting with anything but %s, %d, %i and %r is not allowed")
            _spend_plain(left)
            _spend_plain(right)
        else:
            self._check_numbers(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _check_numbers(self, operator: str, left: Any, right: Any) -> None:
        for value in (left, right):
            if isinstance(value, int) and value.bit_length() > _MAX_INT_BITS:
                raise SecurityError(f"arithmetic on integers of over {_MAX_INT_BITS} bits is not allowed")
        if operator == "**" and isinstance(right, int) and right > _MAX_INT_BITS:
            raise SecurityError(f"a power of over {_MAX_INT_BITS} is not allowed")

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja's own answer prints as nothing until it is used.
        raise SecurityError(f"access to the attribute {attribute!r} of {type(obj).__name__} is not allowed")

    def getitem(self, obj: Any, argument: Any) -> Any:
        _spend_size(argument)
        return super().getitem(obj, argument)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training masks; a rendering passes through it."""

    tags = {"generation"}

    def parse(self, parser: Any) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@jinja2.pass_context
def _finalize(context: Any, value: Any) -> Any:
    # Taking the context keeps Jinja from evaluating output while it compiles.
    return _spend_plain(value)


_GLOBALS: dict[str, Callable[..., Any]] = {
    "range": _range,
    "dict": _dict,
    "namespace": _Namespace,
    "raise_exception": _raise_exception,
    "strftime_now": _strftime_now,
}


@functools.cache
def _environment() -> _Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        optimized=False,  # Folding constants would run filters before there is a meter.
        finalize=_finalize,
        extensions=[_Generation, jinja2.ext.loopcontrols],
    )
    environment.filters = _filters()
    environment.tests = _tests()
    environment.globals = dict(_GLOBALS)
    return environment
