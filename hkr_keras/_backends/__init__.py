"""The only files that compute with a backend: compiling, gradients, replicas."""
