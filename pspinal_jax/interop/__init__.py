"""The progressive head outside linen, one module per neighbour; each is imported only where it is asked for.

functional   plain ``(init, apply)`` functions, for hand-written JAX
nnx          a flax.nnx module
equinox      an Equinox module (extra `equinox`)
haiku        a Haiku module (extra `haiku`)

All of them call the linen head, so the same parameters give the same logits, gradients and statistics everywhere, and
the same key the same dropout masks.
"""
