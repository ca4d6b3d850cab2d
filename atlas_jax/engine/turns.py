"""Where a prompt goes on from, how its next page begins, and a session as its turn leaves it."""

from __future__ import annotations

import time
from dataclasses import replace

from atlas_jax.config import PAGE
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.engine.counters import Counters
from atlas_jax.engine.history import History, continuation
from atlas_jax.engine.prefix import PrefixCache
from atlas_jax.engine.rows import Rows
from atlas_jax.engine.session import Appended, Checkpoint, Session, SessionShape, SessionStats
from atlas_jax.engine.settings import MemoryWrite
from atlas_jax.engine.state import Sequences
from atlas_jax.engine.work import Work
from atlas_jax.model.window import Turn

_KEPT_CHECKPOINTS = 3
"""States at the ends of turns a session keeps, the present one included, to roll back to."""


def same_shape(session: SessionShape, request: SessionShape, given: frozenset[str]) -> SessionShape:
    """A session keeps its shape; a request may repeat it or leave it out, not contradict it.

    Raises:
      InvalidRequest: it names another value.
    """
    for name, have, want in (
        ("window_size", session.plan.window, request.plan.window),
        ("update_frequency", session.plan.update, request.plan.update),
        ("memory_layers", session.layers, request.layers),
        ("polynomial_degree", session.degree, request.degree),
    ):
        if have != want and name in given:
            value = have * PAGE if name in ("window_size", "update_frequency") and have is not None else have
            raise InvalidRequest(
                f"Validation error in field 'atlas.{name}': this session was begun with {value} and keeps it; "
                "reset the session to change it",
                param=f"atlas.{name}",
            )
    return session


def resume_plain(runner: Rows, prefixes: PrefixCache, work: Work) -> None:
    """Goes on from the longest beginning of the prompt that has been read before, else from nothing."""
    prompt = list(work.request.prompt)
    # the last token is fed by the first decode step, so it is never part of what has been read
    known = prefixes.find(work.request.owner, prompt[:-1]) if work.reuses else None
    if known is None:
        work.row = runner.new_row(1)
    else:
        context, work.position = known
        work.page = work.position // PAGE - 1
        saved = Sequences(context, None)
        work.row = runner.adopt(saved, work.plan.ring(work.position + 1), work.position, work.plan.slot(work.page))
    work.cached = work.position
    work.feed = prompt[work.position :]


def resume(runner: Rows, work: Work, session: Session, prompt: list[int]) -> None:
    """Goes on from the session's state, rolled back where the prompt departs from what it has read."""
    assert work.shape is not None
    plan = work.shape.plan
    history = session.history
    step = continuation(history, prompt)
    appended: Appended | None = None
    if step.append:
        pending = [] if session.pending is None else [session.pending]
        appended = Appended(prompt, history.length, pending + prompt)
        before = session.appended
        ends = [checkpoint.position for checkpoint in session.checkpoints]
        if work.request.choice and before is not None and before.prompt == prompt and before.position in ends:
            appended = before  # the first choice has been answered since
    checkpoint, position = session.resume(step.keep if appended is None else appended.position)
    feed = prompt[position:] if appended is None else list(appended.feed)
    kept = Session(
        session.key,
        work.shape,
        history=history.copy(),
        checkpoints=list(session.checkpoints),
        stats=replace(session.stats),
        pending=session.pending if appended is not None else None,
        appended=appended,
        state=session.state,
        has_state=session.has_state,
        created=session.created,
    )
    if checkpoint is None:
        work.row = runner.new_row(1)
        kept.history, kept.checkpoints, kept.stats = History(), [], SessionStats()
    else:
        kept.history.truncate(position)
        kept.checkpoints = [one for one in kept.checkpoints if one.position <= position or one is checkpoint]
        work.page = min(checkpoint.page, position // PAGE)
        slot = plan.slot(max(work.page, 0))
        work.row = runner.adopt(checkpoint.row, plan.ring(position + 1), position, slot)
        work.absorbed = checkpoint.absorbed
    work.position = position
    work.cached = position if appended is None else 0
    work.cache_hit = checkpoint is not None and (position > 0 or appended is not None)
    work.feed = feed
    work.kept = kept


def kept_session(runner: Rows, work: Work, row: Sequences, read: int, loss: float) -> Session:
    """The session as this request leaves it."""
    session = work.kept
    assert session is not None
    assert work.shape is not None
    if read > work.prompt_end >= 0:
        session.history.extend([*work.feed, *work.generated[: read - work.prompt_end - 1]])
        if work.generated and session.history.first_reply is None:
            session.history.first_reply = work.prompt_end + 1
    if work.generated:
        session.pending = work.generated[-1]
    row = runner.set_back(row, work.ring_pages, read, work.plan.slot(max(work.page, 0)))
    session.checkpoints = [
        *session.checkpoints[-(_KEPT_CHECKPOINTS - 1) :],
        Checkpoint(read, work.page, row, work.absorbed),
    ]
    stats = session.stats
    stats.updates += work.updates
    stats.muon_iterations += work.muon_iterations
    if work.updates:
        stats.omega_loss, stats.last_update = loss, time.time()
    return session


def begin_page(runner: Rows, counters: Counters, work: Work) -> tuple[Turn, MemoryWrite | None]:
    """Accounts for the page that begins with the next token; what the runner has to do, and how the memory is written."""
    passes = runner.muon_passes if work.write is not None and work.write.optimizer == "muon" else 0
    if work.begin_page(passes):
        counters.memory_updates += 1
        counters.muon_iterations += passes
    return work.plan.turn(work.page), work.write
