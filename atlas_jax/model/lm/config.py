"""What a trainable ATLAS language model is: frozen, validated, hashable, and the same as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from atlas_jax.config import ConfigError
from atlas_jax.memory import Features, MemoryRule
from atlas_jax.memory._rule import table_from

LAYER_KINDS = {
    "A": "attention to everything before, as in Llama",
    "S": "sliding-window attention",
    "M": "memory alone (LMM)",
    "C": "memory as context of attention (MAC)",
    "G": "memory gating attention (MAG)",
    "L": "memory as a layer before attention (MAL)",
    "D": "deep memory over exponential features (DeepTransformer; Dot with a window)",
}

MEMORY_KINDS = frozenset("MCGL")

Rules = MemoryRule | tuple[MemoryRule | tuple[MemoryRule, ...], ...]
"""One rule for all layers with a memory; or one for each of them, in order, or several, which share out its heads."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class GateStart:
    """Where a memory layer's gates start, before training, whatever the input.

    Attributes:
      eta_max: greatest inner step; None takes the rule's, `MemoryRule.eta_max`.
      eta: inner step as a share of `eta_max`, in (0, 1), as are the others.
      alpha: retention; one that starts far below 1 forgets within a few tokens, and training does not recover.
      theta: momentum.
      gamma: window gates.
    """

    eta_max: float | None = None
    eta: float = 0.2
    alpha: float = 0.995
    theta: float = 0.5
    gamma: float = 0.5

    def __post_init__(self) -> None:
        _require(self.eta_max is None or self.eta_max > 0, f"eta_max must be positive, got {self.eta_max}")
        for name in ("eta", "alpha", "theta", "gamma"):
            _require(0 < getattr(self, name) < 1, f"gate start {name} must be in (0, 1), got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model whose layers are named by a pattern string.

    Attributes:
      pattern: one letter of `LAYER_KINDS` per layer: `"A" * 4` is a Llama, `"MS" * 2` a Samba-like hybrid.
      window: tokens that sliding-window attention sees, the current one included.
      segment: tokens MAC attends to at a time.
      persistent: learned tokens in front of the window of MAC, MAG and MAL (Titans); ATLAS uses none.
      combine: MAG's branches, both normalised: `gate` multiplies (Titans), `add` adds (as ATLAS draws it).
      rule: the memory of one head, for kinds M, C, G, L; projections fit its d_k and d_v. A tuple has a rule for each such
        layer, in order; an entry that is a tuple itself has the rules of a layer's heads, each of an equal share of them.
      memory_heads: memories per layer.
      gate_rank: width between the two linear maps that make each gate.
      gate_start: where gates start.
      conv: taps of the causal convolution on the memory's q, k and v.
      dot_window: Omega window of kind D; 1 is a DeepTransformer, more is Dot.
      dot_hidden: hidden units per head of kind D.
    """

    vocab: int
    embed: int
    ff: int
    heads: int
    pattern: str
    kv_heads: int | None = None
    head_dim: int | None = None
    context_length: int = 2048
    window: int = 256
    segment: int = 64
    persistent: int = 0
    combine: Literal["gate", "add"] = "gate"
    rule: Rules | None = None
    memory_heads: int = 1
    gate_rank: int = 16
    gate_start: GateStart = GateStart()
    conv: int = 4
    dot_window: int = 1
    dot_hidden: int = 64
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    tied_head: bool = True

    def __post_init__(self) -> None:
        for name in ("vocab", "embed", "ff", "heads", "context_length", "window", "segment", "memory_heads"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        for name in ("gate_rank", "conv", "dot_window", "dot_hidden"):
            _require(getattr(self, name) > 0, f"{name} must be positive, got {getattr(self, name)}")
        _require(self.persistent >= 0, f"persistent must not be negative, got {self.persistent}")
        _require(self.combine in ("gate", "add"), f"combine must be 'gate' or 'add', got {self.combine!r}")
        _require(self.norm_eps > 0 and self.rope_base > 0, "norm_eps and rope_base must be positive")
        _require(self.heads % self.n_kv == 0, f"heads ({self.heads}) must be a multiple of kv_heads ({self.n_kv})")
        _require(self.head_dim is not None or self.embed % self.heads == 0, "give head_dim, or heads that divide embed")
        _require(self.dim % 2 == 0, f"head_dim must be even, got {self.dim}")
        unknown = sorted(set(self.pattern) - set(LAYER_KINDS))
        letters = "".join(LAYER_KINDS)
        count = sum(kind in MEMORY_KINDS for kind in self.pattern)
        _require(
            not isinstance(self.rule, tuple) or len(self.rule) == count,
            f"rule has {len(self.rule) if isinstance(self.rule, tuple) else 1} entries for {count} layers with a memory",
        )
        for rules in self.layer_rules if self.rule is not None else ():
            _require(
                not rules or self.memory_heads % len(rules) == 0,
                f"memory_heads ({self.memory_heads}) must be a multiple of a layer's rules ({len(rules)})",
            )
        _require(bool(self.pattern) and not unknown, f"pattern {self.pattern!r} must use letters of {letters}")
        needs = sorted(set(self.pattern) & MEMORY_KINDS)
        _require(not needs or self.rule is not None, f"pattern has memory layers ({''.join(needs)}): give a rule")

    @property
    def n_kv(self) -> int:
        """KV heads: `kv_heads`, or as many as query heads."""
        return self.kv_heads or self.heads

    @property
    def dim(self) -> int:
        """Head dimension: `head_dim`, or embed / heads."""
        return self.head_dim or self.embed // self.heads

    @property
    def layer_rules(self) -> tuple[tuple[MemoryRule, ...], ...]:
        """Of each layer, the rules that share out its heads; empty for layers without a memory."""
        if self.rule is None:
            return ((),) * len(self.pattern)
        places = [kind in MEMORY_KINDS for kind in self.pattern]
        found = iter(self.rule if isinstance(self.rule, tuple) else (self.rule,) * sum(places))
        entries = (next(found) if place else () for place in places)
        return tuple(entry if isinstance(entry, tuple) else (entry,) for entry in entries)

    @property
    def document_step(self) -> int:
        """What places are multiples of where documents may begin in a row: chunks and segments begin anew with them."""
        if not set(self.pattern) & MEMORY_KINDS:
            return 1
        chunks = [rule.chunk for rules in self.layer_rules for rule in rules if rule.anchored]
        return math.lcm(16, *chunks, *([self.segment] if "C" in self.pattern else []))

    def eta_max(self, rule: MemoryRule) -> float:
        """Greatest inner step of a memory: as `gate_start` says, else the rule's own, `MemoryRule.eta_max`."""
        return rule.eta_max if self.gate_start.eta_max is None else self.gate_start.eta_max

    @property
    def is_llama(self) -> bool:
        """Whether the model is one that every Llama implementation can run."""
        return set(self.pattern) == {"A"}

    def replace(self, **changes: Any) -> LMConfig:
        """A copy with some fields changed; validated again."""
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """The configuration as JSON, sorted, so that equal ones give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> LMConfig:
        """The inverse of `to_json`.

        Raises:
          ConfigError: not JSON of such a configuration; the message says what is wrong.
        """
        try:
            fields = json.loads(text)
            rule = fields.pop("rule")
            if rule is not None:
                rule = _rules_from(rule)
            return cls(**{**fields, "gate_start": GateStart(**fields["gate_start"]), "rule": rule})
        except ConfigError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"not the configuration of a language model: {error}") from error


def _rules_from(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_rules_from(one) for one in value)
    fields = {**value, "per_channel": tuple(value["per_channel"]), "features": Features(**value["features"])}
    return MemoryRule(**{**fields, "ns_table": table_from(value["ns_table"])})
