import pytest

from trainer.data.chat.sandbox import BEGIN, END, TemplateRefused, render

VALUES = {"messages": [{"role": "user", "content": "hi"}], "tools": [{"a": "é<"}]}


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% for m in messages %}{{ m.role ~ ': ' ~ m['content'] }}{% endfor %}", "user: hi"),
        ("{{ tools | tojson }}", '[{"a": "é<"}]'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("  {% if true %}\n  a{% endif %}", "  a"),
        ("{% for i in range(3) %}{% if i == 1 %}{% break %}{% endif %}{{ i }}{% endfor %}", "0"),
        ("{% set x %}{% for i in range(2) %}a{% endfor %}{% endset %}{{ x }}", "aa"),
        ("{% macro f(x) %}<{{ x }}>{% endmacro %}{{ f(1) ~ f(2) }}", "<1><2>"),
        ("{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}", "36"),
        ("{{ messages[0].nothing }}|{{ 'ab'.replace('a', 'c') }}|{{ '%s-%s' % (1, 2) }}", "|cb|1-2"),
        ("{% generation %}x{% endgeneration %}", "x"),
    ],
)
def test_what_a_template_may_do(source: str, text: str) -> None:
    assert render(source, VALUES) == text


def test_generation_marks() -> None:
    assert render("a{% generation %}x{% endgeneration %}b", VALUES, marks=True) == f"a{BEGIN}x{END}b"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "does not end: it takes more loops"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "does not end: its macros call each other"),
        ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", "does not end: it takes more loops"),
        ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}", "a text of more than"),
        ("{% set n = namespace(s='a') %}{% for i in range(60) %}{% set n.s = n.s + n.s %}{% endfor %}", "a text of more than"),
        ("{% for i in range(90000) %}{{ 'aaaaaaaaaa' * 100 }}{% endfor %}", "writes more than"),
        ("{{ 'a' * 10**10 }}", "a text of more than"),
        ("{{ [1] * 10**10 }}", "a text of more than"),
        ("{{ 'a' | center(10000000000) }}", "uses a number above 1,000,000"),
        ("{{ 'a'.ljust(10**9) }}", "uses a number above 1,000,000"),
        ("{{ range(10**9) | list }}", "uses a number above 1,000,000"),
        ("{{ '{:>1000000000}'.format(1) }}", "a width that is too large"),
        ("{{ '%1000000000d' % 1 }}", "a width that is too large"),
        ("{{ 10**999 }}", "a number that is too large"),
        ("{{ 'ab' | replace('', 'x' * 1000000) | replace('x', 'y' * 1000000) }}", "a text of more than"),
        ("{{ nothing() }}", "'nothing' is undefined"),
        ("{{ lipsum(1000) }}", "'lipsum' is undefined"),
        ("{{ raise_exception('roles must alternate') }}", "cannot write this conversation: roles must alternate"),
        ("{{ messages[5].role }}", "no element 5"),
        ("{% if %}", "is not valid Jinja in line 1"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ ().__class__.__bases__[0].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% include 'x' %}", "no loader"),
    ],
)
def test_what_it_may_not_do(source: str, problem: str) -> None:
    with pytest.raises(TemplateRefused, match=problem):
        render(source, VALUES)


def test_a_refused_rendering_leaves_nothing_behind_for_the_next() -> None:
    for _ in range(3):
        with pytest.raises(TemplateRefused):
            render("{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}", VALUES)
        assert render("{% for a in range(9999) %}{% endfor %}ok", VALUES) == "ok"
