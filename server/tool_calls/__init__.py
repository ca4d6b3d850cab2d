"""Tool calls and reasoning in a model's text: what a request may ask for, how templates write calls, and how they are read.

Nothing here knows of HTTP or of the engine's threads. `style` is how a family of models writes calls, one file a family
and a table in `styles`; `reader` finds calls in an answer as it grows, `reasoning` what was thought before it; `choice` checks
a request's tools, and `rewrite` describes them to models whose template knows none.
"""
