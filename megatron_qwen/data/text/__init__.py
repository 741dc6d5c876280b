"""Documents out of files: what is read, how it is unpacked, what is wrong with it."""
