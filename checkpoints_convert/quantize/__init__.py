"""Quantized releases: from a run, a checkpoint or a directory to the formats that engines load.

Plans and writes the files, and finds the numbers of methods that look at activations: GPTQ, AWQ, SmoothQuant.
"""
