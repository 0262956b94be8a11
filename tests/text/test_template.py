"""Laws of the chat template: it renders as Jinja does, and a hostile one is stopped, with a reason."""

import time
import tracemalloc

import pytest

from deepseek_jax.text.template import MAX_TEMPLATE_CHARS, render

USER = [{"role": "user", "content": "hi"}]
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
        ("{{ '' | attr('__class__') }}", "attr"),
        ("{{ '{0.__class__}'.format(1) }}", "call of function"),
        ("{% set ns = namespace() %}{% set ns.__html__ = 1 %}", "underscore"),
        ("{{ namespace(__html__=1) }}", "underscore"),
        ("{{ messages.append(1) }}", "append"),
        ("{{ messages[0].pop('role') }}", "pop"),
        ("{{ (1).to_bytes(4, 'big') }}", "to_bytes"),
        ("{{ self }}", "plain data"),
        ("{{ namespace(a=1) }}", "plain data"),
        ("{% include 'x' %}", "include"),
        ("{% import 'x' as y %}", "import"),
        ("{% extends 'x' %}", "extends"),
        ("{% block a %}{% endblock %}", "block"),
        ("{% autoescape true %}{% endautoescape %}", "not allowed"),
        ("{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursive"),
        ("{{ lipsum() }}", "lipsum"),
        ("{{ cycler('a') }}", "cycler"),
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
    "data in a buffer": "{% set x %}{% for i in range(9999) %}" + "x" * 60_000 + "{% endfor %}{% endset %}",
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
    "strftime": "{{ strftime_now('%999999999Y') }}",
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
    "comparisons": "{% set a = 'a' * 999999 %}{% set b = 'a' * 999998 ~ 'a' %}"
    "{% for i in range(99999) %}{% if a == b %}{% endif %}{% endfor %}",
    "searches": "{% set a = 'a' * 99999 %}{% for i in range(9999) %}{% if 'b' in a %}{% endif %}{% endfor %}",
    "slices": "{% set a = 'a' * 999999 %}{% for i in range(99999) %}{% set b = a[1:] %}{% endfor %}",
    "sorts": "{% for i in range(999) %}{{ range(99999) | sort | length }}{% endfor %}",
    "negative work": "{{ [0 - 10**9] | map('spend steps') | list }}",
    "negative step": "{{ [1] | map('each step', 0 - 10**9) | list }}",
    "parentheses": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "sum of many": "{{ " + "+".join("1" * 20_000) + " }}",
    "many branches": "{% if a %}" + "{% elif a %}" * 5000 + "{% endif %}",
    "many loops": "{% for i in [1] %}" * 30 + "{% endfor %}" * 30,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_are_stopped(name):
    begin = time.perf_counter()
    with pytest.raises(ValueError, match="^chat template") as caught:
        show(HOSTILE[name])
    # Unbounded, each takes minutes to forever; the slowest here takes under 3 s on an idle core.
    assert time.perf_counter() - begin < 20
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("name", ["times", "percent", "concat doubling", "join", "replace", "data in a buffer"])
def test_hostile_templates_use_little_memory(name):
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            show(HOSTILE[name])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100e6


def test_the_allowance_grows_with_the_conversation():
    template = "{% for m in messages %}{% for i in range(20) %}{{ m.content }}{% endfor %}{% endfor %}"
    messages = [{"role": "user", "content": "x" * 10_000}] * 100
    assert len(show(template, messages)) == 20_000_000


def test_a_template_too_long_is_refused():
    assert show("x" * MAX_TEMPLATE_CHARS) == "x" * MAX_TEMPLATE_CHARS
    with pytest.raises(ValueError, match=f"got {MAX_TEMPLATE_CHARS + 1} characters"):
        show("x" * (MAX_TEMPLATE_CHARS + 1))


def test_one_rendering_leaves_nothing_to_the_next():
    with pytest.raises(ValueError):
        show(HOSTILE["nested loops"])
    assert show("{{ messages[0].content }}") == "hi"


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
