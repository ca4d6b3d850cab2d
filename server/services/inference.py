"""From the body of a completion or chat request to a running generation."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from atlas_jax.engine.api import InvalidRequest, Overloaded, SamplingParams
from server.config.settings import SamplingSection
from server.middleware.request_context import PARTY, RequestContext
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.sampling import SamplingFields
from server.services.chat_response import ChatResponseBuilder
from server.services.completion_response import CompletionResponseBuilder
from server.services.generation import Generation, Generator
from server.services.generation_plan import GenerationPlan
from server.services.memory_options import MemoryPlan, plan_memory
from server.services.models import Models
from server.services.response_builder import Identification, ResponseBuilder
from server.services.response_format import answer_schema, compiled
from server.services.runtime_config import RuntimeConfig
from server.services.sampling import choices, default_sampling, sampling_params, stop_strings, token_limit
from server.services.tokenization import Tokenization
from server.services.unsupported import refuse_unsupported, refuse_unsupported_chat
from server.services.wire import OPENAI, Wire
from server.tool_calls.answer import AnswerReader
from server.tool_calls.channels import ChannelReader
from server.tool_calls.choice import Tools, chosen_tools, schema_grammar
from server.tool_calls.reader import CallReader
from server.tool_calls.reasoning import ReasoningReader
from server.validation import invalid, parse

_COMPLETION_TOKENS = 16
_EFFORTS = {"none": "low", "minimal": "low", "low": "low", "medium": "medium", "high": "high", "xhigh": "high"}
"""`reasoning_effort` as Harmony's templates know it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is known of a request once it has been checked and tokenised.

    Attributes:
      model: the name the answer carries.
      reader, legacy: as for `ChatResponseBuilder`.
    """

    model: str
    fingerprint: str
    prompt_tokens: int
    reader: Callable[[], AnswerReader] = AnswerReader
    legacy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Answering:
    """How an API writes its answer; the last two are those of `GenerationPlan`."""

    builder: ResponseBuilder
    wire: Wire = OPENAI
    commit: Callable[[], Awaitable[None]] | None = None
    field: str = "prompt"


class Inference:
    """Checks a request completely before anything of it reaches the engine, and starts it."""

    def __init__(
        self,
        *,
        generator: Generator,
        tokenization: Tokenization,
        models: Models,
        sampling: SamplingSection,
        config: RuntimeConfig,
        memory_enabled: bool,
    ) -> None:
        self._generator, self._supervisor, self._admission = generator, generator.supervisor, generator.admission
        self._sampling = sampling
        self._tokenization, self._models = tokenization, models
        self._config, self._memory_enabled = config, memory_enabled

    async def completion(self, raw: Any, context: RequestContext) -> Generation:
        """Starts a completion."""
        body = parse(CompletionRequest, raw)
        refuse_unsupported(_mapping(raw), CompletionRequest)
        return await self.complete(body, context)

    async def complete(
        self, body: CompletionRequest, context: RequestContext, answering: Callable[[Asked], Answering] | None = None
    ) -> Generation:
        """Starts the continuation of a text; `answering` as for `converse`, None is OpenAI's."""
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid("best_of", "must be equal to n", code="unsupported_parameter")
        model = self._admitted(body)
        memory = self._memory(body, context)
        prompts, echoes = await self._tokenization.prompts(body.prompt, echo=bool(body.echo))
        count = choices(body, prompts=len(prompts))
        usage = _wants_usage(body)
        fingerprint = self._supervisor.engine.model.fingerprint
        if answering is not None:
            how = answering(Asked(model=model, fingerprint=fingerprint, prompt_tokens=sum(map(len, prompts))))
        else:
            how = Answering(
                builder=CompletionResponseBuilder(
                    Identification.new("cmpl", model=model, fingerprint=fingerprint),
                    echoes=echoes,
                    choices=count,
                    logprobs=body.logprobs is not None,
                    with_usage=usage,
                )
            )
        plan = GenerationPlan(
            prompts=prompts,
            choices=count,
            sampling=self._sampling_params(body, logprobs=body.logprobs),
            max_tokens=token_limit(
                {"max_tokens": body.max_tokens, "n_predict": body.n_predict}, default=_COMPLETION_TOKENS
            ),
            stop=stop_strings(body),
            ignore_eos=bool(body.ignore_eos),
            reuse=body.cache_prompt is not False,
            grammar=None,
            prompt_logprobs=body.logprobs if body.echo else None,
            memory=memory,
            stream=bool(body.stream),
            include_usage=usage,
            builder=how.builder,
            wire=how.wire,
            commit=how.commit,
            field=how.field,
        )
        return await self._generator.start(plan, context)

    async def chat(self, raw: Any, context: RequestContext) -> Generation:
        """Starts a chat completion."""
        body = parse(ChatRequest, raw)
        refuse_unsupported(_mapping(raw), ChatRequest)
        usage = _wants_usage(body)

        def answering(asked: Asked) -> Answering:
            named = Identification.new("chatcmpl", model=asked.model, fingerprint=asked.fingerprint)
            builder = ChatResponseBuilder(
                named, logprobs=bool(body.logprobs), with_usage=usage, reader=asked.reader, legacy=asked.legacy
            )
            return Answering(builder=builder)

        return await self.converse(body, context, answering)

    async def converse(
        self,
        body: ChatRequest,
        context: RequestContext,
        answering: Callable[[Asked], Answering],
        *,
        whole: bool = False,
    ) -> Generation:
        """Starts the answer to a conversation.

        Args:
          body: what is asked for, in whatever API, as a chat completion.
          answering: says how the answer is written.
          whole: whether its session holds these messages and no others.
        """
        refuse_unsupported_chat(body)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        model = self._admitted(body)
        memory = self._memory(body, context)
        if whole and memory.params is not None:
            memory = replace(memory, params=msgspec.structs.replace(memory.params, whole=True))
        schema, tools = answer_schema(body.response_format), chosen_tools(body)
        written = body.messages, self._variables(body), () if tools is None else tools.told
        prompt = await self._tokenization.chat(*written)
        session = memory.params is not None and memory.params.session is not None
        frame = await self._tokenization.chat_frame(*written) if session else None
        engine = self._supervisor.engine
        thinking = engine.template.thinking
        begun = thinking is not None and self._tokenization.ends_with(prompt, thinking[0])
        grammar = await self._grammar(tools, schema, context, thinking[1] if thinking and begun else None)
        how = answering(
            Asked(
                model=model,
                fingerprint=engine.model.fingerprint,
                prompt_tokens=len(prompt),
                reader=functools.partial(self._reader, tools, thinking, begun=begun, exact=grammar is not None),
                legacy=tools is not None and tools.legacy,
            )
        )
        logprobs = body.top_logprobs or 0 if body.logprobs else None
        plan = GenerationPlan(
            prompts=[prompt],
            choices=choices(body, prompts=1),
            sampling=self._sampling_params(body, logprobs=logprobs),
            max_tokens=token_limit(
                {
                    "max_completion_tokens": body.max_completion_tokens,
                    "max_tokens": body.max_tokens,
                    "n_predict": body.n_predict,
                },
                default=None,
            ),
            stop=stop_strings(body),
            ignore_eos=bool(body.ignore_eos),
            reuse=body.cache_prompt is not False,
            grammar=grammar,
            prompt_logprobs=None,
            memory=memory,
            shown=frozenset((*(thinking or ()), *(() if tools is None else self._tokenization.form.style.markers))),
            chat=frame,
            stream=bool(body.stream),
            include_usage=_wants_usage(body),
            builder=how.builder,
            wire=how.wire,
            commit=how.commit,
            field=how.field,
        )
        return await self._generator.start(plan, context)

    async def _grammar(
        self, tools: Tools | None, schema: dict[str, Any] | None, context: RequestContext, thinking: str | None
    ) -> Any:
        """What the answer must match, or None where any text will do.

        Args:
          thinking: what ends the reasoning that the template has begun, or None.
        """
        engine, owner = self._supervisor.engine, context.identity.owner
        if tools is None and schema is None:
            return None
        style = self._tokenization.form.style
        if tools is None:
            written = schema_grammar(style, schema or {}, thinking)
            made = (
                engine.json_grammar(schema or {}, owner=owner)
                if written is None
                else engine.call_grammar(written, owner=owner)
            )
            return await compiled(made, context)
        calls = tools.grammar(style, thinking=thinking, answer=schema)
        try:
            return await compiled(engine.call_grammar(calls, owner=owner), context)
        except (InvalidRequest, Overloaded):
            if tools.forced or tools.strict or schema is not None:
                raise
            return None  # a model that may call or not is trusted to know how

    def _reader(
        self, tools: Tools | None, thinking: tuple[str, str] | None, *, begun: bool, exact: bool
    ) -> AnswerReader:
        """What tells the parts of one answer apart."""
        style = self._tokenization.form.style
        if style.channels is not None:
            names, most = (frozenset[str](), None) if tools is None else (tools.names, tools.most)
            return AnswerReader(ChannelReader(style, names, exact=exact, most=most, new_id=style.new_id))
        return AnswerReader(
            None if thinking is None else ReasoningReader(*thinking, begun=begun),
            None
            if tools is None
            else CallReader(style, tools.names, exact=exact, most=tools.most, new_id=style.new_id),
        )

    def _variables(self, body: ChatRequest) -> Mapping[str, Any] | None:
        """The template's variables: those of the request, and how much is to be thought where the template is told."""
        effort = _EFFORTS.get(body.reasoning_effort or "")
        if effort is None or not self._supervisor.engine.template.channels:
            return body.chat_template_kwargs
        return {"reasoning_effort": effort, **(body.chat_template_kwargs or {})}

    def _admitted(self, body: SamplingFields) -> str:
        """The model's name, once it is sure that admission does not refuse the request at once."""
        _ = self._supervisor.accepting
        model = self._models.resolve(body.model)
        self._admission.check(PARTY.get())
        return model

    def _sampling_params(self, body: SamplingFields, *, logprobs: int | None) -> SamplingParams:
        engine = self._supervisor.engine
        default = default_sampling(self._sampling, engine.model.sampling)
        return sampling_params(body, default=default, vocab_size=engine.tokenizer.vocab_size, logprobs=logprobs)

    def _memory(self, body: SamplingFields, context: RequestContext) -> MemoryPlan:
        plan = plan_memory(
            body.atlas,
            context.session,
            owner=context.identity.owner,
            defaults=self._config.values,
            unavailable=self._supervisor.engine.model.memory_unavailable
            if self._memory_enabled
            else "ATLAS not enabled",
            max_window=self._config.max_window,
            memory_dim=self._supervisor.engine.model.memory_dim,
        )
        if plan.session_id is not None and plan.session_id.isascii():
            context.response_headers.append((b"x-session-id", plan.session_id.encode()))
        return plan


def _wants_usage(body: SamplingFields) -> bool:
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)


def _mapping(raw: Any) -> Mapping[str, Any]:
    return raw if isinstance(raw, dict) else {}
