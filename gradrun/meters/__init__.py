"""Meters: each measures one thing about a run and knows nothing of the others.

clock (time), tensors (bytes of tensors), process (resident set), accelerator (device memory).
"""
