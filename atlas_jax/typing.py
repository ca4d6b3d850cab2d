"""The one legend of axis letters, and the array types used in public signatures.

B rows of a batch (slots)      T tokens of a step per row     N pages of a row's ring      P tokens of a page
L layers                       E embedding size               V vocabulary                 F feed-forward size
H query heads                  K KV heads                     G = H / K query groups       D head dimension
S sink tokens                  R = 2·Z numbers of a memory key M polynomial features       C value-code dimensions
W tokens of an Omega window    A tapped layers                Z components of a state
"""

from __future__ import annotations

from jaxtyping import Array, Bool, Float, Int, Int8, Int32, UInt8, UInt16, UInt32

__all__ = ["Array", "Bool", "Float", "Int", "Int8", "Int32", "UInt8", "UInt16", "UInt32"]
