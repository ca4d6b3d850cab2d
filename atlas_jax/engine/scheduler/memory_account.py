"""What one request does to its memory, counted as it is done."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from atlas_jax.engine.runner.step_inputs import MemoryWrite
from atlas_jax.engine.sessions.session import SessionShape


@dataclass
class MemoryAccount:
    """How a request's memory is shaped and written, and what it has done.

    Attributes:
      replayed: how the memory is written while text is read that came before this request: to which position, and how.
      absorbed, written: tokens the memory has taken in, in all and in this request.
      gate_sum, gate_count: of the weights its distribution was mixed in with.
    """

    shape: SessionShape
    write: MemoryWrite
    replayed: deque[tuple[int, MemoryWrite]] = field(default_factory=deque)
    absorbed: int = 0
    written: int = 0
    updates: int = 0
    muon_iterations: int = 0
    gate_sum: float = 0.0
    gate_count: int = 0

    @property
    def mean_gate(self) -> float:
        """Mean weight of the memory's distribution where it was read."""
        return self.gate_sum / self.gate_count if self.gate_count else 0.0

    def gate(self, weight: float) -> None:
        """Accounts for a token drawn with this weight on the memory's distribution."""
        if weight > 0:
            self.gate_sum += weight
            self.gate_count += 1

    def write_at(self, position: int) -> MemoryWrite:
        """How the memory is written when the page begins that `position` is in."""
        while self.replayed and self.replayed[0][0] <= position:
            self.replayed.popleft()
        return self.replayed[0][1] if self.replayed else self.write

    def absorb(self, tokens: int, muon_iterations: int) -> None:
        """Accounts for one write of `tokens` tokens."""
        self.absorbed += tokens
        self.written += tokens
        self.updates += 1
        self.muon_iterations += muon_iterations

    def skip(self, writes: int) -> None:
        """Takes back what `absorb` has accounted for writes that were not taken."""
        if writes and self.updates:
            lost = round(self.written * writes / self.updates)
            self.absorbed, self.written, self.updates = self.absorbed - lost, self.written - lost, self.updates - writes

    def absorb_every_token(self, start: int, read: int) -> None:
        """Accounts for a memory that is written with every token: of this request those from `start` to `read`."""
        self.written = self.updates = read - start
        self.absorbed = read
