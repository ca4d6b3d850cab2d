"""Conversations as the model's chat template writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from atlas_jax.engine.api import ChatFrame, InvalidRequest, TemplateFacts
from atlas_jax.engine.sessions.chat_frame import ChatFrames
from atlas_jax.gguf import ChatTemplate, TemplateError, Tokenizer


class Chat:
    """Renders messages; what a template refuses is the request's fault.

    Args:
      template: or why the model's own cannot be used.

    Attributes:
      facts: what the template can do.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | TemplateError) -> None:
        self._tokenizer, self._template = tokenizer, template
        self._frames = ChatFrames(self._render)
        self.facts = TemplateFacts()
        if isinstance(template, ChatTemplate):
            self.facts = TemplateFacts(
                call=template.facts.call,
                system=template.facts.takes_system,
                thinking=template.facts.thinking,
                channels=template.facts.channels,
            )

    def tokens(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        begin_answer: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; raises InvalidRequest."""
        with _template_errors():
            return self._usable().render_tokens(
                self._tokenizer, messages, tools=tools, add_generation_prompt=begin_answer, variables=variables
            )

    def text(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> str:
        """A conversation for people to read; raises InvalidRequest."""
        with _template_errors():
            return self._usable().render(messages, **kwargs)

    def frame(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> ChatFrame:
        """What the template puts around these messages."""
        return self._frames.frame(messages, variables, tools)

    def _render(
        self,
        messages: Sequence[Mapping[str, Any]],
        begin_answer: bool,
        variables: Mapping[str, Any] | None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        return self._usable().render_tokens(
            self._tokenizer, messages, tools=tools, add_generation_prompt=begin_answer, variables=variables
        )

    def _usable(self) -> ChatTemplate:
        if isinstance(self._template, TemplateError):
            raise InvalidRequest(
                f"The chat template of this model cannot be used ({self._template}); "
                "/v1/completions takes a prompt as text",
                param="messages",
                code="chat_template_unusable",
            )
        return self._template


@contextmanager
def _template_errors() -> Iterator[None]:
    try:
        yield
    except TemplateError as error:
        raise InvalidRequest(str(error), param="messages") from error
