"""Rows to examples: sources, template, tokenize, audit."""
