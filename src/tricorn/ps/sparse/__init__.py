"""Sparse tables: what a server holds of an embedding that is trained by rows (docs/decisions/0008-sparse-tables.md)."""


def warm() -> None:
    """Import numba and load (or, the first time on a machine, compile) every kernel, so that roles forked from here
    have them: about a second, or ten seconds the first time.
    """
    from tricorn.ps.sparse.warm import warm_up

    warm_up()
