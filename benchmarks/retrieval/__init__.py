"""The image-retrieval experiments of the TCM paper as one command: `python -m benchmarks.retrieval --help`."""
