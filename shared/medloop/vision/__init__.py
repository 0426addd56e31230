"""Everything that touches pixels: bytes to pixels, pixels to bytes, the one preparation, and pictures for people.

No other part of MedLoop imports PIL.
"""
