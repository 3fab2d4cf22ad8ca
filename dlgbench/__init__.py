"""dlgbench: does this gradient leak my data?"""

__version__ = "0.1.0"
