"""Calls of models whose template knows no tools, or writes them as no family here: described to them in a message."""

from __future__ import annotations

from dataclasses import replace

from server.tool_calls.hermes import HERMES

GENERIC = replace(HERMES, bare=True)
"""What is asked for is what most models were shown at some time; what small ones write instead is a bare JSON object."""
