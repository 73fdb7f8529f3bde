"""Chat templates that would not end, or would fill the memory, drawn from their parts."""

import random

_LARGE = ("10**9", "2**31", "99999999", "10**18", "2**2000", "messages|length * 10**9")
_TEXTS = ("'a'", "messages[0].content", "bos_token", "('ab' ~ 'c')", "'%s'")
_GROWS = (
    "{{ T * N }}",
    "{{ N * T }}",
    "{{ [T] * N }}",
    "{{ ([T] * N) | length }}",
    "{{ T.center(N) }}",
    "{{ T.ljust(N) }}",
    "{{ T.rjust(N, 'x') }}",
    "{{ T.zfill(N) }}",
    "{{ T | center(N) }}",
    "{{ T | indent(N) }}",
    "{{ T | indent(width=N, first=true) }}",
    "{{ ('a\\n' * 9999) | indent(99999) }}",
    "{{ '%NNNd' % 1 }}",
    "{{ '%NNNd' | format(1) }}",
    "{{ '{:>NNN}'.format(1) }}",
    "{{ '{0:>NNN}{0:>NNN}'.format(1) }}",
    "{{ '%*d' % (N, 1) }}",
    "{{ '%.*f' % (NNN, 1.5) }}",
    "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
    "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "{{ ('b' * 99999).join(['a'] * 99999) }}",
    "{{ (['a'] * 99999) | join('b' * 99999) }}",
    "{{ ('\\t' * 9999).expandtabs(N) }}",
    "{{ N ** N }}",
    "{{ 9 ** 9 ** 9 }}",
    "{{ (9 ** 999) ** 999 }}",
    "{{ 1 << N }}",
    "{{ range(N) | list }}",
    "{{ range(N) | sum }}",
    "{{ range(N) | sort | join }}",
    "{{ range(99999) | list | tojson(indent=99999) }}",
    "{{ messages | tojson(indent=N) }}",
    "{{ (range(9999) | list | string) * 9999 }}",
    "{{ lipsum(n=N) }}",
    "{{ range(99999) | map('string') | join(T * 99999) }}",
    "{{ ('a' * 99999) | list | batch(1) | list | length }}",
    "{{ [1] | batch(N, 'x') | list }}",
    "{{ [1] | slice(N) | list }}",
    "{{ ('a ' * 9999999) | wordwrap(1) }}",
    "{{ ('a ' * 99999999) | wordcount }}",
    "{{ ('<' * 9999999) | escape | escape | escape | escape }}",
    "{{ ('a' * 9999999) | urlize | urlencode | upper | title }}",
    "{{ 10 ** 5000 }}",
    "{{ (10 ** 999 * 10 ** 999 * 10 ** 999 * 10 ** 999 * 10 ** 999) | string }}",
    "{{ strftime_now('%Y' * 9999999) }}",
    "{{ messages | pprint }}{{ ([[]] * 9999999) | pprint }}",
    "{{ ('a' * 30 ~ '!') is match('(a+)+$') }}",
    "{{ cycler(*range(99999)) }}{{ dict(a=range(N)|list) }}",
    "{{ namespace(a=1).a }}{{ joiner('a' * N)() }}",
    "{{ '\\ud800' }}",
    "{{ raise_exception('x' * 99999999) }}",
)
_LOOPS = (
    "{% for i in range(N) %}BODY{% endfor %}",
    "{% for i in range(99999) %}BODY{% endfor %}",
    "{% for i in range(999) %}{% for j in range(999) %}BODY{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% if i is odd %}BODY{% endif %}{% endfor %}",
    "{% for i in range(99999) if i > 5 %}BODY{% endfor %}",
    "{% for i in messages recursive %}{{ loop(messages) }}BODY{% endfor %}",
    "{% macro m(n) %}BODY{{ m(n + 1) }}{{ m(n + 2) }}{% endmacro %}{{ m(0) }}",
    "{% macro m() %}{% for i in range(999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}{% call m() %}BODY{% endcall %}{% endcall %}",
    "{% set ns = namespace(t=T) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t ~ ns.t %}{% endfor %}{{ ns.t }}",
    "{% set ns = namespace(t=T) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}BODY{% endfor %}{{ ns.t | length }}",
    "{% set ns = namespace(t=[T]) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t + ns.t %}{% endfor %}{{ ns.t | length }}",
    "{% set ns = namespace(t=[T]) %}{% for i in range(99) %}"
    "{% set ns.t = [ns.t, ns.t] %}{% endfor %}{{ ns.t }}",
    "{% set ns = namespace(t=3) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t * ns.t %}{% endfor %}{{ ns.t > 1 }}",
    "{% set ns = namespace(t=T) %}{% for i in range(99) %}"
    "{% set ns.t = ns.t.replace('a', 'aa') %}{% endfor %}",
    "{% set ns = namespace(t=T) %}{% for i in range(99) %}"
    "{% set ns.t = '%s%s' % (ns.t, ns.t) %}{% endfor %}",
    "{% set ns = namespace(t=T) %}{% for i in range(99) %}"
    "{% set ns.t = [ns.t, ns.t] | join %}{% endfor %}",
    "{% set ns = namespace(t=T) %}{% for i in range(99) %}"
    "{% set ns.t %}{{ ns.t }}{{ ns.t }}{% endset %}{% endfor %}",
    "{% filter upper %}{% for i in range(99999) %}BODY{% endfor %}{% endfilter %}",
    "{% generation %}{% for i in range(9999) %}BODY{% endfor %}{% endgeneration %}",
    "{% set x %}{% for i in range(99999) %}BODYBODY{% endfor %}{% endset %}{{ x }}",
)
_SYNTAX = (
    lambda n: "{{ " + "(" * n + "1" + ")" * n + " }}",
    lambda n: "{{ " + "[" * n + "1" + "]" * n + " }}",
    lambda n: "{{ " + "-" * n + "1 }}",
    lambda n: "{{ " + "not " * n + "1 }}",
    lambda n: "{{ 1" + " + 1" * n + " }}",
    lambda n: "{{ 1" + " ~ 1" * n + " }}",
    lambda n: "{{ 2" + " ** 2" * n + " }}",
    lambda n: "{{ a" + ".a" * n + " }}",
    lambda n: "{{ a" + "|e" * n + " }}",
    lambda n: "{% if a %}" * n + "{% endif %}" * n,
    lambda n: "{% for i in [1] %}" * n + "{% endfor %}" * n,
    lambda n: "{% if 0 %}" + "{% elif 1 %}" * n + "{% endif %}",
    lambda n: "{{ " + "9" * n + " }}",
    lambda n: "{{ 1e" + "9" * (n % 9) + " }}",
    lambda n: "{% set a = 1 %}" * n,
    lambda n: "{# " * n,
    lambda n: "{%" * n,
)


def template(rng: random.Random) -> str:
    """Draws a template."""
    if rng.random() < 0.1:
        return rng.choice(_SYNTAX)(rng.choice((10, 100, 1000, 10_000)))
    parts = [_part(rng) for _ in range(rng.choice((1, 1, 2)))]
    text = "".join(parts)
    for mark, choices in (
        ("NNN", ("999999999", "99999")),
        ("N", _LARGE),
        ("T", _TEXTS),
    ):
        text = _filled(text, mark, choices, rng)
    return text


def _part(rng: random.Random) -> str:
    if rng.random() < 0.5:
        return rng.choice(_GROWS)
    body = rng.choice(("", "a", "{{ T }}", rng.choice(_GROWS)))
    if rng.random() < 0.3:
        body = rng.choice(_LOOPS).replace("BODY", body)
    return rng.choice(_LOOPS).replace("BODY", body)


def _filled(text: str, mark: str, choices: tuple[str, ...], rng: random.Random) -> str:
    import re

    return re.sub(
        rf"(?<![A-Za-z]){mark}(?![A-Za-z])", lambda _: rng.choice(choices), text
    )
