"""From the grammar that a client sent to one that the ranks can follow: the last of the contract's rules."""

from __future__ import annotations

from msgspec import UNSET

from bros_router.api.errors import ValidationError
from bros_router.api.grammar import (
    Grammar,
    JsonGrammar,
    JsonObjectFormat,
    JsonObjectGrammar,
    JsonSchemaFormat,
    JsonSchemaGrammar,
    RegexGrammar,
    ResponseFormat,
    SchemaConfig,
    TextFormat,
)
from bros_router.grammars.protocol import GrammarSource, RegexSource, Rule, SchemaSource, SchemaTextSource, Vetted
from bros_router.grammars.vetter import GrammarVetter, GuidedVocabulary


async def vetted_grammar(
    source: GrammarSource | Grammar, vetter: GrammarVetter, guided: GuidedVocabulary | None
) -> str:
    """The grammar as ranks take it.

    Args:
        guided: `None` where the operator, or the model, allows no grammars.

    Raises:
        ValidationError: there is no such grammar.
        OverloadedError: too many grammars wait to be vetted.
    """
    if guided is None:
        raise _refusal("unsupported")
    reply = await vetter.vet(_source_of(source), guided)
    if isinstance(reply, Vetted):
        return reply.grammar
    raise _refusal(reply.rule, reply.reason)


def _source_of(grammar: GrammarSource | Grammar) -> GrammarSource:
    """What is to be vetted. Raises `ValidationError` where the value has not the shape that its type wants."""
    match grammar:
        case JsonGrammar(dict() as schema) | JsonObjectGrammar(dict() as schema):
            return SchemaSource(schema)
        case JsonGrammar(str(text)) | JsonObjectGrammar(str(text)):
            return SchemaTextSource(text)
        case JsonGrammar() | JsonObjectGrammar():
            raise _refusal("unsupported")
        case JsonSchemaGrammar(config):
            return SchemaSource(config.schema)
        case RegexGrammar(regex):
            return RegexSource(regex)
    return grammar


def grammar_of_format(response_format: ResponseFormat) -> GrammarSource | Grammar | None:
    """What OpenAI's clients mean, who may leave out the properties of a schema; `None`: anything."""
    match response_format:
        case TextFormat():
            return None
        case JsonObjectFormat(value) if value is UNSET:
            return SchemaSource({"type": "object"}, needs_properties=False)
        case JsonObjectFormat(value):
            return JsonObjectGrammar(value)
        case JsonSchemaFormat(SchemaConfig(schema)):
            return SchemaSource(schema, needs_properties=False)
        case JsonSchemaFormat(_, SchemaConfig() as config):
            return JsonSchemaGrammar(config)
        case JsonGrammar() | RegexGrammar():
            return response_format
    raise AssertionError(response_format)


def _refusal(rule: Rule, reason: str = "") -> ValidationError:
    """In TGI's words."""
    match rule:
        case "unsupported":
            return ValidationError("grammar is not supported")
        case "invalid":
            return ValidationError(f"grammar is not valid: {reason}")
        case "uncompilable":
            return ValidationError(f"cannot compile regex from schema: {reason}")
