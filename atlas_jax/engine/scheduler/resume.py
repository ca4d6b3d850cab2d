"""Where a prompt goes on from, how its next page begins, and a session as its turn leaves it."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

from atlas_jax.config import PAGE
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.decode_state import Sequences
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.metrics import Counters
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_state import RequestState
from atlas_jax.engine.sessions.continuation import Continuation, Prompt, appending, continuation
from atlas_jax.engine.sessions.entry import NewText
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.session import Appended, Checkpoint, Session, SessionShape, SessionStats
from atlas_jax.model.page_schedule import NextPage


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


def resume_plain(runner: ModelRunner, prefixes: PrefixCache, req: RequestState) -> None:
    """Goes on from the longest beginning of the prompt that has been read before, else from nothing."""
    prompt = list(req.request.prompt)
    # the last token is fed by the first decode step, so it is never part of what has been read
    known = prefixes.find(req.request.owner, prompt[:-1]) if req.reuses else None
    if known is None:
        req.row = runner.new_row(1)
    else:
        context, req.position = known
        req.page = req.position // PAGE - 1
        saved = Sequences(context, None)
        req.row = runner.resume_row(saved, req.plan.ring(req.position + 1), req.position, req.plan.slot(req.page))
    req.cached = req.position
    req.pending_tokens = prompt[req.position :]


def resume(runner: ModelRunner, req: RequestState, session: Session, bos: int | None) -> None:
    """Goes on from the session's state, set back where the prompt replaces some of what it has read (`continuation`)."""
    assert req.shape is not None
    plan, request, history = req.shape.plan, req.request, session.text()
    regenerate = request.memory is not None and request.memory.regenerate
    prompt = Prompt(req.tokens, session.pending, bos, request.chat, regenerate)
    appended = _further_choice(req, session)
    if appended is not None:
        position = appended.position
        checkpoint = session.state_at(position)
        skip = max(0, len(req.tokens) - len(appended.tokens))
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
    new = [*step.insert, *request.prompt[step.skip :]] if appended is None else appended.tokens
    if step.effect in ("new", "appended"):
        appended = appended or Appended(list(request.prompt), step.keep, new)
    kept = Session(
        session.key,
        req.shape,
        history=session.history.copy(),
        checkpoints=list(session.checkpoints),
        stats=replace(session.stats),
        pending=session.pending if step.keep == history.length else None,
        appended=appended,
        state=session.state,
        created=session.created,
    )
    if checkpoint is None:
        req.row = runner.new_row(1)
        kept.history, kept.checkpoints, kept.stats = History(), [], SessionStats()
    else:
        if position < kept.history.tail_start:  # of a further choice, which leaves no trace
            kept.history = History()
        else:
            kept.history.truncate(position)
        kept.roll_back(checkpoint, position)
        req.page = min(checkpoint.page, position // PAGE)
        slot = plan.slot(max(req.page, 0))
        req.row = runner.resume_row(checkpoint.row, plan.ring(position + 1), position, slot)
        req.absorbed = checkpoint.absorbed
    kept.history.adopt_turns(history, step.keep)
    kept.history.replies += step.answers
    kept.history.preamble = step.preamble
    req.position = position
    req.pending_tokens = [*between, *new]
    req.keep, req.new = step.keep, new
    req.repeats = step.repeats
    req.replayed = _writes(session)
    req.history = step.effect
    req.cached = max(0, step.skip - len(between))
    req.cache_hit = checkpoint is not None and (position > 0 or step.effect == "appended")
    req.kept = kept


def _writes(session: Session) -> deque[tuple[int, MemoryWrite]]:
    """How the memory is written while text is read that the state has not read yet: to which position, and how."""
    writes: deque[tuple[int, MemoryWrite]] = deque()
    end = session.history.length
    for part in session.unread:
        end += len(part.tokens)
        writes.append((end, MemoryWrite.from_reading(part.reading)))
    return writes


def _further_choice(req: RequestState, session: Session) -> Appended | None:
    """The turn a further choice of a request answers too, if it brought new text and the first has answered it since."""
    before = session.appended
    if not req.request.choice or before is None or before.prompt != list(req.request.prompt):
        return None
    known = before.position == 0 or session.state_at(before.position) is not None
    return before if known else None


def kept_session(runner: ModelRunner, req: RequestState, row: Sequences, read: int, loss: float) -> Session:
    """The session as this request leaves it."""
    session = req.kept
    assert session is not None
    assert req.shape is not None
    session.history.forget_turns(session.history.length + 1)  # a prompt that was not read to its end
    if read > req.prompt_end >= 0:
        session.history.extend([*req.pending_tokens, *req.generated[: read - req.prompt_end - 1]])
        if req.generated:
            session.history.answered(req.prompt_end + 1, read + 1)
    if req.generated:
        session.pending = req.generated[-1]
    row = runner.rewind_row(row, req.ring_pages, read, req.plan.slot(max(req.page, 0)))
    session.advance(Checkpoint(read, req.page, row, req.absorbed))
    stats = session.stats
    stats.updates += req.updates
    stats.muon_iterations += req.muon_iterations
    if req.updates:
        stats.omega_loss, stats.last_update = loss, time.time()
    return session


def new_text(req: RequestState, session: Session) -> NewText:
    """What this request has done to its session's text, for the journal."""
    request, keep = req.request, req.keep
    tokens = [*req.new, *req.generated][: session.history.length - keep]
    assert req.write is not None

    def whole() -> list[int]:
        return [*request.prompt[:keep], *tokens]

    return NewText(keep, tokens, whole if req.repeats else None, req.write.reading(session.shape))


def begin_page(runner: ModelRunner, counters: Counters, req: RequestState) -> tuple[NextPage, MemoryWrite | None]:
    """Accounts for the page that begins with the next token; what the runner has to do, and how the memory is written."""
    write = req.write_now()
    passes = runner.muon_passes if write is not None and write.optimizer == "muon" else 0
    if req.begin_page(passes):
        counters.memory_updates += 1
        counters.muon_iterations += passes
    return req.plan.turn(req.page), write
