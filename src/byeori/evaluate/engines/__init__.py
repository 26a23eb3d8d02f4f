"""The programs that generate answers, behind one interface."""
