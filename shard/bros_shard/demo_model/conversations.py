"""Writes short ChatML conversations from docstrings, and a little small talk, so that the chat template works."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Final, TypeVar

from bros_shard.demo_model.stdlib import Definition, Module, Topic

T = TypeVar("T")
#: A question and its answer.
Turn = tuple[str, str]

TURN_START: Final = "<|im_start|>"
TURN_END: Final = "<|im_end|>"

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a helpful assistant who answers questions about Python.",
    "Answer briefly.",
    "You are the demo model of bros.",
)
FUNCTION_QUESTIONS: Final = (
    "What does {name} do?",
    "What does `{name}` do?",
    "Explain {name}.",
    "What is {name} for?",
    "Can you tell me what {name} does?",
    "Describe the function {name} in Python.",
    "How do I use {name}?",
)
CLASS_QUESTIONS: Final = (
    "What is {name}?",
    "What is the class {name} for?",
    "Explain the class `{name}`.",
    "Describe {name}.",
    "Tell me about {name}.",
)
MODULE_QUESTIONS: Final = (
    "What is the {name} module for?",
    "What does the module {name} do?",
    "Tell me about the Python module {name}.",
    "Describe the {name} module.",
    "What is {name}?",
)
CODE_QUESTIONS: Final = (
    "Show me the code of {name}.",
    "How is {name} implemented?",
    "Write the function {name}.",
    "Write {name} in Python.",
)
TOPIC_QUESTIONS: Final = ("Explain: {name}.", "Tell me about {name} in Python.", "What can you say about {name}?")
#: Longer answers teach a model of this size nothing about ending one.
MAX_ANSWER_CHARS: Final = 700
MAX_CODE_LINES: Final = 24
MAX_TURNS: Final = 3

IDENTITY: Final = (
    "I am the demo model of bros, a very small language model. I was trained on the documentation and the "
    "source code of Python, and I know nothing else."
)
LIMITS: Final = (
    "I am a very small model: my sentences look like Python documentation, but what they say is often wrong. "
    "Give bros a larger model for real answers."
)
BROS: Final = (
    "bros is a server for language models and a drop-in replacement for Text Generation Inference. It serves "
    "real-time and best-effort requests from one engine. I am its demo model."
)
GREETING: Final = "Hello! I am the demo model of bros. Ask me something about Python."
#: Written for this project.
SMALL_TALK: Final[tuple[tuple[tuple[str, ...], str], ...]] = (
    (("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning", "Good evening!"), GREETING),
    (("Hello, who are you?", "Hi, what are you?"), f"Hello! {IDENTITY}"),
    (("How are you?", "How are you doing?"), "I am fine, thank you. Ask me something about Python."),
    (
        ("Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "Introduce yourself.",
         "Are you a language model?", "Which model are you?", "What model is this?"),
        IDENTITY,
    ),
    (
        ("What can you do?", "Can you help me?", "What do you know?", "How good are you?", "Are you smart?",
         "Can I trust you?", "Are your answers right?"),
        LIMITS,
    ),
    (("What is bros?", "Tell me about bros.", "What is this server?", "Explain bros."), BROS),
    (
        ("What were you trained on?", "What is your training data?", "How were you trained?"),
        "I was trained on the documentation and the source code that ship with Python.",
    ),
    (("Thanks", "Thank you!", "Thanks a lot!", "Thank you very much."), "You are welcome."),
    (("Bye", "Goodbye", "See you later."), "Goodbye!"),
    (("Say hello.", "Say hi."), "Hello!"),
    (
        ("What is Python?", "Tell me about Python.", "Explain Python.", "Describe Python in one sentence."),
        "Python is a programming language. It is interpreted, interactive and object-oriented, and it comes with "
        "a large standard library.",
    ),
    (
        ("What is deep learning?", "What is machine learning?", "What is a language model?"),
        "A language model is a program that has learned from text to predict the next token. Deep learning means "
        "that it is built from many layers, whose weights are found by training.",
    ),
    (
        ("Write a hello world program.", "Write hello world in Python.", "How do I print a line?"),
        'Use the built-in function print:\n\n```python\nprint("Hello, world!")\n```',
    ),
    (
        ("Write a function that adds two numbers.", "How do I define a function?"),
        "Use the def statement:\n\n```python\ndef add(a, b):\n    return a + b\n```",
    ),
    (
        ("How do I write a loop?", "How do I count to ten?", "Write a for loop."),
        "Use the for statement:\n\n```python\nfor number in range(1, 11):\n    print(number)\n```",
    ),
    (
        ("How do I read a file?", "How do I open a file in Python?"),
        "Open it in a with statement, which closes it again:\n\n"
        '```python\nwith open("notes.txt", encoding="utf-8") as file:\n    text = file.read()\n```',
    ),
)  # fmt: skip


def small_talk() -> Iterator[str]:
    """Every phrasing alone, and once more with a system prompt in front."""
    for questions, answer in SMALL_TALK:
        for question in questions:
            yield render([(question, answer)])
            yield render([(question, answer)], pick(SYSTEM_PROMPTS, question))


def about_topics(topics: Iterable[Topic]) -> Iterator[tuple[str, str]]:
    """(topic, conversation): the first paragraphs of a help page."""
    for topic in topics:
        title, _, body = topic.text.partition("\n")
        paragraphs = re.split(r"\n\n", body.partition("\n")[2].strip())
        answer = first_paragraphs(paragraphs)
        if answer:
            for template in TOPIC_QUESTIONS:
                yield topic.name, render([(template.format(name=title.strip()), answer)])


def about_modules(modules: Iterable[Module]) -> Iterator[tuple[str, str]]:
    """(module, conversation): each public definition is asked about once, up to `MAX_TURNS` in a conversation."""
    for module in modules:
        turns = list(module_turns(module))
        while turns:
            size = 1 + checksum(turns[0][0]) % MAX_TURNS
            conversation, turns = turns[:size], turns[size:]
            wants_system = checksum(conversation[-1][1]) % 3 == 0
            system = pick(SYSTEM_PROMPTS, conversation[0][1]) if wants_system else None
            yield module.name, render(conversation, system)


def module_turns(module: Module) -> Iterator[Turn]:
    answer = first_paragraphs(module.docstring.split("\n\n"))
    if answer:
        yield pick(MODULE_QUESTIONS, module.name).format(name=module.name), answer
    for definition in module.definitions:
        if definition.is_public:
            yield from definition_turns(definition)


def definition_turns(definition: Definition) -> Iterator[Turn]:
    """What it does; for some short functions also how."""
    is_class = not definition.signature
    questions = CLASS_QUESTIONS if is_class else FUNCTION_QUESTIONS
    answer = first_paragraphs(definition.docstring.split("\n\n"))
    if len(answer) > len("Return it."):
        if checksum(definition.docstring) % 3 == 0 and not is_class:
            answer = f"```python\n{definition.name}{definition.signature}\n```\n\n{answer}"
        yield pick(questions, definition.name).format(name=definition.name), answer
    is_short = 0 < definition.source.count("\n") <= MAX_CODE_LINES
    if is_short and checksum(definition.source) % 4 == 0:
        code = f"```python\n{definition.source}\n```"
        yield pick(CODE_QUESTIONS, definition.name).format(name=definition.name), code


def first_paragraphs(paragraphs: Sequence[str]) -> str:
    """As many leading paragraphs as fit an answer, each on one line unless its layout means something."""
    taken: list[str] = []
    for paragraph in paragraphs:
        text = unwrap(paragraph)
        if sum(map(len, taken)) + len(text) > MAX_ANSWER_CHARS:
            break
        taken.append(text)
    return "\n\n".join(taken).strip()


def unwrap(paragraph: str) -> str:
    has_layout = re.search(r"^(\s+\S|>>>|[-*+] |\d+\.)|::$", paragraph, flags=re.M)
    return paragraph if has_layout else " ".join(paragraph.split())


def render(turns: Iterable[Turn], system: str | None = None) -> str:
    """ChatML, exactly as the chat template of `tokenizer.py` writes it."""
    messages = [("system", system)] if system else []
    for question, answer in turns:
        messages += [("user", question), ("assistant", answer)]
    return "".join(f"{TURN_START}{role}\n{text}{TURN_END}\n" for role, text in messages)


def pick(options: Sequence[T], key: str) -> T:
    """Choose by content, so that the choice survives every other change to the corpus."""
    return options[checksum(key) % len(options)]


def checksum(text: str) -> int:
    return zlib.crc32(text.encode())
