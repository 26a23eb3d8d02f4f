"""Weights, attention, adapters, processes."""

import logging

# PEFT imports bitsandbytes where it is installed, which then warns of kernels that nothing here uses
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
