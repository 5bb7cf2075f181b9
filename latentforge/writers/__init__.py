"""Folders of trained students as models that write text, and what is asked of them."""
