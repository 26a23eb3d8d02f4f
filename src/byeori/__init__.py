"""byeori: fine-tune open language models, and prove that it helped."""

__version__ = "0.1.0"
