"""Linux: files, sockets, clocks, the daemon. The only package that touches the real world."""
