"""Where a request goes on from: nothing, a shared prefix, or its session's state, rewound where the prompt replaces text."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

from atlas_jax.config import PAGE
from atlas_jax.engine.api import InvalidRequest
from atlas_jax.engine.runner.base import ModelRunner
from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.scheduler.memory_account import MemoryAccount
from atlas_jax.engine.scheduler.prefix_cache import PrefixCache
from atlas_jax.engine.scheduler.request_state import Cursor, PrefillProgress, RequestState, SessionUpdate
from atlas_jax.engine.sessions.continuation import Continuation, Prompt, appending, continuation
from atlas_jax.engine.sessions.history import History
from atlas_jax.engine.sessions.session import Appended, Checkpoint, Session, SessionShape, SessionStats


@dataclass(frozen=True)
class Start:
    """The state of a request that begins; its parts are those of `RequestState`."""

    cursor: Cursor
    prefill: PrefillProgress
    memory: MemoryAccount | None = None
    update: SessionUpdate | None = None


def same_shape(session: SessionShape, request: SessionShape, given: frozenset[str], *, lora: bool) -> SessionShape:
    """A session keeps its shape; a request may repeat it or leave it out, not contradict it.

    Args:
      given: what the request says of its memory.
      lora: whether it says how far LoRA adapters are used.

    Raises:
      InvalidRequest: it names another value.
    """
    for name, have, want in (
        ("window_size", session.plan.window, request.plan.window),
        ("update_frequency", session.plan.update, request.plan.update),
        ("memory_layers", session.layers, request.layers),
        ("polynomial_degree", session.degree, request.degree),
        ("kept_pairs", session.kept, request.kept),
        ("memory_budget", session.budget, request.budget),
    ):
        if have != want and name in given:
            value = f"{have * PAGE if name in ('window_size', 'update_frequency') and have is not None else have}"
            raise InvalidRequest(
                f"Validation error in field 'atlas.{name}': this session was begun with {value} and keeps it; "
                "reset the session to change it",
                param=f"atlas.{name}",
            )
    if lora and session.lora != request.lora:
        raise InvalidRequest(
            "Validation error in field 'lora': this session was begun with other scales of the LoRA adapters and keeps them; "
            "reset the session to change them",
            param="lora",
        )
    return session


def start_plain(runner: ModelRunner, prefixes: PrefixCache, req: RequestState) -> Start:
    """Goes on from the longest prefix of the prompt that is cached, else from nothing."""
    prompt = list(req.request.prompt)
    # the last token is fed by the first decode step, so it is never part of what has been read
    known = prefixes.find(req.request.owner, prompt[:-1], req.lora) if req.reuses else None
    if known is None:
        return Start(Cursor(), PrefillProgress(runner.new_row(1, req.lora), prompt))
    saved, position = known
    cursor = Cursor(position=position, page=position // PAGE - 1)
    plan = cursor.plan
    row = runner.resume_row(saved, plan.ring(position + 1), position, plan.slot(cursor.page))
    return Start(cursor, PrefillProgress(row, prompt[position:], cached=position))


def start_new(runner: ModelRunner, req: RequestState, shape: SessionShape, write: MemoryWrite) -> Start:
    """Starts with an empty memory that nobody keeps."""
    prefill = PrefillProgress(runner.new_row(1, shape.lora), list(req.request.prompt))
    return Start(Cursor(shape.plan), prefill, MemoryAccount(shape, write))


def start_session(
    runner: ModelRunner, req: RequestState, session: Session, shape: SessionShape, write: MemoryWrite, bos: int | None
) -> Start:
    """Goes on from the session's state, rewound where the prompt replaces some of what it has read (`continuation`)."""
    found = _find(req, session, bos)
    step, checkpoint, position = found.step, found.checkpoint, found.position
    kept, repeated, prompt = _continued(session, shape, found), found.repeated, req.request.prompt
    new = [*step.insert, *prompt[step.skip :]] if repeated is None else repeated.tokens
    kept.appended = repeated
    if step.effect in ("new", "appended") and repeated is None:
        kept.appended = Appended(list(prompt), step.keep, new)
    cursor = Cursor(shape.plan, position)
    account = MemoryAccount(shape, write, _replayed(session))
    if checkpoint is None:
        row = runner.new_row(1, shape.lora)
    else:
        cursor.page = min(checkpoint.page, position // PAGE)
        slot = shape.plan.slot(max(cursor.page, 0))
        row = runner.resume_row(checkpoint.row, shape.plan.ring(position + 1), position, slot)
        account.absorbed = checkpoint.absorbed
    prefill = PrefillProgress(row, [*found.between, *new], cached=max(0, step.skip - len(found.between)))
    hit = checkpoint is not None and (position > 0 or step.effect == "appended")
    return Start(cursor, prefill, account, SessionUpdate(kept, step.effect, hit, step.keep, new, step.repeats))


@dataclass(frozen=True)
class _Found:
    """Where a session is gone on from.

    Attributes:
      step: what the prompt does to the session's text.
      checkpoint, position: the state to go on from, None for the empty one, and the position it will be at.
      between: text that stays but that the state has not read.
      repeated: the new text, where an earlier choice of the same request brought it.
    """

    step: Continuation
    checkpoint: Checkpoint | None
    position: int
    between: Sequence[int]
    repeated: Appended | None


def _find(req: RequestState, session: Session, bos: int | None) -> _Found:
    request, history = req.request, session.text()
    memory = request.memory
    assert memory is not None
    prompt = Prompt(req.tokens, session.pending, bos, request.chat, memory.regenerate, memory.whole)
    repeated = _further_choice(req, session)
    if repeated is not None:
        position = repeated.position
        checkpoint = session.state_at(position)
        skip = max(0, len(req.tokens) - len(repeated.tokens))
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
    return _Found(step, checkpoint, position, between, repeated)


def _continued(session: Session, shape: SessionShape, found: _Found) -> Session:
    """A copy of the session at the position found, for the request to go on with."""
    step, checkpoint, position, history = found.step, found.checkpoint, found.position, session.text()
    kept = Session(
        session.key,
        shape,
        history=session.history.copy(),
        checkpoints=list(session.checkpoints),
        stats=replace(session.stats),
        pending=session.pending if step.keep == history.length else None,
        state=session.state,
        created=session.created,
    )
    if checkpoint is None:
        kept.history, kept.checkpoints, kept.stats = History(), [], SessionStats()
    else:
        if position < kept.history.tail_start:  # of a further choice, which leaves no trace
            kept.history = History()
        else:
            kept.history.truncate(position)
        kept.roll_back(checkpoint, position)
    kept.history.adopt_turns(history, step.keep)
    kept.history.replies += step.answers
    kept.history.preamble = step.preamble
    return kept


def _replayed(session: Session) -> deque[tuple[int, MemoryWrite]]:
    """How the memory is written while text is read that the state has not read yet: to which position, and how."""
    writes: deque[tuple[int, MemoryWrite]] = deque()
    end = session.history.length
    for part in session.unread:
        end += len(part.tokens)
        writes.append((end, MemoryWrite.from_reading(part.reading)))
    return writes


def _further_choice(req: RequestState, session: Session) -> Appended | None:
    """The new text that a further choice of a request answers too, if the first choice has answered it since."""
    before = session.appended
    if not req.request.choice or before is None or before.prompt != list(req.request.prompt):
        return None
    known = before.position == 0 or session.state_at(before.position) is not None
    return before if known else None
