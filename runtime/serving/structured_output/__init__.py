"""Constrained answers: JSON, JSON of a schema, a regular expression, a grammar, or one of some texts.

A grammar says after each token which ones may come next; the sampler drops the others. Grammars come from
clients and can be made to take hours and gigabytes, so llguidance (extra `guided`) runs in processes of its
own, one a form, that are killed where they take too long. Start at `compiler.GrammarCompiler.compile`.
"""
