"""A tiny stand-in of SocialJax's interface: what it takes, what it answers, and when it resets by itself."""

from socialjax.registration import make

__all__ = ["make"]
__version__ = "0.0.stand-in"
