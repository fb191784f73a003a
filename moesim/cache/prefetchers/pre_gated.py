"""Pre-gated MoE: each layer's gate chooses for the next one."""

from __future__ import annotations

from moesim.cache.prefetchers.oracle import OraclePrefetch


class PreGatedPrefetch(OraclePrefetch):
    """The exact experts of the next layer, which is how such a model routes (I4).

    Hwang et al., "Pre-gated MoE", arXiv 2308.12066, ISCA 2024: the gate of layer l, fine-tuned, chooses the experts of layer
    l + 1, so that their copies run beside layer l. The first layer has a gate of its own and loads on demand, as here. The
    published system fetches all of them and keeps no cache; give a `width` of at least the experts of an access. A trace of
    an ordinary model stands in for one of a pre-gated model, whose routing would differ.
    """
