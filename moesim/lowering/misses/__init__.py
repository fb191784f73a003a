"""Where a layer's experts run: the device, after a load or not, or the CPU. One rule per file; `registry.py` lists them."""
