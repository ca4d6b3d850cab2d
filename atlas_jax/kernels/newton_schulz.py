"""Newton–Schulz orthogonalisation: the step of Muon, with the Gram form for tall matrices.

An odd polynomial applied to a matrix acts on its singular values alone. Five steps of a quintic take values in
[0.01, 1] close to 1 and leave singular vectors and rank as they are.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from atlas_jax.typing import Array, Float

CoefficientTable = Literal["jordan", "polar_express"]

COEFFICIENTS: dict[str, tuple[tuple[float, float, float], ...]] = {
    # Jordan et al., Muon: the same quintic every step; singular values end in [0.68, 1.13]
    "jordan": ((3.4445, -4.7750, 2.0315),) * 5,
    # Polar Express (arXiv 2505.16932): the best quintic for what each step can receive
    "polar_express": (
        (8.156554524902461, -22.48329292557795, 15.878769915207462),
        (4.042929935166739, -2.808917465908714, 0.5000178451051316),
        (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
        (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
        (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
    ),
}
