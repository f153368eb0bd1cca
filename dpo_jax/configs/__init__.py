"""The configs of the checkout; what is installed has them in this place."""

import pathlib

__path__ = [str(pathlib.Path(__file__).parents[2] / "configs")]
