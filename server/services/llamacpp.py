"""What llama.cpp's extra endpoints answer."""

from __future__ import annotations

from typing import Any, NoReturn

from atlas_jax import __version__
from server.config.settings import SamplingSection
from server.errors import NotSupported
from server.middleware.request_context import RequestContext
from server.schemas import llamacpp as schema
from server.services import lora
from server.services.engine_supervisor import EngineSupervisor
from server.services.generation import Generation
from server.services.inference import Answering, Asked, Inference
from server.services.llamacpp_api import Asking, LlamaBuilder, completion_request, settings_of, with_pairs
from server.services.models import Models
from server.services.sampling import default_sampling
from server.services.tokenization import Tokenization
from server.services.unsupported import refuse_unsupported
from server.services.wire import Wire
from server.tool_calls.choice import functions_of_tools
from server.validation import invalid, parse


class LlamaCppService:
    """Completions, tokenizer, template, properties and slots."""

    def __init__(
        self,
        *,
        inference: Inference,
        supervisor: EngineSupervisor,
        tokenization: Tokenization,
        models: Models,
        sampling: SamplingSection,
    ) -> None:
        self._inference = inference
        self._supervisor, self._tokenization, self._models, self._sampling = supervisor, tokenization, models, sampling

    async def completion(self, raw: Any, context: RequestContext) -> Generation:
        """Starts the answer of `POST /completion`."""
        body = parse(schema.LlamaCompletionRequest, with_pairs(raw))
        refuse_unsupported(raw, schema.LlamaCompletionRequest)
        if (
            not isinstance(body.prompt, str | None)
            and body.prompt
            and not all(isinstance(one, int) for one in body.prompt)
        ):
            raise invalid("prompt", "must be a string or token ids")
        return await self._complete(body, body.prompt or "", context, "prompt")

    async def infill(self, raw: Any, context: RequestContext) -> Generation:
        """Starts the answer of `POST /infill`; raises NotSupported for a model that was not taught to."""
        body = parse(schema.InfillRequest, with_pairs(raw))
        refuse_unsupported(raw, schema.InfillRequest)
        marks = self._supervisor.engine.model.infill
        if marks is None:
            raise NotSupported("This model cannot fill gaps: its vocabulary has no tokens that mark them")
        prompt = await self._tokenization.gap(marks, body.input_prefix, body.input_suffix, body.prompt or "")
        return await self._complete(body, prompt, context, "input_prefix")

    async def _complete(self, body: Asking, prompt: Any, context: RequestContext, field: str) -> Generation:
        shown = prompt if isinstance(prompt, str) else await self._tokenization.decode(prompt, field)

        def answering(asked: Asked) -> Answering:
            model = self._supervisor.engine.model
            default = default_sampling(self._sampling, model.sampling)
            settings = settings_of(body, default, model=asked.model, context=model.context_length)
            return Answering(
                builder=LlamaBuilder(shown, settings, tokens=bool(body.return_tokens)), wire=Wire(), field=field
            )

        return await self._inference.complete(completion_request(body, prompt), context, answering)

    def rerank(self, raw: Any) -> NoReturn:
        """Raises NotSupported: no model that is served ranks texts."""
        parse(schema.RerankRequest, raw)
        raise NotSupported("This model cannot rank texts; POST /v1/embeddings embeds them")

    async def tokenize(self, wanted: schema.TokenizeRequest) -> schema.TokenizeResponse:
        """Token ids, or tokens with their pieces."""
        ids = await self._tokenization.encode(
            wanted.content,
            add_special=bool(wanted.add_special),
            parse_special=wanted.parse_special is None or wanted.parse_special,
        )
        if not wanted.with_pieces:
            return schema.TokenizeResponse(tokens=list(ids))
        pieces = await self._tokenization.pieces(ids)
        return schema.TokenizeResponse(
            tokens=[schema.TokenPiece(id=one, piece=_piece(data)) for one, data in zip(ids, pieces, strict=True)]
        )

    async def detokenize(self, wanted: schema.DetokenizeRequest) -> schema.DetokenizeResponse:
        """The text of token ids."""
        return schema.DetokenizeResponse(content=await self._tokenization.decode(wanted.tokens, "tokens"))

    async def apply_template(self, wanted: schema.ApplyTemplateRequest) -> schema.ApplyTemplateResponse:
        """A conversation as text."""
        return schema.ApplyTemplateResponse(
            prompt=await self._tokenization.template(
                wanted.messages, wanted.chat_template_kwargs, functions_of_tools(wanted.tools or ())
            )
        )

    def props(self) -> schema.Props:
        """Properties of the model and defaults of a request."""
        engine = self._supervisor.engine
        default = default_sampling(self._sampling, engine.model.sampling)
        name = engine.model.name
        return schema.Props(
            default_generation_settings=schema.GenerationSettings(
                n_ctx=engine.model.context_length,
                params=schema.SamplingDefaults(
                    temperature=default.temperature,
                    top_k=default.top_k,
                    top_p=default.top_p,
                    min_p=default.min_p,
                    typical_p=default.typical_p,
                    repeat_penalty=default.repeat_penalty,
                    presence_penalty=default.presence_penalty,
                    frequency_penalty=default.frequency_penalty,
                    n_predict=-1,
                ),
            ),
            total_slots=len(engine.slots()),
            model_alias=self._models.names[-1],
            model_path=name,
            modalities={"vision": False, "audio": False},
            build_info=f"atlas-jax {__version__}",
        )

    def lora(self) -> list[schema.LoraAdapter]:
        """The LoRA adapters."""
        return lora.adapters(self._supervisor.engine)

    def scale_lora(self, raw: Any) -> schema.LoraChanged:
        """Changes the scales of requests that say nothing of adapters; raises BadRequest."""
        lora.change(raw, self._supervisor.accepting)
        return schema.LoraChanged(success=True)

    def slots(self, owner: str) -> list[schema.Slot]:
        """The decode slots of this moment; of another owner's no more than that they are busy."""
        engine = self._supervisor.engine
        return [
            schema.Slot(
                id=slot.id,
                is_processing=slot.busy,
                n_prompt_tokens=slot.prompt_tokens if slot.owner == owner else 0,
                n_decoded=slot.generated_tokens if slot.owner == owner else 0,
                session=slot.session and slot.owner == owner,
                n_ctx=engine.model.context_length,
            )
            for slot in engine.slots()
        ]


def _piece(data: bytes) -> str | list[int]:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return list(data)
