"""Every byte layout, on disk and on the wire; pure: bytes in, values out, and back.

A module's docstring is the specification of its format.
"""
