"""Plan: does a training step fit on a TPU slice, and what does it cost there?

The real TPU compiler answers, without a TPU: `plan` compiles any step for any topology.
"""
