"""The benchmark of an hour's log counts every line, by its words."""

from __future__ import annotations

from benchmarks.log_hour import kinds

LOG = """\
2026-11-30 09:46:57,596 INFO atlas.engine Loaded a.gguf in 2.1 s
2026-11-30 09:56:16,742 WARNING atlas.server [ATLAS] 17 of 20 requests exceeded the latency budget of 5.0ms
2026-11-30 10:06:16,742 WARNING atlas.server [ATLAS] 3 of 200 requests exceeded the latency budget of 5.0ms
Traceback (most recent call last):
  File "x.py", line 3, in <module>
"""


def test_lines_that_differ_in_numbers_are_one_kind_and_lines_of_a_traceback_count() -> None:
    found = kinds(LOG)
    assert found.total() == len(LOG.splitlines())
    assert found["WARNING atlas.server [ATLAS] # of # requests exceeded the latency budget of #ms"] == 2
    assert found["INFO atlas.engine Loaded a.gguf in # s"] == 1
    assert found["Traceback (most recent call last):"] == 1
    assert len(found) == 4
