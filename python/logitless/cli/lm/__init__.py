"""A small language model on Python's standard library: what ``logitless demo`` trains.

One file an idea: `corpus` (text, byte-pair vocabulary, batches), `model` (a decoder-only
transformer whose head is a function), `heads` (the two heads that are compared), `train` (both runs
in lock-step, every phase timed), `report` (the JSON record) and `figure` (the picture).
"""
