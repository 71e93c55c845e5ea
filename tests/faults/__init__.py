"""The real daemon under real faults, on an unmodified kernel; numbers are those of the matrix.

``FAULT_POINTS=all`` makes every sweep exhaustive; else a fixed choice of points is run.
"""
