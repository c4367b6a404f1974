"""Chat templates: what transformers renders, and what they may take."""

import threading
import time

import pytest
from transformers import AutoTokenizer

from checkpoints import DEMO, PLAIN_TYPES, demo_tokenizer, has_tokenizer
from surgeon import rendering
from surgeon.errors import InputError

MESSAGES = [
    {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is <|this|>? \u00e9\u4e2d\n"}]},
    {"role": "assistant", "content": "A cat.", "reasoning": "It has whiskers.", "tool_calls": None},
    {"role": "user", "content": "Sure?"},
]
EVERYTHING = """{%- set ns = namespace(n=0) -%}
{% for m in messages recursive %}{% if loop.index > 3 %}{% break %}{% endif %}
  {{ m | tojson(indent=2) }}{{ loop.last }}{% set ns.n = ns.n + 1 %}
{%- endfor %}{% generation %}said{% endgeneration %}{{ ns.n }}{{ dict(a=1) }}{{ strftime_now('%Y') }}{{ eos_token }}"""


@pytest.mark.skipif(not has_tokenizer(), reason="needs the demo checkpoint's tokenizer")
@pytest.mark.parametrize("prompted", [True, False])
@pytest.mark.parametrize("template", [None, EVERYTHING, *PLAIN_TYPES])
def test_the_text_is_that_of_transformers(template: str | None, prompted: bool) -> None:
    tokenizer = demo_tokenizer(template) if template in PLAIN_TYPES else AutoTokenizer.from_pretrained(DEMO)
    chosen = None if template in PLAIN_TYPES else template
    theirs = tokenizer.apply_chat_template(
        MESSAGES, chat_template=chosen, tokenize=False, add_generation_prompt=prompted
    )
    messages = [{key: value for key, value in message.items() if value is not None} for message in MESSAGES]
    variables = {**tokenizer.special_tokens_map, "add_generation_prompt": prompted}
    assert rendering.render(tokenizer.get_chat_template(chosen), messages, variables) == theirs
    assert theirs


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "{{ 10 ** (10 ** 9) }}",  # one operation, in which Python looks at nothing else
    ],
)
def test_a_template_that_does_not_end(template: str) -> None:
    begin = time.monotonic()
    with pytest.raises(InputError, match=r"does not end within 0\.5 s: copy chat_template\.jinja"):
        rendering.render(template, MESSAGES, {}, seconds=0.5)
    assert time.monotonic() - begin < 30  # the process's start, on a busy machine
    assert rendering.render("still {{ 'here' }}", MESSAGES, {}) == "still here"


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'x' * 10 ** 10 }}",
        "{{ 'x' | center(10 ** 10) }}",
        "{{ ['x' * 10 ** 6] * 10 ** 6 }}",  # a list of a few MB, whose text is a TB
        "{% set ns = namespace(a='x') %}{% for i in range(99) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    ],
)
def test_a_template_that_takes_all_memory(template: str) -> None:
    with pytest.raises(InputError, match="chat template does not (take this conversation: MemoryError|end within)"):
        rendering.render(template, MESSAGES, {}, seconds=5.0, memory=1 << 28)
    assert rendering.render("here", MESSAGES, {}) == "here"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% if %}", "Expected an expression"),
        ("{{ raise_exception('no\nimages') }}", "no images"),
        ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
        ("{{ messages + 1 }}", "TypeError: can only concatenate"),
        ("{% for m in messages recursive %}{{ loop([m]) }}{% endfor %}", "RecursionError"),
        ("{{ messages.pop() }}", "is unsafe"),
        (5, "TypeError"),
    ],
)
def test_a_template_that_raises(template: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        rendering.render(template, MESSAGES, {})
    assert "the chat template does not take this conversation" in str(caught.value) and "\n" not in str(caught.value)


def test_threads_share_it() -> None:
    texts: dict[int, str] = {}

    def one(number: int) -> None:
        texts[number] = rendering.render("{{ n }}", MESSAGES, {"n": number})

    threads = [threading.Thread(target=one, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == {number: str(number) for number in range(8)}
