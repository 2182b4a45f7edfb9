"""Several processes as one run: joining, coordination, ending together, and arrays that are sharded over them.

With one process all of it does nothing. coordination.py imports no JAX, so that everybody can ask.
"""
