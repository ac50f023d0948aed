"""How much memory tuning and serving take, before a GPU is rented and before anything is loaded.

`shape` knows models in numbers of weights, `tuning` and `serving` the bytes of each part, `fitting` what
fits into a device. Imports neither torch nor transformers; does not know jobs or servers. Start at
`tuning.parts`.
"""
