"""OpenVLA-OFT (arXiv 2502.19645): OpenVLA fine-tuned to give a whole chunk of continuous actions in one forward pass.

One to three images go through OpenVLA's own encoders and projector; a token of proprioception and empty slots, one for each
number of the chunk, join the prompt; the Llama reads all of it at once, every position attending to every other; and a small
network regresses the actions from the states before the slots. Nothing is decoded token by token.

``recipe`` is what a checkpoint's user must know, as no file says it; ``parts`` the small networks, ``components`` their files,
``model`` the network, ``policy`` what acts with it, ``load`` makes one by name. All else is :mod:`spvla.vlas.openvla`'s.
"""

from spvla.vlas.openvla_oft.load import from_pretrained, load, untrained
from spvla.vlas.openvla_oft.policy import OpenVLAOFT
from spvla.vlas.openvla_oft.recipe import Recipe

__all__ = ["OpenVLAOFT", "Recipe", "from_pretrained", "load", "untrained"]
