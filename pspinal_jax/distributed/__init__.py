"""Several processes as one run: joining, agreeing, ending together, and arrays that are spread over them.

With one process all of it does nothing. agree.py and options.py import no JAX, so that everybody can ask.
"""
