"""Which models a request can name."""

from __future__ import annotations

from server.errors import NotFound
from server.schemas.models import Model, ModelMeta
from server.services.host import EngineHost


class Models:
    """The one model of this server, under its own name and its alias."""

    def __init__(self, host: EngineHost, alias: str | None) -> None:
        self._host = host
        self._alias = alias

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, the model's own first."""
        name = self._host.engine.model.name
        return (name,) if self._alias in (None, name) else (name, str(self._alias))

    def resolve(self, name: str | None) -> str:
        """The name a response carries; raises NotFound for a model this server does not have."""
        names = self.names
        if name is None:
            return names[0]
        if name not in names:
            raise NotFound(f"The model '{name[:128]}' does not exist", param="model", code="model_not_found")
        return name

    def describe(self, name: str) -> Model:
        """One model as `/v1/models` lists it."""
        self.resolve(name)
        model = self._host.engine.model
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
