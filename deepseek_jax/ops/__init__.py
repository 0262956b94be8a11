"""Pure functions, arrays in and arrays out: the mathematics, with no weights, files or devices of its own.

Shapes are spelled with one set of letters throughout the project:

    B sequences          T new tokens        S cached tokens      D model width      V vocabulary
    N query heads        G key-value heads   K nope width of a head (or a whole GQA head)
    R rope width         H value width       Q query latent       C key-value latent
    F dense FFN width    M expert FFN width  E experts            A experts a token
    X expert groups      W routed rows       L layers             P prompts (a group has G samples)
    J indexer heads      Z indexer width     U keys chosen for a query

A name may end in its shape: `logits_BTV`. Einsums use the same letters, in lower case.
"""
