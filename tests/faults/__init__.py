"""The real daemon under real faults, on an unmodified kernel; numbers are those of the matrix.

``FAULT_POINTS=all`` makes every sweep exhaustive, ``flushes`` cuts the power at every flush; else a
fixed choice of points is run.
"""
