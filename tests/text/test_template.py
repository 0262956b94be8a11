"""Laws of the chat template: it renders as Jinja does, and a hostile one is stopped, with a reason."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time

import pytest

from deepseek_jax.text import confined
from deepseek_jax.text.template import MAX_TEMPLATE_CHARS, render
from tests.text.peaks import peaks

USER = [{"role": "user", "content": "hi"}]


def forever(body):
    """As many rounds as Jinja's limit of a range's length leaves, which is as good as for ever."""
    return "{% for i in range(99999) %}{% for j in range(99999) %}" + body + "{% endfor %}{% endfor %}"


GROW = "{% set ns = namespace(s='aaaaaaaa', l=[1], m=[1], t=(1,)) %}{% for i in range(64) %}"


def show(template, messages=USER, **extra):
    names = {"bos_token": "<b>", "eos_token": "<e>", "add_generation_prompt": True, **extra}
    return render(template, messages, **names)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}{% for m in messages %}{{ m.role }}:{{ m['content'] }}{{ eos_token }}{% endfor %}", 
         "<b>user:hi<e>"),
        ("{% if add_generation_prompt %}A{% endif %}", "A"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
        ("{{ {'a': '<é>', 'b': [1, none]} | tojson }}", '{"a": "<é>", "b": [1, null]}'),
        ("{{ {'a': [1]} | tojson(indent=2) }}", '{\n  "a": [\n    1\n  ]\n}'),
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{% for x in 'ab' %}{{ x }}{{ '.' if loop.last else ',' }}{{ loop.length }}{% endfor %}", "a,2b.2"),
        ("{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f('a') ~ 1 ~ f(none) }}", "[a]1[None]"),
        ("{% macro f() %}<{{ caller() }}>{% endmacro %}{% call f() %}in{% endcall %}", "<in>"),
        ("{% generation %}kept{% endgeneration %}", "kept"),
        ("{{ 'a</think>b</think>c'.split('</think>')[-1] }}", "c"),
        ("{{ ' a '.strip() + 'b' * 2 + ('%s-%d' % ('x', 3)) }}", "abbx-3"),
        ("{{ ['b', 'a'] | sort | join('+') }} {{ '-'.join(['x', 'y']) }}", "a+b x-y"),
        ("{{ messages | map(attribute='role') | list | length }}", "1"),
        ("{{ messages | selectattr('role', 'equalto', 'user') | list | length }}", "1"),
        ("{% for k, v in {'a': 1}.items() %}{{ k }}{{ v }}{% endfor %}", "a1"),
        ("{% for k, v in {'b': 1, 'a': 2} | dictsort %}{{ k }}{{ v }}{% endfor %}", "a2b1"),
        ("{{ messages[::-1][0]['content'][1:] }}", "i"),
        ("{% set x %}{{ 'a' }}b{% endset %}{{ x | upper }}", "AB"),
        ("{% set s = namespace(n=0) %}{% for i in [3] %}{% set s.n = s.n + i %}{% endfor %}{{ s.n }}", "3"),
        ("{{ 'aXbX'.replace('X', '--', 1) }}{{ 'XX' | replace('X', 'y') }}", "a--bXyy"),
        ("{{ 'a\nb' | indent(2) }}|{{ '  a' | trim }}|{{ 'xax'.strip('x') }}", "a\n  b|a|a"),
        ("{{ x is defined }}{{ x | default('d') }}{{ messages[0].content is string }}", "FalsedTrue"),
        ("{{ dict(a=1)['a'] }}{{ 7 // 2 }}{{ 2 ** 3 }}", "138"),
        ("{% set x = ['nan' | float, 'inf' | float] %}{{ x }}", "[nan, inf]"),
    ],
)  # fmt: skip
def test_renders_as_jinja(template, expected):
    assert show(template) == expected


def test_extra_variables_reach_the_template():
    assert show("{{ tools is none }}{{ thinking }}", tools=None, thinking=True) == "TrueTrue"


def test_strftime_now_gives_the_year():
    assert show("{{ strftime_now('%Y') }}") == time.strftime("%Y")


def test_raise_exception_carries_the_templates_reason():
    with pytest.raises(ValueError, match="roles must alternate"):
        show("{{ raise_exception('roles must alternate') }}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ ''.__class__.__mro__ }}", "__class__"),
        ("{{ messages.__class__ }}", "__class__"),
        ("{{ messages['__class__'] }}", "__class__"),
        ("{{ raise_exception.__globals__ }}", "__globals__"),
        ("{{ [''] | map(attribute='__class__') | list }}", "__class__"),
        ("{{ '' | attr('__class__') }}", "__class__"),
        ("{{ '{0.__class__}'.format(1) }}", "__class__"),
        ("{{ '{0.__class__}' | format(1) }}", "not all arguments converted"),
        ("{{ ('{0.__class__}' | attr('format'))(1) }}", "__class__"),
        ("{{ ['{0.__class__}'] | map('format', 1) | list }}", "not all arguments converted"),
        ("{{ '{a.__class__}'.format_map({'a': 1}) }}", "__class__"),
        ("{{ cycler.__init__.__globals__ }}", "__init__"),
        ("{{ joiner.__call__ }}", "__call__"),
        ("{{ dict.__globals__ }}", "__globals__"),
        ("{{ namespace.__init__ }}", "__init__"),
        ("{{ self.__init__ }}", "__init__"),
        ("{{ self._TemplateReference__context }}", "_TemplateReference__context"),
        ("{{ loop.__class__ }}{% for i in [1] %}{{ loop.__class__ }}{% endfor %}", "__class__"),
        ("{% for i in [1] %}{{ loop._iterator.gi_frame }}{% endfor %}", "_iterator"),
        ("{% macro m() %}{% endmacro %}{{ m._func.__code__ }}", "_func"),
        ("{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}", "__class__"),
        ("{{ (messages | map('upper')).gi_frame.f_globals }}", "gi_frame"),
        ("{{ messages | groupby('__class__') }}", "__class__"),
        ("{{ messages | selectattr('__class__') | list }}", "__class__"),
        ("{{ messages | sort(attribute='__class__') }}", "__class__"),
        ("{{ messages | sum(attribute='__class__') }}", "__class__"),
        ("{{ messages | unique(attribute='__class__') | list }}", "__class__"),
        ("{{ messages | join(attribute='__class__') }}", "__class__"),
        ("{{ messages | map('attr', '__class__') | list | first }}", "__class__"),
        ("{{ messages | map('spend steps') | list }}", "No filter named"),
        ("{{ [0] | map('each step', 0) | list }}", "No filter named"),
        ('{{ 1 is "spend size" }}', "expected token"),
        ("{{ messages | reject('spend slice') | list }}", "No test named"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "underscore"),
        ("{{ namespace(__html__=1) }}", "underscore"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].pop('role') }}", "pop"),
        ("{{ messages.extend([1]) }}", "extend"),
        ("{{ messages | attr('clear') }}", "clear"),
        ("{{ messages[0].update(a=1) }}", "update"),
        ("{{ self }}", "plain data"),
        ("{{ range }}", "plain data"),
        ("{{ messages.index }}", "plain data"),
        ("{{ namespace(a=1) }}", "plain data"),
        ("{% include 'x' %}", "no loader"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'x' as y %}", "no loader"),
        ("{% from 'x' import y %}", "no loader"),
        ("{% extends 'x' %}", "no loader"),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ [1, 2] | random }}", "random"),
        ("{{ open('/etc/passwd') }}", "'open' is undefined"),
        ("{{ environment.globals }}", "'environment' is undefined"),
        ("{{ context.vars }}", "'context' is undefined"),
        ("{{ __builtins__.open }}", "undefined"),
        ("{{ super() }}", "'super' is undefined"),
        ("{{ caller() }}", "'caller' is undefined"),
    ],
)
def test_escapes_are_refused(template, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        show(template)
    assert "\n" not in str(caught.value)


HOSTILE = {
    "range": "{% for i in range(10**9) %}{% endfor %}",
    "range list": "{{ range(10**9) | list }}",
    "range beyond len": "{% for i in range(0, 10**30) %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loop that tests": "{% for i in range(9999) if range(9999) | select('odd') | list == 0 %}{% endfor %}",
    "large body": "{% for i in range(999999) %}" + "{% if i %}{% endif %}" * 5000 + "{% endfor %}",
    "data in a buffer": "{% set x %}" + forever("x" * 60_000) + "{% endset %}",
    "output": "{% for i in range(9999) %}" + "x" * 60_000 + "{% endfor %}",
    "times": "{{ 'a' * 10**9 }}",
    "times reversed": "{{ 10**9 * [1] }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "powers": "{{ (10 ** 1000) ** 1000 }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format": "{{ '{:>1000000000}'.format(1) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a' | center(10**9) }}",
    "center mapped": "{{ ['a'] | map('center', 10**9) | list }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\t'.expandtabs(10**9) }}",
    "batch": "{{ [1] | batch(10**9, 'x') | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "indent": "{{ 'a\n' * 9 | indent(10**9) }}",
    "tojson indent": "{{ [[1]] | tojson(indent=10**9) }}",
    "concat doubling": GROW + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "plus doubling": GROW + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "set doubling": GROW + "{% set ns.s %}{{ ns.s }}{{ ns.s }}{% endset %}{% endfor %}",
    "list doubling": GROW + "{% set ns.l = ns.l + ns.l %}{% endfor %}",
    "replace": "{% set s = 'a' * 99999 %}{{ s.replace('a', s) }}",
    "replace filter": "{% set s = 'a' * 99999 %}{{ s | replace('', s) }}",
    "join": "{% set s = 'a' * 99999 %}{{ s.join(s) }}",
    "join filter": "{% set s = 'a' * 99999 %}{{ s | join(s) }}",
    "strip": "{% set s = 'a' * 999999 %}{{ s.strip('b' * 999999 ~ 'a') }}",
    "trim": "{% set s = 'a' * 999999 %}{{ s | trim('b' * 999999 ~ 'a') }}",
    "shared lists printed": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l }}",
    "shared lists as json": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | tojson }}",
    "shared lists compared": GROW
    + "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}{{ ns.l == ns.m }}",
    "shared lists tested": GROW
    + "{% set ns.l = [ns.l, ns.l] %}{% set ns.m = [ns.m, ns.m] %}{% endfor %}{{ ns.l is eq(ns.m) }}",
    "shared tuples hashed": GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {ns.t: 1} }}",
    "shared tuples looked up": GROW + "{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {'a': 1}[ns.t] }}",
    "shared namespaces": "{% set ns = namespace(n=1) %}{% for i in range(64) %}"
    "{% set ns.n = namespace(a=ns.n, b=ns.n) %}{% endfor %}{{ ns.n | string }}",
    "macro tree": "{% macro m(n) %}{% if n %}{{ m(n-1) }}{{ m(n-1) }}{% endif %}{% endmacro %}{{ m(99) }}",
    "macro without end": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "comparisons": "{% set a = messages[0].role * 10**6 %}{% set b = a ~ 'x' %}{% set c = a ~ 'y' %}"
    + forever("{% if b == c %}{% endif %}"),
    "searches": "{% set a = messages[0].role * 10**6 %}" + forever("{% if 'b' in a %}{% endif %}"),
    "slices": "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "sorts": "{% for i in range(999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "parentheses": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "sum of many": "{{ " + "+".join("1" * 20_000) + " }}",
    "many loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
    # Each of these is a way around counting: nothing here is charged anywhere, and yet it ends.
    "steps through a filter": forever("{{ range(99999) | map('string') | join | length }}"),
    "not a number": "{% set n = '9' * 999 | length %}{% set x = 'nan' | float %}" + "{% for i in range(99999) %}" * 3
    + "{{ x * i }}" + "{% endfor %}" * 3,
    "infinite float": "{{ 'a' * (('1e999' | float) | int) }}",
    "cycle of lists": "{% set n = namespace(l=[]) %}" + "{% for i in range(99999) %}" * 2
    + "{% set n.l = [n.l] %}" + "{% endfor %}" * 2,
    "deep list printed": "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% for j in range(99) %}"
    "{% set n.l = [n.l] %}{% endfor %}{% endfor %}{{ n.l }}",
    "deep list as json": "{% set n = namespace(l=[]) %}{% for i in range(9999) %}{% set n.l = [n.l] %}{% endfor %}"
    "{{ n.l | tojson }}",
    "deep list compared": "{% set n = namespace(l=[], m=[]) %}{% for i in range(9999) %}{% set n.l = [n.l] %}"
    "{% set n.m = [n.m] %}{% endfor %}{{ n.l == n.m }}",
    "shared lists sorted": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ [ns.l, ns.l] | sort }}",
    "shared lists as text": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ (ns.l ~ '') | length }}",
    "shared lists as pretty text": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ ns.l | pprint }}",
    "shared lists formatted": GROW + "{% set ns.l = [ns.l, ns.l] %}{% endfor %}{{ '%s' % [ns.l] }}",
    "sum of lists": "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    "sum of ranges": "{{ range(99999999) | sum }}{{ range(99999999) | sum }}{{ range(99999999) | sum }}",
    "max of ranges": "{% for i in range(99) %}{{ range(99999999) | max }}{% endfor %}",
    "unique": "{{ ([[]] * 99999) | map('string') | unique | list | length }}" * 99,
    "groups": forever("{{ range(99999) | groupby('real') | length }}"),
    "reverse of a range": forever("{{ range(99999) | reverse | list | length }}"),
    "slices of a range": "{{ range(10**9) | slice(10**9) | list | length }}",
    "batch of a range": "{{ range(10**9) | batch(1) | list | length }}",
    "batch filled": "{{ [1] | batch(10**9, 'x') | map('join') | list }}",
    "map of a map": forever("{{ range(99999) | map('abs') | map('abs') | list | length }}"),
    "select": forever("{{ range(99999) | select('gt', 99999) | list | length }}"),
    "reject by a test": forever("{{ range(99999) | reject('lt', 99999) | list | length }}"),
    "word wrap": "{{ ('a ' * 10**7) | wordwrap(1) | length }}" * 9,
    "word wrap with a separator": "{{ ('a ' * 10**6) | wordwrap(1, wrapstring='b' * 10**6) | length }}",
    "word count": forever("{{ ((messages[0].role * 10**6)) | wordcount }}"),
    "strip tags": "{{ ('<' * 10**7) | striptags | length }}" * 99,
    "links": forever("{{ (messages[0].role * 10**6 ~ ' www.a.b') | urlize | length }}"),
    "links of many": forever("{{ ('www.a.b ' * 10**4 ~ i) | urlize | length }}"),
    "truncate": forever("{{ ((messages[0].role * 10**6)) | truncate(10**6) | length }}"),
    "escape": "{{ ('<' * 10**8) | escape | length }}" * 9,
    "xml attributes": forever("{{ {'a': (messages[0].role * 10**6)} | xmlattr | length }}"),
    "url encoding": "{{ ('\u00e9' * 10**8) | urlencode | length }}",
    "title": "{{ ('a ' * 10**7) | title | length }}" * 99,
    "capitals": forever("{{ ((messages[0].role * 10**6)) | upper | lower | length }}"),
    "swap case": forever("{{ ((messages[0].role * 10**6)).swapcase() | length }}"),
    "long number read": forever("{{ ('9' * 4000) | int }}"),
    "number in another base": "{{ ('f' * 10**7) | int(base=16) }}",
    "factorial": "{% set n = namespace(x=1) %}"
    "{% for i in range(1, 99999) %}{% set n.x = n.x * i %}{% endfor %}{{ n.x }}",
    "fibonacci": "{% set n = namespace(a=1, b=1) %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% set n.a = n.a + n.b %}{% set n.b = n.a + n.b %}{% endfor %}{% endfor %}",
    "squares": "{% set n = namespace(x=3) %}{% for i in range(64) %}{% set n.x = n.x * n.x %}{% endfor %}{{ n.x % 7 }}",
    "division": "{{ (3 ** 99999) // (2 ** 99) ** 999 }}" * 99 + "{{ 9 ** 9 ** 9 }}",
    "modulo with a width": "{{ '%(a)1000000000s' % {'a': 1} }}",
    "modulo with a precision": "{{ '%.1000000000f' % 1.0 }}",
    "format filter": "{{ '%1000000000d' | format(1) }}",
    "format with a nested width": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "format map with a width": "{{ '{a:>10000000000}'.format_map({'a': 1}) }}",
    "format attribute": "{{ ('{:>10000000000}' | attr('format'))(1) }}",
    "translate": "{{ ('a' * 10**6).translate({97: 'b' * 10**6}) | length }}",
    "split": "{{ ('a ' * 10**8).split() | length }}",
    "split lines": "{{ ('\n' * 10**9).splitlines() | length }}",
    "join of itself": "{{ ('a' * 10**5).join(['b'] * 10**5) | length }}",
    "count": forever("{{ ((messages[0].role * 10**6)).count('aa') }}"),
    "find": forever("{{ (messages[0].role * 10**6).find('ba' * 9) }}"),
    "replace of nothing": "{{ ('a' * 10**6).replace('', 'b' * 10**4) | length }}",
    "repeated unicode": "{{ '\U0001f600' * 10**9 }}",
    "list of text times": "{{ (['a' * 10**6] * 10**6) | join | length }}",
    "tuple times": "{{ (1, 2) * 10**9 }}",
    "dict of ranges": "{{ dict(range(10**8) | map('string') | batch(2)) | length }}",
    "dict in a dict": "{% set n = namespace(d={}) %}" + forever("{% set n.d = {'a': n.d, 'b': n.d} %}"),
    "namespace in itself": "{% set n = namespace() %}{% set n.n = n %}{{ n.n.n.n }}",
    "namespaces": forever("{% set n = namespace(a=range(9)) %}"),
    "macros of macros": "{% macro a() %}{{ b() }}{{ b() }}{% endmacro %}{% macro b() %}{{ c() }}{{ c() }}{% endmacro %}"
    "{% macro c() %}{{ 'x' * 10**7 }}{% endmacro %}{% for i in range(99) %}{{ a() }}{% endfor %}",
    "caller of itself": "{% macro m() %}{{ caller() }}{% endmacro %}" + forever("{% call m() %}x{% endcall %}"),
    "recursive loop": "{% for i in [[[]]] recursive %}{{ loop([i, i]) }}{% endfor %}",
    "recursive loop over itself": "{% set l = [1] %}{% for i in l recursive %}{{ loop(l) }}{% endfor %}",
    "loop with changed": forever("{{ loop.changed('a' * 10**6) }}"),
    "loop with cycle": forever("{{ loop.cycle('a' * 10**6, 'b') | length }}"),
    "loop by length": forever("{{ loop.length + loop.revindex }}"),
    "loop over characters": "{% for c in 'a' * 10**9 %}{% endfor %}",
    "cycler": "{% set c = cycler('a', 'b') %}{% for i in range(10**9) %}{{ c.next() }}{% endfor %}",
    "joiner": "{% set j = joiner('a' * 10**6) %}{% for i in range(10**9) %}{{ j() | length }}{% endfor %}",
    "block in a loop": forever("{% block b scoped %}x{% endblock %}"),
    "block of itself": "{% block a %}{{ self.a() }}{% endblock %}",
    "include of itself": "{% include self %}",
    "filter block": "{% filter indent(10**9) %}a\nb{% endfilter %}",
    "set block": forever("{% set x %}{{ i }}{% endset %}"),
    "with": forever("{% with a = 'x' * 10**6 %}{% endwith %}"),
    "autoescape": "{% autoescape true %}{{ '<' * 10**9 }}{% endautoescape %}",
    "generation in a loop": forever("{% generation %}x{% endgeneration %}"),
    "break never": forever("{% if i < 0 %}{% break %}{% endif %}{% continue %}"),
    "constants folded": "{% if 'a' * 10**10 == 'b' %}{% endif %}",
    "constants folded twice": "{{ ('a' * 10**5) | replace('a', 'b' * 10**6) }}",
    "constant power": "{% set x = 7 ** (7 ** 9) %}",
    "json with separators": "{{ ([1] * 10**6) | tojson(separators=('a' * 10**6, 'b')) }}",
    "json of keys": "{{ {'a' * 10**9: 1} | tojson }}",
    "time format": "{{ strftime_now('%Y' * 10**8) }}",
    "error of great length": "{{ raise_exception('x' * 10**9) }}",
    "error with lines": "{{ raise_exception('a\nb\r\x1b[31m' * 99) }}",
    "unknown name of great length": "{{ messages['x' * 10**8] + 1 }}",
    "brackets": "{{ " + "[" * 30_000 + "]" * 30_000 + " }}",
    "nots": "{{ " + "not " * 20_000 + "1 }}",
    "signs": "{{ " + "-" * 30_000 + "1 }}",
    "attributes of attributes": "{{ a" + ".b" * 40_000 + " }}",
    "calls of calls": "{{ range" + "(1)" * 30_000 + " }}",
    "filters of filters": "{{ 1" + "|abs" * 30_000 + " }}",
    "conditions": "{{ " + "1 if 1 else " * 9_000 + "1 }}",
    "comparisons in a row": "{{ (" + "1 == " * 20_000 + "1) ~ (a.b.c) }}",
    "ifs in ifs": "{% if 1 %}" * 2000 + "x" + "{% endif %}" * 2000,
    "macros in macros": "{% macro a() %}" * 500 + "{% endmacro %}" * 500 + "{{ a.b.c }}",
    "comment without end": "{#" * 60_000,
    "raw without end": "{% raw %}" * 10_000,
    "quotes": "{{ '" + "\\" * 100_000,
    "many names": "{{ " + " ~ ".join(f"a{i}.b.c" for i in range(9999)) + " }}",
    "blanks": "{{" + " " * 130_000 + "x.y.z }}",
    "blanks before a tag": ("\n" + " " * 1000 + "x") * 120 + "{%- if a.b.c %}{% endif %}",
    "half a pair": "{{ ('\ud800' * 99).encode }}",
    "nul": "{{ a\0b }}",
}  # fmt: skip


@pytest.fixture
def impatient(monkeypatch):
    """The same limit in kind, sooner."""
    monkeypatch.setattr(confined, "SECONDS", 0.2)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="^chat template") as caught:
        show(HOSTILE[name])
    # Unbounded, each takes minutes to forever or all memory.
    assert time.perf_counter() - begin < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_the_limit_of_time_is_processor_time_and_is_said():
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="more than 5 s of processor time"):
        show(HOSTILE["nested loops"])
    assert time.perf_counter() - begin > 4


def test_the_limit_of_memory_is_said():
    with pytest.raises(ValueError, match="more than 1024 MiB of memory"):
        show("{{ 'a' * 10**10 }}")


def test_a_hostile_template_takes_no_memory_here():
    own, others = peaks(
        "import pytest; from tests.text.test_template import HOSTILE, show",
        "for name in ('concat doubling', 'output', 'join', 'error of great length'):\n"
        "    with pytest.raises(ValueError):\n"
        "        show(HOSTILE[name])",
    )
    assert own < 100_000 and 50_000 < others < 1.1 * 2**20  # KiB, so 1.1 GiB


def test_an_output_may_be_many_times_the_conversation():
    template = "{% for m in messages %}{% for i in range(20) %}{{ m.content }}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 10_000}] * 100
    assert len(show(template, messages)) == 20_000_000
    with pytest.raises(ValueError, match="far larger than what it is made from"):
        show("{{ 'x' * 10_000_000 }}")


def test_the_process_can_open_nothing():
    """What an escape from the sandbox would find: no files, no sockets, no processes."""
    show("x")
    limits = resource.prlimit
    pid = confined._shared.process.pid
    assert limits(pid, resource.RLIMIT_NOFILE) == (4, 4) and limits(pid, resource.RLIMIT_NPROC) == (0, 0)
    assert limits(pid, resource.RLIMIT_FSIZE) == (0, 0)
    assert sorted(os.listdir(f"/proc/{pid}/fd")) == ["0", "1", "2", "3"]
    assert os.readlink(f"/proc/{pid}/fd/1") == os.readlink(f"/proc/{pid}/fd/2") == os.devnull


def test_a_process_that_was_killed_is_replaced():
    assert show("x") == "x"
    confined._shared.process.kill()
    confined._shared.process.wait()
    assert show("x") == "x"


def test_an_interrupted_call_leaves_no_answer_to_the_next(monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    show("x")
    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            show(forever("") + "old")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert show("new") == "new"


def test_threads_take_turns():
    found = {}
    threads = [threading.Thread(target=lambda n=n: found.update({n: show("{{ n }}" * 99, n=n)})) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {n: str(n) * 99 for n in range(8)}


def test_a_forked_child_has_a_process_of_its_own():
    script = """
import os
from deepseek_jax.text.template import render
show = lambda t: render(t, [{"role": "user", "content": ""}], bos_token="", eos_token="", add_generation_prompt=True)
assert show("a") == "a"
child = os.fork()
assert show("b" if child else "c") == ("b" if child else "c")
if child:
    assert os.waitpid(child, 0)[1] == 0
    assert show("d") == "d"
    print("ok")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("ok\n", "", 0)


def test_a_template_too_long_is_refused():
    assert show("x" * MAX_TEMPLATE_CHARS) == "x" * MAX_TEMPLATE_CHARS
    with pytest.raises(ValueError, match=f"got {MAX_TEMPLATE_CHARS + 1} characters"):
        show("x" * (MAX_TEMPLATE_CHARS + 1))


@pytest.mark.parametrize("template", ["{% if %}", "{{ a", "{% endfor %}", "{{ 1 | nothing }}"])
def test_bad_syntax_names_the_line(template):
    with pytest.raises(ValueError, match=r"chat template \(line 2\): does not compile"):
        show("\n" + template)


@pytest.mark.parametrize("template", ["{{ a.b.c }}", "{{ 1 / 0 }}", "{{ [] | first | upper + 1 }}"])
def test_failures_while_rendering_are_value_errors(template):
    with pytest.raises(ValueError, match="refused to render"):
        show(template)


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hi", "got str"),
        ({"role": "user", "content": "hi"}, "wrap a single message"),
        ([], "empty list"),
        (["hi"], r"messages\[0\]: got str"),
        ([{"content": "hi"}], r"messages\[0\]\['role'\]: got None"),
        ([{"role": 1, "content": "hi"}], "got 1"),
        ([*USER, {"role": "user"}], r"messages\[1\]\['content'\]: got nothing"),
        ([{"role": "user", "content": 4}], "got int"),
        ([{"role": "user", "content": [object()]}], "got a object, wanted plain data"),
    ],
)
def test_bad_messages_are_named(messages, reason):
    with pytest.raises(ValueError, match=reason):
        show("{{ messages }}", messages)


def test_an_object_in_the_variables_is_refused():
    with pytest.raises(ValueError, match="plain data"):
        show("{{ tool }}", tool=open)


def test_a_tool_call_needs_no_content():
    assert show("{{ messages[0].tool_calls[0] }}", [{"role": "assistant", "tool_calls": ["f"]}]) == "f"
