"""The process in which a checkpoint's tokenizer and chat template run: nothing they do reaches further than this.

It is run as a script, by `text.confined`, and knows nothing of JAX. A request is a line of JSON: an operation, its
limit in seconds of processor time, its arguments. So is the reply: a kind and a value.

The kernel holds the limits, because neither a regular expression nor a list's multiplication hears of anything else:
a timer's signal, which nobody handles, ends the process; memory is bounded by RLIMIT_AS; files, sockets and processes
are bounded at none, so that an escape from Jinja's sandbox would find nothing to open.
"""

import json
import os
import resource
import signal
import sys
from collections import OrderedDict
from datetime import datetime
from functools import lru_cache
from typing import Any, BinaryIO

import jinja2
import jinja2.ext
import tokenizers
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES = 2**30
"""Address space of the process; R1's tokenizer takes 0.1 GB of it, and a text of a million characters 0.2 GB."""
KEPT_TOKENIZERS = 4
_REPLY_BYTES, _REPLY_GROWTH = 2**21, 64  # a reply's longest size: so much, and so many times the request's
_MAX_REASON_CHARS = 300
GENERATION_OPENS, GENERATION_CLOSES = "generation_opens", "generation_closes"
"""Variables of a template that are printed around what stands in its `{% generation %}` tags."""
_PRINTED = str | int | float | list | tuple | dict | jinja2.Undefined | None


class Reply(Exception):
    """An answer that is not a result.

    Attributes:
      kind: "refused" and "invalid" (no JSON), with a reason; "syntax", a template's line and a reason; "absent", a
        tokenizer that is not loaded; "unwritable", a piece of text that the vocabulary lacks and the library's reason.
    """

    def __init__(self, kind: str, value: Any):
        super().__init__(kind, value)
        self.kind, self.value = kind, value


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's text for training masks.

    A rendering passes through it, and prints two variables around it, which are nothing where nobody gives them.
    """

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        mark = lambda name: nodes.Output([nodes.Name(name, "load", lineno=line)], lineno=line)
        return nodes.Scope([mark(GENERATION_OPENS), *body, mark(GENERATION_CLOSES)], lineno=line)


class _Namespace(Namespace):
    """Jinja's namespace without private names, by which objects could pose as other types."""

    def __init__(self, /, *args: Any, **kwargs: Any):
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _refuse_private(name)
        super().__init__(attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def _refuse_private(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"got the namespace attribute {name!r}, wanted no leading underscore")


class _Environment(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        # Jinja's own answer prints as nothing until it is used.
        raise SecurityError(f"access to the attribute {attribute!r} of {type(obj).__name__} is not allowed")


def _finalize(value: Any) -> Any:
    if not isinstance(value, _PRINTED):
        raise SecurityError(f"it prints a {type(value).__name__}, wanted text or plain data")
    return value


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _environment() -> jinja2.Environment:
    environment = _Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalize,
        extensions=[_Generation, jinja2.ext.loopcontrols],
        optimized=False,  # it would write a constant ['nan' | float] into Python as the unknown name nan
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": _strftime_now,
        "namespace": _Namespace,
        "dict": lambda *args, **kwargs: dict(*args, **kwargs),
    }
    # A prompt is a function of its conversation.
    del environment.filters["random"], environment.globals["lipsum"]
    return environment


_ENVIRONMENT = _environment()
_TOKENIZERS: OrderedDict[str, tokenizers.Tokenizer] = OrderedDict()


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(template)


def render(template: str, variables: dict[str, Any]) -> str:
    """A conversation's text."""
    try:
        compiled = _compiled(template)
    except Exception as error:  # Hostile source reaches RecursionError and SyntaxError too.
        raise Reply("syntax", [getattr(error, "lineno", None), _reason(error)]) from None
    try:
        return compiled.render(variables)
    except (MemoryError, Reply):
        raise
    except Exception as error:
        raise Reply("refused", _reason(error)) from None


def load(key: str, source: str, special: list[str], names: list[str]) -> dict[str, Any]:
    """Makes a tokenizer and keeps it under a key.

    Args:
      source: tokenizer.json.
      special: tokens that the checkpoint's other files call special; those that the vocabulary lacks are left out.
      names: tokens to look up.

    Returns:
      "size", one more than the highest id; "ids", the names' ids or None; "empty", the ids of "" with what the
      post-processor adds.
    """
    try:
        inner = tokenizers.Tokenizer.from_str(source)
    except Exception:  # The library raises bare Exception, whose reason for bad JSON is often another one.
        try:
            json.loads(source)
        except (ValueError, RecursionError) as error:
            raise Reply("invalid", _reason(error)) from None
        raise
    inner.no_truncation()
    inner.no_padding()
    added = {token.content for token in inner.get_added_tokens_decoder().values()}
    known = [token for token in special if token and token not in added and inner.token_to_id(token) is not None]
    inner.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in known])
    if not inner.get_vocab_size(with_added_tokens=False):
        raise Reply("refused", "its model has an empty vocabulary, so that text is lost")
    vocabulary = inner.get_vocab(with_added_tokens=True)
    facts = {
        "size": 1 + max(vocabulary.values(), default=-1),
        "ids": {name: inner.token_to_id(name) for name in names},
        "empty": inner.encode("", add_special_tokens=True).ids,
    }
    _TOKENIZERS[key] = inner
    if len(_TOKENIZERS) > KEPT_TOKENIZERS:
        _TOKENIZERS.popitem(last=False)
    return facts


def encode(key: str, text: str) -> list[int]:
    """Token ids, without what a post-processor adds."""
    return _encoded(key, text).ids


def offsets(key: str, text: str) -> list[list[int]]:
    """The same ids, and each one's first character and the one after its last."""
    found = _encoded(key, text)
    return [found.ids, [start for start, _ in found.offsets], [end for _, end in found.offsets]]


def _encoded(key: str, text: str) -> tokenizers.Encoding:
    inner = _tokenizer(key)
    try:
        return inner.encode(text, add_special_tokens=False)
    except Exception as error:  # The library raises bare Exception.
        raise Reply("unwritable", [_unknown_piece(inner, text)[:40], _reason(error)]) from None


def decode(key: str, ids: list[int], skip_special: bool) -> str:
    """Text; ids without a token add nothing."""
    return _tokenizer(key).decode(ids, skip_special_tokens=skip_special)


def _tokenizer(key: str) -> tokenizers.Tokenizer:
    if key not in _TOKENIZERS:
        raise Reply("absent", key)
    _TOKENIZERS.move_to_end(key)
    return _TOKENIZERS[key]


def _unknown_piece(inner: tokenizers.Tokenizer, text: str) -> str:
    """The first piece of the text (a character, in `Tokenizer.characters`) that the vocabulary lacks."""
    known = inner.get_vocab(with_added_tokens=True)
    added = sorted((token.content for token in inner.get_added_tokens_decoder().values()), key=len, reverse=True)
    parts = [text]
    for token in added:
        parts = [piece for part in parts for piece in part.split(token)] if token else parts
    if inner.pre_tokenizer is not None:
        parts = [piece for part in parts for piece, _ in inner.pre_tokenizer.pre_tokenize_str(part)]
    return next((part for part in parts if part not in known), text)


def _reason(error: BaseException) -> str:
    return " ".join(str(error)[:_MAX_REASON_CHARS].split()) or type(error).__name__


OPERATIONS = {function.__name__: function for function in (render, load, encode, offsets, decode)}


def _answer(line: bytes) -> bytes:
    """The reply to a request as a line: its kind, its value, and whether the process is still sound.

    Writing it down is within the limits of the request too.
    """
    try:
        operation, seconds, *arguments = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            kind, value = "done", OPERATIONS[operation](*arguments)
        except Reply as reply:
            kind, value = reply.kind, reply.value
        answer = json.dumps([kind, value, True]).encode()
    except MemoryError:
        answer = _refusal(f"it needs more than {MEMORY_BYTES >> 20} MiB of memory", sound=False)
    except BaseException as error:  # A panic in the tokenizers library is no Exception, and leaves its locks broken.
        answer = _refusal(_reason(error), sound=isinstance(error, Exception))
    if len(answer) > _REPLY_BYTES + _REPLY_GROWTH * len(line):
        answer = _refusal(f"its result of {len(answer)} bytes is far larger than what it is made from", sound=True)
    signal.setitimer(signal.ITIMER_PROF, 0)
    return answer + b"\n"


def _refusal(reason: str, *, sound: bool) -> bytes:
    return json.dumps(["refused", reason, sound]).encode()


def _confine() -> None:
    """Gives up what is not needed any more, after everything that is imported late has been."""
    for template in (*(f"{{{{ 'a &lt; b' | {name} }}}}" for name in _ENVIRONMENT.filters), "{{ strftime_now('%c') }}"):
        try:
            render(template, {})
        except Reply:
            continue
    open_files = 4  # stdin, stdout and stderr, which lead nowhere, and the replies
    for kind, most in (
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_NOFILE, open_files),
    ):
        allowed = resource.getrlimit(kind)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(kind, (most, most))


def _serve(requests: BinaryIO) -> None:
    # The replies get a descriptor of their own: what a library prints must not be taken for one, nor be seen.
    replies = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    _confine()
    for line in requests:
        replies.write(_answer(line))
        replies.flush()


if __name__ == "__main__":
    _serve(sys.stdin.buffer)
