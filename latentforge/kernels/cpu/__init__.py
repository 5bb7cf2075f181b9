"""The C++ backend: addresses of torch tensors handed to the extension."""
