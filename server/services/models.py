"""Which models a request can name."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from server.errors import NotFound
from server.schemas.models import AnthropicModel, Model, ModelMeta
from server.services.engine_supervisor import EngineSupervisor


class Models:
    """The one model of this server, under its own name and its aliases.

    Args:
      strict: whether a request that names another model is refused. Otherwise it is answered by this one, and the answer
        says so: clients have names built in that no file of ours will ever have.
    """

    def __init__(self, supervisor: EngineSupervisor, aliases: Sequence[str] = (), *, strict: bool = False) -> None:
        self._supervisor = supervisor
        self._aliases = tuple(aliases)
        self._strict = strict

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the model's own first."""
        return tuple(dict.fromkeys((self._supervisor.engine.model.name, *self._aliases)))

    def resolve(self, name: str | None) -> str:
        """The name a response carries: the one asked for if it is this model's; raises NotFound if that is strict."""
        names = self.names
        if name in names:
            return name
        if name is not None and self._strict:
            raise _unknown(name)
        return names[0]

    def describe(self, name: str) -> Model:
        """One model as `/v1/models` lists it; raises NotFound for any other name."""
        if name not in self.names:
            raise _unknown(name)
        model = self._supervisor.engine.model
        return Model(
            id=name,
            created=model.created,
            meta=ModelMeta(
                architecture=model.architecture,
                n_params=model.parameters,
                size=model.size_bytes,
                n_ctx_train=model.context_length,
                n_vocab=model.vocab_size,
                n_embd=model.embedding_size,
                n_layer=model.layers,
            ),
        )

    def describe_to_anthropic(self, name: str) -> AnthropicModel:
        """One model as Anthropic's API lists it; raises NotFound for any other name."""
        if name not in self.names:
            raise _unknown(name)
        model = self._supervisor.engine.model
        return AnthropicModel(
            id=name,
            display_name=name,
            created_at=datetime.fromtimestamp(model.created, UTC),
            max_input_tokens=model.context_length,
            max_tokens=model.context_length,
        )


def _unknown(name: str) -> NotFound:
    return NotFound(f"The model '{name[:128]}' does not exist", param="model", code="model_not_found")
