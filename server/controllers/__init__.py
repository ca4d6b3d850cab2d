"""HTTP handlers: parse, call a service, encode."""
