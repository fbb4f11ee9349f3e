"""OpenVLA (arXiv 2406.09246), native on transformers 5: reads the published checkpoint form without remote code.

An image goes through two vision encoders (DINOv2, SigLIP); their patch features are joined on the channels, projected and
inserted after the first token of the prompt; a Llama then writes one token per action dimension, greedily. Each token is
one of 255 bins of a normalised action; a data set's statistics (q01, q99) give it its unit. With a
:class:`~spvla.pruning.TokenSelector`, only the tokens it selects are projected and read by the Llama.

``config``, ``statistics`` and ``images`` are a checkpoint's conventions, ``model`` the network, ``weights`` its tensors,
``policy`` what acts with it, ``load`` makes one by name.
"""

from spvla.vlas.openvla.load import from_pretrained, load, untrained
from spvla.vlas.openvla.policy import OpenVLA

__all__ = ["OpenVLA", "from_pretrained", "load", "untrained"]
