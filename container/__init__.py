"""CONTAINER and CONTAINER-LIGHT for timm: one block, every affinity.

    Y = (alpha A(X) + beta A) V W + X

Importing this package registers the family with timm: `timm.list_models("container*")`.

Docstrings write shapes with these letters:

    B       batch size
    C       channels
    H W     height and width of a feature map, in tokens
    N       tokens of a feature map, N = H W, row-major
    M       heads: distinct N x N matrices of an affinity
    D       channels per head, D = C / M
"""

from . import weights  # importing it makes `pretrained=True` verify the files it loads
from .affinity import Affinity, DepthwiseConv, DoubleAttention, GlobalContext, SelfAttention, TokenMatrix
from .aggregation import Aggregation, Block, ConvexGate, FreeGate
from .container import Container

__version__ = "0.1.0"

__all__ = [
    "Affinity",
    "Aggregation",
    "Block",
    "Container",
    "ConvexGate",
    "DepthwiseConv",
    "DoubleAttention",
    "FreeGate",
    "GlobalContext",
    "SelfAttention",
    "TokenMatrix",
    "weights",
]
