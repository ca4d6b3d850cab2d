"""Responses that are kept: a tree of them for every owner, each a document.

A document holds what one response was asked and what it answered; what came before is found by following its parent. Its
name says where in the tree it is, so that the tree is known from a listing: `<id>.<parent>.<lane>`, and `.deleted` where the
response is gone and others still build on its text. A *lane* is a run of responses in one session: the first response that
follows another goes on in its lane, any further one begins a lane of its own, with a session that is forked.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from msgspec import Struct

from atlas_jax.engine.api import DocumentStore, SnapshotInvalid
from server.errors import NotFound, Unavailable
from server.schemas.responses import Item, OutputItem
from server.services.engine_supervisor import EngineSupervisor
from server.services.thread_pools import ThreadPools

log = logging.getLogger("atlas.server")
T = TypeVar("T")
_CACHED = 32 << 20
"""Bytes of records that are kept in memory as well, the latest ones."""
_NONE, _DELETED = "-", "deleted"
RESPONSE, TURN, CONVERSATION = "resp", "turn", "conversation."
"""How the names of documents begin: responses, items that were added to a conversation, and conversations."""
NO_RESPONSE = msgspec.Raw(b"null")


class Record(Struct, kw_only=True, frozen=True):
    """One response as it is kept, or items that were added to a conversation.

    Attributes:
      session: the name of its lane's session.
      input: what it was asked.
      output: what it answered.
      response: the response object as it was sent.
    """

    id: str
    parent: str | None
    session: str
    input: list[Item]
    output: list[OutputItem]
    response: msgspec.Raw

    @property
    def items(self) -> list[Item]:
        """All of it."""
        return [*self.input, *self.output]

    @property
    def size(self) -> int:
        """About how many bytes it takes."""
        return 2 * len(bytes(self.response)) + len(msgspec.json.encode(self.input))


@dataclass(frozen=True, slots=True)
class Node:
    """A response's place in the tree."""

    id: str
    parent: str | None
    lane: str
    deleted: bool = False

    @property
    def name(self) -> str:
        """Of its document."""
        parts = [self.id, self.parent or _NONE, self.lane, *([_DELETED] if self.deleted else [])]
        return ".".join(parts)

    @classmethod
    def parse(cls, name: str) -> Node | None:
        """The place that a document's name says; None for other documents."""
        parts = name.split(".")
        if not parts[0].startswith((f"{RESPONSE}_", f"{TURN}_")) or len(parts) not in (3, 4):
            return None
        return cls(parts[0], None if parts[1] == _NONE else parts[1], parts[2], parts[3:] == [_DELETED])


def lane_of(session: str) -> str:
    """What stands for a session in the names of documents."""
    return hashlib.sha256(session.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def response_not_found(response_id: str, *, param: str | None = None) -> NotFound:
    """The error of a response that is not there, or not any more."""
    return NotFound(f"Response with id '{response_id[:64]}' not found", param=param, code="response_not_found")


@dataclass
class _Tree:
    """Responses by their places.

    Attributes:
      sizes: bytes of their documents, where other servers write them too: one that was rewritten is shorter.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    children: dict[str, set[str]] = field(default_factory=dict)
    lanes: dict[str, set[str]] = field(default_factory=dict)

    def add(self, node: Node) -> None:
        self.nodes[node.id] = node
        self.lanes.setdefault(node.lane, set()).add(node.id)
        if node.parent is not None:
            self.children.setdefault(node.parent, set()).add(node.id)

    def remove(self, node: Node) -> None:
        del self.nodes[node.id]
        self.lanes[node.lane].discard(node.id)
        if node.parent in self.children:
            self.children[node.parent].discard(node.id)

    def heads(self, lane: str) -> list[Node]:
        """The last of a lane that are there: one, or none where there is no such lane, or nothing left of it."""
        own = [node for one in self.lanes.get(lane, ()) if not (node := self.nodes[one]).deleted]
        followed = {self._living(node.parent) for node in own}
        return [node for node in own if node.id not in followed]

    def _living(self, node_id: str | None) -> str | None:
        """The nearest response that is there, from this one to the beginning."""
        while node_id is not None and (node := self.nodes.get(node_id)) is not None and node.deleted:
            node_id = node.parent
        return node_id


class ResponseStore:
    """The responses of every owner; for the event loop. What blocks runs in a thread."""

    def __init__(self, supervisor: EngineSupervisor, pools: ThreadPools) -> None:
        self._supervisor, self._pools = supervisor, pools
        self._trees: dict[str, _Tree] = {}
        self._records: OrderedDict[tuple[str, str], tuple[Record, int]] = OrderedDict()
        self._cached = 0

    async def find(self, owner: str, response_id: str) -> Node | None:
        """A response's place; None where there is none, or not any more."""
        node = (await self._tree(owner)).nodes.get(response_id)
        return None if node is None or node.deleted or not node.id.startswith(f"{RESPONSE}_") else node

    async def last_of(self, owner: str, session: str) -> Node | None:
        """The last response of a session, None for a session that has none."""
        return next(iter((await self._tree(owner)).heads(lane_of(session))), None)

    async def is_last(self, owner: str, node: Node) -> bool:
        """Whether no other response goes on from this one in its lane."""
        tree = await self._tree(owner)
        return all(tree.nodes[child].lane != node.lane for child in tree.children.get(node.id, ()))

    async def read(self, owner: str, node: Node) -> Record:
        """What is kept of a response; raises Unavailable where that cannot be read."""
        return (await self._read(owner, [node]))[0]

    async def chain(self, owner: str, node: Node) -> list[Record]:
        """What came before, from the beginning, and the response itself."""
        tree = await self._tree(owner)
        path = [node]
        while path[-1].parent is not None and (before := tree.nodes.get(path[-1].parent)) is not None:
            path.append(before)
        return await self._read(owner, path[::-1])

    async def add(self, owner: str, record: Record) -> None:
        """Keeps a response; raises StorageFull, Unavailable."""
        tree = await self._tree(owner)
        node = Node(record.id, record.parent, lane_of(record.session))
        data = msgspec.json.encode(record)
        await self.run(lambda documents: documents.write(owner, node.name, data))
        tree.add(node)
        self._remember(owner, record, len(data))

    async def delete(self, owner: str, node: Node) -> str | None:
        """Removes a response.

        Its text stays as long as other responses build on it.

        Returns:
          The session of its lane, if nothing is left of that.
        """
        tree, record = await self._tree(owner), await self.read(owner, node)
        if tree.children.get(node.id):
            mark = Node(node.id, node.parent, node.lane, deleted=True)
            data = msgspec.json.encode(msgspec.structs.replace(record, response=NO_RESPONSE))

            def hide(documents: DocumentStore) -> None:
                documents.write(owner, mark.name, data)
                documents.delete(owner, node.name)

            await self.run(hide)
            tree.nodes[node.id] = mark
            self._forget(owner, node.id)
            return None if tree.heads(node.lane) else record.session
        gone: Node | None = node
        while gone is not None:
            name = gone.name
            await self.run(lambda documents, name=name: documents.delete(owner, name))  # type: ignore[misc]
            tree.remove(gone)
            self._forget(owner, gone.id)
            before = tree.nodes.get(gone.parent or "")
            gone = before if before is not None and before.deleted and not tree.children.get(before.id) else None
        return None if tree.heads(node.lane) else record.session

    async def delete_lane(self, owner: str, session: str) -> None:
        """Removes all that was said in a session."""
        tree = await self._tree(owner)
        while heads := tree.heads(lane_of(session)):
            await self.delete(owner, heads[0])

    async def rewrite(self, owner: str, record: Record) -> None:
        """Keeps a record in the place of what it was; raises StorageFull, Unavailable."""
        node, data = (await self._tree(owner)).nodes[record.id], msgspec.json.encode(record)
        await self.run(lambda documents: documents.write(owner, node.name, data))
        self._forget(owner, record.id)
        self._remember(owner, record, len(data))

    async def expire(self, owner: str, idle: float) -> int:
        """Deletes the trees that nothing was added to for `idle` seconds; returns how many responses that were."""
        tree, limit = await self._tree(owner), time.time() - idle
        files = await self.run(lambda documents: documents.list(owner))
        modified = {file.filename: file.modified for file in files}
        newest: dict[str, float] = {}
        roots: dict[str, list[Node]] = {}
        for node in tree.nodes.values():
            root = node
            while root.parent is not None and root.parent in tree.nodes:
                root = tree.nodes[root.parent]
            roots.setdefault(root.id, []).append(node)
            newest[root.id] = max(newest.get(root.id, 0.0), modified.get(node.name, time.time()))
        old = [node for root, nodes in roots.items() if newest[root] < limit for node in nodes]
        for node in old:
            name = node.name
            await self.run(lambda documents, name=name: documents.delete(owner, name))  # type: ignore[misc]
            tree.remove(node)
            self._forget(owner, node.id)
        lanes = {CONVERSATION + lane for lane, nodes in tree.lanes.items() if nodes}
        for name, written in modified.items():
            if name.startswith(CONVERSATION) and name not in lanes and written < limit:
                await self.run(lambda documents, name=name: documents.delete(owner, name))  # type: ignore[misc]
        return len(old)

    async def _read(self, owner: str, path: list[Node]) -> list[Record]:
        sizes = self._trees[owner].sizes if owner in self._trees else {}
        known: dict[str, tuple[Record, int]] = {}
        for node in path:
            kept = self._records.get((owner, node.id))
            if kept is not None and sizes.get(node.id, kept[1]) == kept[1]:
                known[node.id] = kept
        missing = [node for node in path if node.id not in known]

        def read(documents: DocumentStore) -> list[tuple[Record, int]]:
            found = []
            for node in missing:
                data = documents.read(owner, node.name)
                if data is None:  # without a store only the latest are kept
                    raise response_not_found(node.id)
                found.append((msgspec.json.decode(data, type=Record), len(data)))
            return found

        for record, size in await self.run(read) if missing else ():
            self._forget(owner, record.id)
            known[record.id] = record, size
        out = [known[node.id] for node in path]
        for record, size in out:
            self._remember(owner, record, size)
        return [record for record, _ in out]

    def _remember(self, owner: str, record: Record, size: int) -> None:
        if (owner, record.id) not in self._records:
            self._records[owner, record.id] = record, size
            self._cached += record.size
        self._records.move_to_end((owner, record.id))
        while self._cached > _CACHED and len(self._records) > 1:
            _, (oldest, _) = self._records.popitem(last=False)
            self._cached -= oldest.size

    def _forget(self, owner: str, response_id: str) -> None:
        known = self._records.pop((owner, response_id), None)
        if known is not None:
            self._cached -= known[0].size

    async def _tree(self, owner: str) -> _Tree:
        shared = self._supervisor.engine.documents.shared
        if owner not in self._trees or shared:
            before = self._trees.get(owner)
            files = await self.run(lambda documents: documents.list(owner))
            if self._trees.get(owner) is before:  # another request may have been as fast
                tree = _Tree()
                for file in files:
                    node = Node.parse(file.filename)
                    # a deletion that was cut short has left both names
                    if node is not None and (node.id not in tree.nodes or node.deleted):
                        tree.add(node)
                        if shared:
                            tree.sizes[node.id] = file.bytes
                self._trees[owner] = tree
        return self._trees[owner]

    async def run(self, work: Callable[[DocumentStore], T]) -> T:
        """Does something with the documents on a thread; raises Unavailable where they cannot be read or written."""
        documents = self._supervisor.engine.documents
        try:
            return await self._pools.run("sessions", lambda: work(documents))
        except (OSError, SnapshotInvalid, msgspec.MsgspecError) as error:
            log.error("[ATLAS] A response that is kept cannot be read or written: %s", type(error).__name__)
            raise Unavailable(
                "What is kept of this response cannot be read or written", code="storage_failed", retry_after=30.0
            ) from error
