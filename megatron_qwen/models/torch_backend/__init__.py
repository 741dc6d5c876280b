"""The modules of backend ``torch``: plain torch on a CPU or a GPU."""
