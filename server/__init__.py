"""An OpenAI-compatible HTTP API with ATLAS memory sessions, in front of any engine that implements `EngineProtocol`."""
