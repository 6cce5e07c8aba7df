"""Chat templates: from messages to the text that the model was trained on.

Templates come with a download, so they run in Jinja's sandbox. The names that they may use are
those of transformers' `apply_chat_template`.
"""

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from pretrained.errors import ModelError


class Generation(Extension):
    """`{% generation %}`, which marks what the assistant says; here it is only its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own way)

    def parse(self, parser: Parser) -> list[Node]:
        """The statements between the marks."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


@dataclasses.dataclass(frozen=True)
class Chat:
    """A chat template.

    Attributes:
      template: in Jinja's language.
      words: what it may name besides the messages, such as bos_token.
      now: the time that it is told if it asks for the day; None is that of rendering.
    """

    template: str
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    now: datetime.datetime | None = None

    def __post_init__(self) -> None:
        """Refuse a broken template now.

        Raises:
          ModelError: it is not in Jinja's language.
        """
        _ = self._compiled

    def render(self, messages: Sequence[Mapping[str, Any]], *, generate: bool) -> str:
        """The text of a conversation.

        Args:
          messages: `{"role": ..., "content": ...}` each.
          generate: whether to end with the words that open the assistant's answer.

        Raises:
          ModelError: the template refuses these messages.
        """
        try:
            return self._compiled.render(
                messages=messages,
                tools=None,
                documents=None,
                add_generation_prompt=generate,
                strftime_now=(self.now or datetime.datetime.now()).strftime,
                **self.words,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = [message.get("role") for message in messages]
            raise ModelError(
                f"The chat template refuses messages of the roles {roles}: {error}"
            ) from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.template)
        except jinja2.TemplateSyntaxError as error:
            raise ModelError(f"line {error.lineno} of the chat template: {error}") from error


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    extensions = [Generation, "jinja2.ext.loopcontrols"]
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=extensions
    )
    made.filters["tojson"] = _to_json
    made.globals["raise_exception"] = _refuse
    return made


def _to_json(value: Any, **options: Any) -> str:
    """As it is: Jinja's own filter escapes what HTML gives a meaning."""
    return json.dumps(value, **{"ensure_ascii": False, **options})


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
