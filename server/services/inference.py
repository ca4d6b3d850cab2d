"""From the body of a completion or chat request to a running generation."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from atlas_jax.engine.api import AnswerShape, InvalidRequest, Overloaded, SamplingParams
from server.config.settings import SamplingSection
from server.middleware.request_context import PARTY, RequestContext
from server.schemas.chat import ChatRequest
from server.schemas.completions import CompletionRequest
from server.schemas.sampling import SamplingFields
from server.services.answer_shape import compiled, shape_of
from server.services.chat_response import ChatResponseBuilder
from server.services.completion_response import CompletionResponseBuilder
from server.services.generation import Generation, Generator
from server.services.generation_plan import GenerationPlan
from server.services.lora import scales_of
from server.services.memory_options import MemoryPlan, check_token_gates, plan_memory
from server.services.models import Models
from server.services.response_builder import Identification, ResponseBuilder
from server.services.runtime_config import RuntimeConfig
from server.services.sampling import choices, default_sampling, sampling_params, stop_strings, token_limit
from server.services.tokenization import Tokenization
from server.services.unsupported import effort_variables, refuse_unsupported, refuse_unsupported_chat
from server.services.wire import OPENAI, Wire
from server.tool_calls.answer import AnswerReader
from server.tool_calls.channels import ChannelReader
from server.tool_calls.choice import Tools, chosen_tools, schema_grammar
from server.tool_calls.reader import CallReader
from server.tool_calls.reasoning import ReasoningReader
from server.validation import invalid, parse, unsupported

_COMPLETION_TOKENS = 16


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
        refuse_unsupported(raw, CompletionRequest)
        return await self.complete(body, context)

    async def complete(
        self, body: CompletionRequest, context: RequestContext, answering: Callable[[Asked], Answering] | None = None
    ) -> Generation:
        """Starts the continuation of a text; `answering` as for `converse`, None is OpenAI's."""
        if body.best_of is not None and body.best_of != (body.n or 1):
            raise invalid("best_of", "must be equal to n", code="unsupported_parameter")
        if answering is not None:
            check_token_gates(body.atlas)
        model = self._admitted(body)
        memory, shape = self._memory(body, context), shape_of(body)
        prompts, echoes = await self._prompts(body)
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
            grammar=None if shape is None else await self._shaped(shape, context),
            prompt_logprobs=body.logprobs if body.echo else None,
            memory=memory,
            lora=scales_of(body.lora, self._supervisor.engine),
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
        refuse_unsupported(raw, ChatRequest)
        return await self.converse(body, context, tools=chosen_tools(body), shape=shape_of(body))

    async def converse(
        self,
        body: ChatRequest,
        context: RequestContext,
        answering: Callable[[Asked], Answering] | None = None,
        *,
        tools: Tools | None = None,
        shape: AnswerShape | None = None,
        whole: bool = False,
    ) -> Generation:
        """Starts the answer to a conversation.

        Args:
          body: what is asked for, in whatever API, as a chat completion; its tools and formats are not read.
          answering: says how the answer is written; None is as OpenAI's API does.
          tools: those it may call, or None.
          shape: what an answer that calls none must match, or None where any text will do.
          whole: whether its session holds these messages and no others.
        """
        refuse_unsupported_chat(body)
        if body.top_logprobs and not body.logprobs:
            raise invalid("top_logprobs", "needs logprobs to be true")
        if answering is not None:
            check_token_gates(body.atlas)
        model = self._admitted(body)
        memory = self._memory(body, context)
        if whole and memory.params is not None:
            memory = replace(memory, params=msgspec.structs.replace(memory.params, whole=True))
        variables = {**(effort_variables(body.reasoning_effort) or {}), **(body.chat_template_kwargs or {})}
        written = body.messages, variables, () if tools is None else tools.told
        prompt = await self._tokenization.chat(*written)
        session = memory.params is not None and memory.params.session is not None
        frame = await self._tokenization.chat_frame(*written) if session else None
        engine = self._supervisor.engine
        thinking = engine.template.thinking
        begun = thinking is not None and self._tokenization.ends_with(prompt, thinking[0])
        grammar = await self._grammar(tools, shape, context, thinking[1] if thinking and begun else None)
        asked = Asked(
            model=model,
            fingerprint=engine.model.fingerprint,
            prompt_tokens=len(prompt),
            reader=functools.partial(self._reader, tools, thinking, begun=begun, exact=grammar is not None),
            legacy=tools is not None and tools.legacy,
        )
        how = _openai_chat(body, asked) if answering is None else answering(asked)
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
            lora=scales_of(body.lora, self._supervisor.engine),
            stream=bool(body.stream),
            include_usage=_wants_usage(body),
            builder=how.builder,
            wire=how.wire,
            commit=how.commit,
            field=how.field,
        )
        return await self._generator.start(plan, context)

    async def _prompts(self, body: CompletionRequest) -> tuple[list[list[int]], list[str] | None]:
        """The prompts of a completion, and with `echo` their texts; with a `suffix`, gaps between both."""
        if not body.suffix:
            return await self._tokenization.prompts(body.prompt, echo=bool(body.echo))
        marks = self._supervisor.engine.model.infill
        if marks is None:
            raise unsupported("suffix")
        if body.echo:
            raise invalid("echo", "cannot be combined with suffix")
        if not isinstance(body.prompt, str | None):
            raise invalid("prompt", "must be a string where there is a suffix")
        return [await self._tokenization.gap(marks, body.prompt or "", body.suffix)], None

    async def _grammar(
        self, tools: Tools | None, shape: AnswerShape | None, context: RequestContext, thinking: str | None
    ) -> Any:
        """What the answer must match, or None where any text will do.

        Args:
          thinking: what ends the reasoning that the template has begun, or None.
        """
        engine, owner = self._supervisor.engine, context.identity.owner
        style = self._tokenization.form.style
        if tools is None:
            if shape is None:
                return None
            written = schema_grammar(style, shape, thinking)
            if written is None:
                return await self._shaped(shape, context)
            return await compiled(engine.call_grammar(written, owner=owner), context)
        calls = tools.grammar(style, thinking=thinking, answer=shape)
        try:
            return await compiled(engine.call_grammar(calls, owner=owner), context)
        except (InvalidRequest, Overloaded):
            if tools.forced or tools.strict or shape is not None:
                raise
            return None  # a model that may call or not is trusted to know how

    async def _shaped(self, shape: AnswerShape, context: RequestContext) -> Any:
        """What a text must match that is a shape and nothing else."""
        made = self._supervisor.engine.answer_grammar(shape, owner=context.identity.owner)
        return await compiled(made, context)

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
            fitting=self._supervisor.engine.fitting(),
        )
        if plan.session_id is not None and plan.session_id.isascii():
            context.response_headers.append((b"x-session-id", plan.session_id.encode()))
        return plan


def _openai_chat(body: ChatRequest, asked: Asked) -> Answering:
    return Answering(
        builder=ChatResponseBuilder(
            Identification.new("chatcmpl", model=asked.model, fingerprint=asked.fingerprint),
            logprobs=bool(body.logprobs),
            with_usage=_wants_usage(body),
            reader=asked.reader,
            legacy=asked.legacy,
        )
    )


def _wants_usage(body: SamplingFields) -> bool:
    return bool(body.stream and body.stream_options and body.stream_options.include_usage)
