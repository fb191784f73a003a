"""moesim: where should each expert live, what should stay cached, and how fast will it be?"""

__version__ = "0.4.0"
