"""The command line: one module a verb, each a thin shell over a function of its stage's folder."""
