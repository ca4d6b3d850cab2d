"""The tiny engines of `tests.engine`, for tests of how a memory is fitted."""

from tests.engine.conftest import cache, compiled, engine, engines, folder, models, opened

__all__ = ["cache", "compiled", "engine", "engines", "folder", "models", "opened"]
