"""Training on handwritten digits with and without TCM; `python -m benchmarks.digits`."""
