"""The aggregation rule: weights × buffer × outer optimiser, composed from small pure functions.

`model` says what can be set and holds the presets, `weights` and `buffer` decide on numbers in the log, `outer` is the
only part that touches tensors.
"""
