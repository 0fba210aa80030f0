"""Chat templates in their helper process: what they render to, and what the hostile ones are answered."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
from transformers import PreTrainedTokenizerFast

from bros_router.chat_templates.renderer import TemplateError, TemplateRenderer
from bros_router.chat_templates.source import ChatTemplate
from bros_router.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  1 < 2 & 'so' on?  \n"},
    {"role": "assistant", "content": "Yes.\x00 \U0001f642"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture
async def renderer() -> AsyncIterator[TemplateRenderer]:
    renderer = TemplateRenderer()
    yield renderer
    await renderer.close()


async def rendered(renderer: TemplateRenderer, source: str, **variables: object) -> str:
    return await renderer.render(ChatTemplate(source, {"eos_token": "</s>"}), {"messages": MESSAGES} | variables)


CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
#: Blocks alone on their lines: what is left of these lines depends on `trim_blocks` and `lstrip_blocks`.
BLOCKS = """\
{{ bos_token }}
{% for message in messages %}
    {% if message.role == 'system' %}
        {% continue %}
    {% endif %}
    {% generation %}
    {% set shout = message.content | upper %}
[{{ loop.index }}] {{ shout }}
    {% endgeneration %}
    {% if loop.index > 2 %}{% break %}{% endif %}
{% endfor %}
{{ shout }}|
"""
#: As in templates with tools: state in a namespace, macros, JSON, slices, missing variables, Python's methods.
FEATURES = """\
{% macro heading(text, mark='#') %}{{ mark * 2 }} {{ text.strip().split()[0].title() }}{% endmacro %}
{% set ns = namespace(last='', count=0) %}
{% for message in messages[::-1] %}{% set ns.count = ns.count + 1 %}{% set ns.last = message.content %}{% endfor %}
{{ heading(ns.last) }} {{ ns.count }} {{ missing }} {{ messages[1] | tojson }} {{ messages[0] | tojson(indent=2) }}
{{ 'tools' if tools is not none else 'no tools' }} {{ documents is defined }} {{ messages | length }}
{{- messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | join('|') }}{{ eos_token }}
"""


@pytest.mark.parametrize("source", [CHATML, BLOCKS, FEATURES], ids=["chatml", "blocks", "features"])
@pytest.mark.parametrize("add_generation_prompt", [False, True])
async def test_templates_render_as_transformers_renders_them(
    renderer, byte_level_tokenizer: Tokenizer, source: str, add_generation_prompt: bool
):
    oracle = PreTrainedTokenizerFast(tokenizer_object=byte_level_tokenizer._tokenizer, eos_token="</s>")
    expected = oracle.apply_chat_template(
        MESSAGES, chat_template=source, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    prompt = await rendered(renderer, source, tools=None, documents=None, add_generation_prompt=add_generation_prompt)
    assert prompt == expected


async def test_bytes_of_a_prompt(renderer):
    assert await rendered(renderer, CHATML, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1 < 2 & 'so' on?<|im_end|>\n"
        "<|im_start|>assistant\nYes.\x00 \U0001f642<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


async def test_templates_know_the_date(renderer):
    assert len(await rendered(renderer, "{{ strftime_now('%Y-%m-%d') }}")) == 10


@pytest.mark.parametrize(
    ("source", "prompt"),
    [
        ("{{ 'a b c' | wordwrap(1) }}", "a\nb\nc"),
        ("{{ [1, {}] | pprint }}", "[1, {}]"),
        ("{{ '\\N{BULLET}' }}", "\u2022"),
        ("{{ lipsum(n=1, html=false) is string }}", "True"),
    ],
)
async def test_what_jinja_loads_late_is_there(renderer, source, prompt):
    """The helper opens no file once it renders."""
    assert await rendered(renderer, source) == prompt


async def test_variables_of_any_json_come_through(renderer):
    value = {"n": 10**30, "f": 1e-7, "l": [None, True, "é\x01"], "": {}}
    assert await rendered(renderer, "{{ value | tojson(separators=(',', ':')) }}", value=value) == (
        '{"n":1000000000000000000000000000000,"f":1e-07,"l":[null,true,"é\\u0001"],"":{}}'
    )


async def test_what_a_template_says_of_the_messages_is_told(renderer):
    with pytest.raises(TemplateError, match=r"^Roles must alternate!$"):
        await rendered(renderer, "{{ raise_exception('Roles must alternate!') }}")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{% for x in %}", "Expected an expression, got 'end of statement block'"),
        ("{{ messages.", "expected name or number"),
        ("{{ nothing.at.all }}", "'nothing' is undefined"),
        ("{{ messages.__class__.__mro__ }}", "access to attribute '__class__' of 'list' object is unsafe."),
        ("{{ ''.__class__() }}", "access to attribute '__class__' of 'str' object is unsafe."),
        ("{% set x = messages.append('x') %}", "access to attribute 'append' of 'list' object is unsafe."),
        ("{% import 'os' as os %}{{ os.system('id') }}", "the template failed (TypeError)"),
        ("{% include '/etc/passwd' %}", "the template failed (TypeError)"),
        ("{{ range(10 ** 9) | list }}", "the template failed (OverflowError)"),
        ("{{ 1 / 0 }}", "the template failed (ZeroDivisionError)"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "the template failed (RecursionError)"),
        ("{{ 'a' * 10 ** 10 }}", "rendering takes too much memory"),
        ("{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}", "the prompt is longer than 4194304 characters"),
        ("{{ '\\ud800' }}", "the prompt is not Unicode"),
        ("{{ raise_exception('\\ud800' + 'x' * 5000) }}", "?" + "x" * 999),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "rendering takes too long"),
        ("{{ 7 ** (7 ** 10) }}", "rendering takes too long"),
    ],
)
async def test_a_template_that_fails_is_told_why_and_the_next_one_is_rendered(renderer, source, reason):
    with pytest.raises(TemplateError) as caught:
        await rendered(renderer, source)
    assert str(caught.value) == reason
    assert await rendered(renderer, "{{ messages | length }}") == "4"


async def test_a_template_that_is_not_unicode_is_told(renderer):
    with pytest.raises(TemplateError, match="the template is not Unicode"):
        await rendered(renderer, "\ud800")


async def test_ten_thousand_messages_are_a_chat(renderer):
    messages = [{"role": "user", "content": str(n)} for n in range(10_000)]
    prompt = await rendered(renderer, CHATML, messages=messages)
    assert prompt.count("<|im_start|>") == 10_000
    assert prompt.endswith("<|im_start|>user\n9999<|im_end|>\n")


async def test_chats_that_arrive_together_get_their_own_prompts(renderer):
    sources = [f"{{{{ messages | length }}}} {n}" for n in range(50)]
    prompts = await asyncio.gather(*(rendered(renderer, source) for source in sources))
    assert prompts == [f"4 {n}" for n in range(50)]


async def test_an_endless_template_fails_alone(renderer):
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    answers = await asyncio.gather(
        *(rendered(renderer, source) for source in ("{{ 1 }}", endless, "{{ 2 }}")), return_exceptions=True
    )
    assert [answers[0], str(answers[1]), answers[2]] == ["1", "rendering takes too long", "2"]


async def test_a_client_that_leaves_does_not_confuse_the_next(renderer):
    leaving = asyncio.create_task(rendered(renderer, "{{ 'left' }}"))
    await asyncio.sleep(0)
    leaving.cancel()
    assert await rendered(renderer, "{{ 'stayed' }}") == "stayed"
    assert leaving.cancelled()


async def test_a_helper_that_was_killed_is_replaced(renderer):
    assert await rendered(renderer, "{{ 1 }}") == "1"
    process = renderer.helper._process
    os.kill(process.pid, signal.SIGKILL)
    await process.wait()
    assert await rendered(renderer, "{{ 2 }}") == "2"
    assert renderer.helper.pid != process.pid


async def test_the_helper_ends_with_the_server(renderer):
    assert await rendered(renderer, "{{ 1 }}") == "1"
    assert await renderer.helper.close() == -signal.SIGKILL


async def test_a_template_reads_no_file_even_outside_the_sandbox(renderer):
    """The limits hold for the process, whatever its template manages to call."""
    await rendered(renderer, "{{ 1 }}")
    with open(f"/proc/{renderer.helper.pid}/limits") as limits:
        rows = {line[:26].strip(): line[26:].split()[0] for line in limits}
    assert rows["Max open files"] == "3"
    assert rows["Max file size"] == "0"
    assert rows["Max address space"] == str(512 * 2**20)
    assert rows["Max core file size"] == "0"
