"""One file per family: the shapes that are timed, and the programs that compute them."""
