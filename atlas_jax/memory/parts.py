"""What memory rules are made of, by name: objectives, activations, architectures, retentions, optimisers.

A `MemoryRule` is plain data that names its parts; here a name gets its function. A part of one's own is a function under
a decorator, and from then on a name like the others, in rules, checkpoints, GGUF files and the server:

    @parts.objective("log_cosh")
    def log_cosh(y, v):
        return jnp.sum(jnp.log(jnp.cosh(y - v)))

    rule = presets.titans(32, 32, objective="log_cosh")

Numbers after a name are further arguments of its function: `"huber(0.5)"`, `"p_norm(1.5)"`. A process that reads such a
model must have imported the module that names its parts; installed packages are found by themselves if they declare it as an
entry point of the group `atlas_jax.parts`.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp

from atlas_jax.config import ConfigError
from atlas_jax.kernels.newton_schulz import orthogonalize
from atlas_jax.typing import Array, Float

if TYPE_CHECKING:
    from atlas_jax.memory._rule import MemoryRule

__all__ = ["Part", "activation", "architecture", "find", "names", "objective", "optimizer", "retention"]

Function = TypeVar("Function", bound=Callable[..., Any])
Apply = Callable[[str, jax.Array], jax.Array]
"""(name of a weight, one vector per token) → the product of the two, for each token."""
Shapes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of each weight."""

_CALL = re.compile(r"([A-Za-z_]\w*)(?:\(([^()]*)\))?")
_GROUP = "atlas_jax.parts"


@dataclass(frozen=True, eq=False)
class Part:
    """A function and what a rule must know of it.

    Attributes:
      function: with the numbers of its name filled in.
      facts: what its decorator was told.
    """

    function: Callable[..., Any]
    facts: Mapping[str, Any] = field(default_factory=dict)


_PARTS: dict[str, dict[str, Part]] = {
    kind: {} for kind in ("objective", "activation", "architecture", "retention", "optimizer")
}


def objective(name: str, *, curvature: float = 2.0) -> Callable[[Function], Function]:
    """Names ℓ(y, v): what the memory reads for a key [d_v] and what it should read [d_v] → a number to be made small.

    Args:
      curvature: its greatest second derivative for errors of length up to 1; safe steps follow from it.
    """
    return _register("objective", name, curvature=curvature)


def activation(name: str, *, slope: float = 0.5) -> Callable[[Function], Function]:
    """Names σ, from an array to one of its shape, each number by itself.

    Args:
      slope: of σ near 0, which safe steps follow from.
    """
    return _register("activation", name, slope=slope)


def architecture(
    name: str, shapes: Callable[[MemoryRule], Shapes], *, zero: bool = False, columns: tuple[str, ...] = ()
) -> Callable[[Function], Function]:
    """Names M: (rule, apply, features [tokens, D]) → what is read [tokens, d_v], the residual aside.

    It sees its weights only through `apply(name, x)`, the product of a weight with one vector per token, once for each
    weight: from that follow its gradients, and a chunkwise form that never forms a weight per token.

    Args:
      shapes: rule → outputs and inputs of each weight.
      zero: whether W₀ starts at zero instead of random numbers of variance 1 / inputs.
      columns: weights whose columns, not rows, are the channels of a gate that is per channel.
    """
    return _register("architecture", name, shapes=shapes, zero=zero, columns=frozenset(columns))


def retention(name: str) -> Callable[[Function], Function]:
    """Names R: (W, α, step) → the memory after a token, all shaped as the weight or broadcast to it.

    `decay` is α·W − step. Others have no dual form: the weights of a chunk are formed one after the other.
    """
    return _register("retention", name)


def optimizer(name: str) -> Callable[[Function], Function]:
    """Names U: the momentum S of a weight [..., outputs, inputs] → the direction of the step, of the size that η says.

    `gradient` has no S, `momentum` and `muon` are U(S) = S and Newton–Schulz, `exact` takes no steps.
    """
    return _register("optimizer", name)


def find(kind: str, text: str) -> Part:
    """The part of a name, with the numbers behind it filled in.

    Args:
      kind: "objective", "activation", "architecture", "retention" or "optimizer".

    Raises:
      ConfigError: no such part, or numbers that its function does not take; the message names the known ones.
    """
    _load_installed(kind, text)
    return _find(kind, text, _PARTS[kind].get(text.partition("(")[0]))


def names(kind: str) -> tuple[str, ...]:
    """Names of all parts of a kind."""
    return tuple(_PARTS[kind])


def _register(kind: str, name: str, **facts: Any) -> Callable[[Function], Function]:
    if not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise ConfigError(f"{kind}: a name is letters, digits and underscores; got {name!r}")

    def named(function: Function) -> Function:
        held = _PARTS[kind].get(name)
        if held is not None and _source(held.function) != _source(function):
            raise ConfigError(f"{kind}: {name!r} is taken by {held.function.__module__}.{held.function.__qualname__}")
        _PARTS[kind][name] = Part(function, facts)
        return function

    return named


def _source(function: Any) -> tuple[str, str]:
    """Where a function is written: a module that is imported again, or a cell that is run again, may name it again."""
    return function.__module__, function.__qualname__


def _load_installed(kind: str, text: str) -> None:
    if text.partition("(")[0] not in _PARTS[kind]:
        for point in entry_points(group=_GROUP):
            point.load()


@functools.lru_cache(maxsize=256)
def _find(kind: str, text: str, part: Part | None) -> Part:
    call = _CALL.fullmatch(text)
    if part is None or call is None:
        raise ConfigError(f"{kind}: must be one of {', '.join(_PARTS[kind])}; got {text!r}")
    if call[2] is None:
        return part
    try:
        numbers = [float(number) for number in call[2].split(",")]
        further = list(inspect.signature(part.function).parameters)[_ARGUMENTS[kind] :]
        given = dict(zip(further, numbers, strict=False))
        if len(given) < len(numbers):
            raise ValueError(f"{call[1]} takes {len(further)} numbers")
    except ValueError as error:
        raise ConfigError(f"{kind}: {text!r}: {error}") from error
    return Part(functools.partial(part.function, **given), part.facts)


_ARGUMENTS = {"objective": 2, "activation": 1, "architecture": 3, "retention": 3, "optimizer": 1}
"""Arguments of each kind's function before those that stand behind its name."""


# --- objectives -------------------------------------------------------------------------------------------------------
@objective("l2")
def _l2(y: Float[Array, " d"], v: Float[Array, " d"]) -> Float[Array, ""]:
    """‖y − v‖²: gradient 2(y − v), with the factor 2 of the papers' loss."""
    return jnp.sum((y - v) ** 2)


@objective("dot")
def _dot(y: Float[Array, " d"], v: Float[Array, " d"]) -> Float[Array, ""]:
    """−⟨y, v⟩."""
    return -jnp.sum(y * v)


@objective("huber")
def _huber(y: Float[Array, " d"], v: Float[Array, " d"], delta: float = 1.0) -> Float[Array, ""]:
    """‖y − v‖² up to an error of length δ, beyond it linear with the slope it has there (MIRAS' Yaad)."""
    error = y - v
    square = jnp.sum(error * error)
    near = square <= delta * delta
    length = jnp.sqrt(jnp.where(near, delta * delta, square))  # no slope of a root that is not taken
    return jnp.where(near, square, delta * (2 * length - delta))


@objective("p_norm", curvature=6.0)
def _p_norm(y: Float[Array, " d"], v: Float[Array, " d"], p: float = 3.0) -> Float[Array, ""]:
    """‖y − v‖ₚᵖ (MIRAS' Moneta): slope p·sign(e)·|e|^(p−1), 0 where the error is 0."""
    size = jnp.abs(y - v)
    some = size > 0
    return jnp.sum(jnp.where(some, jnp.where(some, size, 1.0) ** p, 0.0))


# --- activations ------------------------------------------------------------------------------------------------------
activation("gelu")(jax.nn.gelu)
activation("silu")(jax.nn.silu)
activation("relu", slope=1.0)(jax.nn.relu)
activation("tanh", slope=1.0)(jnp.tanh)


# --- architectures ----------------------------------------------------------------------------------------------------
@architecture("matrix", lambda rule: {"w": (rule.d_v, rule.feature_dim)}, zero=True)
def _matrix(rule: MemoryRule, apply: Apply, x: Float[Array, "T D"]) -> Float[Array, "T d_v"]:
    """W·φ(k)."""
    return apply("w", x)


def _two_layers(rule: MemoryRule) -> Shapes:
    return {"w1": (rule.d_v, rule.hidden_dim), "w2": (rule.hidden_dim, rule.feature_dim)}


@architecture("mlp", _two_layers, columns=("w1",))
def _mlp(rule: MemoryRule, apply: Apply, x: Float[Array, "T D"]) -> Float[Array, "T d_v"]:
    """W1·σ(W2·φ(k)) (equation 42)."""
    return apply("w1", rule.sigma(apply("w2", x)))


@architecture("gated_mlp", lambda rule: {**_two_layers(rule), "w3": _two_layers(rule)["w2"]}, columns=("w1",))
def _gated_mlp(rule: MemoryRule, apply: Apply, x: Float[Array, "T D"]) -> Float[Array, "T d_v"]:
    """W1·(σ(W2·φ(k)) ⊙ W3·φ(k)) (equation 43)."""
    return apply("w1", rule.sigma(apply("w2", x)) * apply("w3", x))


@architecture("norm_matrix", lambda rule: {"w": (rule.d_v, rule.feature_dim)})
def _norm_matrix(rule: MemoryRule, apply: Apply, x: Float[Array, "T D"]) -> Float[Array, "T d_v"]:
    """LayerNorm(W·φ(k)): TTT-Linear's model, its norm inside the loss."""
    return layer_norm(apply("w", x))


@architecture("norm_mlp", _two_layers, columns=("w1",))
def _norm_mlp(rule: MemoryRule, apply: Apply, x: Float[Array, "T D"]) -> Float[Array, "T d_v"]:
    """LayerNorm(W1·σ(W2·φ(k))): TTT-MLP's model, its norm inside the loss."""
    return layer_norm(_mlp(rule, apply, x))


def _three_layers(rule: MemoryRule) -> Shapes:
    hidden = rule.hidden_dim
    return {"w1": (rule.d_v, hidden), "w2": (hidden, hidden), "w3": (hidden, rule.feature_dim)}


@architecture("deep_mlp", _three_layers)
def _deep_mlp(rule: MemoryRule, apply: Apply, x: Float[Array, "T D"]) -> Float[Array, "T d_v"]:
    """W1·σ(W2·σ(W3·φ(k)))."""
    return apply("w1", rule.sigma(apply("w2", rule.sigma(apply("w3", x)))))


def layer_norm(x: Float[Array, "T d"], eps: float = 1e-6) -> Float[Array, "T d"]:
    """Mean 0 and variance 1 over the last axis, without learned numbers."""
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)


# --- retentions -------------------------------------------------------------------------------------------------------
@retention("decay")
def _decay(w: Float[Array, "o i"], alpha: Float[Array, "#o #i"], step: Float[Array, "o i"]) -> Float[Array, "o i"]:
    """α·W − step."""
    return alpha * w - step


@retention("none")
def _none(w: Float[Array, "o i"], alpha: Float[Array, "#o #i"], step: Float[Array, "o i"]) -> Float[Array, "o i"]:
    """W − step; the rule has no α."""
    return w - step


@retention("elastic_net")
def _elastic_net(
    w: Float[Array, "o i"], alpha: Float[Array, "#o #i"], step: Float[Array, "o i"], threshold: float = 1e-3
) -> Float[Array, "o i"]:
    """Soft thresholding of α·W − step (MIRAS, L1 and L2 retention together): what is small is forgotten for good."""
    moved = alpha * w - step
    return jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - threshold, 0.0)


@retention("bounded")
def _bounded(
    w: Float[Array, "o i"], alpha: Float[Array, "#o #i"], step: Float[Array, "o i"], norm: float = 10.0
) -> Float[Array, "o i"]:
    """α·W − step, scaled back to a Frobenius norm where it is past it."""
    moved = alpha * w - step
    square = jnp.sum(moved * moved)
    over = square > norm * norm
    return moved * jnp.where(over, norm * jax.lax.rsqrt(jnp.where(over, square, 1.0)), 1.0)


# --- optimisers -------------------------------------------------------------------------------------------------------
@optimizer("gradient")
@optimizer("momentum")
def _plain(s: Float[Array, "*batch o i"]) -> Float[Array, "*batch o i"]:
    """S itself."""
    return s


@optimizer("muon")
def _muon(s: Float[Array, "*batch o i"]) -> Float[Array, "*batch o i"]:
    """Newton–Schulz; a rule runs it with its own steps and coefficients."""
    return orthogonalize(s)


@optimizer("exact")
def _exact(s: Float[Array, "*batch o i"]) -> Float[Array, "*batch o i"]:
    """Takes no steps."""
    raise AssertionError("the regression is solved, not stepped")


@optimizer("sign")
def _sign(s: Float[Array, "*batch o i"]) -> Float[Array, "*batch o i"]:
    """sign(S), as Lion steps; of norm 1 for each weight, so that η means what it means for Muon."""
    return jnp.sign(s) * (s.shape[-1] * s.shape[-2]) ** -0.5
