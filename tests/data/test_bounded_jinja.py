"""Chat templates that never end are one sentence after bounded work; all others render as transformers renders them."""

from __future__ import annotations

import re
import resource
import time
from typing import Any

import pytest
from jinja2 import UndefinedError

import chats
from byeori.data import bounded_jinja
from byeori.errors import ModelError, TemplateError
from tiny_models import byte_level_tokenizer

MESSAGES = [{"role": "user", "content": "안녕 <b> a\nb"}, {"role": "assistant", "content": "반가워 {0}"}]
DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(64) %}{% set ns.x = EXPRESSION %}{% endfor %}{{ ns.x }}"
MACRO = "{% macro f(n) %}{% if n > 0 %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}"
NESTED = "{% for a in RANGE %}{% for b in RANGE %}{% for c in RANGE %}{% endfor %}{% endfor %}{% endfor %}x"
ENDLESS = {
    "range": "{% for i in range(10**9) %}x{% endfor %}",
    "loops": NESTED.replace("RANGE", "range(99999)"),
    "constant loops": NESTED.replace("RANGE", str([1] * 3000)),
    "text loops": "{% set x = 'a' * 99999 %}" + NESTED.replace("RANGE", "x"),
    "generator loops": NESTED.replace("RANGE", "range(99999)|map('string')"),
    "literal text": "{% for a in range(99999) %}" + "x" * 99999 + "{% endfor %}",
    "recursive loop": "{% for a in [1] recursive %}" + "x" * 9999 + "{{ loop(range(99999)) }}{% endfor %}",
    "two macros": MACRO,
    "blocks": "{% for a in range(99999) %}{% set x %}{{ 'a' * 99999 }}{% endset %}{% endfor %}",
    "product": "{{ 'a' * 10**10 }}",
    "list product": "{{ ([1] * 10**10)|length }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "power by power": "{% set ns = namespace(x=9) %}{% for i in range(64) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent many": "{{ ('%s' * 99999) % (('a' * 99999,) * 99999) }}",
    "format": "{{ '{:1000000000}'.format(1) }}",
    "format nested": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format many": "{{ ('{0}' * 99999).format('a' * 99999) }}",
    "format map": "{{ ('{a}' * 99999).format_map({'a': 'a' * 99999}) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a'|center(10**9) }}",
    "center constant in a loop": "{% for i in range(99999) %}{{ 'a'|center(900000) }}{% endfor %}",
    "center of safe": "{{ ('a'|safe).ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(99999) }}",
    "bytes": "{{ (5).to_bytes(10**10, 'big')|length }}",
    "bytes of bytes": "{{ ('a' * 99999).encode().replace('a'.encode(), ('a' * 99999).encode())|length }}",
    "replace": "{{ ('a' * 99999).replace('a', 'a' * 99999)|length }}",
    "replace filter": "{{ ('a' * 99999)|replace('a', 'a' * 99999)|length }}",
    "join": "{{ (',' * 99999).join('a' * 99999)|length }}",
    "join filter": "{{ ('a' * 99999)|join(',' * 99999) }}",
    "join of references": "{% set x = 'a' * 999999 %}{{ range(99999)|map('replace', 'x', x)|join }}"
    "{{ ([x] * 99999)|map('upper')|join }}{{ ([x] * 99999)|select|join }}",
    "translate": "{{ ('a' * 99999).translate({97: 'b' * 99999})|length }}",
    "indent": "{{ ('\n' * 99999)|indent(99999) }}",
    "indent text": "{{ ('\n' * 99999)|indent('a' * 99999) }}",
    "indented JSON": "{{ ([1] * 99999)|tojson(indent=99999) }}",
    "batch": "{{ [1]|batch(10**9, 'x')|list|length }}",
    "slices": "{{ [1]|slice(10**9)|list|length }}",
    "round": "{{ 5|round(-(10**9))|string }}",
    "doubled by plus": DOUBLED.replace("EXPRESSION", "ns.x + ns.x"),
    "doubled by tilde": DOUBLED.replace("EXPRESSION", "ns.x ~ ns.x"),
    "doubled by join": DOUBLED.replace("EXPRESSION", "[ns.x, ns.x]|join"),
    "doubled by format": DOUBLED.replace("EXPRESSION", "'%s%s' % (ns.x, ns.x)"),
    "doubled list": DOUBLED.replace("EXPRESSION", "[ns.x, ns.x]"),
    "doubled tuple": DOUBLED.replace("EXPRESSION", "(ns.x, ns.x)"),
    "doubled object": DOUBLED.replace("EXPRESSION", "{'a': ns.x, 'b': ns.x}"),
    "doubled dict": DOUBLED.replace("EXPRESSION", "dict(a=ns.x, b=ns.x)"),
    "doubled views": DOUBLED.replace("EXPRESSION", "{'a': ns.x, 'b': ns.x}.items()"),
    "doubled batches": DOUBLED.replace("'ab'", "[1]").replace("EXPRESSION", "(ns.x + ns.x)|batch(9)|list"),
    "doubled namespace": DOUBLED.replace("EXPRESSION", "namespace(a=ns.x, b=ns.x)"),
    "searches": "{% set s = 'a' * 400000 %}{% set t = 'a' * 200000 ~ 'b' %}{% for i in range(99999) %}"
    "{% for j in range(99) %}{% if t in s %}{% endif %}{% endfor %}{% endfor %}",
    "comparisons": "{% set s = 'a' * 400000 %}{% set t = 'a' * 399999 ~ 'b' %}{% for i in range(99999) %}"
    "{% for j in range(99) %}{% if s == t %}{% endif %}{% endfor %}{% endfor %}",
    "constant folding": "{% if false %}{{ 'a' * 10**10 }}{% endif %}{{ 'a'|center(10**10) }}",
}
PLAIN = (
    "{% for m in messages %}{{ loop.index }}/{{ loop.length }} {{ m.role|upper }}: {{ m['content'] | trim }}\n"
    "{% endfor %}",
    "{{ messages[::-1][0].content }}{{ messages[-1]['role'] ~ 1 ~ none ~ [1, 'a'] }}{{ {'a': (1, 2)} }}{{ (1, 2) }}",
    "{{ messages|map(attribute='role')|join(', ') }}{{ messages|selectattr('role', 'equalto', 'user')|list }}",
    "{{ '%s-%5.1f %(x)s' | replace('%(x)s', '') }}{{ '%05d|%-3s' % (7, 'b') }}{{ '{:>4}{a!r}'.format(1, a='x') }}",
    "{{ messages | tojson(indent=2) }}{{ 'a,b'.split(',') }}{{ [3, 1]|sort }}{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 5 }}",
    "{%- macro f(x, n=2) -%}<{{ x }}{{ n * '!' }}>{%- endmacro -%}{{ f('a') }}{{ f(x='b', n=3) }}"
    "{% set y %} z {% endset %}[{{ y }}]",
    "{{ 'a' in messages[0].content }}{{ messages[0] == messages[1] }}{{ 1 < 2 < 3 }}{{ 'x' not in ['x', 'y'] }}"
    "{{ messages[0].role in ('user', 'system') }}{{ loop is defined and 1 in none }}{{ none == none }}",
    "\n{% set ns = namespace(a=0) %}\n{% for c in 'abc' %}{% if c == 'b' %}{% continue %}{% endif %}"
    "{% set ns.a = ns.a + 1 %}{% endfor %}\n{{ ns.a }}{% filter upper %}q{{ ns.a }}{% endfilter %}\n",
    "{% for a in [1, [2, [3]]] recursive %}{% if a is iterable %}({{ loop(a) }}){% else %}{{ a }}{% endif %}"
    "{% endfor %}",
    "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}"
    "{% for a, b in [(1, 2)] %}{{ a + b }}{% endfor %}",
    "{% macro f() %}{{ caller('c') }}{{ caller('d') }}{% endmacro %}{% call(x) f() %}{{ x }}{% endcall %}{{ unknown }}",
    "{% generation %}a{% endgeneration %}{{ bos_token }}{{ none }}{{ true }}{{ 1.5 }}{{ ('a' if false) }}",
    "{{ 'x'|safe ~ '<' }}{{ {'keys': 1}.keys }}{{ messages[0].items }}{{ messages[0].nothing }}{{ ''.__class__ }}",
    "{% set ns = namespace(keys=1, f='{}-{}'.format) %}{{ ns.keys }}{{ ns.f(1, 2) }}{{ ns.nothing }}{{ dict(a=1).a }}",
    "{% for m in messages %}{{ loop.first }}{{ loop.cycle('a', 'b') }}{{ loop.nextitem }}{{ loop._iterable }}"
    "{{ loop.changed(m.role) }}{{ loop.nothing }}{% endfor %}{{ '\u0130 ß' | lower }}{{ [[1, 2], [3]]|sum(start=[]) }}",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_level_tokenizer(bos_token="<s>")


@pytest.mark.parametrize("name", ENDLESS)
def test_work_is_bounded(name: str, tokenizer: Any) -> None:
    tokenizer.chat_template = ENDLESS[name]
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises((ModelError, TemplateError), match=r"far more work|Range too big|many characters|byte"):
        bounded_jinja.render(tokenizer, MESSAGES)
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kilobytes


@pytest.mark.parametrize(
    "template",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 9000 + ")" * 9000 + " }}",
        "{% if 1 %}" * 300 + "x" + "{% endif %}" * 300,
        "{{ 1 // 0 }}",
        "{% include 'x' %}",
        "{{ lipsum(10**9) }}",
        "{{ messages|urlize }}",
        "{{ 10.0 ** 400 }}",
    ],
)
def test_whatever_a_template_raises_is_a_sentence(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    with pytest.raises(TemplateError, match=r"chat template refuses these messages: \S"):
        bounded_jinja.render(tokenizer, MESSAGES)


def test_a_template_of_megabytes_is_not_compiled(tokenizer: Any) -> None:
    tokenizer.chat_template = "x" * 2_000_000
    with pytest.raises(ModelError, match="more than 1,000,000"):
        bounded_jinja.render(tokenizer, MESSAGES)


@pytest.mark.parametrize("template", PLAIN)
def test_equals_transformers(template: str, tokenizer: Any) -> None:
    tokenizer.chat_template = template
    expected = tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    address = re.compile(r" at 0x\w+")
    assert address.sub("", bounded_jinja.render(tokenizer, MESSAGES)) == address.sub("", expected)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (at % 4 > 0)) for at, name in enumerate(chats.shipped_templates())],
)
def test_real_templates_spend_little(name: str, tokenizer: Any) -> None:
    """200 exchanges, and a document of 400,000 characters, as transformers renders them: far below the limits."""
    tokenizer.chat_template = chats.shipped_templates()[name]
    many = [{"role": role, "content": "봄이 왔다 " * 20} for _ in range(200) for role in ("user", "assistant")]
    document = [{"role": "user", "content": "봄이 왔다\n" * 66_000}]
    for messages in (many, document):
        try:
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except UndefinedError:  # a template that reads lists of parts
            messages = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in messages]
            expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert bounded_jinja.render(tokenizer, messages, add_generation_prompt=True) == expected
        assert bounded_jinja.spent() < 0.2
