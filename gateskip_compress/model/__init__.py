"""The one place that knows Hugging Face names: families list them, blocks are found by them, attention runs by them."""

from .blocks import ReadOut as ReadOut
from .blocks import Vocabulary as Vocabulary
from .blocks import blocks as blocks
from .blocks import branches as branches
from .blocks import check_copying as check_copying
from .blocks import family_of as family_of
from .blocks import features as features
from .blocks import gated_mlp as gated_mlp
from .blocks import key_value_features as key_value_features
from .blocks import linears as linears
from .blocks import projections as projections
from .blocks import read_out as read_out
from .blocks import remove_blocks as remove_blocks
from .blocks import surrogate_linears as surrogate_linears
from .blocks import vocabulary as vocabulary
from .blocks import watch as watch
from .blocks import width as width
from .family import BRANCH_KINDS as BRANCH_KINDS
from .family import FAMILIES as FAMILIES
from .family import Branch as Branch
from .family import Family as Family
from .walk import walk as walk
