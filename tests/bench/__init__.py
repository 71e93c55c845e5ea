"""The product's measuring instrument: ``python -m tests.bench``, or ``make bench``.

::

    subjects   what is measured: nbdmirror, an unmirrored server (the limit), a peer's mirror
    loads      what fio does to each
    report     medians, ratios of pairs, the table
    __main__   the rounds
"""
