"""Tool calls and reasoning in a model's text.

Nothing here knows of HTTP or of the engine's threads. `style` is how a family of models writes calls: one file a family, and
a table in `styles`. `choice` checks a request's tools; `conversation` writes them, their calls and results for a template.
`reader` finds calls in an answer as it grows, `reasoning` what was thought before it.
"""
