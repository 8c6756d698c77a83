"""What TCM does on classes by the hundred, characters in many typefaces: `python -m benchmarks.glyphs`."""
