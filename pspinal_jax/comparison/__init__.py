"""Which head for this data: equal tuning, several seeds, one look at the test split; `pspinal_jax.compare`."""
