"""Where a prompt goes on from, how its next page begins, and a session as its turn leaves it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from atlas_jax.config import PAGE
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.engine.runner.base import Rows
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_state import Work
from atlas_jax.engine.sessions.continuation import (
    Continuation,
    Prompt,
    appending,
    continuation,
)
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.session import (
    Appended,
    Checkpoint,
    Session,
    SessionShape,
    SessionStats,
)
from atlas_jax.engine.sessions.tiers import NewText
from atlas_jax.model.page_schedule import Turn

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


def resume(runner: Rows, work: Work, session: Session, bos: int | None) -> None:
    """Goes on from the session's state, set back where the prompt replaces some of what it has read (`continuation`)."""
    assert work.shape is not None
    plan, request, history = work.shape.plan, work.request, session.text()
    regenerate = request.memory is not None and request.memory.regenerate
    prompt = Prompt(work.tokens, session.pending, bos, request.chat, regenerate)
    appended = _further_choice(work, session)
    if appended is not None:
        position = appended.position
        checkpoint = next((one for one in session.checkpoints if one.position == position), None)
        skip = max(0, len(work.tokens) - len(appended.feed))
        step = Continuation("appended" if position else "new", position, skip=skip)
    else:
        step = continuation(history, prompt)
        checkpoint, position = session.resume(step.keep)
    between = request.prompt[position : step.keep] if step.repeats else session.between(position, step.keep)
    if between is None:  # what lies between is not known any more
        step = appending(history, prompt)
        checkpoint, position = session.resume(step.keep)
        between = session.between(position, step.keep)
        assert between is not None
    new = [*step.insert, *request.prompt[step.skip :]] if appended is None else appended.feed
    if step.effect in ("new", "appended"):
        appended = appended or Appended(list(request.prompt), step.keep, new)
    kept = Session(
        session.key,
        work.shape,
        history=session.history.copy(),
        checkpoints=list(session.checkpoints),
        stats=replace(session.stats),
        pending=session.pending if step.keep == history.length else None,
        appended=appended,
        state=session.state,
        created=session.created,
    )
    if checkpoint is None:
        work.row = runner.new_row(1)
        kept.history, kept.checkpoints, kept.stats = History(), [], SessionStats()
    else:
        if position < kept.history.tail_start:  # of a further choice, which leaves no trace
            kept.history = History()
        else:
            kept.history.truncate(position)
        kept.checkpoints = [one for one in kept.checkpoints if one.position <= position or one is checkpoint]
        work.page = min(checkpoint.page, position // PAGE)
        slot = plan.slot(max(work.page, 0))
        work.row = runner.adopt(checkpoint.row, plan.ring(position + 1), position, slot)
        work.absorbed = checkpoint.absorbed
    kept.history.adopt_turns(history, step.keep)
    kept.history.replies += step.answers
    kept.history.preamble = step.preamble
    work.position = position
    work.feed = [*between, *new]
    work.keep, work.new = step.keep, new
    work.repeats = step.repeats
    work.replayed = _writes(session)
    work.history = step.effect
    work.cached = max(0, step.skip - len(between))
    work.cache_hit = checkpoint is not None and (position > 0 or step.effect == "appended")
    work.kept = kept


def _writes(session: Session) -> deque[tuple[int, MemoryWrite]]:
    """How the memory is written while text is read that the state has not read yet: to which position, and how."""
    writes: deque[tuple[int, MemoryWrite]] = deque()
    end = session.history.length
    for part in session.unread:
        end += len(part.tokens)
        writes.append((end, MemoryWrite.from_reading(part.reading)))
    return writes


def _further_choice(work: Work, session: Session) -> Appended | None:
    """The turn a further choice of a request answers too, if it brought new text and the first has answered it since."""
    before = session.appended
    if not work.request.choice or before is None or before.prompt != list(work.request.prompt):
        return None
    known = before.position == 0 or any(one.position == before.position for one in session.checkpoints)
    return before if known else None


def kept_session(runner: Rows, work: Work, row: Sequences, read: int, loss: float) -> Session:
    """The session as this request leaves it."""
    session = work.kept
    assert session is not None
    assert work.shape is not None
    session.history.forget_turns(session.history.length + 1)  # a prompt that was not read to its end
    if read > work.prompt_end >= 0:
        session.history.extend([*work.feed, *work.generated[: read - work.prompt_end - 1]])
        if work.generated:
            session.history.answered(work.prompt_end + 1, read + 1)
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


def new_text(work: Work, session: Session) -> NewText:
    """What this request has done to its session's text, for the journal."""
    request, keep = work.request, work.keep
    tokens = [*work.new, *work.generated][: session.history.length - keep]
    assert work.write is not None

    def whole() -> list[int]:
        return [*request.prompt[:keep], *tokens]

    return NewText(keep, tokens, whole if work.repeats else None, work.write.reading(session.shape))


def begin_page(runner: Rows, counters: Counters, work: Work) -> tuple[Turn, MemoryWrite | None]:
    """Accounts for the page that begins with the next token; what the runner has to do, and how the memory is written."""
    write = work.write_now()
    passes = runner.muon_passes if write is not None and write.optimizer == "muon" else 0
    if work.begin_page(passes):
        counters.memory_updates += 1
        counters.muon_iterations += passes
    return work.plan.turn(work.page), write
