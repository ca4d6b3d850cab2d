"""What a test-time memory is: frozen, validated configuration. Hashable, so a rule is a static argument under `jit`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from atlas_jax.config import ConfigError
from atlas_jax.kernels.feature_maps import monomial_count, sketch_shares
from atlas_jax.kernels.newton_schulz import COEFFICIENTS, CoefficientTable
from atlas_jax.memory import parts
from atlas_jax.typing import Array, Float

FeatureKind = Literal["identity", "polynomial", "exponential", "random_exponential", "elementwise"]
Compression = Literal["none", "sketch", "projection"]
Residual = Literal["none", "key", "features"]
Gate = Literal["eta", "alpha", "theta"]

MAX_POLYNOMIAL_DEGREE = 3
MAX_EXPONENTIAL_DEGREE = 12


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ConfigError(f"{field}: {message}")


def _choice(field: str, value: object, choices: object) -> None:
    names = get_args(choices)
    _require(value in names, field, f"must be one of {', '.join(names)}; got {value!r}")


def _positive(field: str, value: object) -> None:
    _require(isinstance(value, int) and not isinstance(value, bool) and value >= 1, field, f"must be ≥ 1, got {value}")


@dataclass(frozen=True, kw_only=True)
class Features:
    """The feature map φ on keys and queries (ATLAS section 3.1).

    Attributes:
      kind: `polynomial` is all monomials up to `degree` with learnable graded coefficients (equation 5);
        `exponential` is φ* (equation 22) cut at `degree`; `random_exponential` has `width` positive random features
        with the same kernel; `elementwise` is powers of each component, which adds no rank, for comparison.
      degree: highest power, 1 … 3 for a polynomial, 1 … 12 for an exponential or elementwise map.
      compress: squeeze monomials to `width`: `sketch` by fixed products of random signs, `projection` by a learned
        matrix.
      width: features that come out; 0 where `kind` and `compress` fix it.
      seed: of everything random that is not learned.
    """

    kind: FeatureKind = "identity"
    degree: int = 1
    compress: Compression = "none"
    width: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("features.kind", self.kind, FeatureKind)
        _choice("features.compress", self.compress, Compression)
        _positive("features.degree", self.degree)
        limit = MAX_POLYNOMIAL_DEGREE if self.kind == "polynomial" else MAX_EXPONENTIAL_DEGREE
        _require(self.degree <= limit, "features.degree", f"at most {limit} for kind {self.kind!r}, got {self.degree}")
        squeezed = self.compress != "none"
        _require(not squeezed or self.kind in ("polynomial", "exponential"), "features.compress", "only for monomials")
        if squeezed or self.kind == "random_exponential":
            _positive("features.width", self.width)
        else:
            _require(self.width == 0, "features.width", "follows from kind and degree here; leave it 0")

    @property
    def square(self) -> float:
        """|φ(x)|² of a key of unit length, with the coefficients that `init_params` gives; for random maps, its mean."""
        if self.kind in ("polynomial", "exponential"):
            return sum(1 / math.factorial(order) for order in range(self.degree + 1))
        if self.kind == "elementwise":
            return sum(1 / math.factorial(order) for order in range(1, self.degree + 1)) ** 2
        return math.e if self.kind == "random_exponential" else 1.0

    def out_dim(self, dim: int) -> int:
        """Features of a key of `dim` components."""
        if self.width:
            return self.width
        return monomial_count(dim, self.degree) if self.kind in ("polynomial", "exponential") else dim


@dataclass(frozen=True, kw_only=True)
class MemoryRule:
    """A memory, what it learns from a token, and how: everything that is not a weight or a gate.

    With γ, η, α, θ the token's gates, ℓ the objective and W̄ the anchor:

        G_t = Σ_{i in window(t)} γ_i^{(t)} ∇ℓ(W̄; k_i, v_i)
        S_t = θ_t S_{t−1} + G_t
        W_t = R(W_{t−1}, α_t, η_t U(S_t)), which is α_t W_{t−1} − η_t U(S_t) for the retention `decay`

    ℓ, σ, U, R and the architecture are names of `memory.parts`, which says what each computes and how to add one.

    Attributes:
      d_k, d_v: components of keys and queries, and of values.
      memory: `matrix` W·φ(k); `mlp` r + W1·σ(W2·φ(k)) (equation 42); `gated_mlp` r + W1·(σ(W2·φ(k)) ⊙ W3·φ(k)) (43);
        `deep_mlp` with three layers; `norm_matrix` and `norm_mlp`, TTT's, with a LayerNorm inside the loss.
      hidden: hidden units of an MLP; 0 means 4·d_v.
      activation: σ: `gelu`, `silu`, `relu`, `tanh`.
      residual: the r of a memory that is no matrix: nothing, the key (needs d_k = d_v), or its features (as many as d_v).
      features: φ.
      normalize: scale keys and queries to unit length first. The step sizes of every rule assume it.
      objective: `l2` ‖M(φ(k)) − v‖², gradient with the factor 2 of the paper's loss; `dot` −⟨M(φ(k)), v⟩; `huber(δ)`,
        `p_norm(p)` (MIRAS).
      window: tokens c of the Omega window; None, for the optimizer `exact` alone, is all of them.
      gates: `token`, one γ per token that it has in every window; `age`, c of them emitted with each token, the j-th
        for the token j places back (the paper's reading).
      chunk: tokens per anchor. All gradients are taken at the memory as it was at the last multiple of `chunk`
        tokens, so it is part of what is computed, not a speed knob. 1: always at the newest memory.
      gradient_at: `memory`, or `decayed`, the memory after its retention gate (Gated DeltaNet; chunk 1 only).
      optimizer: U. `gradient` (no S), `momentum`, `muon` (Newton–Schulz of each weight's S), `sign`, or `exact`: the ridge
        regression of all tokens so far, W = (λW₀ + Σ vφᵀ)(λI + Σ φφᵀ)⁻¹, for a matrix.
      step: η `outside`, as above (equation 32), or `inside` S_t = θ_t S_{t−1} + η_t G_t (equation 57; Titans).
      retention: R. `decay`, `none` (there is no α), `elastic_net(threshold)`, `bounded(norm)`.
      ns_steps, ns_table: Newton–Schulz iterations and their coefficients: a name, or rows of three numbers, the last of
        which is repeated where there are more iterations.
      ns_per: orthogonalise the momentum of every `token`, or once per `chunk`: then a chunk is read with the memory it
        found, and moves it when the next one begins, by the chunk's last direction times its decayed sum of steps.
      per_channel: gates that have one entry per channel: a row of a matrix memory, a hidden unit of an MLP.
      clip: bound on the Frobenius norm of each token's gradient on each weight, or None.
      ridge: λ of `exact`.
      block: tokens processed together where `chunk` has no meaning (`exact`, matrix with `dot`) or is 1. Only speed.
      remat: recompute inside chunks in the backward pass; memory grows with √T states instead of T intermediates.
    """

    d_k: int
    d_v: int
    memory: str = "matrix"
    hidden: int = 0
    activation: str = "gelu"
    residual: Residual = "none"
    features: Features = Features()
    normalize: bool = True
    objective: str = "l2"
    window: int | None = 1
    gates: Literal["token", "age"] = "token"
    chunk: int = 16
    gradient_at: Literal["memory", "decayed"] = "memory"
    optimizer: str = "gradient"
    step: Literal["outside", "inside"] = "outside"
    retention: str = "decay"
    ns_steps: int = 5
    ns_table: CoefficientTable = "jordan"
    ns_per: Literal["token", "chunk"] = "token"
    per_channel: tuple[Gate, ...] = ()
    clip: float | None = None
    ridge: float = 1e-2
    block: int = 64
    remat: bool = True

    def __post_init__(self) -> None:
        for field in ("d_k", "d_v", "chunk", "block"):
            _positive(field, getattr(self, field))
        _require(isinstance(self.features, Features), "features", "must be a Features")
        for field, choices in _CHOICES.items():
            _choice(field, getattr(self, field), choices)
        for field, kind in _PARTS.items():
            name = getattr(self, field)
            _require(isinstance(name, str), field, f"must be a name, got {name!r}")
            try:
                parts.find(kind, name)
            except ConfigError as error:
                raise ConfigError(f"{field}{str(error).removeprefix(kind)}") from error
        _check_table(self.ns_table)
        for gate in self.per_channel:
            _choice("per_channel", gate, Gate)
        _require(self.hidden >= 0, "hidden", f"must be ≥ 0, got {self.hidden}")
        _require(self.ns_steps >= 0, "ns_steps", f"must be ≥ 0, got {self.ns_steps}")
        _require(self.clip is None or self.clip > 0, "clip", f"must be positive or None, got {self.clip}")
        _require(self.ridge > 0, "ridge", f"must be positive, got {self.ridge}")
        if self.window is not None:
            _positive("window", self.window)
        self._check_parts()

    def _check_parts(self) -> None:
        matrix, exact, decays = self.memory == "matrix", self.optimizer == "exact", self.retention in ("decay", "none")
        columns = parts.find("architecture", self.memory).facts["columns"]
        _require(not matrix or self.residual == "none", "residual", "a matrix memory has none")
        _require(self.residual != "key" or self.d_k == self.d_v, "residual", "'key' needs d_k = d_v")
        fits = self.residual != "features" or self.feature_dim == self.d_v
        _require(fits, "residual", f"'features' needs d_v = {self.feature_dim} features")
        _require((self.window is None) == exact, "window", "None (all tokens) goes with optimizer 'exact', and only so")
        if exact:
            _require(matrix and self.objective == "l2", "optimizer", "'exact' needs a matrix memory and objective 'l2'")
            _require(not self.per_channel, "per_channel", "'exact' has one gate for all channels")
            _require(self.clip is None, "clip", "'exact' takes no gradients")
            _require(decays, "retention", f"'exact' has decay or none, got {self.retention!r}")
        channels = {name: shape[name in columns] for name, shape in self.weight_shapes.items()}
        _require(
            not self.per_channel or set(channels.values()) == {self.channels},
            "per_channel",
            f"each weight of {self.memory!r} needs {self.channels} channels",
        )
        late = self.gradient_at == "decayed"
        _require(not late or self.chunk == 1, "gradient_at", "'decayed' needs chunk 1")
        _require(not late or decays, "gradient_at", "'decayed' needs retention decay")
        _require(
            self.ns_per == "token" or self.directed, "ns_per", "'chunk' is for an optimizer with a direction: muon"
        )
        _require(self.ns_per == "token" or decays, "ns_per", "'chunk' needs retention decay or none")
        if self.features.compress == "sketch":
            try:
                sketch_shares(self.d_k, self.features.degree, self.features.width)
            except ValueError as error:
                raise ConfigError(f"features.width: {error}") from error

    @property
    def weight_shapes(self) -> dict[str, tuple[int, int]]:
        """Outputs and inputs of each of the memory's matrices."""
        return dict(parts.find("architecture", self.memory).facts["shapes"](self))

    def sigma(self, x: Float[Array, "*any"]) -> Float[Array, "*any"]:
        """σ, for architectures to use."""
        result: Array = parts.find("activation", self.activation).function(x)
        return result

    @property
    def directed(self) -> bool:
        """Whether U is anything but S itself: its steps have a size of their own."""
        return self.optimizer not in ("gradient", "momentum", "exact")

    @property
    def linear_retention(self) -> bool:
        """Whether R is α·W − step."""
        return self.retention in ("decay", "none")

    @property
    def feature_dim(self) -> int:
        """Features of a key."""
        return self.features.out_dim(self.d_k)

    @property
    def hidden_dim(self) -> int:
        """Hidden units of an MLP memory."""
        return self.hidden or 4 * self.d_v

    @property
    def channels(self) -> int:
        """Entries of a per-channel gate."""
        return self.hidden_dim if len(self.weight_shapes) > 1 else self.d_v

    @property
    def window_gates(self) -> int:
        """Entries of γ per token."""
        return self.reach + 1 if self.gates == "age" else 1

    @property
    def reach(self) -> int:
        """Tokens before the current one that its window holds."""
        return (self.window or 1) - 1

    @property
    def curvature(self) -> float:
        """λ: half the greatest curvature of what a chunk descends, for keys of unit length, at worst all the same.

        b tokens take as many steps at one anchor, each down a window of c: b·c·|φ|² for a matrix, times what the
        objective says of itself. An MLP that is drawn by `init_params` has σ(x) ≈ x/2 (or the slope that its activation
        names), so ¼(hidden/D + (1 + √(d_v/hidden))²) times that, of its two layers; so reckoned for other architectures.
        """
        steps = self.chunk if self.anchored and not self.sequential else 1
        loss = float(parts.find("objective", self.objective).facts["curvature"]) / 2
        matrix = steps * (self.window or 1) * self.features.square * loss
        if len(self.weight_shapes) == 1:
            return matrix
        slope = float(parts.find("activation", self.activation).facts["slope"])
        widths = self.hidden_dim / self.feature_dim + (1 + (self.d_v / self.hidden_dim) ** 0.5) ** 2
        return matrix * widths * slope**2

    @property
    def eta_max(self) -> float:
        """Greatest step η that never overshoots: η·λ = ½, for then 1 − 2ηλ of the error of a key is left, nothing.

        Past 1/λ errors grow with every chunk. Momentum takes a gradient 1/(1 − θ) times: the bound is (1 − θ) of this
        one. A step of Muon has the size of η whatever c and φ are, so b of them may take ½.
        """
        return 0.5 / (self.chunk if self.anchored else 1) if self.directed else 0.5 / self.curvature

    def uses(self, gate: str) -> bool:
        """Whether `eta`, `alpha`, `theta` or `gamma` plays a part."""
        if gate == "alpha":
            return self.retention != "none"
        if gate == "theta":
            return self.optimizer not in ("gradient", "exact")
        return gate != "eta" or self.optimizer != "exact"

    def gate_dim(self, gate: Gate) -> int:
        """Entries of η, α or θ per token."""
        return self.channels if gate in self.per_channel else 1

    @property
    def anchored(self) -> bool:
        """Whether gradients depend on where chunks begin; if not, `chunk` has no effect."""
        if self.ns_per == "chunk":
            return True
        return self.optimizer != "exact" and not (self.memory == "matrix" and self.objective == "dot")

    @property
    def sequential(self) -> bool:
        """Whether chunk 1 has a parallel form: a triangular system per block."""
        linear = self.memory == "matrix" and self.optimizer in ("gradient", "momentum")
        plain = self.window == 1 and self.clip is None and not self.per_channel and self.linear_retention
        return linear and plain and self.chunk == 1 and self.objective == "l2"


def table_from(value: Any) -> Any:
    """`ns_table` as JSON has it, as a rule has it."""
    return value if isinstance(value, str) else tuple(tuple(row) for row in value)


def _check_table(table: object) -> None:
    if isinstance(table, str):
        _require(table in COEFFICIENTS, "ns_table", f"must be one of {', '.join(COEFFICIENTS)}; got {table!r}")
        return
    rows = (
        isinstance(table, tuple) and len(table) > 0 and all(isinstance(row, tuple) and len(row) == 3 for row in table)
    )
    _require(
        rows and all(math.isfinite(number) for row in table for number in row),  # type: ignore[attr-defined]
        "ns_table",
        f"must be a name, or rows of three numbers; got {table!r}",
    )


_PARTS = {
    "memory": "architecture",
    "activation": "activation",
    "objective": "objective",
    "retention": "retention",
    "optimizer": "optimizer",
}
"""Fields of a rule that name a part, and its kind."""

_CHOICES = {
    "residual": Residual,
    "gates": Literal["token", "age"],
    "gradient_at": Literal["memory", "decayed"],
    "step": Literal["outside", "inside"],
    "ns_per": Literal["token", "chunk"],
}
